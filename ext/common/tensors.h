// Tensors, without PyTorch's dispatcher: a block makes some thirty tensors and views in a step, and these functions are
// several times faster than calls through it.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace rubiks {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

inline Sizes shape(const Tensor& t) {
  Sizes sizes;
  for (int64_t d = 0; d < t.dim(); ++d) sizes.push_back(t.size(d));
  return sizes;
}

// As Python prints a tuple: "(2, 3)".
inline std::string text(const Sizes& sizes) {
  std::string list = "(";
  for (const int64_t size : sizes) list += (list.size() > 1 ? ", " : "") + std::to_string(size);
  return list + ")";
}

inline Sizes contiguous_strides(const Sizes& sizes) {
  Sizes strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  return strides;
}

// A new contiguous tensor, float32 or bfloat16, on the GPU of `like`.
inline Tensor empty(const Tensor& like, const Sizes& sizes, ScalarType type) {
  const int32_t dtype = type == ScalarType::Float ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16();
  const Sizes strides = contiguous_strides(sizes);
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

template <typename T = float>
const T* pointer(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T = float>
const T* pointer(const MaybeTensor& t) {
  return t ? pointer<T>(*t) : nullptr;
}

template <typename T = float>
T* mutable_pointer(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <typename T = float>
T* mutable_pointer(const MaybeTensor& t) {
  return t ? mutable_pointer<T>(*t) : nullptr;
}

}  // namespace rubiks
