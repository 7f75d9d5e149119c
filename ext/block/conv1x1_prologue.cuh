// The prologues of the 1x1 convolution: their coefficients, in shared memory, and how they are applied to x.
#pragma once

#include "block/attention.cuh"
#include "block/conv1x1_ring.cuh"
#include "common/shared_memory.cuh"

#include <cstdint>
#include <type_traits>

namespace rubiks {
namespace {

// K in whole steps of the tensor cores.
__host__ __device__ inline int whole_depth(int k) { return (k + 15) / 16 * 16; }

// Coefficients of two adjacent rows of x.
template <typename Prologue>
struct RowPair {
  float2 c0, c1, c2;  // c2: for Mix only

  // Two elements of these rows after NormRelu, or after Mix, where `first` is of x and `v` of x2.
  __device__ __forceinline__ unsigned apply(unsigned v, unsigned first) const {
    const float2 x = unpack(v);
    if constexpr (std::is_same_v<Prologue, NormRelu>) {
      return pack_relu({x.x * c0.x + c1.x, x.y * c0.y + c1.y});
    } else {
      const float2 g = unpack(first);
      return pack({g.x * c0.x + x.x * c1.x + c2.x, g.y * c0.y + x.y * c1.y + c2.y});
    }
  }
};

// The coefficients of all rows of x, (coefficients, depth) in shared memory.
template <typename Prologue>
struct Coefficients {
  static constexpr int kCount = Prologue::coefficients;
  static constexpr bool kInRegisters = std::is_same_v<Prologue, NormRelu> || std::is_same_v<Prologue, Mix>;

  const Conv1x1& a;
  const int depth;
  const unsigned at;
  float* const table;  // the same place, as a pointer

  template <int threads>
  __device__ __forceinline__ void load() const {
    for (int i = threadIdx.x; i < kCount * depth; i += threads) {
      const int which = i / depth, row = i % depth;
      float value = 0;
      if (row < a.k) {
        if (std::is_same_v<Prologue, Mix>) {
          value = a.mix[which * a.k + row];
        } else {
          value = which == 0 ? a.scale[row] : which == 1 ? a.bias[row] : a.attention[row * 3 + which - 2];
        }
      }
      table[i] = value;
    }
  }

  // Those of rows k + 2 * i and k + 2 * i + 1.
  __device__ __forceinline__ RowPair<Prologue> pair(int k, int i) const {
    const auto of = [&](int which) { return *reinterpret_cast<const float2*>(table + which * depth + k + i * 2); };
    RowPair<Prologue> rows = {of(0), of(1)};
    if constexpr (kCount == 3) rows.c2 = of(2);
    return rows;
  }

  // Applies the norm and the attention to what this thread has copied to a stage, whose first row of x is k.
  template <typename Ring>
  __device__ __forceinline__ void attend(const Ring& ring, int stage, int k) const {
#pragma unroll
    for (int i = 0; i < Ring::kCopies; ++i) {
      const int row = k + ring.fetch_row + i * Ring::kRowStep;
      if (row >= a.k) break;
      mix_frames_in_place(ring.copied(stage, i), at + row * sizeof(float), depth * sizeof(float), a.frames);
    }
  }
};

}  // namespace
}  // namespace rubiks
