// What the epilogues of both kernels of the 1x1 convolution share: the test of the mask, and row sums.
#pragma once

#include "block/conv1x1.h"

#include <cstdint>

namespace rubiks {
namespace {

// Whether the gradient is 0 at x, an element of the mask, because the ReLU gave 0 there.
__device__ __forceinline__ bool stopped(float x, float scale, float bias) { return scale * x + bias <= 0; }

// Adds two elements of a row of y, and their products with `by`, to its sums.
__device__ __forceinline__ void add_pair(float& sum, float& product, float2 v, float2 by) {
  sum += v.x + v.y, product += v.x * by.x + v.y * by.y;
}

// Writes a block's part of the row sums from those of its warps, (warps, 2, rows) in shared memory. Row 0 of these is
// first_row of y.
template <int threads, int warps, int rows>
__device__ __forceinline__ void write_row_sums(const Conv1x1& a, const float* of_warps, int first_row, int part) {
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * rows; i += threads) {
    const int which = i / rows, row = first_row + i % rows;
    if (row >= a.m) continue;
    float total = 0;
#pragma unroll
    for (int w = 0; w < warps; ++w) total += of_warps[w * 2 * rows + i];
    a.sums[(int64_t{part} * 2 + which) * a.m + row] = total;
  }
}

}  // namespace
}  // namespace rubiks
