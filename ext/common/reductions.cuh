// Sums over the threads of a quad, a warp and a block, always in the same order.
#pragma once

namespace rubiks {
namespace {

// Over 4 adjacent lanes, in each of them.
__device__ inline float quad_sum(float v) {
  v += __shfl_xor_sync(0xffffffff, v, 1);
  return v + __shfl_xor_sync(0xffffffff, v, 2);
}

// Over the lanes of a warp, in each of them.
template <typename T>
__device__ inline T warp_sum(T v) {
#pragma unroll
  for (int step = 16; step; step /= 2) v += __shfl_xor_sync(0xffffffff, v, step);
  return v;
}

// Sums over the threads of a block of `threads`: thread i < count gets that of values[i], the others 0. A block may
// call this once, as the shared memory for it is not guarded against a second call.
template <int threads, int count>
__device__ inline float block_sums(const float (&values)[count]) {
  __shared__ float parts[threads / 32][count];
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const float part = warp_sum(values[i]);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32][i] = part;
  }
  __syncthreads();
  float sum = 0;
  if (threadIdx.x >= count) return sum;
#pragma unroll
  for (const auto& part : parts) sum += part[threadIdx.x];
  return sum;
}

}  // namespace
}  // namespace rubiks
