// Matrix products of 1x1 convolutions with many rows on Hopper, by its own matrix instructions (wgmma).
//
// A block keeps the whole weight in shared memory, so x is read once. Its two groups of 4 warps work independently on
// tiles of 64 columns: while one writes its results, the other multiplies. Each reads x through a ring of its own. A
// warp has 16 columns: the prologue is applied in registers, which the instruction takes as its left operand, so the
// result is the transpose of a tile of y. It goes through a few rows of shared memory, from which whole units of 16
// bytes are written and summed.
#pragma once

#include "block/attention.cuh"
#include "block/conv1x1_epilogue.cuh"
#include "block/conv1x1_prologue.cuh"
#include "block/conv1x1_sm90_parts.cuh"
#include "block/conv1x1_sm90_weight.cuh"
#include "common/dependent_launch.cuh"
#include "common/tensor_cores.cuh"
#include "common/tensor_cores_sm90.cuh"

#include <cstdint>
#include <type_traits>

namespace rubiks {
namespace {

constexpr int kRingBytes = kGroups * RingSm90::kBytes;

template <typename Prologue, typename Epilogue>
size_t conv1x1_sm90_bytes(int k) {
  return kRingBytes + kGroups * kGroupWarps * kBatchBytes + size_t{kMaxM} * whole_depth(k) * sizeof(bfloat16) +
         kMaxM * (sizeof(float2) + (std::is_same_v<Epilogue, AttentionMask> ? sizeof(float3) : 0)) +
         Prologue::coefficients * whole_depth(k) * sizeof(float);
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// One thread's share. Shared memory holds the rings, the rows of y that each warp writes, the weight, and tables: of
// rows of y, {offset, 0} or the mask's {scale, bias} (kMaxM); the coefficients of the prologue (coefficients, depth);
// of rows of y, the weights of the attention (kMaxM, 3).
template <typename Prologue, typename Epilogue>
struct Conv1x1Sm90 {
  static constexpr bool kAttends = std::is_same_v<Epilogue, AttentionMask>;
  using Ring = RingSm90;

  const Conv1x1& a;
  const int depth;  // of the weight
  const int group, thread, warp, lane, quad, matrix;
  const unsigned memory, batch_at, weight_at, table;
  const Coefficients<Prologue> coefficients;
  const unsigned attention;
  Ring ring;
  PartsSm90<Prologue, Epilogue> parts;
  WeightSm90 weight;

  __device__ __forceinline__ explicit Conv1x1Sm90(const Conv1x1& a)
      : a(a), depth(whole_depth(a.k)), group(threadIdx.x / kGroupThreads),
        thread(threadIdx.x % kGroupThreads), warp(thread / 32), lane(threadIdx.x % 32), quad(lane % 4),
        matrix(lane / 8), memory(shared_memory()),
        batch_at(memory + kRingBytes + (group * kGroupWarps + warp) * kBatchBytes),
        weight_at(memory + kRingBytes + kGroups * kGroupWarps * kBatchBytes),
        table(weight_at + kMaxM * depth * sizeof(bfloat16)),
        coefficients{a, depth, table + kMaxM * unsigned{sizeof(float2)},
                     reinterpret_cast<float*>(shared_memory_pointer() + (table - memory) + kMaxM * sizeof(float2))},
        attention(coefficients.at + Prologue::coefficients * depth * sizeof(float)),
        ring(memory + group * Ring::kBytes, thread), parts(a, group, ring),
        weight(a, depth / kUnitElements, parts.chunks, weight_at) {}

  __device__ __forceinline__ void load_tables() {
    coefficients.template load<kBlockThreads>();
    for (int row = threadIdx.x; row < kMaxM; row += kBlockThreads) {
      float2 entry = {0, 0};
      if (row < a.m && Epilogue::masks) entry = {a.mask_scale[row], a.mask_bias[row]};
      if (row < a.m && !Epilogue::masks && a.offset) entry.x = a.offset[row];
      store_shared(table + row * sizeof(float2), entry);
      for (int i = 0; kAttends && i < 3; ++i) {
        store_shared(attention + (row * 3 + i) * sizeof(float), row < a.m ? a.mask_attention[row * 3 + i] : 0.0f);
      }
    }
  }

  // Moves to the next stage, with the next part of the weight where `with_weight`.
  __device__ __forceinline__ void next_stage(bool with_weight) {
    ring.next_stage(parts, [&] {
      if (with_weight) {
        fence_shared_memory();
        __syncthreads();  // both groups copied a part of the weight
        weight.copy();
      } else {
        asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(kGroupThreads) : "memory");
      }
    });
  }

  // The prologue of 16 rows of x from row k on; for Mix of `first`, those of x, and v, those of x2.
  __device__ __forceinline__ void apply(unsigned (&v)[4], const unsigned (&first)[4], int k) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const RowPair<Prologue> rows = coefficients.pair(k + half * 8 + quad * 2, 0);  // as one sum: fewer registers
#pragma unroll
      for (int i = half * 2; i < half * 2 + 2; ++i) v[i] = rows.apply(v[i], first[i]);
      if constexpr (coefficients.kAttends) {
        mix_frames_of_lanes(v[half * 2], v[half * 2 + 1], rows.weights, a.frames);
      }
    }
  }

