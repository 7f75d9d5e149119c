// The mix of each frame with its neighbours (temporal attention) on the way to a product. Columns are in the order N, H,
// W, T: the 8 or 16 frames of a pixel are one or two times 8 columns.
#pragma once

#include "pixels.cuh"

namespace rubiks {
namespace {

// Weights of the previous, the same and the next frame, of two rows.
struct Attention {
  float2 back, stay, ahead;
};

// words[i] has two rows in column lane / 4 of the i-th 8 columns, as load_transposed leaves them.
template <int tiles>
__device__ inline void attend(unsigned (&words)[tiles], const Attention& a, int frames) {
  static_assert(tiles % 2 == 0);
  const int lane = threadIdx.x % 32;
  const bool two = frames == 16;
  unsigned before[tiles], after[tiles];  // one column on, the last coming round
#pragma unroll
  for (int i = 0; i < tiles; ++i) {
    before[i] = __shfl_sync(0xffffffff, words[i], (lane + 28) % 32);
    after[i] = __shfl_sync(0xffffffff, words[i], (lane + 4) % 32);
  }
#pragma unroll
  for (int i = 0; i < tiles; ++i) {
    const unsigned first = i % 2 && two ? before[i - i % 2] : 0, last = i % 2 == 0 && two ? after[i + 1 - i % 2] : 0;
    const float2 previous = unpack<__nv_bfloat16>(lane < 4 ? first : before[i]);
    const float2 same = unpack<__nv_bfloat16>(words[i]);
    const float2 next = unpack<__nv_bfloat16>(lane >= 28 ? last : after[i]);
    words[i] = pack<__nv_bfloat16>({fmaf(a.back.x, previous.x, fmaf(a.ahead.x, next.x, a.stay.x * same.x)),
                                    fmaf(a.back.y, previous.y, fmaf(a.ahead.y, next.y, a.stay.y * same.y))});
  }
}

// The same for 8 columns of one row; `weights` are of the previous, the same and the next frame. With 16 frames the two
// units of a pixel are with threads of adjacent numbers, which call this together.
template <typename scalar>
__device__ inline Unit attend(const Unit& unit, const float4& weights, int frames) {
  float v[10];  // with the neighbours
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = unpack<scalar>(unit.pairs[i]);
    v[1 + 2 * i] = two.x, v[2 + 2 * i] = two.y;
  }
  v[0] = v[9] = 0;
  if (frames == 16) {
    const int lane = threadIdx.x % 32;
    const unsigned both = 3u << (lane & ~1);
    const float other = __shfl_xor_sync(both, lane % 2 ? v[1] : v[8], 1);
    (lane % 2 ? v[0] : v[9]) = other;
  }
  Unit mixed;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float two[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int t = 1 + 2 * i + j;
      two[j] = fmaf(weights.x, v[t - 1], fmaf(weights.z, v[t + 1], weights.y * v[t]));
    }
    mixed.pairs[i] = pack<scalar>({two[0], two[1]});
  }
  return mixed;
}

}  // namespace
}  // namespace rubiks
