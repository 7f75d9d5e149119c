// The windows of the stem's 3x3 convolution as columns of a matrix, as an operator.
#include "block/geometry.h"
#include "block/pixels.cuh"
#include "common/dependent_launch.cuh"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(rubiks, m) {
  // The windows (28, P) of a 3x3 convolution with stride 2 and padding 1, and a row of zeros. images (N*T, 3, H, W), 8
  // or 16 frames of a clip; columns are in the order N, H, W, T.
  m.def("stem_columns(Tensor images, int frames) -> Tensor");
}

namespace rubiks {
namespace {

constexpr int64_t kStemRows = 28;  // as in rubiks/ops/fused/stem.py
constexpr unsigned kThreads = 128;  // of a block

__device__ inline bfloat16 to_bfloat16(bfloat16 v) { return v; }
__device__ inline bfloat16 to_bfloat16(float v) { return __float2bfloat16_rn(v); }

// images (N, T, 3, height, width) -> columns (28, N * rows * cols pixels), windows of rows and cols of every second
// pixel. A thread makes the 9 rows of its colour for one pixel.
template <typename scalar, int frames>
__global__ void __launch_bounds__(kThreads)
    stem_columns_kernel(const scalar* images, Unit* columns, int height, int width, int rows, int cols,
                        unsigned pixels) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  wait_for_previous_kernel();
  const unsigned pixel = blockIdx.x * kThreads + threadIdx.x;
  if (pixel >= pixels) return;
  const PixelPlace at(pixel, rows, cols);
  const int col = at.column, row = at.row;
  const int64_t image = static_cast<int64_t>(height) * width;
  images += (static_cast<int64_t>(at.clip) * frames * 3 + blockIdx.y) * image;
#pragma unroll
  for (int k = 0; k < 9; ++k) {
    const int y = row * 2 + k / 3 - 1, x = col * 2 + k % 3 - 1;
    const bool inside = y >= 0 && y < height && x >= 0 && x < width;
    const scalar* from = images + static_cast<int64_t>(y) * width + x;
    __nv_bfloat162 pairs[frames / 2];
#pragma unroll
    for (int t = 0; t < frames; t += 2) {
      scalar first = scalar(0.0f), second = scalar(0.0f);
      if (inside) first = from[t * 3 * image], second = from[(t + 1) * 3 * image];
      pairs[t / 2] = {to_bfloat16(first), to_bfloat16(second)};
    }
    reinterpret_cast<const Pixel<frames>&>(pairs).store(columns, (blockIdx.y * 9 + k) * int64_t{pixels} + pixel);
  }
  if (blockIdx.y == 2) Pixel<frames>{}.store(columns, 27 * int64_t{pixels} + pixel);  // the last row is zeros
#endif
}

}  // namespace

Tensor stem_columns(const Tensor& images, int64_t frames) {
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
  STD_TORCH_CHECK(pixels < (int64_t{1} << 31) - kThreads, "stem_columns: too large, it has ", pixels, " pixels");
  const dim3 blocks(static_cast<unsigned>(ceil_div(pixels, kThreads)), 3);
  geometry.with_frames("stem_columns", [&](auto count) {
    const auto run = [&](auto element) {
      using scalar = decltype(element);
      launch(stem_columns_kernel<scalar, count>, blocks, dim3(kThreads), 0, images,
             pointer<scalar>(images), mutable_pointer<Unit>(columns), height, width, geometry.height,
             geometry.width, pixels);
    };
    type == ScalarType::Float ? run(float{}) : run(bfloat16{});
  });
  return columns;
}

STABLE_TORCH_LIBRARY_IMPL(rubiks, CUDA, m) { m.impl("stem_columns", TORCH_BOX(&stem_columns)); }

}  // namespace rubiks