  // A warp's share of a tile of y, transposed.
  struct Product {
    float sum[2][kHalf / 2];  // of rows 0 to 143 and 144 to 287 of y
    unsigned x[2][4];         // of even and odd steps
  };

  // Adds the products of a chunk of 32 rows of x, which is in the next stage, and for Mix also in the one after that.
  __device__ __forceinline__ void multiply_chunk(Product& product, int k, bool with_weight, unsigned x_at,
                                                 uint64_t first_half, uint64_t second_half) {
    const auto load = [&](unsigned(&v)[4], int step) {
      load_transposed(v, x_at + ring.stage * Ring::kStageBytes + step * 16 * Ring::kRowBytes);
    };
    [[maybe_unused]] unsigned first[2][4];
    next_stage(with_weight);
    if constexpr (Prologue::sources == 2) {
      load(first[0], 0), load(first[1], 1);
      next_stage(with_weight);
    }
    const auto step = [&](int i) {
      unsigned(&v)[4] = product.x[i];
      load(v, i);
      if constexpr (coefficients.kCount > 0) apply(v, first[i], k + i * 16);
      const uint64_t further = (k + i * 16) / 8 * kMatrixBytes >> 4;
      fence_products();
      multiply(product.sum[0], v, first_half + further, k + i * 16 > 0);
      multiply(product.sum[1], v, second_half + further, k + i * 16 > 0);
      commit_products();
      wait_for_products<1>();  // the registers of the step before may change
    };
    step(0);
    if (k + 16 < depth) step(1);
  }

  // The address of a unit in the rows of y that the warp writes. Every other 4 rows have their two units exchanged, so
  // that 8 rows of one unit lie in different banks.
  __device__ __forceinline__ unsigned place(int row, int unit) const {
    return batch_at + row * 32 + ((unit ^ (row / 4 % 2)) * 16);
  }

  // The epilogue of two rows of y, from `row` on, in registers; `pair` points at the two sums.
  __device__ __forceinline__ unsigned finish_pair(const float* pair, int row, unsigned other) const {
    float2 value = {pair[0], pair[1]};
    const float4 entry = load_shared<float4>(table + (row + quad * 2) * sizeof(float2));  // of two rows
    if constexpr (std::is_same_v<Epilogue, Mask>) {
      const float2 at = unpack(other);
      if (stopped(at.x, entry.x, entry.y)) value.x = 0;
      if (stopped(at.y, entry.z, entry.w)) value.y = 0;
    } else if constexpr (!kAttends) {
      if (parts.others) {
        const float2 add = unpack(other);
        value = {value.x + add.x, value.y + add.y};
      }
      if constexpr (!Epilogue::sums) value = {value.x + entry.x, value.y + entry.z};
      if (a.relu) value = {value.x < 0 ? 0 : value.x, value.y < 0 ? 0 : value.y};  // NaN stays
    }
    return pack(value);
  }

