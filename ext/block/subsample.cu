// The pixels that a strided convolution reads, as an operator.
#include "block/operators.h"
#include "block/strided_pixels.cuh"
#include "common/dependent_launch.cuh"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(rubiks, m) {
  // The columns (C, P') at rows and columns 0, stride, 2 * stride, ... of every frame. x (C, P); columns are pixels of
  // clips of 8 or 16 frames, geometry N, T, H, W, in the order N, H, W, T.
  m.def("every(Tensor x, int[] geometry, int stride) -> Tensor");
}

namespace rubiks {
namespace {

constexpr unsigned kThreads = 128;  // of a block

// blockIdx.y is the channel; a thread moves all frames of a pixel. x (C, P) -> out (C, P').
template <int frames>
__global__ void __launch_bounds__(kThreads) subsample_kernel(const StridedPixels grid, const Unit* x, Unit* out) {
  wait_for_previous_kernel();
  const unsigned pixel = blockIdx.x * kThreads + threadIdx.x;
  if (pixel >= grid.strided_pixels) return;
  const PixelPlace at(pixel, grid.strided_height, grid.strided_width);
  const int64_t from = int64_t{blockIdx.y} * grid.pixels + grid.from_strided(at);
  Pixel<frames>::load(x, from, true).store(out, int64_t{blockIdx.y} * grid.strided_pixels + pixel);
}

}  // namespace

Tensor subsample(const Tensor& x, const Sizes& sizes, int64_t stride) {
  const Geometry geometry("every", sizes);
  const StridedPixels grid("every", geometry, stride);
  const int64_t c = x.dim() ? x.size(0) : 0;
  Checks("every", x).units("x", x, c, geometry.columns());
  STD_TORCH_CHECK(c < 65536, "every: x must have at most 65535 rows, got ", c);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor out = empty(x, {c, grid.strided_pixels * geometry.frames}, ScalarType::BFloat16);
  if (x.numel() == 0) return out;
  const dim3 blocks(static_cast<unsigned>(ceil_div(grid.strided_pixels, kThreads)), static_cast<unsigned>(c));
  geometry.with_frames("every", [&](auto frames) {
    launch(subsample_kernel<frames>, blocks, dim3(kThreads), 0, x, grid, pointer<Unit>(x), mutable_pointer<Unit>(out));
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(rubiks, CUDA, m) { m.impl("every", TORCH_BOX(&subsample)); }

}  // namespace rubiks
