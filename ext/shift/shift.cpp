// Schemas of the operator, the checks of its arguments and the layout of its results.
#include "shift/shift.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>

STABLE_TORCH_LIBRARY(rubiks, m) {
  // x (N, T, C, H, W), shift (3, C) rows T, H, W or (2, C) rows H, W, stride and padding of T, H, W.
  m.def("shift(Tensor x, Tensor shift, int[] stride, int[] padding, bool quantize) -> Tensor");
  // Gradients of x and of shift; one that is not needed comes back empty.
  m.def(
      "shift_backward(Tensor grad, Tensor x, Tensor shift, int[] stride, int[] padding, bool quantize, "
      "bool need_x, bool need_shift) -> (Tensor, Tensor)");
}

namespace rubiks {
namespace {

Axis axis(const Tensor& x, int64_t dim, int64_t stride, int64_t padding) {
  STD_TORCH_CHECK(stride >= 1, "shift: stride must be at least 1, got ", stride);
  STD_TORCH_CHECK(padding >= 0, "shift: padding must be at least 0, got ", padding);
  const int64_t length = x.size(dim);
  STD_TORCH_CHECK(length >= 1, "shift: x must not be empty but for N, got shape ", text(shape(x)));
  // Positions along one axis fit 32 bits, with room for the sums that the kernels form; offsets in memory take 64.
  constexpr int64_t limit = int64_t{1} << 28;
  STD_TORCH_CHECK(length <= limit && padding <= limit, "shift: lengths and padding must be at most 2^28, got ", length,
                  " and ", padding);
  // Beyond the padded length a stride makes no difference.
  return {length, (length + 2 * padding - 1) / stride + 1, std::min(stride, length + 2 * padding), padding};
}

}  // namespace

Problem problem(const Tensor& x, const Tensor& shift, const std::vector<int64_t>& stride,
                const std::vector<int64_t>& padding, bool quantize) {
  STD_TORCH_CHECK(x.dim() == 5, "shift: x must be (N, T, C, H, W), got shape ", text(shape(x)));
  const auto type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::Half ||
                      type == ScalarType::BFloat16,
                  "shift: x must be float64, float32, float16 or bfloat16");
  STD_TORCH_CHECK(shift.scalar_type() == (type == ScalarType::Double ? type : ScalarType::Float),
                  "shift: shift must be float64 for float64 x and float32 otherwise");
  STD_TORCH_CHECK(shift.dim() == 2 && (shift.size(0) == 2 || shift.size(0) == 3) && shift.size(1) == x.size(2),
                  "shift: shift must have shape (3, C) or (2, C) with C = ", x.size(2), ", got ", text(shape(shift)));
  STD_TORCH_CHECK(x.device() == shift.device(), "shift: x and shift must be on one device");
  STD_TORCH_CHECK(stride.size() == 3 && padding.size() == 3, "shift: stride and padding must have 3 entries");
  const bool temporal = shift.size(0) == 3;
  STD_TORCH_CHECK(temporal || (stride[0] == 1 && padding[0] == 0),
                  "shift: time that is not shifted takes stride 1 and padding 0");
  const Axis t = temporal ? axis(x, 1, stride[0], padding[0]) : Axis{x.size(1), x.size(1), 1, 0};
  STD_TORCH_CHECK(x.size(2) >= 1, "shift: x must not be empty but for N, got shape ", text(shape(x)));
  return {x.size(0), x.size(2), t, axis(x, 3, stride[1], padding[1]), axis(x, 4, stride[2], padding[2]), temporal,
          quantize};
}

void check_grad(const Problem& p, const Tensor& grad, const Tensor& x) {
  STD_TORCH_CHECK(grad.dim() == 5 && grad.size(0) == p.n && grad.size(1) == p.t.out_length && grad.size(2) == p.c &&
                      grad.size(3) == p.h.out_length && grad.size(4) == p.w.out_length,
                  "shift_backward: grad must have the shape of the output, got ", text(shape(grad)));
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() && grad.device() == x.device(),
                  "shift_backward: grad must have the dtype and device of x");
}

Tensor empty_volume(const Tensor& x, int64_t t, int64_t h, int64_t w) {
  const int64_t n = x.size(0), c = x.size(2), plane = h * w;
  const bool channel_major = x.stride(2) > x.stride(1) && x.stride(2) >= x.stride(0);
  const int64_t sizes[] = {n, t, c, h, w};
  const int64_t contiguous[] = {t * c * plane, c * plane, plane, w, 1};
  const int64_t channels_first[] = {t * plane, plane, n * t * plane, w, 1};
  int32_t dtype = 0, device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(5, sizes, channel_major ? channels_first : contiguous, dtype, device,
                                                  x.get_device_index(), &result));
  return Tensor(result);
}

}  // namespace rubiks
