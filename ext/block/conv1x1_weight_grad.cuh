// The gradient of a 1x1 convolution's weight on tensor cores: gh (M, P) @ f(x)^T (P, K), where gh is g or
// mix[0] * g + mix[1] * h + mix[2], and f(x) is x or relu(scale * x + bias), its frames mixed by attention; both are
// rounded to bfloat16.
//
// M and K are short and P is long, so what counts is to read g, h and x once, without pause. One block runs on each
// multiprocessor. It makes a tile of the result, as large as its registers hold, over its share of the columns: chunks
// of 64, which arrive in a ring of stages in shared memory several chunks ahead of their use. The blocks of a tile take
// the chunks in turn, so that at any time they all read from the same few pages of memory. Each writes its part of
// the sums, and a second kernel (weight_grad_sum.cuh) adds them in a fixed order: the same bits on every run.
#pragma once

#include "block/conv1x1_weight_grad_rows.cuh"
#include "common/dependent_launch.cuh"
#include "common/tensor_cores.cuh"

#include <cstdint>

namespace rubiks {
namespace {

// A warp makes 48 x 72 outputs from fragments of 16 rows of g and 8 rows of x, 16 columns a step.
constexpr int kFragmentsM = 3, kFragmentsK = 9;
constexpr int kWarpM = 16 * kFragmentsM, kWarpK = 8 * kFragmentsK;
// 12 warps: 3 divide the rows of g, 1, 2 or 4 those of x, and the remaining factor of 4, 2 or 1 the steps of a chunk.
constexpr int kWarpsM = 3, kMaxWarpsK = 4;
constexpr int kTileM = kWarpM * kWarpsM, kTileK = kWarpK * kMaxWarpsK;  // rows of g and of x in a tile, at most

constexpr int kMaxStages = 6;

// Shared memory: {mix[0], mix[1], mix[2], unused} of the tile's rows of g, {scale, bias} and {attention, unused} of its
// rows of x, the ring.
constexpr int kMixBytes = sizeof(float4) * kTileM, kNormBytes = sizeof(float2) * kTileK;
constexpr int kTableBytes = kMixBytes + kNormBytes + sizeof(float4) * kTileK;
constexpr int kOutputs = 4 * kFragmentsM * kFragmentsK;                  // of a thread
constexpr int kExchangeBytes = sizeof(float) * kOutputs * kThreads / 2;  // at the end, in place of the ring

struct WeightGrad {
  const bfloat16 *g, *h, *x;        // (M, P), (M, P) or null, (K, P)
  const float *mix, *scale, *bias;  // (3, M), null where h is; (K), null where x is taken as it is
  const float* attention;           // (K, 3) or null
  int frames;                       // of a clip, 8 or 16; with attention only
  float* out;                       // (splits, M, K): parts
  int64_t p;                        // a multiple of 8
  int m, k;
  int tile_m, tile_k, tiles_k, tiles;  // rows of g and of x in a tile; tiles along K and in all
  int splits;                          // blocks that share the chunks of a tile
  int stages, stage_bytes;
};

// A warp's outputs: rows m.. of the tile, columns k.. .
template <int steps>
struct Outputs {
  float sums[kFragmentsM][kFragmentsK][4] = {};
  // Where this lane's rows of the fragments' matrices lie in a chunk of g and of x at the warp's first step. Rows past
  // the last read the last one; their outputs are not written.
  int g_rows[kFragmentsM], x_pairs[kFragmentsK / 2], x_last;

  __device__ Outputs(int m, int k, int rows_m, int rows_k, int first_step) {
    static_assert(kFragmentsK % 2 == 1, "x_last is the fragment without a partner");
    const int lane = threadIdx.x % 32, line = lane % 8, low = lane / 8 % 2, high = lane / 16, unit = 2 * first_step;
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i) {
      g_rows[i] = swizzle(min(m + 16 * i + 8 * low + line, rows_m - 1), unit + high);
    }
#pragma unroll
    for (int j = 0; j < kFragmentsK / 2; ++j) {
      x_pairs[j] = swizzle(min(k + 16 * j + 8 * high + line, rows_k - 1), unit + low);
    }
    x_last = swizzle(min(k + 8 * (kFragmentsK - 1) + line, rows_k - 1), unit + low);
  }

