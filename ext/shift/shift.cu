// The learnable shift on NVIDIA GPUs as operators: arguments, the choice of a kernel, and launches.
#include "shift/small_planes.cuh"
#include "shift/small_planes_plan.h"
#include "shift/tile_plan.h"

#include <torch/csrc/stable/accelerator.h>

namespace rubiks {
namespace {

Strides strides(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.stride(4)}; }

Volume volume(const Tensor& x) {
  Volume v = {x.const_data_ptr(), nullptr, nullptr, strides(x)};
  int64_t last = 0;  // strides of PyTorch's tensors are not negative
  for (int64_t d = 0; d < x.dim(); ++d) last += (x.size(d) - 1) * x.stride(d);
  v.begin = static_cast<const char*>(v.data);
  v.end = v.begin + (last + 1) * static_cast<int64_t>(x.element_size());
  return v;
}

Arguments arguments(const Problem& p, const Tensor& shift, bool backward) {
  Arguments a = {};
  a.shift = shift.const_data_ptr();
  a.shift_row = shift.stride(0), a.shift_column = shift.stride(1);
  a.n = static_cast<int>(p.n), a.c = static_cast<int>(p.c);
  const auto line = [&](const Axis& axis) {
    const int length = static_cast<int>(axis.length), out = static_cast<int>(axis.out_length);
    const int stride = static_cast<int>(axis.stride), padding = static_cast<int>(axis.padding);
    const int far = static_cast<int>(reach(axis));
    return backward ? Line{out, length, 1, stride, padding, far} : Line{length, out, stride, 1, padding, far};
  };
  a.t = line(p.t), a.h = line(p.h), a.w = line(p.w);
  a.temporal = p.temporal, a.quantize = p.quantize;
  return a;
}

// Frames of a clip whose time is not shifted are walked over in runs of up to 8, so that there are blocks enough.
void split_frames(Arguments& a) {
  if (a.temporal || a.n != 1) return;
  int length = std::min(a.t.source, 8);
  while (a.t.source % length) --length;
  a.n = a.t.source / length;
  a.t.source = a.t.result = length;
  for (Strides* s : {&a.source.strides, &a.x.strides, &a.result_strides}) s->n = length * s->t;
}

template <typename scalar, typename real, bool backward, int tall, int wide, int step>
void run(const Arguments& a, const Tensor& x) {
  const int64_t blocks = int64_t{a.plan.groups} * a.c * a.plan.row_tiles * a.plan.col_tiles;
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "shift: x is too large, it takes ", blocks, " blocks");
  launch(shift_kernel<scalar, real, backward, tall, wide, step>, dim3(static_cast<unsigned>(blocks)),
         dim3(a.plan.threads), kStages * a.plan.stage_bytes, x, a);
}

template <typename scalar, bool backward>
void run(const Arguments& a, const Pack& p, const Tensor& x) {
  const dim3 blocks((p.clips ? a.n : a.c) / p.planes, p.clips ? a.c : a.n);
  const int bytes = p.bytes * (backward && a.need_shift ? 2 : 1) + kZeros;
  launch(shift_small_planes_kernel<scalar, backward>, blocks, dim3(32), bytes, x, a, p);
}

// Shifts by the kernel for small planes where there is a pack of them, and otherwise by the other one.
template <typename scalar, typename real, bool backward>
void choose(const Arguments& a, const Pack& p, const Tensor& x) {
  if constexpr (sizeof(real) == 4) {
    if (p.planes) return run<scalar, backward>(a, p, x);
  }
  if constexpr (!backward) {
    if (a.plan.step == 2) return run<scalar, real, backward, 4, 1, 2>(a, x);
  }
  if constexpr (sizeof(scalar) == 2) {
    if (a.plan.wide == 2) return run<scalar, real, backward, 4, 2, 1>(a, x);
  }
  run<scalar, real, backward, 8, 1, 1>(a, x);
}

template <bool backward>
void dispatch(const Arguments& a, const Pack& p, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return choose<double, double, backward>(a, p, x);
    case ScalarType::Float:
      return choose<float, float, backward>(a, p, x);
    case ScalarType::Half:
      return choose<__half, float, backward>(a, p, x);
    default:
      return choose<__nv_bfloat16, float, backward>(a, p, x);
  }
}

Tensor shift_cuda(const Tensor& x, const Tensor& shift, std::vector<int64_t> stride, std::vector<int64_t> padding,
                  bool quantize) {
  const Problem p = problem(x, shift, stride, padding, quantize);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = empty_volume(x, p.t.out_length, p.h.out_length, p.w.out_length);
  if (out.numel() == 0) return out;
  Arguments a = arguments(p, shift, false);
  a.source = volume(x);
  a.result = out.mutable_data_ptr(), a.result_strides = strides(out);
  split_frames(a);
  const int size = static_cast<int>(x.element_size());
  a.plan = plan_tiles(a, size);
  dispatch<false>(a, plan_pack(a, false, size), x);
  return out;
}

std::tuple<Tensor, Tensor> shift_backward_cuda(const Tensor& grad, const Tensor& x, const Tensor& shift,
                                               std::vector<int64_t> stride, std::vector<int64_t> padding, bool quantize,
                                               bool need_x, bool need_shift) {
  const Problem p = problem(x, shift, stride, padding, quantize);
  check_grad(p, grad, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const auto none = torch::stable::new_empty(shift, {0});
  Tensor grad_x = need_x ? empty_volume(x, x.size(1), x.size(3), x.size(4)) : torch::stable::new_empty(x, {0});
  if (x.numel() == 0 || !(need_x || need_shift)) {
    return {grad_x, need_shift ? torch::stable::new_zeros(shift, {shift.size(0), p.c}) : none};
  }
  Arguments a = arguments(p, shift, true);
  a.need_x = need_x, a.need_shift = need_shift;
  a.source = volume(grad);
  a.x = volume(x);
  if (need_x) a.result = grad_x.mutable_data_ptr(), a.result_strides = strides(grad_x);
  split_frames(a);
  const int size = static_cast<int>(x.element_size());
  a.plan = plan_tiles(a, size);
  const Pack planes = plan_pack(a, true, size);
  const int64_t slots = planes.planes ? a.n : int64_t{a.plan.groups} * a.plan.row_tiles * a.plan.col_tiles;
  const Tensor sums = torch::stable::new_empty(shift, {need_shift ? p.c * slots : 0, 3});
  a.sums = sums.mutable_data_ptr();
  dispatch<true>(a, planes, x);
  if (!need_shift) return {grad_x, none};
  Tensor grad_shift = torch::stable::new_empty(shift, {shift.size(0), p.c});
  const auto add = [&](auto real) {
    launch(shift_grad_sum_kernel<decltype(real)>, dim3(static_cast<unsigned>(p.c)), dim3(32), 0, x,
           sums.const_data_ptr(), grad_shift.mutable_data_ptr(), a.c, slots, a.temporal);
  };
  shift.scalar_type() == ScalarType::Double ? add(double{}) : add(float{});
  return {grad_x, grad_shift};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rubiks, CUDA, m) {
  m.impl("shift", TORCH_BOX(&shift_cuda));
  m.impl("shift_backward", TORCH_BOX(&shift_backward_cuda));
}

}  // namespace rubiks
