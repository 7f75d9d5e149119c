// Passes over channel-major matrices of bfloat16 on NVIDIA GPUs, as fast as memory, columns in the order N, H, W, T: the
// backward of batch norm, ReLU and the mix of neighbouring frames; the windows of the stem; every second pixel.
// stream_cuda.cu launches them.
//
// blockIdx.y is the channel. A thread has all frames of a pixel. Arithmetic is in float32.
#pragma once

#include "pixels.cuh"

#include <cstdint>

namespace rubiks {
namespace {

constexpr unsigned kThreads = 128;  // of a block

struct MixBackward {
  const Unit *x, *grad;       // (C, pixels); grad: upstream
  const float *scale, *bias;  // (C)
  const float* weights;       // (C, 3), of the previous, the same and the next frame
  Unit* result;               // (C, pixels)
  float* sums;                // (blocks of a channel, 2, C): of the result and of its product with x
  float* grad_weights;        // (C, 3, blocks of a channel): parts of the gradient of weights
  unsigned pixels;            // of a channel
};

// With value = relu(scale * x + bias): frame t of the upstream gradient meets the values of frames t - 1, t and t + 1,
// so the value of frame t meets the gradients of frames t + 1, t and t - 1.
template <int frames>
__global__ void __launch_bounds__(kThreads) mix_backward_kernel(const MixBackward a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  wait_for_kernel_before();
  constexpr int kRows = 5;  // of sums: 2 of the result, 3 of the gradient of weights
  const unsigned c = blockIdx.y, channels = gridDim.y;
  const float scale = a.scale[c], bias = a.bias[c];
  const float back = a.weights[3 * c], stay = a.weights[3 * c + 1], ahead = a.weights[3 * c + 2];
  float sums[kRows] = {};
  const int64_t first = static_cast<int64_t>(c) * a.pixels;
#pragma unroll 2
  for (unsigned pixel = blockIdx.x * kThreads + threadIdx.x; pixel < a.pixels; pixel += gridDim.x * kThreads) {
    float g[frames], x[frames], result[frames];
    const auto of_g = Pixel<frames>::load(a.grad, first + pixel, true);
    const auto of_x = Pixel<frames>::load(a.x, first + pixel, true);
    of_g.unpack_to(g), of_x.unpack_to(x);
#pragma unroll
    for (int t = 0; t < frames; ++t) {
      const float value = rectified(fmaf(scale, x[t], bias));
      const float before = t > 0 ? g[t - 1] : 0, after = t + 1 < frames ? g[t + 1] : 0;
      result[t] = value == 0 ? 0 : fmaf(back, after, fmaf(ahead, before, stay * g[t]));
      sums[0] += result[t];
      sums[1] = fmaf(result[t], x[t], sums[1]);
      sums[2] = fmaf(after, value, sums[2]);
      sums[3] = fmaf(g[t], value, sums[3]);
      sums[4] = fmaf(before, value, sums[4]);
    }
    Pixel<frames>::rounded(result).store(a.result, first + pixel);
  }

  __shared__ float parts[kThreads / 32][kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const float part = warp_sum(sums[i]);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32][i] = part;
  }
  __syncthreads();
  const unsigned row = threadIdx.x;
  if (row >= kRows) return;
  float sum = 0;
#pragma unroll
  for (const auto& part : parts) sum += part[row];
  if (row < 2) {
    a.sums[(blockIdx.x * 2 + row) * channels + c] = sum;
  } else {
    a.grad_weights[static_cast<int64_t>(3 * c + row - 2) * gridDim.x + blockIdx.x] = sum;
  }
#endif
}

// A warp for each row adds its parts in a fixed order. parts (rows, count), sums (rows).
__global__ void sum_parts_kernel(const float* parts, float* sums, int count) {
  wait_for_kernel_before();
  parts += static_cast<int64_t>(blockIdx.x) * count;
  float sum = 0;
  for (int i = threadIdx.x; i < count; i += 32) sum += parts[i];
  sum = warp_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

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

// The place of pixel `index` of (C, N, rows, cols) in (C, N, height, width), of which it takes every stride-th.
struct Every {
  int height, width, rows, cols, stride;
  unsigned pixels, large_pixels;  // of a channel

  __device__ int64_t large(unsigned index) const {
    const unsigned col = index % cols, row = index / cols % rows, clip = index / cols / rows;
    return static_cast<int64_t>(blockIdx.y) * large_pixels + (clip * height + row * stride) * width + col * stride;
  }
  __device__ int64_t small(unsigned index) const { return static_cast<int64_t>(blockIdx.y) * pixels + index; }
};

// x (C, P) -> out (C, P').
template <int frames>
__global__ void __launch_bounds__(kThreads) every_kernel(const Every a, const Unit* x, Unit* out) {
  wait_for_kernel_before();
  const unsigned index = blockIdx.x * kThreads + threadIdx.x;
  if (index < a.pixels) Pixel<frames>::load(x, a.large(index), true).store(out, a.small(index));
}

// g (C, P) += part (C, P').
template <int frames>
__global__ void __launch_bounds__(kThreads) add_every_kernel(const Every a, Unit* g, const Unit* part) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  wait_for_kernel_before();
  const unsigned index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= a.pixels) return;
  const int64_t to = a.large(index);
  float sum[frames], term[frames];
  Pixel<frames>::load(g, to, true).unpack_to(sum);
  Pixel<frames>::load(part, a.small(index), true).unpack_to(term);
#pragma unroll
  for (int t = 0; t < frames; ++t) sum[t] += term[t];
  Pixel<frames>::rounded(sum).store(g, to);
#endif
}

}  // namespace
}  // namespace rubiks
