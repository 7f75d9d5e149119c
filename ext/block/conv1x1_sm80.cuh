// Matrix products of 1x1 convolutions on NVIDIA GPUs from compute capability 8.0 on.
//
// A block keeps up to 16 * row_tiles rows of the weight in shared memory and goes over tiles of 128 columns, which it
// reads through a ring. A warp multiplies all of the block's rows by 32 columns on tensor cores (mma.m16n8k16), so the
// prologue is applied to each element once, in registers.
// Results are exchanged between neighbouring threads, which then write 8 bytes each.
#pragma once

#include "block/attention.cuh"
#include "block/conv1x1_epilogue.cuh"
#include "block/conv1x1_prologue.cuh"
#include "block/conv1x1_sm80_parts.cuh"
#include "common/dependent_launch.cuh"
#include "common/reductions.cuh"
#include "common/tensor_cores.cuh"

#include <cstdint>
#include <type_traits>

namespace rubiks {
namespace {

template <typename Prologue, typename Epilogue, typename Shape>
size_t conv1x1_sm80_bytes(int k) {
  const int depth = whole_depth(k), floats = Epilogue::sums ? 2 * Shape::warps : 1;
  return RingSm80<Shape>::kBytes + Shape::rows * depth * 2 +
         (Prologue::coefficients * depth + Shape::rows * floats) * 4;
}

// One thread's share. Shared memory holds the ring, the weight, the coefficients of the prologue (coefficients, depth),
// then the offsets (rows) or, for an epilogue that sums, each warp's row sums (warps, 2, rows).
template <typename Prologue, typename Epilogue, typename Shape>
struct Conv1x1Sm80 {
  static constexpr int kRows = Shape::rows, kThreads = Shape::threads, kWarps = Shape::warps;
  static constexpr int kTiles = Shape::column_tiles;  // of 8 columns, of a warp
  static constexpr bool kAttends = std::is_same_v<Epilogue, AttentionMask>;
  using Sum = float[Shape::row_tiles][kTiles][4];
  using Fragments = unsigned[kTiles / 2][4];  // of each 16 columns, of which each 8: rows 0-7 and 8-15
  using Ring = RingSm80<Shape>;

  const Conv1x1& a;
  const int depth, pitch;  // of the weight: columns, bytes of a row
  const int spread;        // see permuted()
  char* const memory;
  Ring ring;
  PartsSm80<Prologue, Epilogue, Shape> parts;
  const unsigned weights_at;
  const Coefficients<Prologue> coefficients;
  float* const tail;  // offsets or row sums
  const int warp, lane, quad, group;

  __device__ __forceinline__ explicit Conv1x1Sm80(const Conv1x1& a)
      : a(a), depth(whole_depth(a.k)), pitch(depth * 2),
        spread((depth / 8) % 8 == 0 ? 8 : (depth / 8) % 4 == 0 ? 4 : 2), memory(shared_memory_pointer()),
        ring(shared_memory(), threadIdx.x), parts(a), weights_at(ring.at + Ring::kBytes),
        coefficients{a, depth, weights_at + kRows * pitch,
                     reinterpret_cast<float*>(memory + Ring::kBytes + kRows * pitch)},
        tail(coefficients.table + Prologue::coefficients * depth), warp(threadIdx.x / 32), lane(threadIdx.x % 32),
        quad(lane % 4), group(lane / 4) {}

  // Units of 16 bytes of a row of the weight are permuted so that any 8 rows of one unit lie in different banks.
  __device__ __forceinline__ int permuted(int row, int unit) const { return unit ^ (row % 8 * spread / 8); }

  // The weight, `bytes` at a time, with zeros beyond its rows and columns.
  template <int bytes>
  __device__ __forceinline__ void copy_weight() {
    constexpr int kCount = bytes / 2;
    for (int i = threadIdx.x; i < kRows * (depth / kCount); i += kThreads) {
      const int row = i / (depth / kCount), unit = i % (depth / kCount);
      const bool there = parts.first_row + row < a.m && unit * kCount < a.k;
      const auto* from = a.weight + (there ? int64_t{parts.first_row + row} * a.k + unit * kCount : 0);
      const int whole_unit = unit * bytes / 16;
      copy_async<bytes>(weights_at + row * pitch + permuted(row, whole_unit) * 16 + unit * bytes % 16, from, there);
    }
  }

  __device__ __forceinline__ void load_tables() {
    coefficients.template load<kThreads>();
    if constexpr (Epilogue::sums) {
      for (int i = threadIdx.x; i < kWarps * 2 * kRows; i += kThreads) tail[i] = 0;
    } else {
      for (int i = threadIdx.x; i < kRows; i += kThreads) {
        tail[i] = a.offset && parts.first_row + i < a.m ? a.offset[parts.first_row + i] : 0;
      }
    }
  }

