// The shift of planes of any size; forward and backward are one kernel.
//
// A block makes one tile of rows and columns of one channel for all frames, for several clips where planes are small.
// It walks over the source's frames: each is copied to shared memory ahead of its use, interpolated in space once, and
// combined in time with the frame before it, which stays in registers. So x is read once and the result written once.
#pragma once

#include "shift/tile_reader.cuh"

namespace rubiks {
namespace {

constexpr int kThreads = 128;  // per block, at most
constexpr int kStages = 3;     // frames of a tile in shared memory
constexpr int kHead = 16;      // bytes of zeros before a stage's data: what a tap outside the source reads
constexpr int kSharedBytes = 48 * 1024;                        // of a block, without asking for more
constexpr int kSumBytes = kThreads / 32 * sizeof(double);  // of them for block_sum()
// Blocks per multiprocessor that the compiler leaves registers for: with fewer, latency shows; with more, it spills.
constexpr int kForwardBlocks = 7, kBackwardBlocks = 5;
constexpr int kBlocks = 2048, kRuns = 8;  // a block makes up to kRuns tiles where that leaves kBlocks blocks

__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline void round(float v, float* p) { *p = v; }
__device__ inline void round(double v, double* p) { *p = v; }
__device__ inline void round(float v, __half* p) { *p = __float2half_rn(v); }
__device__ inline void round(float v, __nv_bfloat16* p) { *p = __float2bfloat16_rn(v); }

// Values from shared memory, by 32-bit addresses: with pointers, every access has to work out the address space.
template <typename scalar, typename real, int wide>
__device__ inline void load(unsigned address, real (&v)[wide]) {
  if constexpr (sizeof(scalar) == 8) {
    asm volatile("ld.shared.f64 %0, [%1];" : "=d"(v[0]) : "r"(address));
  } else if constexpr (sizeof(scalar) == 4) {
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v[0]) : "r"(address));
  } else {
    unsigned short bits[wide];
    if constexpr (wide == 1) {
      asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits[0]) : "r"(address));
    } else {
      asm volatile("ld.shared.v2.u16 {%0, %1}, [%2];" : "=h"(bits[0]), "=h"(bits[1]) : "r"(address));
    }
#pragma unroll
    for (int j = 0; j < wide; ++j) v[j] = to_float(reinterpret_cast<const scalar&>(bits[j]));
  }
}

template <typename scalar, typename real, int wide>
__device__ inline void store(scalar* p, const real (&v)[wide]) {
  struct alignas(sizeof(scalar) * wide) {
    scalar values[wide];
  } packed;
#pragma unroll
  for (int j = 0; j < wide; ++j) round(v[j], &packed.values[j]);
  *reinterpret_cast<decltype(packed)*>(p) = packed;
}

// A thread's patch of tall x wide pixels of a tile. They share their taps: row i of pixels reads rows i * step and
// i * step + 1 of taps. step is 1, or 2 where the gather is strided.
template <bool backward, int tall, int wide, int step>
struct Patch {
  static constexpr int tap_rows = (tall - 1) * step + 2, tap_cols = (wide - 1) * step + 2;

  int item, row, col;  // of the tile
  int rows;            // of pixels inside the result

  __device__ Patch(const Tile& tile) {
    const int patch_cols = (tile.cols + wide - 1) / wide, patch_rows = (tile.rows + tall - 1) / tall;
    const int line = divide(threadIdx.x, patch_cols);
    col = (threadIdx.x - line * patch_cols) * wide;
    item = divide(line, patch_rows), row = (line - item * patch_rows) * tall;
    rows = item < tile.items ? min(tall, tile.rows - row) : 0;
  }

