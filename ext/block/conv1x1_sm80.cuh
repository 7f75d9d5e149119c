// Matrix products of 1x1 convolutions on NVIDIA GPUs from compute capability 8.0 on. block/conv1x1_sm80.cu plans and launches
// them.
//
// A block keeps the weight of up to 16 * tiles rows in shared memory and goes over tiles of 128 columns. x streams
// through a ring of stages, 32 rows of a tile each, copied ahead of their use. A warp multiplies all of the block's
// rows with 32 columns by tensor cores (mma.m16n8k16), so f is applied to each element once, in registers. Results are
// exchanged between neighbouring threads, which then write 8 bytes each.
#pragma once

#include "block/attention.cuh"
#include "block/conv1x1.h"

#include <cstdint>

namespace rubiks {
namespace {

constexpr int kColumns = 128;  // of a tile
constexpr int kDepth = 32;     // rows of a stage
constexpr int kRowBytes = kColumns * 2, kStageBytes = kDepth * kRowBytes;

// How the work is divided: a warp makes 16 * rows rows and 8 * columns columns.
template <int rows_, int columns_, int stages_, int blocks_>
struct Shape {
  static constexpr int rows = rows_, columns = columns_, stages = stages_, blocks = blocks_;
  static constexpr int warps = kColumns / (8 * columns), threads = 32 * warps, all_rows = 16 * rows;
  template <Start start, Ending ending>
  static size_t shared_bytes(int k) {
    const int depth = (k + 15) / 16 * 16, floats = ending == Ending::plain ? 1 : 2 * warps;
    return stages * kStageBytes + all_rows * depth * 2 + (kCoefficients<start> * depth + all_rows * floats) * 4;
  }
};

// Sum over four threads.
__device__ inline float quad_sum(float v) {
  v += __shfl_xor_sync(0xffffffff, v, 1);
  return v + __shfl_xor_sync(0xffffffff, v, 2);
}

template <typename shape, Start start, Ending ending>
__global__ void __launch_bounds__(shape::threads, shape::blocks) kernel(const __grid_constant__ Pointwise a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  extern __shared__ __align__(128) char memory[];
  constexpr int kRows = shape::all_rows, kThreads = shape::threads, kWarps = shape::warps, kStages = shape::stages;
  constexpr int kTiles = shape::columns;  // of 8 columns, of a warp
  const int depth = (a.k + 15) / 16 * 16;  // K in whole steps
  const int pitch = depth * 2;             // bytes of a row of the weight
  // Units of 16 bytes of a row of the weight are permuted so that any 8 rows of one unit lie in different banks.
  const int spread = (depth / 8) % 8 == 0 ? 8 : (depth / 8) % 4 == 0 ? 4 : 2;
  const auto permuted = [&](int row, int unit) { return unit ^ (row % 8 * spread / 8); };
  char* const weight = memory + kStages * kStageBytes;
  const unsigned ring_at = shared_memory(), weights_at = ring_at + kStages * kStageBytes;
  [[maybe_unused]] const unsigned coefficients_at = weights_at + kRows * pitch;
  float* const coefficient = reinterpret_cast<float*>(weight + kRows * pitch);  // (kCoefficients, depth)
  float* const offset = coefficient + kCoefficients<start> * depth;             // (kRows), where plain
  float* const row_sums = offset;                                               // (kWarps, 2, kRows), where not
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4, group = lane / 4;
  const int slice = blockIdx.x % a.slices, first_row = slice * kRows;
  const int first_tile = blockIdx.x / a.slices, tile_step = gridDim.x / a.slices;
  const int tile_count = static_cast<int>((a.p + kColumns - 1) / kColumns);

  if (!a.early) wait_for_kernel_before();
  // The weight, with zeros beyond its rows and columns.
  const auto copy_weight = [&](auto bytes) {  // so many at a time
    constexpr int kBytes = bytes.value, kCount = kBytes / 2;
    for (int i = threadIdx.x; i < kRows * (depth / kCount); i += kThreads) {
      const int row = i / (depth / kCount), unit = i % (depth / kCount);
      const bool there = first_row + row < a.m && unit * kCount < a.k;
      const auto* from = a.weight + (there ? int64_t{first_row + row} * a.k + unit * kCount : 0);
      const int whole_unit = unit * kBytes / 16;
      copy_async<kBytes>(weights_at + row * pitch + permuted(row, whole_unit) * 16 + unit * kBytes % 16, from, there);
    }
  };
  if (a.k % 8 == 0) {
    copy_weight(std::integral_constant<int, 16>{});
  } else {
    copy_weight(std::integral_constant<int, 4>{});
  }
  if (a.early) wait_for_kernel_before();
  for (int i = threadIdx.x; i < kCoefficients<start> * depth; i += kThreads) {
    const int which = i / depth, row = i % depth;
    coefficient[i] = row < a.k ? coefficient_of<start>(a, which, row) : 0;
  }
  if constexpr (ending == Ending::plain) {
    for (int i = threadIdx.x; i < kRows; i += kThreads) {
      offset[i] = a.offset && first_row + i < a.m ? a.offset[first_row + i] : 0;
    }
  }
  if constexpr (ending != Ending::plain) {
    for (int i = threadIdx.x; i < kWarps * 2 * kRows; i += kThreads) row_sums[i] = 0;
  }

  if constexpr (start == Start::attend) __syncthreads();  // a thread takes what others have stored

  // The stages of a tile, in order: for every 32 rows of x those of x, and of x2 where mixed; then for every 32 rows of
  // the result those of the residual, or of the mask. A thread copies its unit of 16 bytes in rows fetch_row, fetch_row +
  // kRowStep, ... A row's units are permuted so that a matrix of 8 rows lies in different banks.
  constexpr int kUnits = kColumns / 8, kRowStep = kThreads / kUnits;
  static_assert(kRowStep % 8 == 0, "rows that a thread copies have the same permutation");
  const int fetch_unit = threadIdx.x % kUnits, fetch_row = threadIdx.x / kUnits;
  const unsigned fetch_to = ring_at + fetch_row * kRowBytes + ((fetch_unit ^ (fetch_row % 8)) * 16);
  const int chunks = (a.k + kDepth - 1) / kDepth;
  constexpr bool attends = ending == Ending::attend, masks = ending == Ending::mask || attends;
  constexpr int kSources = start == Start::mix ? 2 : 1;
  const int parts = chunks * kSources + (a.residual || masks ? (kRows + kDepth - 1) / kDepth : 0);
  int next_tile = first_tile, next_part = 0;
  const auto fetch = [&](int stage) {
    if (next_tile < tile_count) {
      const int64_t column = int64_t{next_tile} * kColumns + fetch_unit * 8;
      const bfloat16* source = start == Start::mix && next_part % 2 ? a.x2 : a.x;
      int row = next_part / kSources * kDepth, end = a.k;
      if (next_part >= chunks * kSources) {
        source = masks ? a.mask : a.residual;
        row = first_row + (next_part - chunks * kSources) * kDepth;
        end = min(first_row + kRows, a.m);
      }
      if (column >= a.p) end = 0;
      row += fetch_row;
      const bfloat16* from = source + row * a.p + column;
#pragma unroll
      for (int i = 0; i < kDepth / kRowStep; ++i) {
        const bool there = row + i * kRowStep < end;
        copy_async(fetch_to + stage * kStageBytes + i * kRowStep * kRowBytes,
                   there ? from + i * kRowStep * a.p : source, there);
      }
      if (++next_part == parts) next_part = 0, next_tile += tile_step;
    }
    commit();
  };
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) fetch(i);
  int stage = kStages - 1;  // the one in use, which is filled again when the next is taken
  const auto next_stage = [&](const auto& prepare) {
    wait<kStages - 2>();
    prepare(stage + 1 == kStages ? 0 : stage + 1);  // changes what this thread has copied
    __syncthreads();  // the stage is there, and everyone has left the one that is filled next
    fetch(stage);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  };

