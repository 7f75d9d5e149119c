// The ring of stages in shared memory through which conv1x1_sm80.cuh reads x, and the residual or the mask.
#pragma once

#include "block/conv1x1.h"
#include "common/async_copy.cuh"

#include <cstdint>

namespace rubiks {
namespace {

constexpr int kColumns = 128;  // of a tile
constexpr int kDepth = 32;     // rows of a stage
constexpr int kRowBytes = kColumns * 2, kStageBytes = kDepth * kRowBytes;

// How the work is divided: a warp makes 16 * row_tiles rows and 8 * column_tiles columns.
template <int row_tiles_, int column_tiles_, int stages_, int blocks_>
struct Shape {
  static constexpr int row_tiles = row_tiles_, column_tiles = column_tiles_, stages = stages_;
  static constexpr int blocks = blocks_;  // of a multiprocessor
  static constexpr int rows = 16 * row_tiles, warps = kColumns / (8 * column_tiles), threads = 32 * warps;
};

// A tile comes in parts, a stage each: for every 32 rows of x those of x, and of x2 where mixed; then for every 32 rows
// of the result those of the residual or of the mask. A thread copies its unit of 16 bytes in rows fetch_row, fetch_row
// + kRowStep, ... A row's units are permuted so that a matrix of 8 rows lies in different banks.
template <typename Prologue, typename Epilogue, typename Shape>
struct RingSm80 {
  static constexpr int kRows = Shape::rows, kStages = Shape::stages, kSources = Prologue::sources;
  static constexpr int kUnits = kColumns / 8, kRowStep = Shape::threads / kUnits;  // of what all threads copy at once
  static constexpr int kCopies = kDepth / kRowStep;                               // of a thread for a stage
  static_assert(kRowStep % 8 == 0, "rows that a thread copies have the same permutation");

  const Conv1x1& a;
  const unsigned at;  // in shared memory
  const int first_row, first_tile, tile_step, tile_count;
  const int fetch_unit, fetch_row;
  const unsigned fetch_to;
  const int chunks, parts;  // of 32 rows of x; of a tile
  int next_tile, next_part = 0;
  int stage = kStages - 1;  // the one in use, which is filled again when the next is taken

  __device__ __forceinline__ RingSm80(const Conv1x1& a, unsigned at)
      : a(a), at(at), first_row(blockIdx.x % a.slices * kRows), first_tile(blockIdx.x / a.slices),
        tile_step(gridDim.x / a.slices), tile_count(static_cast<int>((a.p + kColumns - 1) / kColumns)),
        fetch_unit(threadIdx.x % kUnits), fetch_row(threadIdx.x / kUnits),
        fetch_to(at + fetch_row * kRowBytes + ((fetch_unit ^ (fetch_row % 8)) * 16)),
        chunks((a.k + kDepth - 1) / kDepth),
        parts(chunks * kSources + (a.residual || Epilogue::masks ? (kRows + kDepth - 1) / kDepth : 0)),
        next_tile(first_tile) {}

  // Starts the copy of the next part to a stage.
  __device__ __forceinline__ void fetch(int stage) {
    if (next_tile < tile_count) {
      const int64_t column = int64_t{next_tile} * kColumns + fetch_unit * 8;
      const bfloat16* source = kSources == 2 && next_part % 2 ? a.x2 : a.x;
      int row = next_part / kSources * kDepth, end = a.k;
      if (next_part >= chunks * kSources) {
        source = Epilogue::masks ? a.mask : a.residual;
        row = first_row + (next_part - chunks * kSources) * kDepth;
        end = min(first_row + kRows, a.m);
      }
      if (column >= a.p) end = 0;
      row += fetch_row;
      const bfloat16* from = source + row * a.p + column;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const bool there = row + i * kRowStep < end;
        copy_async(copied(stage, i), there ? from + i * kRowStep * a.p : source, there);
      }
      if (++next_part == parts) next_part = 0, next_tile += tile_step;
    }
    commit_copies();
  }

  // Where copy i of this thread goes, which is of row fetch_row + i * kRowStep of the stage.
  __device__ __forceinline__ unsigned copied(int stage, int i) const {
    return fetch_to + stage * kStageBytes + i * kRowStep * kRowBytes;
  }

  __device__ __forceinline__ void start() {
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) fetch(i);
  }

  // Goes on to the next stage, in which prepare(stage) may first change what this thread has copied.
  template <typename F>
  __device__ __forceinline__ void next_stage(const F& prepare) {
    wait_for_copies<kStages - 2>();
    prepare(stage + 1 == kStages ? 0 : stage + 1);
    __syncthreads();  // the stage is there, and all threads have left the one that is filled next
    fetch(stage);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }

  __device__ __forceinline__ void next_stage() {
    next_stage([](int) {});
  }
};

}  // namespace
}  // namespace rubiks