  // Where the taps lie in a stage, in bytes. The stage holds a window of the source from first_row and first_col on,
  // with rows of `pitch` elements of `size` bytes.
  __device__ void find_taps(int (&tap)[tap_rows][tap_cols], const Arguments& a, const Tile& tile, int base_h,
                            int base_w, int first_row, int first_col, int pitch, int size) const {
    const auto position = [](const Line& line, int first, int i) {  // of tap i of a patch's line of taps
      return step == 1 ? first + i : (first + i / 2) * line.stride + i % 2;
    };
#pragma unroll
    for (int i = 0; i < tap_rows; ++i) {
      const bool used = rows > 0 && i / step < rows + 2 - step;
      const int r = used ? locate<backward>(a.h, position(a.h, tile.row + row, i) + base_h) : -1;
      const int line_of_taps = item * a.plan.source.item_pitch + (r - first_row) * pitch - first_col;
#pragma unroll
      for (int j = 0; j < tap_cols; ++j) {
        const int q = locate<backward>(a.w, position(a.w, tile.col + col, j) + base_w);
        tap[i][j] = r >= 0 && q >= 0 ? kHead + (line_of_taps + q) * size : 0;
      }
    }
  }
};

// What a thread keeps from frame to frame: the previous frame, interpolated in space, and the gradient of the shift.
template <typename real, bool sum, int tall, int wide, int step>
struct PatchState {
  real before[tall][wide] = {}, x_before[sum ? tall : 1][wide] = {};
  Sums<real> sums = {};

  // Adds the taps of the next frame. load_x(i, row) reads row i of x's pixels, which holds zeros; store(i, row) writes
  // row i of the result.
  template <int tap_rows, int tap_cols, typename Load, typename Store>
  __device__ void add(const real (&value)[tap_rows][tap_cols], const Maps<real>& maps, const Load& load_x,
                      const Store& store) {
    const auto& [t, h, w] = maps;
    // Interpolation and difference along W of one row of taps, which two rows of pixels share.
    real across[tap_rows][wide], slope[tap_rows][wide];
#pragma unroll
    for (int i = 0; i < tap_rows * wide; ++i) {
      const real* v = &value[i / wide][i % wide * step];
      across[i / wide][i % wide] = w.w0 * v[0] + w.w1 * v[1];
      slope[i / wide][i % wide] = v[0] - v[1];
    }
#pragma unroll
    for (int i = 0; i < tall; ++i) {
      real out[wide], x_now[wide] = {};
      if (sum) load_x(i, x_now);
#pragma unroll
      for (int j = 0; j < wide; ++j) {
        const real top = across[i * step][j], bottom = across[i * step + 1][j];
        const real now = h.w0 * top + h.w1 * bottom;
        out[j] = t.w0 * before[i][j] + t.w1 * now;
        before[i][j] = now;
        if constexpr (sum) {
          // This frame is the second tap of result frame - 1 and the first of result frame.
          const real x_step = x_now[j] - x_before[i][j], x_both = x_now[j] - t.w1 * x_step;
          sums.t += now * x_step;
          sums.h += (top - bottom) * x_both;
          sums.w += (h.w0 * slope[i * step][j] + h.w1 * slope[i * step + 1][j]) * x_both;
          x_before[i][j] = x_now[j];
        }
      }
      store(i, out);
    }
  }

  // Starts x of the next clip.
  __device__ void clear_x() {
#pragma unroll
    for (int i = 0; i < tall * wide; ++i) x_before[i / wide][i % wide] = 0;
  }
};

