// The weight of conv1x1_sm90.cuh in shared memory.
#pragma once

#include "block/conv1x1_sm90_parts.cuh"
#include "common/async_copy.cuh"
#include "common/tensor_cores_sm90.cuh"

#include <cstdint>

namespace rubiks {
namespace {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct WeightSm90 {
  const Conv1x1& a;
  const int units, chunks;  // of 8 and of 32 columns
  const unsigned at;
  int chunk = 0;  // the next one to copy

  __device__ __forceinline__ WeightSm90(const Conv1x1& a, int units, int chunks, unsigned at)
      : a(a), units(units), chunks(chunks), at(at) {}

  // Starts the copy of the next chunk, with zeros beyond the weight's rows and columns. The first tile takes one chunk
  // after another. 8 threads copy the units of 8 rows that lie together.
  __device__ __forceinline__ void copy() {
    if (chunk == chunks) return;
    constexpr int kUnits = kDepth / kUnitElements;
    for (int i = threadIdx.x; i < kMaxM * kUnits; i += kBlockThreads) {
      const int row = i / (8 * kUnits) * 8 + i % 8, unit = chunk * kUnits + i / 8 % kUnits;
      const bool there = row < a.m && unit * kUnitElements < a.k;
      const unsigned to = at + (row / 8 * units + unit) * kMatrixBytes + row % 8 * sizeof(Unit);
      if (unit < units) copy_async(to, a.weight + (there ? row * a.k + unit * kUnitElements : 0), there);
    }
    ++chunk;
  }

  // The descriptor of the first or second half of the rows.
  __device__ __forceinline__ uint64_t half(int which) const {
    return descriptor(at + which * (kHalf / 8) * units * kMatrixBytes, kMatrixBytes, units * kMatrixBytes);
  }
};

#endif

}  // namespace
}  // namespace rubiks
