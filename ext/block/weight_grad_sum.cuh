// Adds up the parts of up to three gradients of weights, which conv1x1_weight_grad.cuh has left.
#pragma once

#include "common/dependent_launch.cuh"

#include <cstdint>

namespace rubiks {
namespace {

constexpr int kSumColumns = 32, kSumGroups = 8;  // threads of a block: columns, and groups of parts
constexpr int kMaxGradients = 3;

struct WeightGradParts {
  struct {
    const float* parts;  // (splits, size)
    float* sum;          // (size)
    int64_t size;
    int splits;
  } at[kMaxGradients];
};

// sum[i] = sum of parts[s][i] over s, in a fixed order, in vectors of floats; blockIdx.y chooses from the list.
template <typename vector>
__global__ void __launch_bounds__(kSumColumns* kSumGroups)
    weight_grad_sum_kernel(const __grid_constant__ WeightGradParts list) {
  constexpr int width = sizeof(vector) / sizeof(float);
  struct alignas(sizeof(vector)) Values {
    float at[width];
  };
  __shared__ Values groups[kSumGroups][kSumColumns];
  wait_for_previous_kernel();
  const auto& a = list.at[blockIdx.y];
  const int64_t size = a.size / width, i = static_cast<int64_t>(blockIdx.x) * kSumColumns + threadIdx.x;
  const vector* parts = reinterpret_cast<const vector*>(a.parts);
  Values sum = {};
  const auto add = [&](const Values& v) {
#pragma unroll
    for (int j = 0; j < width; ++j) sum.at[j] += v.at[j];
  };
  if (i < size) {
#pragma unroll 4
    for (int s = threadIdx.y; s < a.splits; s += kSumGroups) {
      const vector v = parts[s * size + i];
      add(reinterpret_cast<const Values&>(v));
    }
  }
  groups[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || i >= size) return;
#pragma unroll
  for (int j = 1; j < kSumGroups; ++j) add(groups[j][threadIdx.x]);
  reinterpret_cast<vector*>(a.sum)[i] = reinterpret_cast<const vector&>(sum);
}

}  // namespace
}  // namespace rubiks
