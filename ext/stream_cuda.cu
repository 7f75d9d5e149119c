// Passes over channel-major matrices that memory bounds, on NVIDIA GPUs: checks the arguments and launches the kernels of
// stream_cuda.cuh, and registers the operators.
#include "fused_cuda.h"
#include "geometry.h"
#include "stream_cuda.cuh"

STABLE_TORCH_LIBRARY_FRAGMENT(rubiks, m) {
  // Columns are pixels of clips of 8 or 16 frames, geometry N, T, H, W, in the order N, H, W, T.
  // Of m, relu(scale * x + bias) mixed with the frames before and after: g (C, P), 0 where the ReLU was closed; the
  // gradient of weights (C, 3); row sums of g and of g * x (parts, 2, C), to be added. gm, x (C, P), scale, bias (C).
  m.def(
      "mix_backward(Tensor gm, Tensor x, Tensor scale, Tensor bias, Tensor weights, int[] geometry) -> (Tensor, "
      "Tensor, Tensor)");
  // The windows (28, P) of a 3x3 convolution with stride 2 and padding 1, and a row of zeros. images (N*T, 3, H, W).
  m.def("stem_columns(Tensor images, int frames) -> Tensor");
  // The columns (C, P') at rows and columns 0, stride, 2 * stride, ... of every frame. x (C, P).
  m.def("every(Tensor x, int[] geometry, int stride) -> Tensor");
  // Adds part (C, P') to these columns of g (C, P).
  m.def("add_every_(Tensor(a!) g, Tensor part, int[] geometry, int stride) -> ()");
}