  __device__ __forceinline__ void next_stage() {
    ring.next_stage(parts, [] { __syncthreads(); });
  }

  // The prologue of 16 rows of x from row k on; for Mix of `first`, those of x, and v, those of x2.
  __device__ __forceinline__ void apply(Fragments& v, const Fragments& first, int k) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const RowPair<Prologue> rows = coefficients.pair(k + half * 8, quad);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const int at = i % 2 * 2 + half;
        v[i / 2][at] = rows.apply(v[i / 2][at], first[i / 2][at]);
      }
#pragma unroll
      for (int i = 0; coefficients.kAttends && i < kTiles / 2; ++i) {
        mix_frames_of_lanes(v[i][half], v[i][2 + half], rows.weights, a.frames);
      }
    }
  }

  // sum += weight @ x for a chunk of 32 rows of x, which is in the next stage, and for Mix also in the one after that.
  __device__ __forceinline__ void multiply(Sum& sum, int chunk, unsigned weight_at,
                                           const unsigned (&x_at)[kTiles / 2]) {
    next_stage();
    const auto load = [&](Fragments& v, int step) {
#pragma unroll
      for (int i = 0; i < kTiles / 2; ++i) {
        load_transposed(v[i], x_at[i] + ring.stage * Ring::kStageBytes + step * 16 * Ring::kRowBytes);
      }
    };
    constexpr int kSteps = kDepth / 16;
    [[maybe_unused]] Fragments first[kSteps];
    if constexpr (Prologue::sources == 2) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) load(first[step], step);
      next_stage();
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int k = chunk * kDepth + step * 16;
      if (k >= a.k) break;
      Fragments b;
      load(b, step);
      if constexpr (coefficients.kCount > 0) apply(b, first[step], k);
      unsigned w[2][4];
      const unsigned w_at = weight_at + permuted(lane, k / 8 + lane / 16) * 16;
      load_matrices(w[0], w_at);
