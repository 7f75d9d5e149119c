// The prologues of the 1x1 convolution: their coefficients, in shared memory, and how they are applied to x.
#pragma once

#include "block/attention.cuh"
#include "block/conv1x1_ring.cuh"

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
  uint3 weights;      // for Attention only

  // Two elements of these rows after NormRelu, or after Mix, where `first` is of x and `v` of x2.
  __device__ __forceinline__ unsigned apply(unsigned v, unsigned first) const {
    const float2 x = unpack(v);
    if constexpr (std::is_same_v<Prologue, Mix>) {
      const float2 g = unpack(first);
      return pack({g.x * c0.x + x.x * c1.x + c2.x, g.y * c0.y + x.y * c1.y + c2.y});
    } else {
      return pack_relu({x.x * c0.x + c1.x, x.y * c0.y + c1.y});
    }
  }
};

// The coefficients of all rows of x, (coefficients, depth) in shared memory. Weights of frames are pairs of bfloat16
// for every two rows, in the place of the first.
template <typename Prologue>
struct Coefficients {
  static constexpr int kCount = Prologue::coefficients;
  static constexpr bool kMixes = std::is_same_v<Prologue, Mix>, kAttends = std::is_same_v<Prologue, Attention>;

  const Conv1x1& a;
  const int depth;
  const unsigned at;
  float* const table;  // the same place, as a pointer

  template <int threads>
  __device__ __forceinline__ void load() const {
    for (int i = threadIdx.x; i < kCount * depth; i += threads) {
      const int which = i / depth, row = i % depth;
      table[i] = row < a.k ? coefficient(which, row) : 0;
    }
  }

  __device__ __forceinline__ float coefficient(int which, int row) const {
    if (kMixes) return a.mix[which * a.k + row];
    if (which < 2) return which == 0 ? a.scale[row] : a.bias[row];
    const float* of_frame = a.attention + row / 2 * 6 + which - 2;
    return __uint_as_float(pack({of_frame[0], of_frame[3]}));
  }

  // Those of rows k + 2 * i and k + 2 * i + 1.
  __device__ __forceinline__ RowPair<Prologue> pair(int k, int i) const {
    const float* const first = table + k + i * 2;
    const auto of = [&](int which) { return *reinterpret_cast<const float2*>(first + which * depth); };
    RowPair<Prologue> rows = {of(0), of(1)};
    if constexpr (kMixes) rows.c2 = of(2);
    if constexpr (kAttends) {
      const auto weights = [&](int which) { return __float_as_uint(first[which * depth]); };
      rows.weights = {weights(2), weights(3), weights(4)};
    }
    return rows;
  }
};

}  // namespace
}  // namespace rubiks
