// Copies of a volume's part of a tile from global to shared memory, frame by frame.
#pragma once

#include "common/async_copy.cuh"
#include "shift/gather.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace rubiks {
namespace {

struct Tile {  // of the result
  int c, item, items, runs, row, rows, col, cols;
};

// A unit of 16 bytes that is partly outside the tensor.
template <typename scalar>
__device__ __noinline__ void copy_ends(unsigned to, const char* from, const Volume& v) {
  for (int i = 0; i < 16; i += sizeof(scalar)) {
    if (from + i < v.begin || from + i >= v.end) continue;
    *static_cast<scalar*>(__cvta_shared_to_generic(to + i)) = *reinterpret_cast<const scalar*>(from + i);
  }
}

// Element by element: for volumes whose rows are not adjacent.
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

// A volume as one thread of a block reads it: a window of some clips of one channel, frame by frame, one clip after the
// other.
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

}  // namespace
}  // namespace rubiks
