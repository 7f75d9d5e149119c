// Passes over channel-major matrices of bfloat16 on NVIDIA GPUs, as fast as memory, columns in the order N, H, W, T: the
// windows of the stem, and every second pixel. block/stem.cu launches them.
//
// blockIdx.y is the channel. A thread has all frames of a pixel.
#pragma once

#include "block/pixels.cuh"

#include <cstdint>

namespace rubiks {
namespace {

constexpr unsigned kThreads = 128;  // of a block

__device__ inline __nv_bfloat16 to_bfloat16(__nv_bfloat16 v) { return v; }
__device__ inline __nv_bfloat16 to_bfloat16(float v) { return __float2bfloat16_rn(v); }

// images (N, T, 3, height, width) -> columns (28, N * rows * cols pixels), windows of rows and cols of every second
// pixel. A thread makes the 9 rows of its colour for one pixel.
template <typename scalar, int frames>
__global__ void __launch_bounds__(kThreads)
    stem_columns_kernel(const scalar* images, Unit* columns, int height, int width, int rows, int cols,
                        unsigned pixels) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  wait_for_kernel_before();
  const unsigned pixel = blockIdx.x * kThreads + threadIdx.x;
  if (pixel >= pixels) return;
  const int col = pixel % cols, row = pixel / cols % rows;
  const int64_t image = static_cast<int64_t>(height) * width;
  images += (static_cast<int64_t>(pixel / cols / rows) * frames * 3 + blockIdx.y) * image;
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

struct Every {
  int height, width, rows, cols, stride;  // of x, and of the result
  unsigned x_pixels, pixels;              // of a channel
};

// x (C, P) -> out (C, P').
template <int frames>
__global__ void __launch_bounds__(kThreads) every_kernel(const Every a, const Unit* x, Unit* out) {
  wait_for_kernel_before();
  const unsigned pixel = blockIdx.x * kThreads + threadIdx.x;
  if (pixel >= a.pixels) return;
  const unsigned col = pixel % a.cols, row = pixel / a.cols % a.rows, clip = pixel / a.cols / a.rows;
  const int64_t from = int64_t{blockIdx.y} * a.x_pixels + (clip * a.height + row * a.stride) * a.width + col * a.stride;
  Pixel<frames>::load(x, from, true).store(out, int64_t{blockIdx.y} * a.pixels + pixel);
}

}  // namespace
}  // namespace rubiks