  const auto nothing = [](int) {};

  // Where this lane's rows of matrices lie: of the weight, and of x in a stage.
  const int matrix = lane / 8;
  const unsigned weight_at = weights_at + (matrix % 2 * 8 + lane % 8) * pitch;
  unsigned x_at[kTiles / 2];
#pragma unroll
  for (int i = 0; i < kTiles / 2; ++i) {
    const int unit = warp * kTiles + i * 2 + matrix / 2;
    x_at[i] = ring_at + (matrix % 2 * 8 + lane % 8) * kRowBytes + ((unit ^ (lane % 8)) * 16);
  }
  // Of a result's place in a stage: row group, or 8 more, which has the same permutation; columns 2 quad and + 1.
  const char* result_at[kTiles];
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    result_at[j] = memory + group * kRowBytes + (((warp * kTiles + j) ^ group) * 16) + quad * 4;
  }

#pragma unroll 1
  for (int tile = first_tile; tile < tile_count; tile += tile_step) {
    float sum[shape::rows][kTiles][4] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      next_stage([&](int next) {
        if constexpr (start != Start::attend) return;
#pragma unroll
        for (int i = 0; i < kDepth / kRowStep; ++i) {
          const int row = chunk * kDepth + fetch_row + i * kRowStep;
          if (row >= a.k) break;
          attend_in_place(fetch_to + next * kStageBytes + i * kRowStep * kRowBytes,
                          coefficients_at + row * sizeof(float), depth * sizeof(float), a.frames);
        }
      });
      // For each 16 rows and every 16 columns, of which each 8: rows 0-7 and 8-15.
      constexpr int kSteps = kDepth / 16;
      const auto load = [&](unsigned(&v)[kTiles / 2][4], int step) {
#pragma unroll
        for (int i = 0; i < kTiles / 2; ++i) {
          load_transposed(v[i], x_at[i] + stage * kStageBytes + step * 16 * kRowBytes);
        }
      };
      [[maybe_unused]] unsigned first[kSteps][kTiles / 2][4];
      if constexpr (start == Start::mix) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) load(first[step], step);
        next_stage(nothing);
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int k = chunk * kDepth + step * 16;
        if (k >= a.k) break;
        unsigned b[kTiles / 2][4];
        load(b, step);
        if constexpr (start == Start::norm || start == Start::mix) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const auto pair = [&](int which) {  // of coefficients, for this lane's rows
              return *reinterpret_cast<const float2*>(coefficient + which * depth + k + half * 8 + quad * 2);
            };
            const float2 c0 = pair(0), c1 = pair(1);
            [[maybe_unused]] float2 c2;
            if constexpr (start == Start::mix) c2 = pair(2);
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
              unsigned& v = b[i / 2][i % 2 * 2 + half];
              const float2 x = unpack<bfloat16>(v);
              if constexpr (start != Start::mix) {
                v = pack_relu<bfloat16>({x.x * c0.x + c1.x, x.y * c0.y + c1.y});
              } else {
                const float2 x1 = unpack<bfloat16>(first[step][i / 2][i % 2 * 2 + half]);
                v = pack<bfloat16>({x1.x * c0.x + x.x * c1.x + c2.x, x1.y * c0.y + x.y * c1.y + c2.y});
              }
            }
          }
        }
        unsigned w[2][4];
        const unsigned w_at = weight_at + permuted(lane, k / 8 + matrix / 2) * 16;
        load_matrices(w[0], w_at);
