// How both kernels of the 1x1 convolution read x, and the residual or the mask: asynchronous copies bring one part of a
// tile after another to the stages of a ring in shared memory, ahead of their use.
#pragma once

#include "block/conv1x1.h"
#include "common/async_copy.cuh"

#include <cstdint>

namespace rubiks {
namespace {

constexpr int kDepth = 32;  // rows of a part

// The parts of a tile, each for one stage: for every 32 rows of x those of x and, with Mix, those of x2; then, for
// every 32 rows of y, those of the residual or the mask.
struct Parts {
  const Conv1x1& a;
  const int first_tile, tile_step, tile_count;
  const int chunks;       // of 32 rows of x
  const bool others;      // whether a residual or a mask is read
  const int of_x, count;  // parts of a tile: from x and x2, and in all
  int next_tile, next_part = 0;

  // rows: of y in a tile.
  __device__ __forceinline__ Parts(const Conv1x1& a, int sources, bool masks, int rows, int columns, int first_tile,
                                   int tile_step)
      : a(a), first_tile(first_tile), tile_step(tile_step),
        tile_count(static_cast<int>((a.p + columns - 1) / columns)), chunks((a.k + kDepth - 1) / kDepth),
        others(masks || a.residual), of_x(chunks * sources),
        count(of_x + (others ? (rows + kDepth - 1) / kDepth : 0)), next_tile(first_tile) {}
};

// A thread copies its unit of 16 bytes in rows fetch_row, fetch_row + kRowStep, ... of a part. Unit u of row r is
// stored at unit u ^ (r % 8), so that a matrix of 8 rows lies in different banks.
template <int columns, int threads, int stages>
struct Ring {
  static constexpr int kRowBytes = 2 * columns, kRowUnits = columns / kUnitElements;
  static constexpr int kStageBytes = kDepth * kRowBytes, kBytes = stages * kStageBytes;
  static constexpr int kRowStep = threads / kRowUnits;  // rows that all threads copy at once
  static constexpr int kCopies = kDepth / kRowStep;     // of a thread for a stage
  static_assert(kRowStep % 8 == 0, "rows that a thread copies have the same permutation");

  const unsigned at;  // in shared memory
  const int fetch_unit, fetch_row;
  const unsigned fetch_to;  // where the first copy to stage 0 goes
  int stage = stages - 1;   // the one in use, which is filled again when the next is taken

  __device__ __forceinline__ Ring(unsigned at, unsigned thread)
      : at(at), fetch_unit(thread % kRowUnits), fetch_row(thread / kRowUnits),
        fetch_to(at + fetch_row * kRowBytes + ((fetch_unit ^ (fetch_row % 8)) * 16)) {}

  // Where copy i of this thread goes, which is of row fetch_row + i * kRowStep of the stage.
  __device__ __forceinline__ unsigned copied(int stage, int i) const {
    return fetch_to + stage * kStageBytes + i * kRowStep * kRowBytes;
  }

  template <typename P>
  __device__ __forceinline__ void start(P& parts) {
#pragma unroll 1
    for (int i = 0; i < stages - 1; ++i) parts.fetch(*this, i);
  }

  // Moves to the next stage. After meet(), it must be complete, and all threads must have left the one that is filled
  // next.
  template <typename P, typename Meet>
  __device__ __forceinline__ void next_stage(P& parts, const Meet& meet) {
    wait_for_copies<stages - 2>();
    meet();
    parts.fetch(*this, stage);
    stage = stage + 1 == stages ? 0 : stage + 1;
  }
};

}  // namespace
}  // namespace rubiks
