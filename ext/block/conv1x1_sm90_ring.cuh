// The rings of stages in shared memory through which conv1x1_sm90.cuh reads x, and the residual or the mask: one for
// each group of warps.
#pragma once

#include "block/conv1x1.h"
#include "common/async_copy.cuh"

#include <cstdint>

namespace rubiks {
namespace {

constexpr int kGroups = 2, kGroupWarps = 4, kGroupThreads = 32 * kGroupWarps, kBlockThreads = kGroups * kGroupThreads;
constexpr int kColumns = 16 * kGroupWarps;  // of a tile
constexpr int kDepth = 32, kStages = 6;     // rows of a stage; stages of a ring
constexpr int kRowBytes = 2 * kColumns, kRowUnits = kColumns / kUnitElements, kStageBytes = kDepth * kRowBytes;

// A tile comes in parts, a stage each: for every 32 rows of x those of x, and of x2 where mixed; then for every 32 rows
// of the result those of the residual or of the mask. A thread copies its unit of 16 bytes in two rows. A row's units
// are permuted so that a matrix of 8 rows lies in different banks.
template <typename Prologue, typename Epilogue>
struct RingSm90 {
  static constexpr int kSources = Prologue::sources;
  static constexpr int kRowStep = kGroupThreads / kRowUnits;  // rows that all threads of a group copy at once
  static constexpr int kCopies = kDepth / kRowStep;           // of a thread for a stage
  static_assert(kRowStep % 8 == 0, "rows that a thread copies have the same permutation");

  const Conv1x1& a;
  const unsigned at;  // in shared memory
  const int fetch_unit, fetch_row;
  const unsigned fetch_to;
  const int chunks;              // of 32 rows of x
  const bool others;             // whether a residual or a mask is read
  const int parts_of_x, parts;  // of a tile
  const int tile_count, tile_step, first_tile;
  int next_tile, next_part = 0;
  const bfloat16* from = nullptr;  // this thread's next unit
  int left = 0;                    // rows from there on
  int stage = kStages - 1;         // the one in use, which is filled again when the next is taken

  __device__ __forceinline__ RingSm90(const Conv1x1& a, unsigned at, int group, int thread)
      : a(a), at(at), fetch_unit(thread % kRowUnits), fetch_row(thread / kRowUnits),
        fetch_to(at + fetch_row * kRowBytes + ((fetch_unit ^ (fetch_row % 8)) * 16)),
        chunks((a.k + kDepth - 1) / kDepth), others(Epilogue::masks || a.residual), parts_of_x(chunks * kSources),
        parts(parts_of_x + (others ? (a.m + kDepth - 1) / kDepth : 0)),
        tile_count(static_cast<int>((a.p + kColumns - 1) / kColumns)), tile_step(kGroups * gridDim.x),
        first_tile(kGroups * blockIdx.x + group), next_tile(first_tile) {}

  // Goes to the first rows of a source in the columns of the next tile.
  __device__ __forceinline__ void open(const bfloat16* source, int rows) {
    const int64_t column = int64_t{next_tile} * kColumns + fetch_unit * kUnitElements;
    from = source + fetch_row * a.p + column;
    left = column < a.p ? rows - fetch_row : 0;
  }

  // Starts the copy of the next part to a stage.
  __device__ __forceinline__ void fetch(int stage) {
    if (next_tile < tile_count) {
      const bfloat16* source = kSources == 2 && next_part < parts_of_x && next_part % 2 ? from + (a.x2 - a.x) : from;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const bool there = left > i * kRowStep;
        copy_async(copied(stage, i), there ? source + i * kRowStep * a.p : a.x, there);
      }
      ++next_part;
      if (next_part % kSources == 0 || next_part > parts_of_x) from += kDepth * a.p, left -= kDepth;
      if (next_part == parts) {
        next_part = 0, next_tile += tile_step;
        open(a.x, a.k);
      } else if (next_part == parts_of_x) {
        open(Epilogue::masks ? a.mask : a.residual, a.m);
      }
    }
    commit_copies();
  }

  // Where copy i of this thread goes, which is of row fetch_row + i * kRowStep of the stage.
  __device__ __forceinline__ unsigned copied(int stage, int i) const {
    return fetch_to + stage * kStageBytes + i * kRowStep * kRowBytes;
  }

  __device__ __forceinline__ void start() {
    open(a.x, a.k);
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) fetch(i);
  }

  // Goes on to the next stage, in which prepare(stage) may first change what this thread has copied. After meet(), the
  // stage must be there and all threads of the group have left the one that is filled next.
  template <typename Prepare, typename Meet>
  __device__ __forceinline__ void next_stage(const Prepare& prepare, const Meet& meet) {
    wait_for_copies<kStages - 2>();
    prepare(stage + 1 == kStages ? 0 : stage + 1);
    meet();
    fetch(stage);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
};

}  // namespace
}  // namespace rubiks
