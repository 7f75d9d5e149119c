// The learnable shift on NVIDIA GPUs: forward and backward are one kernel. shift/shift.cu plans and launches it.
//
// Both directions are the same gather. Along one axis, position j of the result reads positions j * stride + base and
// the next of the source, weighted w0 and w1. Forward, the source is x and base = floor(shift) - padding. Backward, the
// source is the upstream gradient, with stride - 1 zeros between its elements, and base = padding - floor(shift) - 1.
//
// A block makes one tile of rows and columns of one channel for all frames, for several clips where planes are small.
// It walks over the source's frames: each is copied to shared memory ahead of its use, interpolated in space once, and
// combined in time with the frame before it, which stays in registers. So x is read once and the result written once.
//
// Backward, the derivative along an axis is the difference of the same two taps, so one walk gives the gradient of x
// and, multiplied with x and summed, that of the shift. Blocks write their sums and a second kernel adds them in a
// fixed order: the same bits on every run.
#pragma once

#include "common/dependent_launch.cuh"
#include "shift/shift.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

namespace rubiks {
namespace {

constexpr int kThreads = 128;  // per block, at most
constexpr int kStages = 3;     // frames of a tile in shared memory
constexpr int kHead = 16;      // bytes of zeros before a stage's data: what a tap outside the source reads
constexpr int kSharedBytes = 48 * 1024;
// Blocks per multiprocessor that the compiler leaves registers for: with fewer, waiting shows; with more, it spills.
constexpr int kForwardBlocks = 7, kBackwardBlocks = 5;
constexpr int kBlocks = 2048, kRuns = 8;  // a block makes up to kRuns tiles in turn while that leaves kBlocks blocks

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
  bool planes;     // its rows adjoin and the tile spans their width: in units of 16 bytes; otherwise element by element
  int item_pitch;  // elements of shared memory for one clip
  int lanes;       // threads that copy one clip, where planes
  int64_t span;    // bytes from the start of a block's first window to the end of its last, whole units included
};

struct Plan {
  int tall, wide, step;              // of a thread's patch of pixels, see walk()
  int items, rows, cols;             // of a tile: clips, rows and columns of the result
  int runs;                          // tiles of consecutive clips that a block makes in turn
  int groups, row_tiles, col_tiles;  // of blocks
  int threads, stage_bytes, x_offset;
  Copy source, x;
};

struct Arguments {
  Volume source;  // (n, T, c, H, W) forward: x; backward: the upstream gradient
  Volume x;       // backward only
  void* result;   // forward: the output; backward: the gradient of x
  Strides result_strides;
  void* sums;         // (c, slots), backward only
  const void* shift;          // (rows, c)
  int64_t shift_row, shift_column;
  int n, c;
  Line t, h, w;
  bool temporal, quantize, need_x, need_shift;
  Plan plan;
};

__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline void round(float v, float* p) { *p = v; }
__device__ inline void round(double v, double* p) { *p = v; }
__device__ inline void round(float v, __half* p) { *p = __float2half_rn(v); }
__device__ inline void round(float v, __nv_bfloat16* p) { *p = __float2bfloat16_rn(v); }

// Values from shared memory, by its own 32-bit addresses: with pointers, every access works out the address space anew.
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

// 16 bytes to shared memory.
__device__ inline void copy_async(unsigned to, const char* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
#else
  const int4 v = *reinterpret_cast<const int4*>(from);
  asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
#endif
}

__device__ inline void commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int pending>
__device__ inline void wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

template <typename real>
struct Map {  // the taps of one axis: base and base + 1
  int base;
  real w0, w1;
};

// below: a whole shift i stands as (i - 1) + 1. The shift's gradient at the kink there is the mean over both forms.
template <typename real, bool backward>
__device__ inline Map<real> map_of(const Line& a, real shift, bool quantize, bool below) {
  Taps<real> t = taps(shift, a.reach, quantize);
  if (!backward) return {static_cast<int>(t.base) - a.padding, 1 - t.fraction, t.fraction};
  if (below && t.fraction == 0) t = {t.base - 1, 1};
  return {a.padding - static_cast<int>(t.base) - 1, t.fraction, 1 - t.fraction};
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

struct Tile {  // of the result
  int c, item, items, runs, row, rows, col, cols;
};

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

// A unit of 16 bytes that is partly outside the tensor.
template <typename scalar>
__device__ __noinline__ void copy_ends(unsigned to, const char* from, const Volume& v) {
  for (int i = 0; i < 16; i += sizeof(scalar)) {
    if (from + i < v.begin || from + i >= v.end) continue;
    *static_cast<scalar*>(__cvta_shared_to_generic(to + i)) = *reinterpret_cast<const scalar*>(from + i);
  }
}

// Element by element: volumes whose rows do not adjoin.
template <typename scalar>
__device__ __noinline__ void copy_elements(unsigned target, const scalar* from, const Strides* s, int items,
                                           int item_pitch, int rows, int cols) {
  scalar* to = static_cast<scalar*>(__cvta_shared_to_generic(target));
#pragma unroll 1
  for (int i = threadIdx.x; i < items * rows * cols; i += blockDim.x) {
    const int q = i % cols, r = i / cols % rows, g = i / cols / rows;
    to[g * item_pitch + r * cols + q] = from[g * s->n + r * s->h + q * s->w];
  }
}

// a / b for numbers up to a few hundred, in a third of the instructions.
__device__ inline int divide(int a, int b) { return static_cast<int>(__fdividef(a + 0.5f, b)); }

// A volume as one thread of a block reads it: a window of some clips of one channel, frame by frame, clips in turn.
template <typename scalar>
struct Reader {
  static constexpr int size = sizeof(scalar);
  // The window in the first frame of the clips at hand and in the next frame to copy. Where planes, a run of bytes is
  // copied for each clip, and these point at this thread's first unit of 16 bytes.
  const char *clip, *next;
  int clip_low, low;  // the lower bits of the same for the frame in use
  int target;         // where `next` goes in a stage, in bytes
  int bytes;          // of the run, from there on
  int inside;         // units that reach over the ends of a run stay inside the tensor
  int rows, cols;

  // frame: the first that is read.
  __device__ void open(const Volume& v, const Copy& how, const Tile& tile, int row, int row_count, int col,
                       int col_count, int frame, int offset) {
    rows = row_count, cols = col_count;
    clip = static_cast<const char*>(v.data) + (tile.c * v.strides.c + tile.item * v.strides.n + row * v.strides.h +
                                               col * v.strides.w) * size;
    inside = clip - v.begin >= 15 && v.end - clip >= how.span;
    clip += frame * v.strides.t * size;
    target = offset, bytes = 0;
    if (how.planes) {
      const int item = tile.items == 1 ? 0 : divide(threadIdx.x, how.lanes);
      const int unit = (threadIdx.x - item * how.lanes) * 16;
      clip += item * v.strides.n * size + unit;
      target += item * how.item_pitch * size + unit;
      bytes = item < tile.items ? rows * cols * size - unit : -16;  // a thread without a clip copies nothing
    }
    keep(clip), keep(target), keep(bytes), keep(inside);
    next = clip;
    low = clip_low = static_cast<int>(reinterpret_cast<uintptr_t>(clip));
  }

  // Starts the copy of the next frame of `items` clips to a stage.
  __device__ void load(unsigned stage, const Volume& v, const Copy& how, int items) {
    unsigned to = stage + target;
    if (how.planes) {
      const int before = static_cast<int>(reinterpret_cast<uintptr_t>(next)) & 15;
      const char* from = next - before;
#pragma unroll 1
      for (int left = bytes + before; left > 0; left -= how.lanes * 16) {
        if (inside || (from >= v.begin && from + 16 <= v.end)) {
          copy_async(to, from);
        } else {
          copy_ends<scalar>(to, from, v);
        }
        from += how.lanes * 16, to += how.lanes * 16;
      }
    } else {
      copy_elements(to, reinterpret_cast<const scalar*>(next), &v.strides, items, how.item_pitch, rows, cols);
    }
    next += v.strides.t * size;
  }

  // How far past a multiple of 16 bytes the runs of the frame in use start: they keep that distance in shared memory.
  __device__ int skew(const Copy& how) const { return how.planes ? low & 15 : 0; }
  __device__ void pass(const Volume& v) { low += static_cast<int>(v.strides.t) * size; }

  // The next run's clips, to copy or to use.
  __device__ void copy_next_clips(const Volume& v, int items) { next = clip += items * v.strides.n * size; }
  __device__ void use_next_clips(const Volume& v, int items) {
    low = clip_low += items * static_cast<int>(v.strides.n) * size;
  }
};

template <typename real>
struct Sums {  // the gradient of the shift
  real t, h, w;
};

// One walk over the source's frames. Writes the result where `write`, and returns this thread's part of the gradient of
// the shift if `sum`. A thread makes a patch of tall x wide pixels, which share their taps: row i of pixels reads rows
// i * step and i * step + 1 of taps. step is 1, or 2 where the gather is strided.
template <typename scalar, typename real, bool backward, bool sum, int tall, int wide, int step>
__device__ inline Sums<real> walk(const Arguments& a, const Tile& tile, const Map<real>& mt, const Map<real>& mh,
                                  const Map<real>& mw, bool write) {
  extern __shared__ __align__(16) char memory[];
  unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(memory));
  keep(shared);
  constexpr int size = sizeof(scalar), tap_rows = (tall - 1) * step + 2, tap_cols = (wide - 1) * step + 2;
  const Plan& plan = a.plan;

  const int2 h = window<backward>(a.h, mh.base, tile.row, tile.rows);
  const int2 w = plan.source.planes ? int2{0, a.w.source - 1} : window<backward>(a.w, mw.base, tile.col, tile.cols);
  const int2 t = window<backward>(a.t, mt.base, 0, a.t.result);
  Reader<scalar> source, x;
  source.open(a.source, plan.source, tile, h.x, max(h.y - h.x + 1, 0), w.x, max(w.y - w.x + 1, 0), min(t.x, t.y),
              kHead);
  if constexpr (sum) {
    x.open(a.x, plan.x, tile, tile.row, tile.rows, tile.col, tile.cols, 0, kHead + plan.x_offset);
  }

  // This thread's patch: where its taps lie in a stage, in bytes, and where its pixels go.
  const int patch_cols = (tile.cols + wide - 1) / wide, patch_rows = (tile.rows + tall - 1) / tall;
  const int line = divide(threadIdx.x, patch_cols), col = (threadIdx.x - line * patch_cols) * wide;
  const int item = divide(line, patch_rows), row = (line - item * patch_rows) * tall;
  const int rows = item < tile.items ? min(tall, tile.rows - row) : 0;  // pixel rows of the patch that there are
  const auto position = [](const Line& line, int first, int i) {        // of tap i of a patch's line of taps
    return step == 1 ? first + i : (first + i / 2) * line.stride + i % 2;
  };
  int tap[tap_rows][tap_cols];
#pragma unroll
  for (int i = 0; i < tap_rows; ++i) {
    const bool used = rows > 0 && i / step < rows + 2 - step;
    const int r = used ? locate<backward>(a.h, position(a.h, tile.row + row, i) + mh.base) : -1;
    const int line_of_taps = item * plan.source.item_pitch + (r - h.x) * source.cols - w.x;
#pragma unroll
    for (int j = 0; j < tap_cols; ++j) {
      const int q = locate<backward>(a.w, position(a.w, tile.col + col, j) + mw.base);
      tap[i][j] = r >= 0 && q >= 0 ? kHead + (line_of_taps + q) * size : 0;
    }
  }
  scalar* result = static_cast<scalar*>(a.result) + (tile.item + item) * a.result_strides.n +
                   tile.c * a.result_strides.c + (tile.row + row) * a.result_strides.h + tile.col + col;
  scalar* to = result;
  const int x_place = (item * plan.x.item_pitch + row * tile.cols + col) * size;

  constexpr int head = kHead / size;
  for (int i = threadIdx.x; i < kStages * head; i += blockDim.x) {
    round(real{0}, reinterpret_cast<scalar*>(memory + i / head * plan.stage_bytes) + i % head);
  }
  // Frame i of a clip's walk is source position mt.base + i and completes result i - 1. x of result i comes with it.
  const int frames = (a.t.result - 1) * (backward ? 1 : a.t.stride) + 2;
  int next_run = 0, next_frame = 0;  // to fetch
  const auto fetch = [&](int stage) {
    if (next_run < tile.runs) {
      const unsigned to = shared + stage * plan.stage_bytes;
      if (locate<backward>(a.t, mt.base + next_frame) >= 0) source.load(to, a.source, plan.source, tile.items);
      if constexpr (sum) {
        if (next_frame < frames - 1) x.load(to, a.x, plan.x, tile.items);
      }
      if (++next_frame == frames) {
        next_frame = 0, ++next_run;
        source.copy_next_clips(a.source, tile.items);
        if constexpr (sum) x.copy_next_clips(a.x, tile.items);
      }
    }
    commit();
  };
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) fetch(i);

