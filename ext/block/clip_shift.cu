// Batch norm, ReLU and the learnable shift as operators: schemas, checks and launches.
#include "block/clip_shift_backward.cuh"
#include "block/clip_shift_forward.cuh"
#include "block/geometry.h"
#include "block/operators.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(rubiks, m) {
  // x (C, P) shifted after relu(scale * x + bias), or as it is without these -> (C, P'). shift (3, C), or (2, C) where
  // each frame is shifted by itself; geometry N, T, H, W, with 8 or 16 frames; stride of H and W, 1 or 2.
  m.def("clip_shift(Tensor x, Tensor? scale, Tensor? bias, Tensor shift, int[] geometry, int stride) -> Tensor");
  // For the norm with coefficients stats (4, C): the gradient of its result (C, P), that of shift, and what
  // norm_gradients makes of the first: mix (3, C) and the gradients of the norm's weight and bias (C). grad (C, P').
  m.def(
      "clip_shift_backward(Tensor grad, Tensor x, Tensor stats, Tensor shift, int[] geometry, int stride) -> (Tensor, "
      "Tensor, Tensor, Tensor, Tensor)");
}

namespace rubiks {
namespace {

constexpr int kRows = 4;            // of a thread's strip
constexpr int64_t kMostBlocks = 32;  // of a channel, backward

// Arguments and number of threads for strips of `rows` rows of the result.
ClipShift arguments(const char* op, const Tensor& shift, int64_t c, const Geometry& source, const Geometry& result,
                    int rows) {
  STD_TORCH_CHECK(shift.dim() == 2 && (shift.size(0) == 2 || shift.size(0) == 3), op,
                  ": shift must have shape (3, C) or (2, C), got ", text(shape(shift)));
  ClipShift a = {};
  a.shift = pointer(shift);
  a.height = static_cast<int>(result.height), a.width = static_cast<int>(result.width);
  a.source_height = static_cast<int>(source.height), a.source_width = static_cast<int>(source.width);
  a.c = static_cast<int>(c), a.clips = static_cast<int>(source.clips);
  const int64_t strips = ceil_div(result.height, rows), threads = result.clips * strips * result.width;
  STD_TORCH_CHECK(threads < (int64_t{1} << 31) && c < 65536, op, ": too large");
  a.strips = static_cast<unsigned>(strips), a.threads = static_cast<unsigned>(threads);
  return a;
}

void check_stride(const char* op, int64_t stride) {
  STD_TORCH_CHECK(stride == 1 || stride == 2, op, ": stride must be 1 or 2, got ", stride);
}

}  // namespace

Tensor clip_shift(const Tensor& x, const MaybeTensor& scale, const MaybeTensor& bias, const Tensor& shift,
                  const Sizes& sizes, int64_t stride) {
  check_stride("clip_shift", stride);
  const Geometry source("clip_shift", sizes), result = source.strided("clip_shift", stride);
  const int64_t c = x.dim() ? x.size(0) : 0;
  const Checks check("clip_shift", x);
  check.units("x", x, c, source.columns());
  STD_TORCH_CHECK(scale.has_value() == bias.has_value(), "clip_shift: scale and bias must be given together");
  if (scale) check.floats("scale", *scale, {c}), check.floats("bias", *bias, {c});
  check.floats("shift", shift, {shift.dim() ? shift.size(0) : 0, c});
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = empty(x, {c, result.columns()}, ScalarType::BFloat16);
  if (x.numel() == 0) return out;
  const auto run = [&](auto frames, auto norm, auto temporal, auto step) {
    constexpr int rows = step == 1 ? kRows : 1;
    ClipShift a = arguments("clip_shift", shift, c, source, result, rows);
    a.source = pointer<Unit>(x), a.result = mutable_pointer<Unit>(out);
    a.scale = pointer(scale), a.bias = pointer(bias);
    const dim3 blocks(static_cast<unsigned>(ceil_div(a.threads, kClipThreads)), static_cast<unsigned>(c));
    launch(clip_shift_kernel<frames, norm, temporal, step, rows>, blocks, dim3(kClipThreads), 0, x, a);
  };
  using std::bool_constant;
  const auto with_stride = [&](auto frames, auto norm, auto temporal) {
    stride == 1 ? run(frames, norm, temporal, std::integral_constant<int, 1>{})
                : run(frames, norm, temporal, std::integral_constant<int, 2>{});
  };
  const auto with_rows = [&](auto frames, auto norm) {
    shift.size(0) == 3 ? with_stride(frames, norm, bool_constant<true>{})
                       : with_stride(frames, norm, bool_constant<false>{});
  };
  source.with_frames("clip_shift", [&](auto frames) {
    scale ? with_rows(frames, bool_constant<true>{}) : with_rows(frames, bool_constant<false>{});
  });
  return out;
}

std::tuple<Tensor, Tensor> clip_shift_backward(const Tensor& grad, const Tensor& x, const Tensor& stats,
                                                    const Tensor& shift, const Sizes& sizes, int64_t stride,
                                                    const NormGradients& norm) {
  check_stride("clip_shift_backward", stride);
  const Geometry result("clip_shift_backward", sizes), source = result.strided("clip_shift_backward", stride);
  const int64_t c = x.dim() ? x.size(0) : 0;
  const Checks check("clip_shift_backward", x);
  check.units("x", x, c, result.columns());
  check.units("grad", grad, c, source.columns());
  check.floats("stats", stats, {4, c});
  check.floats("shift", shift, {shift.dim() ? shift.size(0) : 0, c});
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor g = empty(x, {c, result.columns()}, ScalarType::BFloat16);
  Tensor grad_shift = empty(x, {shift.size(0), c}, ScalarType::Float);
  const bool is_temporal = shift.size(0) == 3;
  const auto run = [&](auto frames, auto temporal, auto step) {
    constexpr int rows = step == 1 ? kRows : 1;
    ClipShift a = arguments("clip_shift_backward", shift, c, source, result, rows);
    const int64_t blocks = std::min(std::max<int64_t>(ceil_div(a.threads, kClipThreads), 1), kMostBlocks);
    const Tensor sums = empty(x, {c, blocks, kShiftSums}, ScalarType::Float);
    a.source = pointer<Unit>(grad), a.x = pointer<Unit>(x), a.result = mutable_pointer<Unit>(g);
    a.scale = pointer(stats) + 2 * c, a.bias = pointer(stats) + 3 * c;
    a.sums = mutable_pointer<ShiftSums>(sums);
    launch(clip_shift_backward_kernel<frames, temporal, step, rows>,
           dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(c)), dim3(kClipThreads), 0, x, a);
    launch(clip_shift_grad_sum_kernel, dim3(static_cast<unsigned>(c)), dim3(32), 0, x, a.sums, blocks,
           mutable_pointer(grad_shift), c, is_temporal, norm);
  };
  const auto with_stride = [&](auto frames, auto temporal) {
    stride == 1 ? run(frames, temporal, std::integral_constant<int, 1>{})
                : run(frames, temporal, std::integral_constant<int, 2>{});
  };
  if (c == 0) return {g, grad_shift};
  result.with_frames("clip_shift_backward", [&](auto frames) {
    is_temporal ? with_stride(frames, std::bool_constant<true>{}) : with_stride(frames, std::bool_constant<false>{});
  });
  return {g, grad_shift};
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> clip_shift_backward_op(const Tensor& grad, const Tensor& x,
                                                                          const Tensor& stats, const Tensor& shift,
                                                                          Sizes sizes, int64_t stride) {
  const int64_t c = x.dim() ? x.size(0) : 0;
  Tensor mix = empty(x, {3, c}, ScalarType::Float), weight = empty(x, {c}, ScalarType::Float),
         bias = empty(x, {c}, ScalarType::Float);
  const NormGradients norm = {static_cast<double>(x.dim() == 2 ? x.size(1) : 0), pointer(stats), mutable_pointer(mix),
                            mutable_pointer(weight), mutable_pointer(bias)};
  const auto [g, grad_shift] = clip_shift_backward(grad, x, stats, shift, sizes, stride, norm);
  return {g, grad_shift, mix, weight, bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rubiks, CUDA, m) {
  m.impl("clip_shift", TORCH_BOX(&clip_shift));
  m.impl("clip_shift_backward", TORCH_BOX(&clip_shift_backward_op));
}

}  // namespace rubiks
