// The shift of small planes, as at the end of a network: a warp makes whole planes for all frames, on its own.
//
// shift_kernel spends most of its time on such planes on setting up and on its pipeline. Here a pack of a few planes
// that are adjacent in memory is copied to shared memory with all its frames at once, shifted there in place, and
// copied back: memory is only touched in whole units of 16 bytes, and no warp waits for another.
//
// In place, the result of frame j takes the place of frame j of the source once frames base + j and base + j + 1 have
// been read. Where base >= -1, walking forward in time never needs an overwritten frame again; otherwise the walk goes
// backward in time, as over the mirrored clip.
#pragma once

#include "shift/packed_rows.cuh"
#include "shift/shift_kernel.cuh"

namespace rubiks {
namespace {

constexpr int kZeros = 32;            // bytes of zeros at every frame: at least a row of taps
constexpr int kPackBlocks = 16;      // warps per multiprocessor that the compiler leaves registers for

// Planes that a warp makes: of consecutive clips of one channel, or of consecutive channels of one clip. In shared
// memory they lie as in memory, but with zeros before every frame, for rows of taps outside the source.
struct Pack {
  bool clips;
  int planes, lanes;        // of the pack; threads for each
  int runs, run_bytes;      // contiguous pieces of the pack in memory
  int data, plane, frame;   // where in shared memory the first plane lies; bytes from plane to plane, frame to frame
  int bytes;                // of shared memory for a volume
};

template <typename scalar>
struct Packed {
  const Arguments& a;
  const Pack& p;
  unsigned shared;  // of the source; that of x follows
  int n, c;         // of this thread's plane
  int row, col;     // of its patch
  bool used;        // whether there is one
  int place;        // of its first pixel in a frame, in bytes

  // Calls copy(byte in shared memory, byte in the volume) for this thread's units of 16 bytes of the pack.
  template <typename F>
  __device__ void each_unit(const Strides& s, F copy) const {
    const int64_t from = (p.clips ? blockIdx.y * s.c + blockIdx.x * int64_t{p.planes} * s.n
                                  : blockIdx.y * s.n + blockIdx.x * int64_t{p.planes} * s.c) * sizeof(scalar);
    const int64_t stride = s.t * static_cast<int>(sizeof(scalar));
#pragma unroll 1
    for (int i = threadIdx.x * 16; i < p.run_bytes; i += 32 * 16) {
      int there = p.data + i;
      int64_t here = from + i;
#pragma unroll 4
      for (int run = 0; run < p.runs; ++run, there += p.frame, here += stride) copy(there, here);
    }
  }

  __device__ void copy_in(const Volume& v, unsigned to) const {
    each_unit(v.strides, [&](int there, int64_t i) { copy_async(to + there, static_cast<const char*>(v.data) + i); });
  }

  __device__ void copy_out() const {
    each_unit(a.result_strides, [&](int here, int64_t i) {
      *reinterpret_cast<int4*>(static_cast<char*>(a.result) + i) = load_shared<int4>(shared + here);
    });
  }

  // Interpolates a frame's taps v in space to `now`. If `sum`, adds to the gradient of the shift: the frame is the
  // second tap of result frame - 1, weighted w1, and the first of result frame; x_before and x_now are of these.
  template <bool sum, typename X>
  __device__ static void interpolate(const float (&v)[kTall + 1][kWide + 1], const Map<float>& mh, const Map<float>& mw,
                                     float w1, const X& x_before, const X& x_now, float (&now)[kTall][kWide],
                                     Sums<float>& part) {
#pragma unroll
    for (int i = 0; i < kTall; ++i) {
      float down[kWide + 1], slope[kWide + 1];
#pragma unroll
      for (int j = 0; j <= kWide; ++j) {
        slope[j] = v[i][j] - v[i + 1][j];
        down[j] = sum ? v[i + 1][j] + mh.w0 * slope[j] : mh.w0 * v[i][j] + mh.w1 * v[i + 1][j];
      }
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        const float across = down[j] - down[j + 1];
        now[i][j] = sum ? down[j + 1] + mw.w0 * across : mw.w0 * down[j] + mw.w1 * down[j + 1];
        if constexpr (sum) {
          const float x_step = x_now[i][j] - x_before[i][j], x_both = x_now[i][j] - w1 * x_step;
          part.t += now[i][j] * x_step;
          part.h += (mw.w0 * slope[j] + mw.w1 * slope[j + 1]) * x_both;
          part.w += across * x_both;
        }
      }
    }
  }

