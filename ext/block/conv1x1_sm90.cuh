// Matrix products of 1x1 convolutions with many rows on Hopper, by its own matrix instructions (wgmma).
//
// A block keeps the whole weight in shared memory, so x is read once. Its two groups of 4 warps work on their own: each
// goes over tiles of 64 columns, and while one writes its results the other multiplies. x streams through a ring of
// stages, 32 rows of a tile each, copied ahead of their use. A warp has 16 columns: f is applied in registers, which
// the instruction takes as the left operand, so what it makes is the transpose of a tile of y. That goes through a few
// rows of shared memory, from which whole units of 16 bytes are written and summed.
#pragma once

#include "block/attention.cuh"
#include "block/conv1x1.h"

#include <cstdint>

namespace rubiks {
namespace {

constexpr int kMaxRows = 288, kMaxDepth = 288;  // of the weight
constexpr int kHalf = kMaxRows / 2;             // rows of y that one instruction makes
constexpr int kGroups = 2, kGroupWarps = 4, kGroupThreads = 32 * kGroupWarps, kBlockThreads = kGroups * kGroupThreads;
constexpr int kColumns = 16 * kGroupWarps;  // of a tile
constexpr int kDepth = 32, kStages = 6;     // rows of a stage; stages of a ring
constexpr int kRowBytes = 2 * kColumns, kRowUnits = kColumns / kUnitElements, kStageBytes = kDepth * kRowBytes;
constexpr int kBatches = kMaxRows / kDepth;    // of rows of y that a warp writes at a time
constexpr int kBatchBytes = kDepth * 16 * 2;   // of these rows and a warp's columns
constexpr int kRingBytes = kGroups * kStages * kStageBytes;
constexpr int kMatrixBytes = 8 * sizeof(Unit);  // of 8 x 8 elements

// Rows of the weight in whole steps of the instruction.
__host__ __device__ inline int whole_depth(int k) { return (k + 15) / 16 * 16; }

template <Start start, Ending ending>
size_t hopper_bytes(int k) {
  return kRingBytes + kGroups * kGroupWarps * kBatchBytes + size_t{kMaxRows} * whole_depth(k) * sizeof(bfloat16) +
         kMaxRows * (sizeof(float2) + (ending == Ending::attend ? sizeof(float3) : 0)) +
         kCoefficients<start> * whole_depth(k) * sizeof(float);
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What the instruction is told of a matrix in shared memory: it lies in blocks of 8 x 8 elements, `next_k` bytes apart
// along the sum and `next_row` bytes along the rows.
__device__ inline uint64_t descriptor(unsigned address, int next_k, int next_row) {
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t(next_k >> 4) << 16 | uint64_t(next_row >> 4) << 32;
}

__device__ inline void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for this group's products but for those of the last `pending` commits.
template <int pending>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// sum (64, 144) [+]= a (64, 16) @ b (16, 144), b by its descriptor; each warp has 16 rows, laid out as for multiply_add.
__device__ inline void multiply(float (&sum)[kHalf / 2], const unsigned (&a)[4], uint64_t b, bool add) {
#define RUBIKS_4(i) "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3])
#define RUBIKS_24(i) \
  RUBIKS_4(i), RUBIKS_4(i + 4), RUBIKS_4(i + 8), RUBIKS_4(i + 12), RUBIKS_4(i + 16), RUBIKS_4(i + 20)
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %77, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n144k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "
      "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, "
      "%68, %69, %70, %71}, {%72, %73, %74, %75}, %76, p, 1, 1, 0;\n"
      "}\n"
      : RUBIKS_24(0), RUBIKS_24(24), RUBIKS_24(48)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
#undef RUBIKS_24
#undef RUBIKS_4
}

// Writes four 8 x 8 matrices, transposed: lane l gives the address of row l % 8 of the transpose of matrix l / 8.
__device__ inline void store_transposed(unsigned row, const unsigned (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(v[0]),
               "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

#endif

template <Start start, Ending ending>
__global__ void __launch_bounds__(kBlockThreads, 1) hopper_kernel(const __grid_constant__ Pointwise a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr bool attends = ending == Ending::attend, masks = ending == Ending::mask || attends;
  const int depth = whole_depth(a.k), units = depth / kUnitElements;
  const int group = threadIdx.x / kGroupThreads, thread = threadIdx.x % kGroupThreads;
  const int warp = thread / 32, lane = threadIdx.x % 32, quad = lane % 4, matrix = lane / 8;
  const unsigned memory = shared_memory(), ring = memory + group * kStages * kStageBytes;
  const unsigned batch_at = memory + kRingBytes + (group * kGroupWarps + warp) * kBatchBytes;
  const unsigned weight = memory + kRingBytes + kGroups * kGroupWarps * kBatchBytes;
  const unsigned table = weight + kMaxRows * depth * sizeof(bfloat16);  // of rows of y: {offset, 0} or mask's {scale, bias}
  const unsigned coefficient = table + kMaxRows * sizeof(float2);       // (kCoefficients, depth)
  const unsigned attention = coefficient + kCoefficients<start> * depth * sizeof(float);  // (kMaxRows, 3)

  // The weight is copied in parts for 32 rows of x, of which the first tile takes one after the other. It has zeros beyond
  // its rows and columns. 8 threads copy the units of 8 rows that lie together.
  const int chunks = (a.k + kDepth - 1) / kDepth;
  int weight_chunk = 0;
  const auto copy_weight = [&] {
    if (weight_chunk == chunks) return;
    constexpr int kUnits = kDepth / kUnitElements;
    for (int i = threadIdx.x; i < kMaxRows * kUnits; i += kBlockThreads) {
      const int row = i / (8 * kUnits) * 8 + i % 8, unit = weight_chunk * kUnits + i / 8 % kUnits;
      const bool there = row < a.m && unit * kUnitElements < a.k;
      const unsigned to = weight + (row / 8 * units + unit) * kMatrixBytes + row % 8 * sizeof(Unit);
      if (unit < units) copy_async(to, a.weight + (there ? row * a.k + unit * kUnitElements : 0), there);
    }
    ++weight_chunk;
  };
  if (!a.early) wait_for_kernel_before();
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) copy_weight();
  if (a.early) wait_for_kernel_before();
  for (int i = threadIdx.x; i < kCoefficients<start> * depth; i += kBlockThreads) {
    const int which = i / depth, row = i % depth;
    store_shared(coefficient + i * sizeof(float), row < a.k ? coefficient_of<start>(a, which, row) : 0.0f);
  }
  for (int row = threadIdx.x; row < kMaxRows; row += kBlockThreads) {
    float2 entry = {0, 0};
    if (row < a.m && masks) entry = {a.mask_scale[row], a.mask_bias[row]};
    if (row < a.m && !masks && a.offset) entry.x = a.offset[row];
    store_shared(table + row * sizeof(float2), entry);
    for (int i = 0; attends && i < 3; ++i) {
      store_shared(attention + (row * 3 + i) * sizeof(float), row < a.m ? a.mask_attention[row * 3 + i] : 0.0f);
    }
  }

  if constexpr (start == Start::attend) __syncthreads();  // a thread takes what others have stored

  // The stages of a tile, in order: for every 32 rows of x those of x, and of x2 where mixed; then for every 32 rows of
  // the result those of the residual, or of the mask. A thread copies its unit of 16 bytes in two rows. A row's units
  // are permuted so that a matrix of 8 rows lies in different banks.
  constexpr int kRowStep = kGroupThreads / kRowUnits;
  static_assert(kRowStep % 8 == 0, "rows that a thread copies have the same permutation");
  const int fetch_unit = thread % kRowUnits, fetch_row = thread / kRowUnits;
  const unsigned fetch_to = ring + fetch_row * kRowBytes + ((fetch_unit ^ (fetch_row % 8)) * 16);
  constexpr int kSources = start == Start::mix ? 2 : 1;
  const bool others = masks || a.residual;
  const int of_x = chunks * kSources, parts = of_x + (others ? (a.m + kDepth - 1) / kDepth : 0);
  const int tile_count = static_cast<int>((a.p + kColumns - 1) / kColumns), tile_step = kGroups * gridDim.x;
  const int first_tile = kGroups * blockIdx.x + group;
  int next_tile = first_tile, next_part = 0;
  const bfloat16* from = nullptr;  // this thread's next unit
  int left = 0;                    // rows from there on
  const auto open = [&](const bfloat16* source, int rows) {
    const int64_t column = int64_t{next_tile} * kColumns + fetch_unit * kUnitElements;
    from = source + fetch_row * a.p + column;
    left = column < a.p ? rows - fetch_row : 0;
  };
  open(a.x, a.k);
  const auto fetch = [&](int stage) {
    if (next_tile < tile_count) {
      const bfloat16* source = start == Start::mix && next_part < of_x && next_part % 2 ? from + (a.x2 - a.x) : from;
#pragma unroll
      for (int i = 0; i < kDepth / kRowStep; ++i) {
        const bool there = left > i * kRowStep;
        copy_async(fetch_to + stage * kStageBytes + i * kRowStep * kRowBytes,
                   there ? source + i * kRowStep * a.p : a.x, there);
      }
      ++next_part;
      if (next_part % kSources == 0 || next_part > of_x) from += kDepth * a.p, left -= kDepth;
      if (next_part == parts) {
        next_part = 0, next_tile += tile_step;
        open(a.x, a.k);
      } else if (next_part == of_x) {
        open(masks ? a.mask : a.residual, a.m);
      }
    }
    commit();
  };
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) fetch(i);
  int stage = kStages - 1;  // the one in use, which is filled again when the next is taken
  const auto next_stage = [&](bool with_weight, const auto& prepare) {
    wait<kStages - 2>();
    prepare(stage + 1 == kStages ? 0 : stage + 1);  // changes what this thread has copied
    // The stage is there, and everyone of the group has left the one that is filled next.
    if (with_weight) {
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // matrix instructions read it
      __syncthreads();  // both groups copied a part of it
      copy_weight();
    } else {
      asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(kGroupThreads) : "memory");
    }
    fetch(stage);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  };

  const auto nothing = [](int) {};

  // Where this lane's row of matrices of x lies in a stage: columns of the warp, the first or second 8 rows of a step.
  const unsigned x_at = ring + (matrix / 2 * 8 + lane % 8) * kRowBytes + (((warp * 2 + matrix % 2) ^ (lane % 8)) * 16);
  // The same of the residual or mask: the first or second 8 of 16 rows of y; then the columns.
  const unsigned other_at = x_at;
  // Of the rows of y that the warp writes: where this lane's row of matrices goes, and where its unit of a row lies. The
  // units of 4 rows in turn are exchanged, so that 8 rows of one unit lie in different banks.
  const auto place = [&](int row, int unit) { return batch_at + row * 32 + ((unit ^ (row / 4 % 2)) * 16); };
  const unsigned matrix_to = place(matrix / 2 * 8 + lane % 8, matrix % 2), unit_at = place(lane / 2, lane % 2);
  const uint64_t weight_at = descriptor(weight, kMatrixBytes, units * kMatrixBytes);
  const uint64_t second_half = descriptor(weight + kHalf / 8 * units * kMatrixBytes, kMatrixBytes, units * kMatrixBytes);

  // Sums over this warp's columns: of y in even lanes, of its square or product in odd ones. Row 16 i + lane / 2.
  float row_sums[ending == Ending::plain ? 1 : kMaxRows / 16] = {};
  int tile = first_tile;
#pragma unroll 1
  do {  // the first one also where there is none for this group: the other waits for its part of the weight
    float sum[2][kHalf / 2];  // of rows 0 to 143 and 144 to 287 of y
    unsigned x[2][4];         // of even and odd steps
    const auto load = [&](unsigned(&v)[4], int step) {
      load_transposed(v, x_at + stage * kStageBytes + step * 16 * kRowBytes);
    };
    const auto apply = [&](unsigned(&v)[4], [[maybe_unused]] const unsigned(&v1)[4], int k) {
      constexpr int halves = start == Start::norm || start == Start::mix ? 2 : 0;
#pragma unroll
      for (int half = 0; half < halves; ++half) {
        const auto pair = [&](int which) {  // of coefficients, for this lane's rows of x
          return load_shared<float2>(coefficient + (which * depth + k + half * 8 + quad * 2) * sizeof(float));
        };
        const float2 c0 = pair(0), c1 = pair(1);
        [[maybe_unused]] float2 c2;
        if constexpr (start == Start::mix) c2 = pair(2);
#pragma unroll
        for (int i = half * 2; i < half * 2 + 2; ++i) {
          const float2 value = unpack<bfloat16>(v[i]);
          if constexpr (start != Start::mix) {
            v[i] = pack_relu<bfloat16>({value.x * c0.x + c1.x, value.y * c0.y + c1.y});
          } else {
            const float2 g = unpack<bfloat16>(v1[i]);
            v[i] = pack<bfloat16>({g.x * c0.x + value.x * c1.x + c2.x, g.y * c0.y + value.y * c1.y + c2.y});
          }
        }
      }
    };
    const auto product = [&](const unsigned(&v)[4], int k) {
      const uint64_t further = k / 8 * kMatrixBytes >> 4;
      fence_products();
      multiply(sum[0], v, weight_at + further, k > 0);
      multiply(sum[1], v, second_half + further, k > 0);
      commit_products();
      wait_products<1>();  // the registers of the step before may change
    };
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int k = chunk * kDepth;
      [[maybe_unused]] unsigned first[2][4];
      next_stage(tile == first_tile, [&](int next) {
        if constexpr (start != Start::attend) return;
#pragma unroll
        for (int i = 0; i < kDepth / kRowStep; ++i) {
          const int row = k + fetch_row + i * kRowStep;
          if (row >= a.k) break;
          attend_in_place(fetch_to + next * kStageBytes + i * kRowStep * kRowBytes, coefficient + row * sizeof(float),
                          depth * sizeof(float), a.frames);
        }
      });
      if constexpr (start == Start::mix) {
        load(first[0], 0), load(first[1], 1);
        next_stage(tile == first_tile, nothing);
      }
      load(x[0], 0);
      apply(x[0], first[0], k);
      product(x[0], k);
      if (k + 16 < depth) {
        load(x[1], 1);
        apply(x[1], first[1], k + 16);
        product(x[1], k + 16);
      }
    }
    wait_products<0>();

    // sum[i][4 j + 2 h + e]: row 144 i + 8 j + 2 quad + e, column lane / 4 + 8 h of the warp's.
    const int64_t column = int64_t{tile} * kColumns + warp * 16 + lane % 2 * kUnitElements;
    bfloat16* to = a.y + lane / 2 * a.p + column;
#pragma unroll
    for (int batch = 0; batch < kBatches; ++batch) {
      if (batch * kDepth >= a.m) break;
      if (others) next_stage(false, nothing);
      __syncwarp();  // the rows before have been read
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        unsigned v[4];  // of rows 0-7: columns 0-7, 8-15; of rows 8-15
        [[maybe_unused]] unsigned other[4];
        if (others && !attends) load_transposed(other, other_at + stage * kStageBytes + i * 16 * kRowBytes);
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          const int row = batch * 32 + i * 16 + part / 2 * 8;  // but for 2 quad
          float* const pair = &sum[row / kHalf][row % kHalf / 8 * 4 + part % 2 * 2];
          float2 value = {pair[0], pair[1]};
          const float4 entry = load_shared<float4>(table + (row + quad * 2) * sizeof(float2));  // of two rows
          if constexpr (ending == Ending::mask) {
            const float2 at = unpack<bfloat16>(other[part]);
            if (entry.x * at.x + entry.y <= 0) value.x = 0;
            if (entry.z * at.y + entry.w <= 0) value.y = 0;
          } else if constexpr (!attends) {
            if (others) {
              const float2 add = unpack<bfloat16>(other[part]);
              value = {value.x + add.x, value.y + add.y};
            }
            if constexpr (ending == Ending::plain) value = {value.x + entry.x, value.y + entry.z};
            if (a.relu) value = {value.x < 0 ? 0 : value.x, value.y < 0 ? 0 : value.y};  // NaN stays
          }
          v[part] = pack<bfloat16>(value);
        }
        store_transposed(matrix_to + i * 16 * 32, v);
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = batch * 32 + i * 16 + lane / 2;
        const Unit unit = load_shared<Unit>(unit_at + i * 16 * 32);
        const bool inside = column < a.p;
        // Always one access, unlike an assignment.
        if (inside && row < a.m) __stwb(reinterpret_cast<uint4*>(to), reinterpret_cast<const uint4&>(unit));
        to += 16 * a.p;
        if constexpr (ending != Ending::plain) {
          [[maybe_unused]] Unit x_unit;
          if constexpr (masks) {
            const int local = i * 16 + lane / 2;
            x_unit = load_shared<Unit>(ring + stage * kStageBytes + local * kRowBytes +
                                       (((warp * 2 + lane % 2) ^ (local % 8)) * 16));
          }
          [[maybe_unused]] float2 entry;
          [[maybe_unused]] float3 weights;
          [[maybe_unused]] unsigned beyond;
          if constexpr (attends) {
            const unsigned from = attention + row * 3 * sizeof(float);
            entry = load_shared<float2>(table + row * sizeof(float2)), beyond = word_beyond(unit, a.frames);
            weights = {load_shared<float>(from), load_shared<float>(from + 4), load_shared<float>(from + 8)};
          }
          float sums[2] = {0, 0};
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            float2 value = unpack<bfloat16>(unit.pairs[j]);
            if constexpr (attends) {
              const unsigned before = j > 0 ? unit.pairs[j - 1] : lane % 2 ? beyond : 0;
              const unsigned after = j < 3 ? unit.pairs[j + 1] : lane % 2 ? 0 : beyond;
              const float2 at = unpack<bfloat16>(x_unit.pairs[j]);
              const float first = unmixed(weights, unpack<bfloat16>(before).y, value.x, value.y);
              const float second = unmixed(weights, value.x, value.y, unpack<bfloat16>(after).x);
              value.x = entry.x * at.x + entry.y <= 0 ? 0 : first, value.y = entry.x * at.y + entry.y <= 0 ? 0 : second;
            }
            const float2 by = masks ? unpack<bfloat16>(x_unit.pairs[j]) : value;
            sums[0] += value.x + value.y, sums[1] += value.x * by.x + value.y * by.y;
          }
          if (!inside) sums[0] = sums[1] = 0;
          const bool odd = lane % 2;
          const float theirs = __shfl_xor_sync(0xffffffff, odd ? sums[0] : sums[1], 1);
          row_sums[batch * 2 + i] += (odd ? sums[1] : sums[0]) + theirs;
        }
      }
    }
  } while ((tile += tile_step) < tile_count);

  if constexpr (ending != Ending::plain) {
    wait<0>();
    __syncthreads();  // the rings are free
    constexpr int kWarpSums = 2 * kMaxRows;
    const unsigned sums_at = memory + (threadIdx.x / 32 * kWarpSums + lane % 2 * kMaxRows + lane / 2) * sizeof(float);
#pragma unroll
    for (int i = 0; i < kMaxRows / 16; ++i) store_shared(sums_at + i * 16 * sizeof(float), row_sums[i]);
    __syncthreads();
    for (int i = threadIdx.x; i < kWarpSums; i += kBlockThreads) {
      const int row = i % kMaxRows;
      if (row >= a.m) continue;
      float total = 0;
#pragma unroll
      for (int w = 0; w < kGroups * kGroupWarps; ++w) {
        total += load_shared<float>(memory + (w * kWarpSums + i) * sizeof(float));
      }
      a.sums[(int64_t{blockIdx.x} * 2 + i / kMaxRows) * a.m + row] = total;
    }
  }
#endif
}

}  // namespace
}  // namespace rubiks
