// Pixels of channel-major matrices of bfloat16 whose columns are in the order N, H, W, T: a pixel's frames are
// adjacent. With 8 or 16 of them they are whole units of 16 bytes, which a thread has in registers.
#pragma once

#include "common/bfloat16.cuh"

#include <cstdint>

namespace rubiks {
namespace {

template <int frames>
struct Pixel {
  static constexpr int units = frames / kUnitElements;
  static_assert(units * kUnitElements == frames);
  Unit at[units];

  // Zeros where not `inside`.
  __device__ static Pixel load(const Unit* matrix, int64_t index, bool inside) {
    Pixel pixel = {};
    if (inside) {
#pragma unroll
      for (int i = 0; i < units; ++i) pixel.at[i] = matrix[index * units + i];
    }
    return pixel;
  }

  __device__ void store(Unit* matrix, int64_t index) const {
#pragma unroll
    for (int i = 0; i < units; ++i) {
      store_unit(matrix + index * units + i, at[i]);
    }
  }

  __device__ void unpack_to(float (&values)[frames]) const {
#pragma unroll
    for (int i = 0; i < frames / 2; ++i) {
      const float2 two = unpack(at[i / 4].pairs[i % 4]);
      values[2 * i] = two.x, values[2 * i + 1] = two.y;
    }
  }

  __device__ static Pixel pack_from(const float (&values)[frames]) {
    Pixel pixel;
#pragma unroll
    for (int i = 0; i < frames / 2; ++i) {
      pixel.at[i / 4].pairs[i % 4] = pack({values[2 * i], values[2 * i + 1]});
    }
    return pixel;
  }
};

// Where a pixel of a channel is, whose clips are height x width.
struct PixelPlace {
  unsigned clip, row, column;

  __device__ PixelPlace(unsigned pixel, int height, int width)
      : clip(pixel / width / height), row(pixel / width % height), column(pixel % width) {}
};

__device__ inline float rectified(float v) { return v < 0 ? 0 : v; }  // NaN stays

}  // namespace
}  // namespace rubiks