  // Shifts the pack, in place where `write`. Returns this thread's part of the gradient of the shift if `sum`. Threads
  // for which this walk is not meant (`mine`) only wait for the others.
  template <bool backward, bool sum>
  __device__ Sums<float> walk(const Maps<float>& maps, bool mine, bool write) const {
    const auto& [mt, mh, mw] = maps;
    constexpr int size = sizeof(scalar);
    const int frames = a.t.source;
    Sums<float> sums = {};
#pragma unroll 1
    for (int back = 0; back < 2; ++back) {
      const bool now_mine = mine && used && (mt.base < -1) == back;
      if (!__any_sync(0xffffffff, now_mine)) continue;
      const int base = back ? -1 - mt.base : mt.base;
      float w0 = back ? mt.w1 : mt.w0, w1 = back ? mt.w0 : mt.w1;
      const int step = back ? -p.frame : p.frame;
      const unsigned first = shared + (back ? (frames - 1) * p.frame : 0);
      unsigned tap[kTall + 1], taps[kWide + 1], pixels[kWide];  // rows of taps in frame `base`; what to read of rows
#pragma unroll
      for (int i = 0; i <= kTall; ++i) {
        const bool inside = static_cast<unsigned>(row + mh.base + i) < static_cast<unsigned>(a.h.source) &&
                            static_cast<unsigned>(col + mw.base + kWide) < static_cast<unsigned>(a.w.source + kWide);
        const int origin = place + ((mh.base + i) * a.w.source + mw.base) * size;
        tap[i] = first + base * step + (inside ? origin : 0);
        keep(tap[i]);
      }
#pragma unroll
      for (int j = 0; j <= kWide; ++j) {
        const bool inside = static_cast<unsigned>(col + mw.base + j) < static_cast<unsigned>(a.w.source);
        taps[j] = mask<scalar>(j, inside);
        keep(taps[j]);
        if (j < kWide) pixels[j] = mask<scalar>(j, true);
      }
      const bool second = row + 1 < a.h.source;
      unsigned to[kTall] = {first + place, first + place + a.w.source * size};
      keep(to[0]), keep(to[1]), keep(w0), keep(w1);
      float before[kTall][kWide] = {}, x_before[sum ? kTall : 1][kWide] = {};  // before: weighted
      Sums<float> part = {};
      wait_for_copies<0>();
      __syncwarp();
#pragma unroll 1
      for (int frame = 0, offset = 0; frame <= frames; ++frame, offset += step) {
        float now[kTall][kWide] = {}, x_now[sum ? kTall : 1][kWide] = {};
        if constexpr (sum) {
#pragma unroll
          for (int i = 0; i < kTall; ++i) {
            if (frame < frames && now_mine && (i == 0 || second)) {
              load_row<scalar>(to[i] + offset + p.bytes, pixels, x_now[i]);
            }
          }
        }
        if (now_mine && static_cast<unsigned>(base + frame) < static_cast<unsigned>(frames)) {
          float v[kTall + 1][kWide + 1];
#pragma unroll
          for (int i = 0; i <= kTall; ++i) load_row<scalar>(tap[i] + offset, taps, v[i]);
          interpolate<sum>(v, mh, mw, w1, x_before, x_now, now, part);
        }
        __syncwarp();  // all of the frame has been read
#pragma unroll
        for (int i = 0; i < kTall; ++i) {
          float out[kWide];
#pragma unroll
          for (int j = 0; j < kWide; ++j) {
            out[j] = before[i][j] + w1 * now[i][j];
            before[i][j] = w0 * now[i][j];
            if constexpr (sum) x_before[i][j] = x_now[i][j];
          }
          if (frame > 0 && now_mine && write && (i == 0 || second)) store_row<scalar>(to[i] + offset - step, out);
        }
        __syncwarp();  // rows of taps of the next frame may reach into this one, for values that they drop
      }
      if (back) part.t = -part.t;
      sums = add(sums, part, 1.0f);
    }
    __syncwarp();
    return sums;
  }
};

// The sum over the lanes of a plane, in the first of them.
__device__ inline float plane_sum(float value, int lane, int lanes) {
#pragma unroll
  for (int step = 16; step; step /= 2) {
    const float other = __shfl_down_sync(0xffffffff, value, step);
    if (lane + step < lanes) value += other;
  }
  return value;
}

template <typename scalar, bool backward>
__global__ void __launch_bounds__(32, kPackBlocks)
    shift_small_planes_kernel(const __grid_constant__ Arguments a, const __grid_constant__ Pack p) {
  wait_for_previous_kernel();
  const unsigned shared = shared_memory();
  const int lane = threadIdx.x, plane = divide(lane, p.lanes), part = lane - plane * p.lanes;
  const int patch_cols = a.w.source / kWide, line = divide(part, patch_cols);
  const bool used = plane < p.planes;
  const int item = blockIdx.x * p.planes + (used ? plane : 0);
  const int n = p.clips ? item : blockIdx.y, c = p.clips ? blockIdx.y : item;
  const int row = line * kTall, col = (part - line * patch_cols) * kWide;
  const int place = p.data + plane * p.plane + (row * a.w.source + col) * static_cast<int>(sizeof(scalar));
  const Packed<scalar> packed = {a, p, shared, n, c, row, col, used, place};

  const float* shift = static_cast<const float*>(a.shift) + c * a.shift_column;
  const int rows = a.temporal ? 3 : 2;
  const float st = a.temporal ? shift[0] : 0;
  const float sh = shift[(rows - 2) * a.shift_row], sw = shift[(rows - 1) * a.shift_row];
  packed.copy_in(a.source, shared);
  if (backward && a.need_shift) packed.copy_in(a.x, shared + p.bytes);
  commit_copies();
#pragma unroll 1
  for (int i = lane; i < a.t.source * (kZeros / 4); i += 32) {
    store_shared(shared + ((i / (kZeros / 4) * p.frame) & ~3) + i % (kZeros / 4) * 4, 0u);
  }
  const auto maps = [&](bool quantize, bool below) { return maps_of<float, backward>(a, st, sh, sw, quantize, below); };
  if constexpr (!backward) {
    packed.template walk<false, false>(maps(a.quantize, false), true, true);
  } else {
    const bool apart = a.quantize || !a.need_shift;  // as in shift_kernel; the walk that writes is the last
    if (a.need_shift) {
      const bool kink = (a.temporal && whole(a.t, st)) || whole(a.h, sh) || whole(a.w, sw);
      const float scale = kink ? 0.5f : 1;
      Sums<float> sums = {};
#pragma unroll 1
      for (int side = __any_sync(0xffffffff, kink); side >= 0; --side) {
        const bool write = a.need_x && !apart && side == 0;
        const auto part = packed.template walk<true, true>(maps(false, side), side == 0 || kink, write);
        sums = add(sums, part, scale);
      }
      sums = {plane_sum(sums.t, part, p.lanes), plane_sum(sums.h, part, p.lanes), plane_sum(sums.w, part, p.lanes)};
      if (used && part == 0) static_cast<Sums<float>*>(a.sums)[c * int64_t{a.n} + n] = sums;
    }
    if (a.need_x && apart) {
      packed.template walk<true, false>(maps(a.quantize, false), true, true);
    }
    if (!a.need_x) return;
  }
  packed.copy_out();
}

}  // namespace
}  // namespace rubiks