// One walk over the source's frames. Writes the result where `write`, and returns this thread's part of the gradient of
// the shift if `sum`.
template <typename scalar, typename real, bool backward, bool sum, int tall, int wide, int step>
__device__ inline Sums<real> walk(const Arguments& a, const Tile& tile, const Maps<real>& maps, bool write) {
  extern __shared__ __align__(16) char stages[];
  unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(stages));
  keep(shared);
  constexpr int size = sizeof(scalar);
  const Plan& plan = a.plan;

  const int2 h = window<backward>(a.h, maps.h.base, tile.row, tile.rows);
  const int2 w = plan.source.planes ? int2{0, a.w.source - 1} : window<backward>(a.w, maps.w.base, tile.col, tile.cols);
  const int2 t = window<backward>(a.t, maps.t.base, 0, a.t.result);
  Reader<scalar> source, x;
  source.open(a.source, plan.source, tile, h.x, max(h.y - h.x + 1, 0), w.x, max(w.y - w.x + 1, 0), min(t.x, t.y),
              kHead);
  if constexpr (sum) {
    x.open(a.x, plan.x, tile, tile.row, tile.rows, tile.col, tile.cols, 0, kHead + plan.x_offset);
  }
  using Pixels = Patch<backward, tall, wide, step>;
  const Pixels patch(tile);
  int tap[Pixels::tap_rows][Pixels::tap_cols];
  patch.find_taps(tap, a, tile, maps.h.base, maps.w.base, h.x, w.x, source.cols, size);
  const int rows = patch.rows;
  scalar* result = static_cast<scalar*>(a.result) + (tile.item + patch.item) * a.result_strides.n +
                   tile.c * a.result_strides.c + (tile.row + patch.row) * a.result_strides.h + tile.col + patch.col;
  scalar* to = result;
  const int x_place = (patch.item * plan.x.item_pitch + patch.row * tile.cols + patch.col) * size;

  constexpr int head = kHead / size;
  for (int i = threadIdx.x; i < kStages * head; i += blockDim.x) {
    round(real{0}, reinterpret_cast<scalar*>(stages + i / head * plan.stage_bytes) + i % head);
  }
  // Frame i of a clip's walk is source position base + i and completes result i - 1. x of result i comes with it.
  const int frames = (a.t.result - 1) * (backward ? 1 : a.t.stride) + 2;
  int next_run = 0, next_frame = 0;  // to fetch
  const auto fetch = [&](int stage) {
    if (next_run < tile.runs) {
      const unsigned to = shared + stage * plan.stage_bytes;
      if (locate<backward>(a.t, maps.t.base + next_frame) >= 0) source.load(to, a.source, plan.source, tile.items);
      if constexpr (sum) {
        if (next_frame < frames - 1) x.load(to, a.x, plan.x, tile.items);
      }
      if (++next_frame == frames) {
        next_frame = 0, ++next_run;
        source.copy_next_clips(a.source, tile.items);
        if constexpr (sum) x.copy_next_clips(a.x, tile.items);
      }
    }
    commit_copies();
  };
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) fetch(i);

  PatchState<real, sum, tall, wide, step> state;
  int stage = 0, run = 0, frame = 0, due = 1;
#pragma unroll 1
  while (run < tile.runs) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // the frame is complete, and all threads have left the stage that is filled next
    fetch(stage == 0 ? kStages - 1 : stage - 1);
    const bool read = locate<backward>(a.t, maps.t.base + frame) >= 0;
    unsigned here = shared + stage * plan.stage_bytes;
    unsigned x_here = here + kHead + plan.x_offset + x_place;
    if (read) {
      here += source.skew(plan.source);
      source.pass(a.source);
    }
    if constexpr (sum) {
      x_here += x.skew(plan.x);
      x.pass(a.x);
    }
    const bool complete = backward ? frame > 0 : frame == due;
    real value[Pixels::tap_rows][Pixels::tap_cols];
    constexpr int cols = Pixels::tap_cols, taps = Pixels::tap_rows * cols;
    if (read) {
#pragma unroll
      for (int i = 0; i < taps; ++i) {
        real one[1];
        load<scalar>(here + tap[i / cols][i % cols], one);
        value[i / cols][i % cols] = one[0];
      }
    } else {
#pragma unroll
      for (int i = 0; i < taps; ++i) value[i / cols][i % cols] = 0;
    }
    scalar* row_to = to;
    state.add(
        value, maps,
        [&](int i, real(&x_now)[wide]) {
          if (frame < frames - 1 && i < rows) load<scalar>(x_here + i * tile.cols * size, x_now);
        },
        [&](int i, const real(&out)[wide]) {
          if (complete && write && i < rows) store(row_to, out);
          row_to += a.result_strides.h;
        });
    if (complete) to += a.result_strides.t, due += a.t.stride;
    if (++stage == kStages) stage = 0;
    if (++frame == frames) {
      frame = 0, due = 1, ++run;
      to = result += tile.items * a.result_strides.n;
      source.use_next_clips(a.source, tile.items);
      if constexpr (sum) {
        x.use_next_clips(a.x, tile.items);
        state.clear_x();
      }
    }
  }
  wait_for_copies<0>();
  __syncthreads();  // the next walk reuses the stages
  return state.sums;
}