#pragma unroll
      for (int i = 0; i < Shape::row_tiles; ++i) {
        if (i + 1 < Shape::row_tiles) load_matrices(w[(i + 1) % 2], w_at + (i + 1) * 16 * pitch);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          multiply_add(sum[i][j], w[i % 2], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }

  // Of the residual or of the mask: the pair at rows 16 i + 8 half + group, tile j of columns.
  __device__ __forceinline__ float2 other(const char* const (&result_at)[kTiles], int i, int j, int half) const {
    const char* at = result_at[j] + ring.stage * Ring::kStageBytes + (i % 2 * 16 + half * 8) * Ring::kRowBytes;
    return unpack(*reinterpret_cast<const unsigned*>(at));
  }

  // Writes pairs of a row, 8 bytes at a time: even lanes take the even tiles of 8 columns of themselves and their
  // neighbour, odd lanes the odd ones.
  __device__ __forceinline__ void store_row(const unsigned (&words)[kTiles], int row, int64_t column) const {
    bfloat16* to = a.y + row * a.p + column + quad / 2 * 4 + quad % 2 * 8;
#pragma unroll
    for (int j = 0; j < kTiles; j += 2) {
      const bool odd = quad % 2;
      const unsigned theirs = __shfl_xor_sync(0xffffffff, odd ? words[j] : words[j + 1], 1);
      const uint2 two = odd ? uint2{theirs, words[j + 1]} : uint2{words[j], theirs};
      const bool there = row < a.m && column + (j + quad % 2) * 8 < a.p;
      if (there) __stwb(reinterpret_cast<uint2*>(to + j * 8), two);  // always one access, unlike an assignment
    }
  }

  // The epilogue of 16 rows: sum[j] has rows 16 i + group and + 8, columns 8 j + 2 quad and + 1 of the warp's.
  __device__ __forceinline__ void finish(float (&sum)[kTiles][4], int i, int64_t column, bool whole,
                                         const char* const (&result_at)[kTiles]) {
    if (i % 2 == 0 && (Epilogue::masks || a.residual)) next_stage();
    if (!Epilogue::masks && a.residual) {
#pragma unroll
      for (int j = 0; j < 2 * kTiles; ++j) {
        const float2 r = other(result_at, i, j / 2, j % 2);
        sum[j / 2][j % 2 * 2] += r.x, sum[j / 2][j % 2 * 2 + 1] += r.y;
      }
    }
    float parts_of[4] = {0, 0, 0, 0};  // sums of this thread's elements: both of row group, both of row group + 8
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int local = i * 16 + half * 8 + group, row = parts.first_row + local;
      const auto add = [&](int j, float2 v, float2 by) {
        if (!whole && column + j * 8 >= a.p) return;
        add_pair(parts_of[half * 2], parts_of[half * 2 + 1], v, by);
      };
      unsigned words[kTiles];
      const float offset = Epilogue::sums ? 0 : tail[local];
      [[maybe_unused]] float scale = 0, bias = 0;
      [[maybe_unused]] float3 weights = {0, 0, 0};
      if constexpr (Epilogue::masks) {
        if (row < a.m) scale = a.mask_scale[row], bias = a.mask_bias[row];
        if (kAttends && row < a.m) {
          const float* from = a.mask_attention + row * 3;
          weights = {from[0], from[1], from[2]};
        }
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        float v0 = sum[j][half * 2] + offset, v1 = sum[j][half * 2 + 1] + offset;
        if (a.relu) v0 = v0 < 0 ? 0 : v0, v1 = v1 < 0 ? 0 : v1;  // NaN stays
        if constexpr (std::is_same_v<Epilogue, Mask>) {
          const float2 x = other(result_at, i, j, half);
          v0 = stopped(x.x, scale, bias) ? 0 : v0, v1 = stopped(x.y, scale, bias) ? 0 : v1;
          add(j, {v0, v1}, x);
        } else if constexpr (std::is_same_v<Epilogue, Sums>) {
          add(j, {v0, v1}, {v0, v1});
        }
        words[j] = pack({v0, v1});
      }
      if constexpr (kAttends) {
        // The four threads of a quad hold the frames of a pixel; the pairs next to a thread's own come by shuffles.
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
          const float previous = unpack(quad == 0 ? first : before[j]).y, next = unpack(quad == 3 ? last : after[j]).x;
          const float2 x = other(result_at, i, j, half), same = unpack(words[j]);
          const float v0 = stopped(x.x, scale, bias) ? 0 : unmix(weights, previous, same.x, same.y);
          const float v1 = stopped(x.y, scale, bias) ? 0 : unmix(weights, same.x, same.y, next);
          add(j, {v0, v1}, x);
        }
      }
      store_row(words, row, column);
    }
    if constexpr (Epilogue::sums) {
#pragma unroll
      for (int j = 0; j < 4; ++j) parts_of[j] = quad_sum(parts_of[j]);
      // Each of the four threads adds one of the four sums. No other thread adds to that row of the warp's copy.
      const float part = quad == 0 ? parts_of[0] : quad == 1 ? parts_of[1] : quad == 2 ? parts_of[2] : parts_of[3];
      tail[(warp * 2 + quad % 2) * kRows + i * 16 + quad / 2 * 8 + group] += part;
    }
  }

  __device__ __forceinline__ void run() {
    if (!a.early) wait_for_previous_kernel();
    if (a.k % 8 == 0) {
      copy_weight<16>();
    } else {
      copy_weight<4>();
    }
    if (a.early) wait_for_previous_kernel();
    load_tables();
    ring.start(parts);

    // Where this lane's rows of matrices lie: of the weight, and of x in a stage.
    const int matrix = lane / 8;
    const unsigned weight_at = weights_at + (matrix % 2 * 8 + lane % 8) * pitch;
    unsigned x_at[kTiles / 2];
#pragma unroll
    for (int i = 0; i < kTiles / 2; ++i) {
      const int unit = warp * kTiles + i * 2 + matrix / 2;
      x_at[i] = ring.at + (matrix % 2 * 8 + lane % 8) * Ring::kRowBytes + ((unit ^ (lane % 8)) * 16);
    }
    // Of a result's place in a stage: row group, or 8 more, which has the same permutation; columns 2 quad and + 1.
    const char* result_at[kTiles];
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      result_at[j] = memory + group * Ring::kRowBytes + (((warp * kTiles + j) ^ group) * 16) + quad * 4;
    }
#pragma unroll 1
    for (int tile = parts.first_tile; tile < parts.tile_count; tile += parts.tile_step) {
      Sum sum = {};
#pragma unroll 1
      for (int chunk = 0; chunk < parts.chunks; ++chunk) multiply(sum, chunk, weight_at, x_at);
      const int64_t column = int64_t{tile} * kColumns + warp * 8 * kTiles;
      const bool whole = column + 8 * kTiles <= a.p;
#pragma unroll
      for (int i = 0; i < Shape::row_tiles; ++i) finish(sum[i], i, column, whole, result_at);
    }
    if constexpr (Epilogue::sums) write_row_sums<kThreads, kWarps, kRows>(a, tail, parts.first_row, parts.first_tile);
  }
};

template <typename Prologue, typename Epilogue, typename Shape>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks)
    conv1x1_sm80_kernel(const __grid_constant__ Conv1x1 a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  Conv1x1Sm80<Prologue, Epilogue, Shape>(a).run();
#endif
}

}  // namespace
}  // namespace rubiks
