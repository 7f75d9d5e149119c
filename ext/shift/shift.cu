// The learnable shift on NVIDIA GPUs: plans the tiles of a launch, launches, and registers the operator.
#include "common/launch.h"
#include "shift/small_planes.cuh"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <cstring>

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

int64_t window_length(const Line& a, int64_t results) {
  return std::min<int64_t>(a.source, (results - 1) * a.stride / a.dilation + 2);
}

// Copies of rows x cols elements of a volume whose planes are `width` wide.
Copy copies(const Volume& v, int64_t rows, int64_t cols, int64_t width, bool all, int64_t items, int size) {
  // A run may start anywhere in a unit of 16 bytes, but at the same distance for every clip.
  const bool planes = all && v.strides.w == 1 && v.strides.h == width && (items == 1 || v.strides.n * size % 16 == 0);
  const int64_t bytes = planes ? ceil_div(rows * width * size + 30, 16) * 16 : rows * cols * size;
  return {planes, static_cast<int>(bytes / size), 1, 0};
}

// Whether threads can make pairs of pixels and write them at once.
bool pairs(const Arguments& a) {
  const Strides &s = a.result_strides, &x = a.x.strides;
  const bool even = (s.n | s.t | s.c | s.h) % 2 == 0;
  const bool x_even = (x.n | x.t | x.c | x.h) % 2 == 0 && reinterpret_cast<uintptr_t>(a.x.data) % 4 == 0;
  return even && x_even && a.w.result % 2 == 0;
}

// The largest tiles that a block's threads, each with a patch of tall x wide pixels, and its shared memory take.
Plan plan(const Arguments& a, int size) {
  const bool strided = a.h.stride > 1 || a.w.stride > 1;
  const int wide = size == 2 && !strided && pairs(a) ? 2 : 1, tall = (strided ? 4 : 8) / wide;
  // Parts of equal size, at most `part`.
  const auto even = [](int64_t total, int64_t part) { return ceil_div(total, ceil_div(total, part)); };
  int64_t cols = std::min<int64_t>(a.w.result, kThreads * wide);
  int64_t rows = std::min<int64_t>(a.h.result, kThreads / ceil_div(cols, wide) * tall), items = a.n;
  Plan p = {};
  p.tall = tall, p.wide = wide, p.step = strided ? 2 : 1;
  for (;;) {
    cols = even(a.w.result, cols), rows = even(a.h.result, rows);
    if (cols < a.w.result) cols = ceil_div(cols, wide) * wide;
    if (rows < a.h.result && rows > tall) rows = ceil_div(rows, tall) * tall;
    const int64_t patches = ceil_div(rows, tall) * ceil_div(cols, wide);
    items = rows < a.h.result || cols < a.w.result
                ? 1
                : even(a.n, std::min(items, std::max<int64_t>(kThreads / patches, 1)));
    p.threads = static_cast<int>(ceil_div(items * patches, 32) * 32);
    const bool all = cols == a.w.result;
    p.source = copies(a.source, window_length(a.h, rows), window_length(a.w, cols), a.w.source, all, items, size);
    int64_t bytes = kHead + ceil_div(items * p.source.item_pitch * size, 16) * 16;
    if (a.need_shift) {
      p.x = copies(a.x, rows, cols, a.w.result, all, items, size);
      p.x_offset = static_cast<int>(bytes - kHead);
      bytes += ceil_div(items * p.x.item_pitch * size, 16) * 16;
    }
    if (p.threads <= kThreads && kStages * bytes <= kSharedBytes) {
      p.stage_bytes = static_cast<int>(bytes);
      break;
    }
    int64_t& largest = items > 1 ? items : rows > 1 ? rows : cols;
    largest = ceil_div(largest, 2);
  }
  p.items = static_cast<int>(items), p.rows = static_cast<int>(rows), p.cols = static_cast<int>(cols);
  p.source.lanes = p.x.lanes = p.threads / p.items;
  p.row_tiles = static_cast<int>(ceil_div(a.h.result, rows));
  p.col_tiles = static_cast<int>(ceil_div(a.w.result, cols));
  // Setting up a tile costs as much as several frames of it, so a block goes on with the same tile of further clips.
  const int64_t sets = ceil_div(a.n, items), blocks = sets * a.c * p.row_tiles * p.col_tiles;
  const int64_t runs = std::min(std::min<int64_t>(sets, kRuns), std::max<int64_t>(blocks / kBlocks, 1));
  p.runs = a.n % items ? 1 : static_cast<int>(runs);
  p.groups = static_cast<int>(ceil_div(sets, p.runs));
  const auto span = [&](const Volume& v, int64_t frames, int64_t elements) {
    return ((p.runs * items - 1) * v.strides.n + (frames - 1) * v.strides.t + elements) * size + 15;
  };
  p.source.span = span(a.source, a.t.source, window_length(a.h, rows) * a.w.source);
  p.x.span = span(a.x, a.t.result, rows * a.w.result);
  return p;
}

