// The temporal attention shift: each frame is mixed with the one before and the one after it, on the way into a product
// and back. Columns are in the order N, H, W, T: the 8 or 16 frames of a pixel are one or two units of 8 columns. On
// the way into a product the mix is computed in bfloat16, two elements at a time: pairs of frames, or of rows.
#pragma once

#include "common/bfloat16.cuh"
#include "common/shared_memory.cuh"

namespace rubiks {
namespace {

// Two elements mixed with those of the frames before and after them: all arguments are pairs.
__device__ inline unsigned mix_pair(unsigned of_before, unsigned before, unsigned of_same, unsigned same,
                                    unsigned of_after, unsigned after) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  const auto pair = [](const unsigned& word) { return reinterpret_cast<const __nv_bfloat162&>(word); };
  const auto result = __hfma2(pair(of_before), pair(before),
                              __hfma2(pair(of_after), pair(after), __hmul2(pair(of_same), pair(same))));
  return reinterpret_cast<const unsigned&>(result);
#else
  return 0;
#endif
}

// The pair of frames next to a unit in the other unit of a pixel of 16 frames: the last pair of the first unit, or the
// first pair of the second. The two units are with threads of adjacent numbers, which call this together. 0 where a
// pixel has 8 frames.
__device__ inline unsigned pair_beyond(const Unit& unit, int frames) {
  if (frames != 16) return 0;
  const int lane = threadIdx.x % 32;
  return __shfl_xor_sync(3u << (lane & ~1), lane % 2 ? unit.pairs[0] : unit.pairs[3], 1);
}

// The frames of a unit mixed by the weights of the previous (x), the same (y) and the next frame (z).
__device__ inline Unit mix_frames(const Unit& unit, const float4& weights, int frames) {
  const unsigned beyond = pair_beyond(unit, frames), of_before = pack({weights.x, weights.x});
  const unsigned of_same = pack({weights.y, weights.y}), of_after = pack({weights.z, weights.z});
  const bool second = threadIdx.x % 2;
  Unit result;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const unsigned previous = i > 0 ? unit.pairs[i - 1] : second ? beyond : 0;
    const unsigned next = i < 3 ? unit.pairs[i + 1] : second ? 0 : beyond;
    const unsigned before = __funnelshift_l(previous, unit.pairs[i], 16);
    const unsigned after = __funnelshift_r(unit.pairs[i], next, 16);
    result.pairs[i] = mix_pair(of_before, before, of_same, unit.pairs[i], of_after, after);
  }
  return result;
}

// The same in registers: a lane has two rows of column lane / 4 of 8 columns, and of the next 8 ones. weights: those of
// the previous (x), the same (y) and the next frame (z), of both rows.
__device__ inline void mix_frames_of_lanes(unsigned& first, unsigned& second, const uint3& weights, int frames) {
  const int lane = threadIdx.x % 32;
  const auto rotated = [&](unsigned pair, int by) { return __shfl_sync(0xffffffff, pair, (lane + by) % 32); };
  const unsigned first_before = rotated(first, 28), second_after = rotated(second, 4);
  unsigned first_after = rotated(first, 4), second_before = rotated(second, 28);
  const bool two = frames == 16, start = lane < 4, end = lane >= 28;
  if (start) second_before = two ? first_before : 0;
  if (end) first_after = two ? second_after : 0;
  first = mix_pair(weights.x, start ? 0 : first_before, weights.y, first, weights.z, first_after);
  second = mix_pair(weights.x, second_before, weights.y, second, weights.z, end ? 0 : second_after);
}

// The gradient of a frame before the mix, from those of the mixes of the previous, the same and the next frame: what a
// frame gave to the next one comes back from there.
__device__ inline float unmix(const float3& weights, float previous, float same, float next) {
  return fmaf(weights.x, next, fmaf(weights.z, previous, weights.y * same));
}

}  // namespace
}  // namespace rubiks
