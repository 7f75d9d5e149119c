// How conv1x1_sm90.cuh divides the work, and the parts in which a group of its warps reads a tile.
#pragma once

#include "block/conv1x1_ring.cuh"
#include "common/tensor_cores_sm90.cuh"

#include <cstdint>

namespace rubiks {
namespace {

constexpr int kGroups = 2, kGroupWarps = 4, kGroupThreads = 32 * kGroupWarps, kBlockThreads = kGroups * kGroupThreads;
constexpr int kColumns = 16 * kGroupWarps;  // of a tile
constexpr int kStages = 6;                  // of a group's ring
constexpr int kMaxM = 288, kMaxK = 288;     // of the weight
constexpr int kHalf = kMaxM / 2;            // rows of y that one instruction makes
static_assert(kHalf == kProductRows);
constexpr int kBatches = kMaxM / kDepth;      // of rows of y that a warp writes at a time
constexpr int kBatchBytes = kDepth * 16 * 2;  // of these rows and a warp's columns

using RingSm90 = Ring<kColumns, kGroupThreads, kStages>;

// The address of the next part is kept and advanced, not computed for each part: there are registers for it.
template <typename Prologue, typename Epilogue>
struct PartsSm90 : Parts {
  static constexpr int kSources = Prologue::sources;

  const int row, unit;             // the thread's first of a part
  const bfloat16* from = nullptr;  // there, in the next part
  int left = 0;                    // rows of the source from there on

  __device__ __forceinline__ PartsSm90(const Conv1x1& a, int group, const RingSm90& ring)
      : Parts(a, kSources, Epilogue::masks, a.m, kColumns, kGroups * blockIdx.x + group, kGroups * gridDim.x),
        row(ring.fetch_row), unit(ring.fetch_unit) {
    open(a.x, a.k);
  }

  // Moves to the first rows of a source in the columns of the next tile.
  __device__ __forceinline__ void open(const bfloat16* source, int rows) {
    const int64_t column = int64_t{next_tile} * kColumns + unit * kUnitElements;
    from = source + row * a.p + column;
    left = column < a.p ? rows - row : 0;
  }

  // Starts the copy of the next part to a stage.
  __device__ __forceinline__ void fetch(const RingSm90& ring, int stage) {
    if (next_tile < tile_count) {
      const bfloat16* source = kSources == 2 && next_part < of_x && next_part % 2 ? from + (a.x2 - a.x) : from;
#pragma unroll
      for (int i = 0; i < ring.kCopies; ++i) {
        const bool there = left > i * ring.kRowStep;
        copy_async(ring.copied(stage, i), there ? source + i * ring.kRowStep * a.p : a.x, there);
      }
      ++next_part;
      if (next_part % kSources == 0 || next_part > of_x) from += kDepth * a.p, left -= kDepth;
      if (next_part == count) {
        next_part = 0, next_tile += tile_step;
        open(a.x, a.k);
      } else if (next_part == of_x) {
        open(Epilogue::masks ? a.mask : a.residual, a.m);
      }
    }
    commit_copies();
  }
};

}  // namespace
}  // namespace rubiks
