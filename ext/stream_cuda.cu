// Passes over channel-major matrices that memory bounds, on NVIDIA GPUs: checks the arguments, chooses the width of
// accesses and launches the kernels of stream_cuda.cuh, and registers the operators.
#include "fused_cuda.h"
#include "matrix_cuda.h"
#include "stream_cuda.cuh"

STABLE_TORCH_LIBRARY_FRAGMENT(rubiks, m) {
  // relu(scale * x + bias) mixed with the frames before and after: x (C, P), scale, bias (C), weights (C, 3), geometry
  // N, T, H, W -> (C, P).
  m.def("norm_mix(Tensor x, Tensor scale, Tensor bias, Tensor weights, int[] geometry) -> Tensor");
  // g (C, P), 0 where the ReLU was closed; the gradient of weights (C, 3); row sums of g and of g * x (parts, 2, C), to
  // be added. gm, x (C, P).
  m.def(
      "norm_mix_backward(Tensor gm, Tensor x, Tensor scale, Tensor bias, Tensor weights, int[] geometry) -> (Tensor, "
      "Tensor, Tensor)");
  // The windows (28, P) of a 3x3 convolution with stride 2 and padding 1, and a row of zeros. images (B, 3, H, W).
  m.def("stem_columns(Tensor images) -> Tensor");
  // The columns (C, P') at rows and columns 0, stride, 2 * stride, ... of every frame. x (C, P).
  m.def("every(Tensor x, int[] geometry, int stride) -> Tensor");
  // Adds part (C, P') to these columns of g (C, P).
  m.def("add_every_(Tensor(a!) g, Tensor part, int[] geometry, int stride) -> ()");
}

namespace rubiks {
namespace {

constexpr int64_t kStemRows = 28;  // as rubiks/ops/fused.py

using bfloat16 = __nv_bfloat16;

struct Geometry {
  int64_t clips, frames, height, width;

  Geometry(const char* op, const Sizes& sizes) {
    STD_TORCH_CHECK(sizes.size() == 4 && std::all_of(sizes.begin(), sizes.end(), [](int64_t s) { return s >= 0; }), op,
                    ": geometry must be N, T, H, W, got ", text(sizes));
    clips = sizes[0], frames = sizes[1], height = sizes[2], width = sizes[3];
  }

  int64_t columns() const { return clips * frames * height * width; }