#pragma unroll
        for (int i = 0; i < shape::rows; ++i) {
          if (i + 1 < shape::rows) load_matrices(w[(i + 1) % 2], w_at + (i + 1) * 16 * pitch);
#pragma unroll
          for (int j = 0; j < kTiles; ++j) {
            multiply_add<bfloat16>(sum[i][j], w[i % 2], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
          }
        }
      }
    }

    // sum[i][j]: rows 16 i + group and + 8, columns 8 j + 2 quad and + 1.
    const int64_t column = int64_t{tile} * kColumns + warp * 8 * kTiles;
    const bool whole = column + 8 * kTiles <= a.p;
#pragma unroll
    for (int i = 0; i < shape::rows; ++i) {
      if (i % 2 == 0 && (masks || a.residual)) next_stage(nothing);
      const auto other = [&](int j, int half) {  // of the residual or of the mask
        const char* at = result_at[j] + stage * kStageBytes + (i % 2 * 16 + half * 8) * kRowBytes;
        return unpack<bfloat16>(*reinterpret_cast<const unsigned*>(at));
      };
      if (!masks && a.residual) {
#pragma unroll
        for (int j = 0; j < 2 * kTiles; ++j) {
          const float2 r = other(j / 2, j % 2);
          sum[i][j / 2][j % 2 * 2] += r.x, sum[i][j / 2][j % 2 * 2 + 1] += r.y;
        }
      }
      float parts_of[4] = {0, 0, 0, 0};  // sums of this thread's elements: both of row group, both of row group + 8
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int local = i * 16 + half * 8 + group, row = first_row + local;
        unsigned words[kTiles];
        const float add = ending == Ending::plain ? offset[local] : 0;
        [[maybe_unused]] float s = 0, o = 0;
        [[maybe_unused]] float3 weights = {0, 0, 0};
        if constexpr (masks) {
          if (row < a.m) s = a.mask_scale[row], o = a.mask_bias[row];
          if (attends && row < a.m) {
            const float* from = a.mask_attention + row * 3;
            weights = {from[0], from[1], from[2]};
          }
        }
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          float v0 = sum[i][j][half * 2] + add, v1 = sum[i][j][half * 2 + 1] + add;
          if (a.relu) v0 = v0 < 0 ? 0 : v0, v1 = v1 < 0 ? 0 : v1;  // NaN stays
          if constexpr (ending == Ending::mask) {
            const float2 x = other(j, half);
            v0 = s * x.x + o <= 0 ? 0 : v0;
            v1 = s * x.y + o <= 0 ? 0 : v1;
            if (whole || column + j * 8 < a.p) {
              parts_of[half * 2] += v0 + v1, parts_of[half * 2 + 1] += v0 * x.x + v1 * x.y;
            }
          } else if constexpr (ending == Ending::sums) {
            if (whole || column + j * 8 < a.p) {
              parts_of[half * 2] += v0 + v1, parts_of[half * 2 + 1] += v0 * v0 + v1 * v1;
            }
          }
          words[j] = pack<bfloat16>({v0, v1});
        }
        if constexpr (attends) {
          // The frames of a pixel are with the four threads of a quad; those beyond come round.
          unsigned before[kTiles], after[kTiles];
#pragma unroll
          for (int j = 0; j < kTiles; ++j) {
            before[j] = __shfl_sync(0xffffffff, words[j], lane / 4 * 4 + (lane + 3) % 4);
            after[j] = __shfl_sync(0xffffffff, words[j], lane / 4 * 4 + (lane + 1) % 4);
          }
#pragma unroll
          for (int j = 0; j < kTiles; ++j) {
            const bool two = a.frames == 16;
            const unsigned first = j % 2 && two ? before[j - j % 2] : 0;
            const unsigned last = j % 2 == 0 && two ? after[j + 1 - j % 2] : 0;
            const float previous = unpack<bfloat16>(quad == 0 ? first : before[j]).y;
            const float next = unpack<bfloat16>(quad == 3 ? last : after[j]).x;
            const float2 x = other(j, half), same = unpack<bfloat16>(words[j]);
            const float v0 = s * x.x + o <= 0 ? 0 : unmixed(weights, previous, same.x, same.y);
            const float v1 = s * x.y + o <= 0 ? 0 : unmixed(weights, same.x, same.y, next);
            if (whole || column + j * 8 < a.p) {
              parts_of[half * 2] += v0 + v1, parts_of[half * 2 + 1] += v0 * x.x + v1 * x.y;
            }
          }
        }
        // Even lanes take the even tiles of 8 columns of themselves and their neighbour, odd lanes the odd ones.
        bfloat16* to = a.y + row * a.p + column + quad / 2 * 4 + quad % 2 * 8;