  real before[tall][wide] = {}, x_before[sum ? tall : 1][wide] = {};
  Sums<real> sums = {};
  int stage = 0, run = 0, frame = 0, due = 1;
#pragma unroll 1
  while (run < tile.runs) {
    wait<kStages - 2>();
    __syncthreads();  // the frame is there, and everyone has left the stage that is filled next
    fetch(stage == 0 ? kStages - 1 : stage - 1);
    const bool read = locate<backward>(a.t, mt.base + frame) >= 0;
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
    real value[tap_rows][tap_cols];
    if (read) {
#pragma unroll
      for (int i = 0; i < tap_rows * tap_cols; ++i) {
        real one[1];
        load<scalar>(here + tap[i / tap_cols][i % tap_cols], one);
        value[i / tap_cols][i % tap_cols] = one[0];
      }
    } else {
#pragma unroll
      for (int i = 0; i < tap_rows * tap_cols; ++i) value[i / tap_cols][i % tap_cols] = 0;
    }
    // Interpolation and difference along W of one row of taps, which two rows of pixels share.
    real across[tap_rows][wide], slope[tap_rows][wide];
#pragma unroll
    for (int i = 0; i < tap_rows * wide; ++i) {
      const real* v = &value[i / wide][i % wide * step];
      across[i / wide][i % wide] = mw.w0 * v[0] + mw.w1 * v[1];
      slope[i / wide][i % wide] = v[0] - v[1];
    }
    scalar* row_to = to;
#pragma unroll
    for (int i = 0; i < tall; ++i) {
      real out[wide], x_now[wide] = {};
      if (sum && frame < frames - 1 && i < rows) {
        load<scalar>(x_here + i * tile.cols * size, x_now);
      }
#pragma unroll
      for (int j = 0; j < wide; ++j) {
        const real top = across[i * step][j], bottom = across[i * step + 1][j];
        const real now = mh.w0 * top + mh.w1 * bottom;
        out[j] = mt.w0 * before[i][j] + mt.w1 * now;
        before[i][j] = now;
        if constexpr (sum) {
          // This frame is the second tap of result frame - 1 and the first of result frame.
          const real x_step = x_now[j] - x_before[i][j], x_both = x_now[j] - mt.w1 * x_step;
          sums.t += now * x_step;
          sums.h += (top - bottom) * x_both;
          sums.w += (mh.w0 * slope[i * step][j] + mh.w1 * slope[i * step + 1][j]) * x_both;
          x_before[i][j] = x_now[j];
        }
      }
      if (complete && write && i < rows) store(row_to, out);
      row_to += a.result_strides.h;
    }
    if (complete) to += a.result_strides.t, due += a.t.stride;
    if (++stage == kStages) stage = 0;
    if (++frame == frames) {
      frame = 0, due = 1, ++run;
      to = result += tile.items * a.result_strides.n;
      source.use_next_clips(a.source, tile.items);
      if constexpr (sum) {
        x.use_next_clips(a.x, tile.items);
#pragma unroll
        for (int i = 0; i < tall * wide; ++i) x_before[i / wide][i % wide] = 0;
      }
    }
  }
  wait<0>();
  __syncthreads();  // the next walk reuses the stages
  return sums;
}

