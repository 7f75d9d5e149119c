// The shift on NVIDIA GPUs as a gather: what its kernels share.
//
// Both directions are the same gather. Along one axis, position j of the result reads positions j * stride + base and
// the next of the source, weighted w0 and w1. Forward, the source is x and base = floor(shift) - padding. Backward, the
// source is the upstream gradient, with stride - 1 zeros between its elements, and base = padding - floor(shift) - 1.
//
// Backward, the derivative along an axis is the difference of the same two taps, so one walk gives the gradient of x
// and, multiplied with x and summed, that of the shift. Blocks write their sums and a second kernel adds them in a
// fixed order: the same bits on every run.
#pragma once

#include "common/dependent_launch.cuh"
#include "common/reductions.cuh"
#include "shift/shift.h"

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace rubiks {
namespace {

struct Strides {  // in elements
  int64_t n, t, c, h, w;
};

struct Line {  // one axis of the gather
  int source, result, stride, dilation, padding, reach;
};

struct Volume {
  const void* data;
  const char *begin, *end;  // of its elements in memory
  Strides strides;
};

// How a volume's part of a tile gets to shared memory.
struct Copy {
  bool planes;     // its rows are adjacent and the tile spans their width: in units of 16 bytes, else by element
  int item_pitch;  // elements of shared memory for one clip
  int lanes;       // threads that copy one clip, where planes
  int64_t span;    // bytes from the start of a block's first window to the end of its last, whole units included
};

struct Plan {
  int tall, wide, step;              // of a thread's patch of pixels, see walk()
  int items, rows, cols;             // of a tile: clips, rows and columns of the result
  int runs;                          // tiles of consecutive clips that a block makes one by one
  int groups, row_tiles, col_tiles;  // of blocks
  int threads, stage_bytes, x_offset;
  Copy source, x;
};

struct Arguments {
  Volume source;  // (n, T, c, H, W) forward: x; backward: the upstream gradient
  Volume x;       // backward only
  void* result;   // forward: the output; backward: the gradient of x
  Strides result_strides;
  void* sums;               // (c, slots), backward only
  const void* shift;        // (rows, c)
  int64_t shift_row, shift_column;
  int n, c;
  Line t, h, w;
  bool temporal, quantize, need_x, need_shift;
  Plan plan;
};

template <typename real>
struct Map {  // the taps of one axis: base and base + 1
  int base;
  real w0, w1;
};

// below: a whole shift i is taken as (i - 1) + 1. Its gradient, at a kink, is the mean over both forms.
template <typename real, bool backward>
__device__ inline Map<real> map_of(const Line& a, real shift, bool quantize, bool below) {
  Taps<real> t = taps(shift, a.reach, quantize);
  if (!backward) return {static_cast<int>(t.base) - a.padding, 1 - t.fraction, t.fraction};
  if (below && t.fraction == 0) t = {t.base - 1, 1};
  return {a.padding - static_cast<int>(t.base) - 1, t.fraction, 1 - t.fraction};
}

template <typename real>
struct Maps {
  Map<real> t, h, w;
};

// Of a channel with shifts t, h and w.
template <typename real, bool backward>
__device__ inline Maps<real> maps_of(const Arguments& a, real t, real h, real w, bool quantize, bool below) {
  return {map_of<real, backward>(a.t, t, quantize, below), map_of<real, backward>(a.h, h, quantize, below),
          map_of<real, backward>(a.w, w, quantize, below)};
}

template <typename real>
__device__ inline bool whole(const Line& a, real shift) {
  return taps(shift, a.reach, false).fraction == 0;
}

// Where in the source the gather finds position v, or -1. Only the backward gather has zeros between.
template <bool backward>
__device__ inline int locate(const Line& a, int v) {
  if (backward && a.dilation > 1) {
    if (v % a.dilation) return -1;
    v /= a.dilation;
  }
  return static_cast<unsigned>(v) < static_cast<unsigned>(a.source) ? v : -1;
}

// The first and the last position of the source that `count` results read; none where the second is smaller.
template <bool backward>
__device__ inline int2 window(const Line& a, int base, int first, int count) {
  const int low = max(first * a.stride + base, 0);
  const int high = min((first + count - 1) * a.stride + base + 1, (a.source - 1) * a.dilation);
  if (!backward || a.dilation == 1) return {low, high};
  return {(low + a.dilation - 1) / a.dilation, high < 0 ? -1 : high / a.dilation};
}

template <typename real>
struct Sums {  // the gradient of the shift
  real t, h, w;
};

// The gradient of the shift is the mean over both sides of a kink, which `scale` makes it.
template <typename real>
__device__ inline Sums<real> add(const Sums<real>& a, const Sums<real>& b, real scale) {
  return {a.t + b.t * scale, a.h + b.h * scale, a.w + b.w * scale};
}

// a / b for numbers up to a few hundred, in a third of the instructions.
__device__ inline int divide(int a, int b) { return static_cast<int>(__fdividef(a + 0.5f, b)); }

// Keeps a value in its register: the compiler would rather compute it again in every turn of the loop.
template <typename T>
__device__ inline void keep(T& value) {
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(value));
  } else if constexpr (std::is_same_v<T, float>) {
    asm volatile("" : "+f"(value));
  } else {
    asm volatile("" : "+r"(value));
  }
}

// One warp per channel adds the sums of its tiles. sums (c, slots), grad (rows, c).
template <typename real>
__global__ void shift_grad_sum_kernel(const Sums<real>* sums, real* grad, int c, int64_t slots, bool temporal) {
  wait_for_previous_kernel();
  const int channel = blockIdx.x;
  double total[3] = {};
  for (int64_t i = threadIdx.x; i < slots; i += 32) {
    const Sums<real> part = sums[channel * slots + i];
    total[0] += part.t, total[1] += part.h, total[2] += part.w;
  }
  for (int i = 0; i < 3; ++i) total[i] = warp_sum(total[i]);
  if (threadIdx.x) return;
  if (temporal) grad[channel] = total[0];
  grad[(temporal ? 1 : 0) * c + channel] = total[1];
  grad[(temporal ? 2 : 1) * c + channel] = total[2];
}

}  // namespace
}  // namespace rubiks
