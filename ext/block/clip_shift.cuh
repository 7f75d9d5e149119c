// What clip_shift_forward.cuh and clip_shift_backward.cuh share: batch norm, ReLU and the learnable shift of
// channel-major matrices, columns in the order N, H, W, T.
//
// A thread has all frames of a pixel in registers. So a shift in time moves between registers, one in space reads whole
// units of 16 bytes, and the threads of a warp read adjacent pixels. Each thread makes a strip of a few rows of one
// column of the frame: consecutive rows share what they read. blockIdx.y is the channel. Arithmetic is in float32.
#pragma once

#include "block/pixels.cuh"
#include "common/dependent_launch.cuh"

#include <cstdint>

namespace rubiks {
namespace {

constexpr unsigned kClipThreads = 128;  // of a block

struct ShiftSums {        // over the pixels of a channel
  float t, h, w;          // the gradient of the shift
  float result, product;  // of the gradient of x before its norm's coefficients, and of its product with x
};
constexpr int kShiftSums = sizeof(ShiftSums) / sizeof(float);

struct ClipShift {
  const Unit* source;         // (C, source pixels): what is shifted or, backward, the upstream gradient
  const Unit* x;              // (C, pixels), backward only
  const float *scale, *bias;  // (C), or null
  const float* shift;         // (3, C) or (2, C), rows [T,] H, W
  Unit* result;               // (C, pixels)
  ShiftSums* sums;            // (C, blocks), backward only
  int height, width, source_height, source_width;  // of the result, and of the source
  unsigned strips, threads;                        // of a clip; of a channel
  int c, clips;
};

// Where a shift reads along one axis: at base and base + 1, weighted 1 - fraction and fraction.
struct Taps {
  int base;
  float fraction;

  // Beyond +-far nothing is inside, so that larger shifts, and NaN, count as far.
  __device__ Taps(float shift, int far) {
    const float near = !(shift > -far) ? -far : !(shift < far) ? far : shift;
    base = static_cast<int>(floorf(near)), fraction = near - base;
  }
};

// Of column (y, x) of a plane; zeros outside.
template <int frames>
__device__ inline Pixel<frames> load(const Unit* plane, int y, int x, int height, int width) {
  const bool inside = static_cast<unsigned>(y) < static_cast<unsigned>(height) &&
                      static_cast<unsigned>(x) < static_cast<unsigned>(width);
  return Pixel<frames>::load(plane, y * width + x, inside);
}

// Calls f(t, values[t + base], values[t + base + 1]) for every frame t, with zeros for frames outside.
template <int frames, typename F>
__device__ inline void with_neighbours(const float (&values)[frames], int base, const F& f) {
  float v[frames];
#pragma unroll
  for (int t = 0; t < frames; ++t) v[t] = values[t];
  // For a base of 0 or -1, as nearly all shifts have, nothing is moved.
  if (base >= 0) {
#pragma unroll 1
    for (int i = min(base, frames); i > 0; --i) {
#pragma unroll
      for (int t = 0; t < frames; ++t) v[t] = t + 1 < frames ? v[t + 1] : 0;
    }
#pragma unroll
    for (int t = 0; t < frames; ++t) f(t, v[t], t + 1 < frames ? v[t + 1] : 0.0f);
  } else {
#pragma unroll 1
    for (int i = max(base + 1, -frames); i < 0; ++i) {
#pragma unroll
      for (int t = frames - 1; t >= 0; --t) v[t] = t > 0 ? v[t - 1] : 0;
    }
#pragma unroll
    for (int t = 0; t < frames; ++t) f(t, t > 0 ? v[t - 1] : 0.0f, v[t]);
  }
}

// The place of a thread's strip.
template <int rows>
struct Strip {
  int clip, y, x;

  __device__ Strip(const ClipShift& a, unsigned thread) {
    const unsigned rest = thread / a.width;
    x = thread % a.width, clip = rest / a.strips, y = rest % a.strips * rows;
  }
};

}  // namespace
}  // namespace rubiks