// The gradient of the shift is the mean over both sides of a kink, which `scale` makes it.
template <typename real>
__device__ inline Sums<real> add(const Sums<real>& a, const Sums<real>& b, real scale) {
  return {a.t + b.t * scale, a.h + b.h * scale, a.w + b.w * scale};
}

template <typename real>
__device__ inline real block_sum(real value) {
  __shared__ real parts[kThreads / 32];
  for (int step = 16; step; step /= 2) value += __shfl_down_sync(0xffffffff, value, step);
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
  wait_for_kernel_before();
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
  const auto map = [&](const Line& line, real s, bool quantize, bool below) {
    return map_of<real, backward>(line, s, quantize, below);
  };
  if constexpr (!backward) {
    walk<scalar, real, false, false, tall, wide, step>(
        a, tile, map(a.t, st, a.quantize, false), map(a.h, sh, a.quantize, false), map(a.w, sw, a.quantize, false),
        true);
  } else {
    // The gradient of x is that of the rounding, the gradient of the shift that of the interpolation: one walk where
    // both are the same, and one more for the other side of a kink.
    const bool apart = a.quantize || !a.need_shift;
    if (a.need_x && apart) {
      walk<scalar, real, true, false, tall, wide, step>(
          a, tile, map(a.t, st, a.quantize, false), map(a.h, sh, a.quantize, false), map(a.w, sw, a.quantize, false),
          true);
    }
    if (!a.need_shift) return;
    const bool kink = (a.temporal && whole(a.t, st)) || whole(a.h, sh) || whole(a.w, sw);
    const real scale = kink ? 0.5 : 1;
    Sums<real> sums = {};
#pragma unroll 1
    for (int side = 0; side <= kink; ++side) {
      sums = add(sums, walk<scalar, real, true, true, tall, wide, step>(
                           a, tile, map(a.t, st, false, side), map(a.h, sh, false, side), map(a.w, sw, false, side),
                           a.need_x && !apart && side == 0), scale);
    }
    sums = {block_sum(sums.t), block_sum(sums.h), block_sum(sums.w)};
    if (threadIdx.x == 0) {
      const int64_t slots = int64_t{plan.groups} * tiles;
      static_cast<Sums<real>*>(a.sums)[c * slots + group * tiles + index] = sums;
    }
  }
}

// One warp per channel adds the sums of its tiles. sums (c, slots), grad (rows, c).
template <typename real>
__global__ void sum_kernel(const Sums<real>* sums, real* grad, int c, int64_t slots, bool temporal) {
  wait_for_kernel_before();
  const int channel = blockIdx.x;
  double total[3] = {};
  for (int64_t i = threadIdx.x; i < slots; i += 32) {
    const Sums<real> part = sums[channel * slots + i];
    total[0] += part.t, total[1] += part.h, total[2] += part.w;
  }
  for (int i = 0; i < 3; ++i) {
    for (int step = 16; step; step /= 2) total[i] += __shfl_down_sync(0xffffffff, total[i], step);
  }
  if (threadIdx.x) return;
  if (temporal) grad[channel] = total[0];
  grad[(temporal ? 1 : 0) * c + channel] = total[1];
  grad[(temporal ? 2 : 1) * c + channel] = total[2];
}

}  // namespace
}  // namespace rubiks