template <typename real>
__device__ inline real block_sum(real value) {
  __shared__ real parts[kThreads / 32];
  value = warp_sum(value);
  __syncthreads();  // an earlier sum has been read
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0;
  for (int i = 0; i < static_cast<int>(blockDim.x) / 32; ++i) value += parts[i];
  return value;
}

template <typename scalar, typename real, bool backward, int tall, int wide, int step>
__global__ void __launch_bounds__(kThreads, sizeof(real) > 4 ? 1 : backward ? kBackwardBlocks : kForwardBlocks)
    shift_kernel(const __grid_constant__ Arguments a) {
  wait_for_previous_kernel();
  const Plan& plan = a.plan;
  const unsigned tiles = plan.row_tiles * plan.col_tiles;
  const unsigned rest = tiles == 1 ? blockIdx.x : blockIdx.x / tiles, index = blockIdx.x - rest * tiles;
  const int c = rest % a.c, group = rest / a.c;
  const int item = group * plan.items * plan.runs;
  const int row = index / plan.col_tiles * plan.rows, col = index % plan.col_tiles * plan.cols;
  const int items = min(plan.items, a.n - item);
  const Tile tile = {c,   item, items, min(plan.runs, (a.n - item) / items),
                     row, min(plan.rows, a.h.result - row),
                     col, min(plan.cols, a.w.result - col)};

  const real* shift = static_cast<const real*>(a.shift) + c * a.shift_column;
  const int rows = a.temporal ? 3 : 2;
  const real st = a.temporal ? shift[0] : 0;
  const real sh = shift[(rows - 2) * a.shift_row], sw = shift[(rows - 1) * a.shift_row];
  const auto maps = [&](bool quantize, bool below) { return maps_of<real, backward>(a, st, sh, sw, quantize, below); };
  if constexpr (!backward) {
    walk<scalar, real, false, false, tall, wide, step>(a, tile, maps(a.quantize, false), true);
  } else {
    // The gradient of x is that of the rounding, the gradient of the shift that of the interpolation: one walk where
    // both are the same, and one more for the other side of a kink.
    const bool apart = a.quantize || !a.need_shift;
    if (a.need_x && apart) {
      walk<scalar, real, true, false, tall, wide, step>(a, tile, maps(a.quantize, false), true);
    }
    if (!a.need_shift) return;
    const bool kink = (a.temporal && whole(a.t, st)) || whole(a.h, sh) || whole(a.w, sw);
    const real scale = kink ? 0.5 : 1;
    Sums<real> sums = {};
#pragma unroll 1
    for (int side = 0; side <= kink; ++side) {
      const bool write = a.need_x && !apart && side == 0;
      sums = add(sums, walk<scalar, real, true, true, tall, wide, step>(a, tile, maps(false, side), write), scale);
    }
    sums = {block_sum(sums.t), block_sum(sums.h), block_sum(sums.w)};
    if (threadIdx.x == 0) {
      const int64_t slots = int64_t{plan.groups} * tiles;
      static_cast<Sums<real>*>(a.sums)[c * slots + group * tiles + index] = sums;
    }
  }
}

}  // namespace
}  // namespace rubiks
