// Squeeze-excite (Hu et al., CVPR 2018) of channel-major matrices on NVIDIA GPUs, but for its two small products: a gate
// for each channel and frame, sigmoid(logit). Columns are in the order N, H, W, T. block/squeeze_excite.cu launches the kernels.
//
// A block has one clip of one channel, blockIdx.x = c * N + n, and its threads take the pixels in turn. Means, logits and
// gradients of either are (C, N, T), float32.
#pragma once

#include "block/pixels.cuh"

#include <cstdint>

namespace rubiks {
namespace {

constexpr unsigned kSqueezeThreads = 128;

// The sums over the threads of a block, in the first `frames` of them.
template <int frames>
__device__ inline float block_sum(const float (&sums)[frames]) {
  __shared__ float parts[kSqueezeThreads / 32][frames];
#pragma unroll
  for (int t = 0; t < frames; ++t) {
    const float part = warp_sum(sums[t]);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32][t] = part;
  }
  __syncthreads();
  float sum = 0;
  if (threadIdx.x >= frames) return sum;
#pragma unroll
  for (const auto& part : parts) sum += part[threadIdx.x];
  return sum;
}

template <int frames>
__device__ inline void load_gates(float (&gates)[frames], const float* logits) {
#pragma unroll
  for (int t = 0; t < frames; ++t) gates[t] = 1 / (1 + __expf(-logits[blockIdx.x * int64_t{frames} + t]));
}

// The mean of each frame.
template <int frames>
__global__ void __launch_bounds__(kSqueezeThreads) squeeze_kernel(const Unit* x, float* means, unsigned pixels) {
  wait_for_kernel_before();
  float sums[frames] = {};
#pragma unroll 4
  for (unsigned i = threadIdx.x; i < pixels; i += kSqueezeThreads) {
    float values[frames];
    Pixel<frames>::load(x, int64_t{blockIdx.x} * pixels + i, true).unpack_to(values);
#pragma unroll
    for (int t = 0; t < frames; ++t) sums[t] += values[t];
  }
  const float sum = block_sum(sums);
  if (threadIdx.x < frames) means[blockIdx.x * int64_t{frames} + threadIdx.x] = sum / pixels;
}

// out = x * gate + add / pixels, where there is an add (C, N, T). x may be out.
template <int frames>
__global__ void __launch_bounds__(kSqueezeThreads)
    excite_kernel(const Unit* x, const float* logits, const float* add, Unit* out, unsigned pixels) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  wait_for_kernel_before();
  float gates[frames], adds[frames] = {};
  load_gates(gates, logits);
#pragma unroll
  for (int t = 0; t < frames; ++t) {
    if (add != nullptr) adds[t] = add[blockIdx.x * int64_t{frames} + t] / pixels;
  }
#pragma unroll 2
  for (unsigned i = threadIdx.x; i < pixels; i += kSqueezeThreads) {
    float values[frames];
    Pixel<frames>::load(x, int64_t{blockIdx.x} * pixels + i, true).unpack_to(values);
#pragma unroll
    for (int t = 0; t < frames; ++t) values[t] = fmaf(values[t], gates[t], adds[t]);
    Pixel<frames>::rounded(values).store(out, int64_t{blockIdx.x} * pixels + i);
  }
#endif
}

// From the gradient g of the result: that of the logits. And x * gate again, `out`.
template <int frames>
__global__ void __launch_bounds__(kSqueezeThreads)
    excite_backward_kernel(const Unit* g, const Unit* x, const float* logits, Unit* out, float* grad_logits,
                           unsigned pixels) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  wait_for_kernel_before();
  float gates[frames], sums[frames] = {};
  load_gates(gates, logits);
#pragma unroll 2
  for (unsigned i = threadIdx.x; i < pixels; i += kSqueezeThreads) {
    float values[frames], of_g[frames];
    Pixel<frames>::load(x, int64_t{blockIdx.x} * pixels + i, true).unpack_to(values);
    Pixel<frames>::load(g, int64_t{blockIdx.x} * pixels + i, true).unpack_to(of_g);
#pragma unroll
    for (int t = 0; t < frames; ++t) {
      sums[t] = fmaf(of_g[t], values[t], sums[t]);
      values[t] *= gates[t];
    }
    Pixel<frames>::rounded(values).store(out, int64_t{blockIdx.x} * pixels + i);
  }
  const float sum = block_sum(sums);
  if (threadIdx.x >= frames) return;
  const int64_t at = blockIdx.x * int64_t{frames} + threadIdx.x;
  const float gate = 1 / (1 + __expf(-logits[at]));
  grad_logits[at] = sum * gate * (1 - gate);
#endif
}

// values, and 0 where the ReLU that gave `of` is closed; NaN stays.
__global__ void close_kernel(float* values, const float* of, int64_t count) {
  wait_for_kernel_before();
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i < count && of[i] <= 0) values[i] = 0;
}

}  // namespace
}  // namespace rubiks
