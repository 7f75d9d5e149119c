// Batch norm of channel-major matrices (C, P) on NVIDIA GPUs: from row sums to coefficients, and the gradient of the
// input. What uses the coefficients is in the matrix products and the shift.
#pragma once

#include "block/attention.cuh"
#include "block/norm_gradients.cuh"
#include "block/pixels.cuh"

#include <cstdint>

namespace rubiks {
namespace {

constexpr int kNormColumns = 16, kNormGroups = 32;  // threads of a block: channels, and groups of parts
constexpr int kGradThreads = 256, kGradPixels = 2;  // of a block, and of a thread

// Both sums of a channel over all parts, in a fixed order; valid where threadIdx.y is 0. sums (parts, 2, C).
__device__ inline double2 add_parts(const float* sums, int64_t parts, int c, int channel) {
  __shared__ double2 groups[kNormGroups][kNormColumns];
  double2 sum = {0, 0};
  if (channel < c) {
#pragma unroll 4
    for (int64_t part = threadIdx.y; part < parts; part += kNormGroups) {
      const float* row = sums + part * 2 * c + channel;
      sum = {sum.x + row[0], sum.y + row[c]};
    }
  }
#pragma unroll
  for (unsigned half = kNormGroups / 2; half > 0; half /= 2) {  // the upper half hands over to the lower half
    if (threadIdx.y >= half && threadIdx.y < 2 * half) groups[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y >= half) continue;
    const double2 part = groups[threadIdx.y + half][threadIdx.x];
    sum = {sum.x + part.x, sum.y + part.y};
  }
  return sum;
}

// sums (parts, 2, C) of x and of x^2 over `count` columns; weight, beta (C); running_mean, running_var (C) or null,
// updated in place, as is the number of batches, or null; stats (4, C): mean, 1 / standard deviation, scale, bias.
__global__ void __launch_bounds__(kNormColumns* kNormGroups)
    norm_coefficients_kernel(const float* sums, int64_t parts, int c, double count, const float* weight,
                             const float* beta, float* running_mean, float* running_var, int64_t* batches, double momentum,
                             double eps, float* stats) {
  wait_for_kernel_before();
  const int channel = blockIdx.x * kNormColumns + threadIdx.x;
  const double2 sum = add_parts(sums, parts, c, channel);
  if (threadIdx.y > 0 || channel >= c) return;
  if (channel == 0 && batches != nullptr) ++*batches;
  const double mean = sum.x / count;
  double var = sum.y / count - mean * mean;
  if (var < 0) var = 0;  // by rounding; NaN stays
  const double rstd = 1 / sqrt(var + eps), scale = weight[channel] * rstd;
  stats[channel] = mean;
  stats[c + channel] = rstd;
  stats[2 * c + channel] = scale;
  stats[3 * c + channel] = beta[channel] - mean * scale;
  if (running_mean != nullptr) running_mean[channel] = (1 - momentum) * running_mean[channel] + momentum * mean;
  if (running_var != nullptr) {
    const double unbiased = var * (count / (count > 1 ? count - 1 : 1));  // of a single value there is no estimate
    running_var[channel] = (1 - momentum) * running_var[channel] + momentum * unbiased;
  }
}

// sums and, where not null, more (parts, 2, C): of g and of g * x.
__global__ void __launch_bounds__(kNormColumns* kNormGroups)
    norm_gradients_kernel(const float* sums, int64_t parts, const float* more, int64_t more_parts, int c,
                          const NormGradients to) {
  wait_for_kernel_before();
  const int channel = blockIdx.x * kNormColumns + threadIdx.x;
  double2 sum = add_parts(sums, parts, c, channel);
  if (more != nullptr) {
    __syncthreads();  // the sums of the groups have been read
    const double2 others = add_parts(more, more_parts, c, channel);
    sum = {sum.x + others.x, sum.y + others.y};
  }
  if (threadIdx.y > 0 || channel >= c) return;
  to.write(sum.x, sum.y, c, channel);
}

// The gradient of a norm's input. Matrices are of pixels, their columns in the order N, H, W, T.
struct InputGrad {
  const Unit *g, *x, *residual;     // (C, pixels); residual may be null
  const Unit* part;                 // (C, part_pixels), which is added to g at every stride-th pixel, or null
  const float* mix;                 // (3, C)
  const float *scale, *bias;        // (C), of the norm; with attention only
  const float* attention;           // (C, 3), or null
  Unit* out;                        // (C, pixels): mix[0] * g + mix[1] * x + mix[2] + residual
  float* grad_attention;            // (C, 3, blocks of a channel), parts
  unsigned pixels, part_pixels;     // of a channel
  int height, width, part_height, part_width, stride;
  int c;
};

// blockIdx.y is the channel. With attention g is the gradient of the mix of frames after the norm and its ReLU.
template <int frames, bool attends>
__global__ void __launch_bounds__(kGradThreads) norm_input_grad_kernel(const __grid_constant__ InputGrad a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  wait_for_kernel_before();
  constexpr int pixels = attends && frames == 16 ? 1 : kGradPixels;
  const unsigned c = blockIdx.y, first = blockIdx.x * kGradThreads * kGradPixels + threadIdx.x;
  const int64_t start = static_cast<int64_t>(c) * a.pixels;
  const float of_g = a.mix[c], of_x = a.mix[a.c + c], constant = a.mix[2 * a.c + c];
  [[maybe_unused]] float scale, bias, sums[3] = {};
  [[maybe_unused]] float3 weights;
  if constexpr (attends) {
    const float* from = a.attention + 3 * c;
    scale = a.scale[c], bias = a.bias[c], weights = {from[0], from[1], from[2]};
  }
#pragma unroll 1
  for (unsigned set = 0; set < kGradPixels / pixels; ++set) {
    Pixel<frames> of_pixel[pixels], x_pixel[pixels], r_pixel[pixels], part[pixels];
#pragma unroll
    for (int j = 0; j < pixels; ++j) {  // all loads are on their way before the first is used
      const unsigned pixel = first + (set * pixels + j) * kGradThreads;
      const bool inside = pixel < a.pixels;
      of_pixel[j] = Pixel<frames>::load(a.g, start + pixel, inside);
      x_pixel[j] = Pixel<frames>::load(a.x, start + pixel, inside);
      r_pixel[j] = Pixel<frames>::load(a.residual, start + pixel, inside && a.residual != nullptr);
      if (a.part != nullptr) {
        const unsigned column = pixel % a.width, row = pixel / a.width % a.height, clip = pixel / a.width / a.height;
        const int64_t at = (clip * a.part_height + row / a.stride) * a.part_width + column / a.stride;
        part[j] = Pixel<frames>::load(a.part, static_cast<int64_t>(c) * a.part_pixels + at,
                                      inside && row % a.stride == 0 && column % a.stride == 0);
      }
    }
#pragma unroll
    for (int j = 0; j < pixels; ++j) {
      const unsigned pixel = first + (set * pixels + j) * kGradThreads;
      if (pixel >= a.pixels) continue;
      float g[frames], x[frames], out[frames];
      of_pixel[j].unpack_to(g), x_pixel[j].unpack_to(x);
      if constexpr (attends) {
        float before = 0;
#pragma unroll
        for (int t = 0; t < frames; ++t) {
          const float same = g[t], after = t + 1 < frames ? g[t + 1] : 0;
          const float value = rectified(fmaf(scale, x[t], bias));
          sums[0] = fmaf(after, value, sums[0]);  // frame t + 1 of the mix looks back to this one
          sums[1] = fmaf(same, value, sums[1]);
          sums[2] = fmaf(before, value, sums[2]);
          g[t] = value == 0 ? 0 : unmixed(weights, before, same, after);
          before = same;
        }
      }
      if (a.part != nullptr) {
        float term[frames];
        part[j].unpack_to(term);
#pragma unroll
        for (int t = 0; t < frames; ++t) g[t] += term[t];
      }
      r_pixel[j].unpack_to(out);
#pragma unroll
      for (int t = 0; t < frames; ++t) out[t] += fmaf(of_g, g[t], fmaf(of_x, x[t], constant));
      Pixel<frames>::rounded(out).store(a.out, start + pixel);
    }
  }
  if constexpr (attends) {
    __shared__ float parts[kGradThreads / 32][3];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const float part = warp_sum(sums[i]);
      if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32][i] = part;
    }
    __syncthreads();
    if (threadIdx.x >= 3) return;
    float sum = 0;
#pragma unroll
    for (const auto& part : parts) sum += part[threadIdx.x];
    a.grad_attention[static_cast<int64_t>(3 * c + threadIdx.x) * gridDim.x + blockIdx.x] = sum;
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

}  // namespace
}  // namespace rubiks