  // Adds the products over this warp's steps of a chunk.
  __device__ void add(unsigned g, unsigned x) {
#pragma unroll 2  // with more, registers spill
    for (int step = 0; step < steps; ++step) {
      const int units = step * 32;  // two units on, which in permuted rows is this bit of the address
      unsigned a[kFragmentsM][4];
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i) load_matrices(a[i], (g + g_rows[i]) ^ units);
#pragma unroll
      for (int j = 0; j < kFragmentsK / 2; ++j) {
        unsigned b[4];
        load_matrices(b, (x + x_pairs[j]) ^ units);
#pragma unroll
        for (int i = 0; i < kFragmentsM; ++i) {
          multiply_add(sums[i][2 * j], a[i], b[0], b[1]);
          multiply_add(sums[i][2 * j + 1], a[i], b[2], b[3]);
        }
      }
      unsigned b[2];
      load_matrices(b, (x + x_last) ^ units);
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i) multiply_add(sums[i][kFragmentsK - 1], a[i], b[0], b[1]);
    }
  }

  __device__ float& at(int i) { return sums[i / 4 / kFragmentsK][i / 4 % kFragmentsK][i % 4]; }
};

// The instruction takes the number as a constant.
__device__ inline void wait_for_all_but(int groups) {
  static_assert(kMaxStages == 6);
  switch (groups) {
    case 0:
      return wait_for_copies<0>();
    case 1:
      return wait_for_copies<1>();
    case 2:
      return wait_for_copies<2>();
    case 3:
      return wait_for_copies<3>();
    default:
      return wait_for_copies<4>();
  }
}

// Groups of warps add up their parts of the same outputs: the upper half hands over to the lower half.
template <int groups, int steps>
__device__ inline void add_groups(Outputs<steps>& outputs, int group, unsigned ring) {
  constexpr int group_threads = kThreads / groups;
#pragma unroll
  for (int half = groups / 2; half > 0; half /= 2) {
    const int threads = half * group_threads, pitch = threads * static_cast<int>(sizeof(float));
    const unsigned slot = ring + threadIdx.x % threads * sizeof(float);
    __syncthreads();  // the ring, or the slots of the round before, have been read
    if (group >= half && group < 2 * half) {
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) store_shared(slot + i * pitch, outputs.at(i));
    }
    __syncthreads();
    if (group < half) {
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) outputs.at(i) += load_shared<float>(slot + i * pitch);
    }
  }
}

// Writes a warp's outputs, from row warp_m and column warp_k on, to a tile (rows_m, rows_k), whose rows are k apart.
template <int steps>
__device__ inline void write_outputs(const Outputs<steps>& outputs, float* out, int k, int rows_m, int rows_k,
                                     int warp_m, int warp_k) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2 * kFragmentsM; ++i) {
    const int row = warp_m + 8 * i + lane / 4;
    if (row >= rows_m) break;
    float* line = out + static_cast<int64_t>(row) * k;
#pragma unroll
    for (int j = 0; j < kFragmentsK; ++j) {
      const int col = warp_k + 8 * j + lane % 4 * 2;
      const float* v = outputs.sums[i / 2][j] + i % 2 * 2;
      if (k % 2 == 0) {
        if (col < rows_k) *reinterpret_cast<float2*>(line + col) = {v[0], v[1]};
      } else {
        if (col < rows_k) line[col] = v[0];
        if (col + 1 < rows_k) line[col + 1] = v[1];
      }
    }
  }
}