  // The sums of a unit of row `row` of y, and of its product with the mask or itself. i: which 16 rows of the batch.
  __device__ __forceinline__ float2 unit_sums(const Unit& unit, int row, int i) const {
    [[maybe_unused]] Unit x_unit;
    if constexpr (Epilogue::masks) {
      const int local = i * 16 + lane / 2;
      x_unit = load_shared<Unit>(ring.at + ring.stage * Ring::kStageBytes + local * Ring::kRowBytes +
                                 (((warp * 2 + lane % 2) ^ (local % 8)) * 16));
    }
    [[maybe_unused]] float2 entry;
    [[maybe_unused]] float3 weights;
    [[maybe_unused]] unsigned beyond;
    if constexpr (kAttends) {
      const unsigned from = attention + row * 3 * sizeof(float);
      entry = load_shared<float2>(table + row * sizeof(float2)), beyond = pair_beyond(unit, a.frames);
      weights = {load_shared<float>(from), load_shared<float>(from + 4), load_shared<float>(from + 8)};
    }
    float2 sums = {0, 0};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float2 value = unpack(unit.pairs[j]);
      if constexpr (kAttends) {
        const unsigned before = j > 0 ? unit.pairs[j - 1] : lane % 2 ? beyond : 0;
        const unsigned after = j < 3 ? unit.pairs[j + 1] : lane % 2 ? 0 : beyond;
        const float2 at = unpack(x_unit.pairs[j]);
        const float first = unmix(weights, unpack(before).y, value.x, value.y);
        const float second = unmix(weights, value.x, value.y, unpack(after).x);
        value.x = stopped(at.x, entry.x, entry.y) ? 0 : first, value.y = stopped(at.y, entry.x, entry.y) ? 0 : second;
      }
      const float2 by = Epilogue::masks ? unpack(x_unit.pairs[j]) : value;
      add_pair(sums.x, sums.y, value, by);
    }
    return sums;
  }

  // Sums over this warp's columns: of y in even lanes, of its square or product in odd ones. Row 16 i + lane / 2.
  using RowSums = float[Epilogue::sums ? kMaxM / 16 : 1];

  // The epilogue of a tile: sum[i][4 j + 2 h + e] has row 144 i + 8 j + 2 quad + e, column lane / 4 + 8 h.
  __device__ __forceinline__ void finish(const Product& product, int tile, unsigned other_at, unsigned matrix_to,
                                         unsigned unit_at, RowSums& row_sums) {
    const int64_t column = int64_t{tile} * kColumns + warp * 16 + lane % 2 * kUnitElements;
    bfloat16* to = a.y + lane / 2 * a.p + column;
#pragma unroll
    for (int batch = 0; batch < kBatches; ++batch) {
      if (batch * kDepth >= a.m) break;
      if (parts.others) next_stage(false);
      __syncwarp();  // the rows before have been read
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        unsigned v[4];  // of rows 0-7: columns 0-7, 8-15; of rows 8-15
        [[maybe_unused]] unsigned other[4];
        if (parts.others && !kAttends) {
          load_transposed(other, other_at + ring.stage * Ring::kStageBytes + i * 16 * Ring::kRowBytes);
        }
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          const int row = batch * 32 + i * 16 + part / 2 * 8;  // but for 2 quad
          v[part] = finish_pair(&product.sum[row / kHalf][row % kHalf / 8 * 4 + part % 2 * 2], row, other[part]);
        }
        store_transposed(matrix_to + i * 16 * 32, v);
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = batch * 32 + i * 16 + lane / 2;
        const Unit unit = load_shared<Unit>(unit_at + i * 16 * 32);
        const bool inside = column < a.p;
        if (inside && row < a.m) store_unit(to, unit);
        to += 16 * a.p;
        if constexpr (Epilogue::sums) {
          float2 sums = unit_sums(unit, row, i);
          if (!inside) sums = {0, 0};
          const bool odd = lane % 2;
          const float theirs = __shfl_xor_sync(0xffffffff, odd ? sums.x : sums.y, 1);
          row_sums[batch * 2 + i] += (odd ? sums.y : sums.x) + theirs;
        }
      }
    }
  }

  // This block's part of the row sums, from those of its warps.
  __device__ __forceinline__ void write_sums(const RowSums& row_sums) const {
    wait_for_copies<0>();
    __syncthreads();  // the rings are free
    constexpr int kWarpSums = 2 * kMaxM;
    const unsigned sums_at = memory + (threadIdx.x / 32 * kWarpSums + lane % 2 * kMaxM + lane / 2) * sizeof(float);
#pragma unroll
    for (int i = 0; i < kMaxM / 16; ++i) store_shared(sums_at + i * 16 * sizeof(float), row_sums[i]);
    write_row_sums<kBlockThreads, kGroups * kGroupWarps, kMaxM>(a, reinterpret_cast<float*>(shared_memory_pointer()), 0,
                                                                blockIdx.x);
  }

  __device__ __forceinline__ void run() {
    if (!a.early) wait_for_previous_kernel();
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) weight.copy();
    if (a.early) wait_for_previous_kernel();
    load_tables();
    ring.start(parts);

    // Where this lane's row of matrices lies in a stage. Of x: columns of the warp, the first or second 8 rows of a
    // step; of the residual or mask, the first or second 8 of 16 rows of y; then the columns.
    const unsigned x_at =
        ring.at + (matrix / 2 * 8 + lane % 8) * Ring::kRowBytes + (((warp * 2 + matrix % 2) ^ (lane % 8)) * 16);
    // Of the rows of y that the warp writes: where this lane's row of matrices goes, and where its unit of a row lies.
    const unsigned matrix_to = place(matrix / 2 * 8 + lane % 8, matrix % 2), unit_at = place(lane / 2, lane % 2);
    const uint64_t first_half = weight.half(0), second_half = weight.half(1);
    RowSums row_sums = {};
    int tile = parts.first_tile;
#pragma unroll 1
    do {  // at least once, even without a tile for this group: the other group waits for its part of the weight
      Product product;
#pragma unroll 1
      for (int chunk = 0; chunk < parts.chunks; ++chunk) {
        multiply_chunk(product, chunk * kDepth, tile == parts.first_tile, x_at, first_half, second_half);
      }
      wait_for_products<0>();
      finish(product, tile, x_at, matrix_to, unit_at, row_sums);
    } while ((tile += parts.tile_step) < parts.tile_count);
    if constexpr (Epilogue::sums) write_sums(row_sums);
  }
};

#endif

template <typename Prologue, typename Epilogue>
__global__ void __launch_bounds__(kBlockThreads, 1) conv1x1_sm90_kernel(const __grid_constant__ Conv1x1 a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  Conv1x1Sm90<Prologue, Epilogue>(a).run();
#endif
}

}  // namespace
}  // namespace rubiks
