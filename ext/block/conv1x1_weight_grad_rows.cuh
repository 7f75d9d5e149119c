// Rows of a chunk in shared memory, for conv1x1_weight_grad.cuh: each thread copies its share of them and changes it in
// place.
#pragma once

#include "block/attention.cuh"
#include "common/async_copy.cuh"

#include <cstdint>

namespace rubiks {
namespace {

constexpr int kWarps = 12, kThreads = 32 * kWarps;

constexpr int kColumns = 64, kSteps = kColumns / 16;  // of a chunk
constexpr int kRowBytes = 2 * kColumns, kRowUnits = kColumns / kUnitElements;
constexpr int kPassRows = kThreads / kRowUnits;  // rows that all threads copy at once, one unit each
static_assert(kPassRows % kRowUnits == 0, "all rows of a thread's share are permuted alike");

// The units of a row are permuted, differently in 8 consecutive rows, so that one unit of 8 rows lies in 8 banks.
__device__ inline int swizzle(int row, int unit) { return row * kRowBytes + ((unit ^ (row % kRowUnits)) * 16); }

// The part of a chunk that one thread copies and transforms: one unit of each kPassRows-th row.
struct Share {
  int row, unit;
  int offset;  // of the first in shared memory; rows of the others are permuted alike

  __device__ Share() : row(threadIdx.x / kRowUnits), unit(threadIdx.x % kRowUnits), offset(swizzle(row, unit)) {}
};

// Starts the copy of a thread's share of `rows` rows; columns from p on are zeros.
__device__ inline void copy_rows(unsigned to, const bfloat16* from, int rows, int64_t p, int64_t column,
                                 const Share& s) {
  const bool inside = column < p;
  from += s.row * p + (inside ? column : 0);
  to += s.offset;
#pragma unroll 1
  for (int row = s.row; row < rows; row += kPassRows) {
    copy_async(to, from, inside);
    to += kPassRows * kRowBytes;
    from += kPassRows * p;
  }
}

// g = mix[0] * g + mix[1] * h + mix[2] for a thread's share of `rows` rows; h lies `apart` bytes behind g.
__device__ inline void mix_rows(unsigned g, int apart, unsigned mixes, int rows, const Share& s) {
  g += s.offset;
#pragma unroll 1
  for (int row = s.row; row < rows; row += kPassRows, g += kPassRows * kRowBytes) {
    const float4 mix = load_shared<float4>(mixes + row * sizeof(float4));
    Unit unit = load_shared<Unit>(g);
    const Unit other = load_shared<Unit>(g + apart);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 a = unpack(unit.pairs[i]), b = unpack(other.pairs[i]);
      unit.pairs[i] = pack({fmaf(mix.x, a.x, fmaf(mix.y, b.x, mix.z)),  //
                                    fmaf(mix.x, a.y, fmaf(mix.y, b.y, mix.z))});
    }
    store_shared(g, unit);
  }
}

// x = relu(scale * x + bias) for a thread's share of `rows` rows; with `frames`, mixed with the neighbouring frames.
__device__ inline void activate_rows(unsigned x, unsigned coefficients, unsigned attention, int frames, int rows,
                                     const Share& s) {
  x += s.offset;
#pragma unroll 1
  for (int row = s.row; row < rows; row += kPassRows, x += kPassRows * kRowBytes) {
    const float2 scale_bias = load_shared<float2>(coefficients + row * sizeof(float2));
    Unit unit = load_shared<Unit>(x);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 a = unpack(unit.pairs[i]);
      unit.pairs[i] = pack_relu({fmaf(scale_bias.x, a.x, scale_bias.y), fmaf(scale_bias.x, a.y, scale_bias.y)});
    }
    if (frames) unit = mix_frames(unit, load_shared<float4>(attention + row * sizeof(float4)), frames);
    store_shared(x, unit);
  }
}

}  // namespace
}  // namespace rubiks
