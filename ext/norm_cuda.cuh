// Batch norm of channel-major matrices (C, P) on NVIDIA GPUs: from row sums to coefficients, and the gradient of the
// input. What uses the coefficients is in the matrix products and the shift.
#pragma once

#include "mma.cuh"
#include "norm_gradients.cuh"

#include <cstdint>

namespace rubiks {
namespace {

constexpr int kNormColumns = 16, kNormGroups = 32;  // threads of a block: channels, and groups of parts
constexpr int kGradThreads = 256, kGradUnits = 2;   // of a block, and of a thread

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

// out = mix[0] * g + mix[1] * x + mix[2] + residual. All but mix (3, C) are (C, units) of 8 elements; residual may be
// null. `blocks` make one row.
template <typename scalar>
__global__ void __launch_bounds__(kGradThreads)
    norm_input_grad_kernel(const Unit* g, const Unit* x, const float* mix, const Unit* residual, Unit* out, int c,
                           int64_t units, unsigned blocks) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  wait_for_kernel_before();
  const unsigned row = blockIdx.x / blocks;
  const int64_t start = row * units, end = start + units;
  const int64_t first = start + static_cast<int64_t>(blockIdx.x % blocks) * kGradThreads * kGradUnits + threadIdx.x;
  const float of_g = mix[row], of_x = mix[c + row], constant = mix[2 * c + row];
  Unit a[kGradUnits], b[kGradUnits], r[kGradUnits] = {};
#pragma unroll
  for (int j = 0; j < kGradUnits; ++j) {  // all loads are on their way before the first is used
    const int64_t i = first + j * kGradThreads;
    if (i >= end) continue;
    a[j] = g[i], b[j] = x[i];
    if (residual != nullptr) r[j] = residual[i];
  }
#pragma unroll
  for (int j = 0; j < kGradUnits; ++j) {
    const int64_t i = first + j * kGradThreads;
    if (i >= end) continue;
    Unit result;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const float2 u = unpack<scalar>(a[j].pairs[pair]), v = unpack<scalar>(b[j].pairs[pair]);
      const float2 w = unpack<scalar>(r[j].pairs[pair]);
      result.pairs[pair] = pack<scalar>({fmaf(of_g, u.x, fmaf(of_x, v.x, constant)) + w.x,  //
                                         fmaf(of_g, u.y, fmaf(of_x, v.y, constant)) + w.y});
    }
    out[i] = result;
  }
#endif
}

}  // namespace
}  // namespace rubiks
