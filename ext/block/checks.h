// Checks of the arguments of the fused block's operators.
#pragma once

#include "common/bfloat16.cuh"
#include "common/tensors.h"

namespace rubiks {

constexpr int64_t kMaxRows = int64_t{1} << 28;  // of a matrix, so that small multiples of a row's number fit 32 bits

// The kernels take clips of 8 or 16 frames.
inline void check_frames(const char* op, int64_t frames, int64_t columns) {
  STD_TORCH_CHECK((frames == 8 || frames == 16) && columns % frames == 0, op,
                  ": columns must be pixels of clips of 8 or 16 frames, got ", frames, " frames and P = ", columns);
}

// The checks of one operator's arguments. All must be on the device of `first`.
class Checks {
 public:
  Checks(const char* op, const Tensor& first) : op_(op), first_(first) {}

  // (rows, columns) of bfloat16.
  void matrix(const char* name, const Tensor& t, int64_t rows, int64_t columns) const {
    tensor(name, t, ScalarType::BFloat16, {rows, columns});
  }

  // (rows, columns) of bfloat16 that is read 16 bytes at a time.
  void units(const char* name, const Tensor& t, int64_t rows, int64_t columns) const {
    matrix(name, t, rows, columns);
    aligned(name, t, sizeof(Unit));
  }

  void floats(const char* name, const Tensor& t, const Sizes& sizes) const {
    tensor(name, t, ScalarType::Float, sizes);
  }

  void aligned(const char* name, const Tensor& t, int64_t bytes) const {
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % bytes == 0, op_, ": ", name,
                    " must start at a multiple of ", bytes, " bytes");
  }

  // Weights of the previous, the same and the next frame for each of `rows` rows.
  void attention(const Tensor& t, int64_t rows, int64_t frames, int64_t columns) const {
    floats("attention", t, {rows, 3});
    check_frames(op_, frames, columns);
  }

  // (2, C), or (parts, 2, C), over `count` columns; returns the number of parts.
  int64_t sums(const Tensor& t, int64_t count) const {
    const int64_t d = t.dim();
    STD_TORCH_CHECK((d == 2 || d == 3) && t.size(d - 2) == 2 && t.size(d - 1) <= kMaxRows, op_,
                    ": sums must have shape (2, C) or (parts, 2, C), got ", text(shape(t)));
    floats("sums", t, shape(t));
    STD_TORCH_CHECK(count >= 1, op_, ": count must be at least 1, got ", count);
    return d == 3 ? t.size(0) : 1;
  }

 private:
  void tensor(const char* name, const Tensor& t, ScalarType type, const Sizes& sizes) const {
    STD_TORCH_CHECK(t.scalar_type() == type, op_, ": ", name, " must be ",
                    type == ScalarType::Float ? "float32" : "bfloat16", ", got ", t.scalar_type());
    STD_TORCH_CHECK(shape(t) == sizes, op_, ": ", name, " must have shape ", text(sizes), ", got ", text(shape(t)));
    STD_TORCH_CHECK(t.is_contiguous(), op_, ": ", name, " must be contiguous");
    STD_TORCH_CHECK(t.device() == first_.device(), op_, ": ", name, " must be on the device of the first argument");
  }

  const char* op_;
  const Tensor& first_;
};

}  // namespace rubiks