// The pack of planes that a warp makes; without planes where shift_kernel has to serve.
Pack pack(const Arguments& a, bool backward, int size) {
  Pack p = {};
  for (const Line* l : {&a.t, &a.h, &a.w}) {
    if (l->source != l->result || l->stride > 1 || l->dilation > 1) return p;
  }
  const int64_t t = a.t.source, plane = int64_t{a.h.source} * a.w.source;
  p.lanes = static_cast<int>(std::min<int64_t>(ceil_div(a.h.source, kTall) * (a.w.source / kWide), 33));
  const Strides& s = a.source.strides;
  const auto suits = [&](const void* data, const Strides& v) {  // laid out as the source, in whole units
    return std::memcmp(&v, &s, sizeof(Strides)) == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  };
  if (size > 4 || a.w.source % kWide || p.lanes > 32 || s.w != 1 || s.h != a.w.source) return p;
  if (!suits(a.source.data, s) || (a.x.data && !suits(a.x.data, a.x.strides))) return p;
  if (a.result && !suits(a.result, a.result_strides)) return p;
  p.clips = s.t == plane && s.n == t * plane;
  if (!p.clips && s.c != plane) return p;
  const int64_t others = p.clips ? s.c : (s.t | s.n), piece = (p.clips ? t : 1) * plane * size;
  const int items = p.clips ? a.n : a.c, rest = p.clips ? a.c : a.n;
  int planes = 32 / p.lanes;
  while (planes && (items % planes || planes * piece % 16)) --planes;
  if (others * size % 16 || planes * p.lanes < 16 || rest > 65535) return p;
  p.runs = p.clips ? 1 : a.t.source;
  const int64_t head = p.clips ? ceil_div((t - 1) * plane * size + kZeros, 16) * 16 : kZeros;
  const int64_t bytes = head + planes * piece;
  if (bytes * (p.clips ? 1 : t) * (backward && a.need_shift ? 2 : 1) + kZeros > kSharedBytes) return p;
  p.run_bytes = static_cast<int>(planes * piece), p.data = static_cast<int>(head);
  p.plane = static_cast<int>(piece), p.frame = static_cast<int>(p.clips ? plane * size : bytes);
  p.bytes = static_cast<int>(bytes * (p.clips ? 1 : t));
  p.planes = planes;
  return p;
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
  launch(planes_kernel<scalar, backward>, blocks, dim3(32), bytes, x, a, p);
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
  a.plan = plan(a, size);
  dispatch<false>(a, pack(a, false, size), x);
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
  a.plan = plan(a, size);
  const Pack planes = pack(a, true, size);
  const int64_t slots = planes.planes ? a.n : int64_t{a.plan.groups} * a.plan.row_tiles * a.plan.col_tiles;
  const Tensor sums = torch::stable::new_empty(shift, {need_shift ? p.c * slots : 0, 3});
  a.sums = sums.mutable_data_ptr();
  dispatch<true>(a, planes, x);
  if (!need_shift) return {grad_x, none};
  Tensor grad_shift = torch::stable::new_empty(shift, {shift.size(0), p.c});
  const auto add = [&](auto real) {
    launch(sum_kernel<decltype(real)>, dim3(static_cast<unsigned>(p.c)), dim3(32), 0, x, sums.const_data_ptr(),
           grad_shift.mutable_data_ptr(), a.c, slots, a.temporal);
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
