// How conv1x1_sm80.cuh divides the work, and the parts in which it reads a tile.
#pragma once

#include "block/conv1x1_ring.cuh"

#include <cstdint>

namespace rubiks {
namespace {

constexpr int kColumns = 128;  // of a tile

// How the work is divided: a warp makes 16 * row_tiles rows and 8 * column_tiles columns.
template <int row_tiles_, int column_tiles_, int stages_, int blocks_>
struct Shape {
  static constexpr int row_tiles = row_tiles_, column_tiles = column_tiles_, stages = stages_;
  static constexpr int blocks = blocks_;  // of a multiprocessor
  static constexpr int rows = 16 * row_tiles, warps = kColumns / (8 * column_tiles), threads = 32 * warps;
};

template <typename Shape>
using RingSm80 = Ring<kColumns, Shape::threads, Shape::stages>;

// The address of the next part is computed from its number: registers are short.
template <typename Prologue, typename Epilogue, typename Shape>
struct PartsSm80 : Parts {
  static constexpr int kRows = Shape::rows, kSources = Prologue::sources;

  const int first_row;  // of this block's slice

  __device__ __forceinline__ explicit PartsSm80(const Conv1x1& a)
      : Parts(a, kSources, Epilogue::masks, kRows, kColumns, blockIdx.x / a.slices, gridDim.x / a.slices),
        first_row(blockIdx.x % a.slices * kRows) {}

  // Starts the copy of the next part to a stage.
  __device__ __forceinline__ void fetch(const RingSm80<Shape>& ring, int stage) {
    if (next_tile < tile_count) {
      const int64_t column = int64_t{next_tile} * kColumns + ring.fetch_unit * kUnitElements;
      const bfloat16* source = kSources == 2 && next_part % 2 ? a.x2 : a.x;
      int row = next_part / kSources * kDepth, end = a.k;
      if (next_part >= of_x) {
        source = Epilogue::masks ? a.mask : a.residual;
        row = first_row + (next_part - of_x) * kDepth;
        end = min(first_row + kRows, a.m);
      }
      if (column >= a.p) end = 0;
      row += ring.fetch_row;
      const bfloat16* from = source + row * a.p + column;
#pragma unroll
      for (int i = 0; i < ring.kCopies; ++i) {
        const bool there = row + i * ring.kRowStep < end;
        copy_async(ring.copied(stage, i), there ? from + i * ring.kRowStep * a.p : source, there);
      }
      if (++next_part == count) next_part = 0, next_tile += tile_step;
    }
    commit_copies();
  }
};

}  // namespace
}  // namespace rubiks
