// The mix of each frame with its neighbours (temporal attention) on the way into a product, and back. Columns are in the
// order N, H, W, T: the 8 or 16 frames of a pixel are one or two times 8 columns. Into a product, it is computed in the
// type of the elements, two at a time.
#pragma once

#include "common/tensor_cores.cuh"

namespace rubiks {
namespace {

template <typename scalar>
using Pair = std::conditional_t<std::is_same_v<scalar, __half>, __half2, __nv_bfloat162>;

// Two elements of frames mixed with those before and after; each word of two elements.
template <typename scalar>
__device__ inline unsigned mixed(unsigned back, unsigned before, unsigned stay, unsigned same, unsigned ahead,
                                 unsigned after) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  const auto pair = [](const unsigned& word) { return reinterpret_cast<const Pair<scalar>&>(word); };
  const auto result =
      __hfma2(pair(back), pair(before), __hfma2(pair(ahead), pair(after), __hmul2(pair(stay), pair(same))));
  return reinterpret_cast<const unsigned&>(result);
#else
  return 0;
#endif
}

// The word of a unit's neighbour among the 16 frames of a pixel: the last of the first unit, and the first of the second.
// The two units are with threads of adjacent numbers, which call this together. 0 with 8 frames.
__device__ inline unsigned word_beyond(const Unit& unit, int frames) {
  if (frames != 16) return 0;
  const int lane = threadIdx.x % 32;
  return __shfl_xor_sync(3u << (lane & ~1), lane % 2 ? unit.pairs[0] : unit.pairs[3], 1);
}

// 8 columns of a row mixed by the row's weights, of the previous, the same and the next frame.
template <typename scalar>
__device__ inline Unit attend(const Unit& unit, const float4& weights, int frames) {
  const unsigned beyond = word_beyond(unit, frames), back = pack<scalar>({weights.x, weights.x});
  const unsigned stay = pack<scalar>({weights.y, weights.y}), ahead = pack<scalar>({weights.z, weights.z});
  const bool second = threadIdx.x % 2;
  Unit result;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const unsigned previous = i > 0 ? unit.pairs[i - 1] : second ? beyond : 0;
    const unsigned next = i < 3 ? unit.pairs[i + 1] : second ? 0 : beyond;
    const unsigned before = __funnelshift_l(previous, unit.pairs[i], 16);
    const unsigned after = __funnelshift_r(unit.pairs[i], next, 16);
    result.pairs[i] = mixed<scalar>(back, before, stay, unit.pairs[i], ahead, after);
  }
  return result;
}

// A unit of bfloat16 in shared memory becomes relu(scale * x + bias), mixed. The row's coefficients lie `pitch` bytes apart:
// scale, bias, then the weights.
__device__ inline void attend_in_place(unsigned at, unsigned coefficients, int pitch, int frames) {
  const auto c = [&](int which) { return load_shared<float>(coefficients + which * pitch); };
  const float scale = c(0), bias = c(1);
  Unit unit = load_shared<Unit>(at);
#pragma unroll
  for (unsigned& pair : unit.pairs) {
    const float2 x = unpack<__nv_bfloat16>(pair);
    pair = pack_relu<__nv_bfloat16>({x.x * scale + bias, x.y * scale + bias});
  }
  store_shared(at, attend<__nv_bfloat16>(unit, {c(2), c(3), c(4), 0}, frames));
}

// Back: the gradient of frame t is that of the mixes of frames t + 1, t and t - 1.
__device__ inline float unmixed(const float3& weights, float before, float same, float after) {
  return fmaf(weights.x, after, fmaf(weights.z, before, weights.y * same));
}

}  // namespace
}  // namespace rubiks
