// What the launchers of the matrix kernels share: checks of arguments and what they ask of PyTorch and the GPU.
#pragma once

#include "common/launch.h"
#include "common/tensor_cores.cuh"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace rubiks {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

inline std::string text(const Sizes& sizes) {
  std::string list = "(";
  for (const int64_t size : sizes) list += (list.size() > 1 ? ", " : "") + std::to_string(size);
  return list + ")";
}

inline Sizes shape(const Tensor& t) {
  Sizes sizes;
  for (int64_t d = 0; d < t.dim(); ++d) sizes.push_back(t.size(d));
  return sizes;
}

// A block makes some thirty tensors and views in a step: these are several times faster than calls through PyTorch's
// dispatcher.

inline Sizes contiguous(const Sizes& sizes) {
  Sizes strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  return strides;
}

// A new contiguous tensor on the device of `like`.
inline Tensor empty(const Tensor& like, const Sizes& sizes, ScalarType type) {
  const int32_t dtype = type == ScalarType::Float      ? aoti_torch_dtype_float32()
                        : type == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                       : aoti_torch_dtype_float16();
  const Sizes strides = contiguous(sizes);
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  dtype, aoti_torch_device_type_cuda(), like.get_device_index(),
                                                  &result));
  return Tensor(result);
}

// A view that starts `offset` elements after the first of t.
inline Tensor view(const Tensor& t, const Sizes& sizes, const Sizes& strides, int64_t offset = 0) {
  int64_t start = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &start));
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(sizes.size()), sizes.data(),
                                                        strides.data(), start + offset, &result));
  return Tensor(result);
}

// The checks of one operator's arguments. All are on the device of `first`.
class Checks {
 public:
  Checks(const char* op, const Tensor& first) : op_(op), first_(first) {}

  // (rows, columns) of 16-bit elements that can be read 16 bytes at a time.
  void matrix(const char* name, const Tensor& t) const {
    const auto type = t.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, op_, ": ", name,
                    " must be bfloat16 or float16, got ", type);
    STD_TORCH_CHECK(type == first_.scalar_type(), op_, ": ", name, " must be ", first_.scalar_type(),
                    ", the type of g, got ", type);
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) >= 1, op_, ": ", name,
                    " must have shape (rows, P) with a row or more, got ", text(shape(t)));
    STD_TORCH_CHECK(t.size(0) <= kMaxRows, op_, ": ", name, " must have at most ", kMaxRows, " rows, got ", t.size(0));
    STD_TORCH_CHECK(t.size(1) % kUnitElements == 0, op_, ": P must be a multiple of ", kUnitElements, ", got ",
                    t.size(1));
    STD_TORCH_CHECK(t.is_contiguous(), op_, ": ", name, " must be contiguous");
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % sizeof(Unit) == 0, op_, ": ", name,
                    " must start at a multiple of ", sizeof(Unit), " bytes");
    device(name, t);
  }

  // (rows, columns) of bfloat16.
  void bfloat16(const char* name, const Tensor& t, int64_t rows, int64_t columns) const {
    const auto type = t.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::BFloat16, op_, ": ", name, " must be bfloat16, got ", type);
    STD_TORCH_CHECK(shape(t) == Sizes({rows, columns}), op_, ": ", name, " must have shape ", text({rows, columns}),
                    ", got ", text(shape(t)));
    STD_TORCH_CHECK(t.is_contiguous(), op_, ": ", name, " must be contiguous");
    device(name, t);
  }

  // The same, read 16 bytes at a time.
  void pixels(const char* name, const Tensor& t, int64_t rows, int64_t columns) const {
    bfloat16(name, t, rows, columns);
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % sizeof(Unit) == 0, op_, ": ", name,
                    " must start at a multiple of ", sizeof(Unit), " bytes");
  }

  void floats(const char* name, const Tensor& t, const Sizes& sizes) const {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, op_, ": ", name, " must be float32, got ", t.scalar_type());
    STD_TORCH_CHECK(shape(t) == sizes, op_, ": ", name, " must have shape ", text(sizes), ", got ", text(shape(t)));
    STD_TORCH_CHECK(t.is_contiguous(), op_, ": ", name, " must be contiguous");
    device(name, t);
  }

  void same_shape(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(shape(t) == shape(first_), op_, ": ", name, " must have the shape of g, ", text(shape(first_)),
                    ", got ", text(shape(t)));
  }

  // (2, C) or (parts, 2, C); returns the number of parts.
  int64_t sums(const Tensor& t, int64_t count) const {
    const int64_t d = t.dim();
    STD_TORCH_CHECK((d == 2 || d == 3) && t.size(d - 2) == 2 && t.size(d - 1) <= kMaxRows, op_,
                    ": sums must have shape (2, C) or (parts, 2, C), got ", text(shape(t)));
    floats("sums", t, shape(t));
    STD_TORCH_CHECK(count >= 1, op_, ": count must be at least 1, got ", count);
    return d == 3 ? t.size(0) : 1;
  }

 private:
  static constexpr int64_t kMaxRows = int64_t{1} << 28;  // so that small multiples of a row's number fit 32 bits

  void device(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(t.device() == first_.device(), op_, ": ", name, " must be on the device of the first argument");
  }

  const char* op_;
  const Tensor& first_;
};

// Lets a kernel have all shared memory that a block may have on the device of x.
template <auto kernel>
void allow_shared_memory(const Tensor& x) {
  static thread_local int device = -1;
  if (device == x.get_device_index()) return;
  const int most = attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(x);
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  device = x.get_device_index();
}

template <typename T = float>
const T* pointer(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T = float>
const T* pointer(const std::optional<Tensor>& t) {
  return t ? pointer<T>(*t) : nullptr;
}

template <typename T = float>
T* mutable_pointer(const std::optional<Tensor>& t) {
  return t ? static_cast<T*>(t->mutable_data_ptr()) : nullptr;
}

// Calls f with a value of the element type.
template <typename F>
void with_type(const Tensor& x, const F& f) {
  x.scalar_type() == ScalarType::Half ? f(__half{}) : f(__nv_bfloat16{});
}

}  // namespace
}  // namespace rubiks