namespace rubiks {
namespace {

constexpr int64_t kStemRows = 28;    // as rubiks/ops/fused.py
constexpr int64_t kMostBlocks = 32;  // of a channel of mix_backward

using bfloat16 = __nv_bfloat16;

// Of blocks with a thread for each pixel of a channel.
dim3 grid(const char* op, int64_t pixels, int64_t channels) {
  constexpr int64_t most = (int64_t{1} << 31) - kThreads;  // threads are counted in 32 bits
  STD_TORCH_CHECK(pixels <= most && channels < 65536, op, ": too large, it has ", pixels, " pixels in each of ",
                  channels, " channels; at most ", most, " and 65535");
  return dim3(static_cast<unsigned>(ceil_div(pixels, kThreads)), static_cast<unsigned>(channels));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> mix_backward_cuda(const Tensor& gm, const Tensor& x, const Tensor& scale,
                                                     const Tensor& bias, const Tensor& weights, Sizes sizes) {
  const Geometry geometry("mix_backward", sizes);
  const int64_t c = x.dim() ? x.size(0) : 0;
  const Checks check("mix_backward", x);
  check.pixels("x", x, c, geometry.columns());
  check.pixels("gm", gm, c, geometry.columns());
  check.floats("scale", scale, {c});
  check.floats("bias", bias, {c});
  check.floats("weights", weights, {c, 3});
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor g = empty(x, {c, geometry.columns()}, ScalarType::BFloat16);
  if (x.numel() == 0) {
    return {g, torch::stable::new_zeros(weights, {c, 3}), torch::stable::new_zeros(weights, {1, 2, c})};
  }
  const int64_t pixels = geometry.columns() / geometry.frames;
  dim3 blocks = grid("mix_backward", pixels, c);
  blocks.x = std::min<unsigned>(blocks.x, kMostBlocks);
  Tensor grad_weights = empty(weights, {c, 3}, ScalarType::Float);
  const Tensor sums = empty(weights, {blocks.x, 2, c}, ScalarType::Float);
  const Tensor parts = empty(weights, {c, 3, blocks.x}, ScalarType::Float);
  const MixBackward a = {pointer<Unit>(x), pointer<Unit>(gm), pointer(scale), pointer(bias), pointer(weights),
                         static_cast<Unit*>(g.mutable_data_ptr()), mutable_pointer(sums), mutable_pointer(parts),
                         static_cast<unsigned>(pixels)};
  geometry.with_frames("mix_backward", [&](auto frames) {
    launch(mix_backward_kernel<frames>, blocks, dim3(kThreads), 0, x, a);
  });
  launch(sum_parts_kernel, dim3(static_cast<unsigned>(3 * c)), dim3(32), 0, x, pointer(parts),
         mutable_pointer(grad_weights), blocks.x);
  return {g, grad_weights, sums};
}

Tensor stem_columns_cuda(const Tensor& images, int64_t frames) {
  const auto type = images.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Float,
                  "stem_columns: images must be bfloat16 or float32, got ", type);
  STD_TORCH_CHECK(images.dim() == 4 && images.size(1) == 3 && frames > 0 && images.size(0) % frames == 0,
                  "stem_columns: images must have shape (N * ", frames, ", 3, H, W), got ", text(shape(images)));
  STD_TORCH_CHECK(images.is_contiguous(), "stem_columns: images must be contiguous");
  const int64_t height = images.size(2), width = images.size(3);
  const Geometry geometry("stem_columns",
                          {images.size(0) / frames, frames, ceil_div(height, 2), ceil_div(width, 2)});
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  Tensor columns = empty(images, {kStemRows, geometry.columns()}, ScalarType::BFloat16);
  if (columns.numel() == 0) return columns;
  const int64_t pixels = geometry.columns() / frames;
  geometry.with_frames("stem_columns", [&](auto count) {
    const auto run = [&](auto element) {
      using scalar = decltype(element);
      launch(stem_columns_kernel<scalar, count>, grid("stem_columns", pixels, 3), dim3(kThreads), 0, images,
             pointer<scalar>(images), static_cast<Unit*>(columns.mutable_data_ptr()), height, width, geometry.height,
             geometry.width, pixels);
    };
    type == ScalarType::Float ? run(float{}) : run(bfloat16{});
  });
  return columns;
}

namespace {

// Calls f with the arguments, the number of frames and the blocks.
template <typename F>
void with_every(const char* op, const Sizes& sizes, int64_t stride, const Tensor& large_x, const F& f) {
  const Geometry large(op, sizes), small = large.strided(op, stride);
  if (large_x.numel() == 0) return;
  const auto narrow = [](int64_t n) { return static_cast<int>(n); };
  const int64_t pixels = small.columns() / large.frames, large_pixels = large.columns() / large.frames;
  const dim3 blocks = grid(op, pixels, large_x.size(0));
  grid(op, large_pixels, large_x.size(0));  // checks
  const Every a = {narrow(large.height), narrow(large.width), narrow(small.height), narrow(small.width),
                   narrow(stride), static_cast<unsigned>(pixels), static_cast<unsigned>(large_pixels)};
  large.with_frames(op, [&](auto frames) { f(a, frames, blocks); });
}

}  // namespace

Tensor every_cuda(const Tensor& x, Sizes sizes, int64_t stride) {
  const Geometry large("every", sizes), small = large.strided("every", stride);
  Checks("every", x).pixels("x", x, x.dim() ? x.size(0) : 0, large.columns());
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = empty(x, {x.size(0), small.columns()}, ScalarType::BFloat16);
  with_every("every", sizes, stride, x, [&](const Every& a, auto frames, dim3 blocks) {
    launch(every_kernel<frames>, blocks, dim3(kThreads), 0, x, a, pointer<Unit>(x),
           static_cast<Unit*>(out.mutable_data_ptr()));
  });
  return out;
}

void add_every_cuda(const Tensor& g, const Tensor& part, Sizes sizes, int64_t stride) {
  const Geometry large("add_every_", sizes), small = large.strided("add_every_", stride);
  const int64_t c = g.dim() ? g.size(0) : 0;
  const Checks check("add_every_", g);
  check.pixels("g", g, c, large.columns());
  check.pixels("part", part, c, small.columns());
  const torch::stable::accelerator::DeviceGuard guard(g.get_device_index());
  with_every("add_every_", sizes, stride, g, [&](const Every& a, auto frames, dim3 blocks) {
    launch(add_every_kernel<frames>, blocks, dim3(kThreads), 0, g, a, static_cast<Unit*>(g.mutable_data_ptr()),
           pointer<Unit>(part));
  });
}

STABLE_TORCH_LIBRARY_IMPL(rubiks, CUDA, m) {
  m.impl("mix_backward", TORCH_BOX(&mix_backward_cuda));
  m.impl("stem_columns", TORCH_BOX(&stem_columns_cuda));
  m.impl("every", TORCH_BOX(&every_cuda));
  m.impl("add_every_", TORCH_BOX(&add_every_cuda));
}

}  // namespace rubiks