#pragma unroll
        for (int j = 0; j < kTiles; j += 2) {
          const bool odd = quad % 2;
          const unsigned other = __shfl_xor_sync(0xffffffff, odd ? words[j] : words[j + 1], 1);
          const uint2 two = odd ? uint2{other, words[j + 1]} : uint2{words[j], other};
          const bool there = row < a.m && column + (j + quad % 2) * 8 < a.p;
          if (there) __stwb(reinterpret_cast<uint2*>(to + j * 8), two);  // always one access, unlike an assignment
        }
      }
      if constexpr (ending != Ending::plain) {
#pragma unroll
        for (int j = 0; j < 4; ++j) parts_of[j] = quad_sum(parts_of[j]);
        // Each of the four threads adds one of the four sums; rows belong to one warp's copy, so nobody else does.
        const float part = quad == 0 ? parts_of[0] : quad == 1 ? parts_of[1] : quad == 2 ? parts_of[2] : parts_of[3];
        row_sums[(warp * 2 + quad % 2) * kRows + i * 16 + quad / 2 * 8 + group] += part;
      }
    }
  }
  if constexpr (ending != Ending::plain) {
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * kRows; i += kThreads) {
      const int which = i / kRows, row = first_row + i % kRows;
      if (row >= a.m) continue;
      float total = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += row_sums[w * 2 * kRows + i];
      a.sums[(int64_t{first_tile} * 2 + which) * a.m + row] = total;
    }
  }
#endif
}

}  // namespace
}  // namespace rubiks