  Geometry strided(const char* op, int64_t stride) const {
    STD_TORCH_CHECK(stride >= 1, op, ": stride must be at least 1, got ", stride);
    Geometry result = *this;
    result.height = ceil_div(height, stride), result.width = ceil_div(width, stride);
    return result;
  }
};

// Whether t, in rows of `length`, can be read `count` elements at a time.
bool aligned(int count, int64_t length, const Tensor& t) {
  const auto address = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  return length % count == 0 && address % (count * t.element_size()) == 0;
}

// Of blocks with `threads` for each channel in all.
dim3 grid(const char* op, int64_t threads, int64_t channels) {
  constexpr int64_t most = (int64_t{1} << 31) - kThreads;  // threads are counted in 32 bits
  STD_TORCH_CHECK(threads <= most && channels < 65536, op, ": too large, it takes ", threads, " threads for each of ",
                  channels, " channels; at most ", most, " and 65535");
  return dim3(static_cast<unsigned>(ceil_div(threads, kThreads)), static_cast<unsigned>(channels));
}

// Calls f with a constant, the first of `widths` that `takes` allows, or 1.
template <int... widths, typename Takes, typename F>
void with_width(const Takes& takes, const F& f) {
  const bool found = ((takes(widths) && (f(std::integral_constant<int, widths>{}), true)) || ...);
  if (!found) f(std::integral_constant<int, 1>{});
}

// ---- norm_mix and its backward

Mix mix(const char* op, const Tensor& x, const Tensor& scale, const Tensor& bias, const Tensor& weights,
        const Geometry& geometry) {
  const int64_t c = x.dim() ? x.size(0) : 0;
  const Checks check(op, x);
  check.bfloat16("x", x, c, geometry.columns());
  check.floats("scale", scale, {c});
  check.floats("bias", bias, {c});
  check.floats("weights", weights, {c, 3});
  Mix a = {};
  a.x = pointer<bfloat16>(x);
  a.scale = pointer(scale), a.bias = pointer(bias), a.weights = pointer(weights);
  a.p = geometry.columns(), a.frame = geometry.height * geometry.width, a.frames = static_cast<int>(geometry.frames);
  return a;
}

// Blocks for strips of a width.
dim3 grid(const char* op, Mix& a, int wide, int64_t channels) {
  const int64_t strips = a.p / a.frames / wide;
  const dim3 blocks = grid(op, strips, channels);
  a.strips = static_cast<unsigned>(strips);
  return blocks;
}

}  // namespace

Tensor norm_mix_cuda(const Tensor& x, const Tensor& scale, const Tensor& bias, const Tensor& weights,
                     Sizes sizes) {
  const Geometry geometry("norm_mix", sizes);
  Mix a = mix("norm_mix", x, scale, bias, weights, geometry);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = empty(x, {x.size(0), x.size(1)}, ScalarType::BFloat16);
  if (x.numel() == 0) return out;
  a.result = static_cast<bfloat16*>(out.mutable_data_ptr());
  const auto takes = [&](int wide) { return aligned(wide, a.frame, x); };
  with_width<8, 4>(takes, [&](auto wide) {
    const dim3 blocks = grid("norm_mix", a, wide, x.size(0));
    launch(norm_mix_kernel<wide>, blocks, dim3(kThreads), 0, x, a);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> norm_mix_backward_cuda(const Tensor& gm, const Tensor& x, const Tensor& scale,
                                                          const Tensor& bias, const Tensor& weights,
                                                          Sizes sizes) {
  const Geometry geometry("norm_mix_backward", sizes);
  Mix a = mix("norm_mix_backward", x, scale, bias, weights, geometry);
  const int64_t c = x.size(0);
  Checks("norm_mix_backward", x).bfloat16("gm", gm, c, a.p);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor g = empty(x, {c, a.p}, ScalarType::BFloat16);
  if (x.numel() == 0) {
    return {g, torch::stable::new_zeros(weights, {c, 3}), torch::stable::new_zeros(weights, {1, 2, c})};
  }
  a.grad = pointer<bfloat16>(gm);
  a.result = static_cast<bfloat16*>(g.mutable_data_ptr());
  Tensor grad_weights = empty(weights, {c, 3}, ScalarType::Float), sums = grad_weights;
  const auto takes = [&](int wide) { return aligned(wide, a.frame, x) && aligned(wide, a.frame, gm); };
  with_width<8, 4>(takes, [&](auto wide) {
    const dim3 blocks = grid("norm_mix_backward", a, wide, c);
    sums = empty(weights, {blocks.x, 2, c}, ScalarType::Float);
    const Tensor parts = empty(weights, {c, 3, blocks.x}, ScalarType::Float);
    a.sums = mutable_pointer(sums), a.grad_weights = mutable_pointer(parts);
    launch(norm_mix_backward_kernel<wide>, blocks, dim3(kThreads), 0, x, a);
    launch(sum_parts_kernel, dim3(static_cast<unsigned>(3 * c)), dim3(32), 0, x, pointer(parts),
           mutable_pointer(grad_weights), blocks.x);
  });
  return {g, grad_weights, sums};
}

// ---- stem_columns

Tensor stem_columns_cuda(const Tensor& images) {
  const auto type = images.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Float,
                  "stem_columns: images must be bfloat16 or float32, got ", type);
  STD_TORCH_CHECK(images.dim() == 4 && images.size(1) == 3, "stem_columns: images must have shape (B, 3, H, W), got ",
                  text(shape(images)));
  STD_TORCH_CHECK(images.is_contiguous(), "stem_columns: images must be contiguous");
  const int64_t height = images.size(2), width = images.size(3);
  const int64_t p = images.size(0) * ceil_div(height, 2) * ceil_div(width, 2);
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  Tensor columns = empty(images, {kStemRows, p}, ScalarType::BFloat16);
  if (p == 0) return columns;
  const auto run = [&](auto wide, auto element) {
    using scalar = decltype(element);
    launch(stem_columns_kernel<scalar, wide>, grid("stem_columns", p / wide, 3), dim3(kThreads), 0, images,
           pointer<scalar>(images), static_cast<bfloat16*>(columns.mutable_data_ptr()), height, width, p / wide);
  };
  with_width<8>([&](int wide) { return width % (2 * wide) == 0 && aligned(16 / images.element_size(), width, images); },
                [&](auto wide) { type == ScalarType::Float ? run(wide, float{}) : run(wide, bfloat16{}); });
  return columns;
}

// ---- every and add_every_

// Launches f(arguments, width, blocks) with the widest accesses that both matrices take.
template <typename F>
void launch_every(const char* op, const Geometry& large, const Geometry& small, int64_t stride, const Tensor& large_x,
                  const Tensor& small_x, const F& f) {
  if (large_x.numel() == 0) return;
  const auto narrow = [](int64_t n) { return static_cast<unsigned>(n); };
  const int64_t frames = large.clips * large.frames, small_frame = small.height * small.width;
  const auto takes = [&](int wide) {
    return stride == 2 && aligned(2 * wide, large.width, large_x) && aligned(wide, small.width, small_x);
  };
  with_width<4, 2>(takes, [&](auto wide) {
    const int64_t threads = ceil_div(frames, kEveryFrames) * (small_frame / wide);
    const dim3 blocks = grid(op, threads, large_x.size(0));
    f(Every{large.height * large.width, large.width, stride, narrow(small_frame), narrow(small.width), narrow(frames),
            narrow(threads)},
      wide, blocks);
  });
}

Tensor every_cuda(const Tensor& x, Sizes sizes, int64_t stride) {
  const Geometry large("every", sizes), small = large.strided("every", stride);
  Checks("every", x).bfloat16("x", x, x.dim() ? x.size(0) : 0, large.columns());
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = empty(x, {x.size(0), small.columns()}, ScalarType::BFloat16);
  launch_every("every", large, small, stride, x, out, [&](const Every& a, auto wide, dim3 blocks) {
    launch(every_kernel<wide>, blocks, dim3(kThreads), 0, x, a, pointer<bfloat16>(x),
           static_cast<bfloat16*>(out.mutable_data_ptr()));
  });
  return out;
}

void add_every_cuda(const Tensor& g, const Tensor& part, Sizes sizes, int64_t stride) {
  const Geometry large("add_every_", sizes), small = large.strided("add_every_", stride);
  const int64_t c = g.dim() ? g.size(0) : 0;
  const Checks check("add_every_", g);
  check.bfloat16("g", g, c, large.columns());
  check.bfloat16("part", part, c, small.columns());
  const torch::stable::accelerator::DeviceGuard guard(g.get_device_index());
  launch_every("add_every_", large, small, stride, g, part, [&](const Every& a, auto wide, dim3 blocks) {
    launch(add_every_kernel<wide>, blocks, dim3(kThreads), 0, g, a, static_cast<bfloat16*>(g.mutable_data_ptr()),
           pointer<bfloat16>(part));
  });
}

STABLE_TORCH_LIBRARY_IMPL(rubiks, CUDA, m) {
  m.impl("norm_mix", TORCH_BOX(&norm_mix_cuda));
  m.impl("norm_mix_backward", TORCH_BOX(&norm_mix_backward_cuda));
  m.impl("stem_columns", TORCH_BOX(&stem_columns_cuda));
  m.impl("every", TORCH_BOX(&every_cuda));
  m.impl("add_every_", TORCH_BOX(&add_every_cuda));
}

}  // namespace rubiks