// kWarpsM x warps_k warps cover a tile; the groups of so many take different steps of each chunk.
template <int warps_k>
__global__ void __launch_bounds__(kThreads, 1) conv1x1_weight_grad_kernel(const __grid_constant__ WeightGrad a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  constexpr int group_threads = 32 * kWarpsM * warps_k, groups = kThreads / group_threads, steps = kSteps / groups;
  const int tile = blockIdx.x % a.tiles, split = blockIdx.x / a.tiles;
  const int first_m = tile / a.tiles_k * a.tile_m, rows_m = min(a.tile_m, a.m - first_m);
  const int first_k = tile % a.tiles_k * a.tile_k, rows_k = min(a.tile_k, a.k - first_k);
  const bfloat16* g = a.g + first_m * a.p;
  const bfloat16* h = a.h + (a.h ? first_m * a.p : 0);
  const bfloat16* x = a.x + first_k * a.p;
  const bool mixed = a.mix != nullptr, activated = a.scale != nullptr;

  // A stage: rows of g, of h where mixed, of x.
  const unsigned mixes = shared_memory(), coefficients = mixes + kMixBytes, attention = coefficients + kNormBytes;
  const unsigned ring = mixes + kTableBytes;
  const unsigned ring_end = ring + a.stages * a.stage_bytes;
  const int h_offset = rows_m * kRowBytes, x_offset = mixed ? 2 * h_offset : h_offset;
  const auto next = [&](unsigned stage) { return stage + a.stage_bytes == ring_end ? ring : stage + a.stage_bytes; };

  const int chunks = static_cast<int>((a.p + kColumns - 1) / kColumns);
  const Share share;
  const auto column = [&](int chunk) { return static_cast<int64_t>(chunk) * kColumns + share.unit * kUnitElements; };
  const auto copy = [&](int chunk, unsigned stage) {
    if (chunk < chunks) {
      copy_rows(stage, g, rows_m, a.p, column(chunk), share);
      if (mixed) copy_rows(stage + h_offset, h, rows_m, a.p, column(chunk), share);
      copy_rows(stage + x_offset, x, rows_k, a.p, column(chunk), share);
    }
    commit_copies();  // empty past the last chunk, to keep the count of groups
  };
  wait_for_previous_kernel();
  unsigned free = ring;
  for (int i = 0; i < a.stages - 1; ++i, free = next(free)) copy(split + i * a.splits, free);

  if (mixed) {
#pragma unroll 1
    for (int row = threadIdx.x; row < rows_m; row += kThreads) {
      const float* mix = a.mix + first_m + row;
      store_shared(mixes + row * sizeof(float4), float4{mix[0], mix[a.m], mix[2 * a.m], 0});
    }
  }
  if (activated) {
#pragma unroll 1
    for (int row = threadIdx.x; row < rows_k; row += kThreads) {
      store_shared(coefficients + row * sizeof(float2), float2{a.scale[first_k + row], a.bias[first_k + row]});
      if (a.attention == nullptr) continue;
      const float* weights = a.attention + (first_k + row) * 3;
      store_shared(attention + row * sizeof(float4), float4{weights[0], weights[1], weights[2], 0});
    }
  }
  __syncthreads();

  const int warp = threadIdx.x / 32, group = threadIdx.x / group_threads;
  const int warp_m = warp % kWarpsM * kWarpM, warp_k = warp / kWarpsM % warps_k * kWarpK;
  const bool idle = warp_m >= rows_m || warp_k >= rows_k;
  Outputs<steps> outputs(warp_m, warp_k, rows_m, rows_k, group * steps);
  unsigned stage = ring;
  for (int chunk = split; chunk < chunks; chunk += a.splits, stage = next(stage), free = next(free)) {
    // A thread transforms what it copied itself, so its own wait is enough. Zeros past the last column stay.
    wait_for_all_but(a.stages - 2);
    if (column(chunk) < a.p) {
      if (mixed) mix_rows(stage, h_offset, mixes, rows_m, share);
      if (activated) {
        activate_rows(stage + x_offset, coefficients, attention, a.frames, rows_k, share);
      }
    }
    __syncthreads();  // the chunk is complete, and the one before, whose stage is `free`, has been read
    copy(chunk + (a.stages - 1) * a.splits, free);
    if (!idle) outputs.add(stage, stage + x_offset);
  }

  add_groups<groups>(outputs, group, ring);
  if (group > 0 || idle) return;
  float* out = a.out + (static_cast<int64_t>(split) * a.m + first_m) * a.k + first_k;
  write_outputs(outputs, out, a.k, rows_m, rows_k, warp_m, warp_k);
#endif
}

}  // namespace
}  // namespace rubiks
