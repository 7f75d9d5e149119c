// Rows of a patch of pixels in shared memory, for small_planes.cuh.
#pragma once

#include "common/bfloat16.cuh"
#include "common/shared_memory.cuh"

#include <cuda_fp16.h>

#include <type_traits>

namespace rubiks {
namespace {

constexpr int kTall = 2, kWide = 7;  // of a thread's patch of pixels

// Rows of pixels in shared memory. Two 16-bit numbers are read and written as one word, wherever the row starts in it.

__device__ inline void store_half(unsigned address, unsigned v) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(static_cast<unsigned short>(v)) : "memory");
}

// A number whose bits are the upper ones of a word.
template <typename scalar>
__device__ inline float widen(unsigned bits) {
  if constexpr (std::is_same_v<scalar, __half>) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits >> 16)));
  } else {
    return __uint_as_float(bits);
  }
}

template <typename scalar>
__device__ inline unsigned pack_pair(float low, float high) {
  if constexpr (std::is_same_v<scalar, __half>) {
    const __half2 v = __floats2half2_rn(low, high);
    return reinterpret_cast<const unsigned&>(v);
  } else {
    return pack({low, high});
  }
}

// What load_row() takes for element j of a row, to read it or to put zero in its place.
template <typename scalar>
__device__ inline unsigned mask(int j, bool used) {
  if (sizeof(scalar) == 4) return used ? 0xffffffff : 0;
  return j % 2 ? (used ? 0xffff0000 : 0) : (used ? 0x1044 : 0x4444);  // bits to keep, bytes for __byte_perm
}

template <typename scalar, int count>
__device__ inline void load_row(unsigned address, const unsigned (&masks)[count], float (&v)[count]) {
  if constexpr (sizeof(scalar) == 4) {
#pragma unroll
    for (int j = 0; j < count; ++j) v[j] = __uint_as_float(load_shared<unsigned>(address + 4 * j) & masks[j]);
  } else {
    constexpr int words = count / 2 + 1;
    unsigned word[words + 1] = {};
#pragma unroll
    for (int j = 0; j < words; ++j) word[j] = load_shared<unsigned>((address & ~3u) + 4 * j);
#pragma unroll
    for (int j = 0; j < count; j += 2) {
      const unsigned pair = __funnelshift_r(word[j / 2], word[j / 2 + 1], address * 8);
      v[j] = widen<scalar>(__byte_perm(pair, 0, masks[j]));
      if (j + 1 < count) v[j + 1] = widen<scalar>(pair & masks[j + 1]);
    }
  }
}

template <typename scalar>
__device__ inline void store_row(unsigned address, const float (&v)[kWide]) {
  if constexpr (sizeof(scalar) == 4) {
#pragma unroll
    for (int j = 0; j < kWide; ++j) store_shared(address + 4 * j, __float_as_uint(v[j]));
  } else {
    unsigned pair[kWide / 2 + 1];
#pragma unroll
    for (int j = 0; j < kWide; j += 2) pair[j / 2] = pack_pair<scalar>(v[j], j + 1 < kWide ? v[j + 1] : 0);
    const bool odd = address & 2;  // the row starts in the upper half of a word
#pragma unroll
    for (int j = 0; j < kWide / 2; ++j) {
      store_shared(((address + 2) & ~3u) + 4 * j, __funnelshift_r(pair[j], pair[j + 1], address * 8));
    }
    store_half(odd ? address : address + 2 * (kWide - 1), odd ? pair[0] : pair[kWide / 2]);
  }
}

}  // namespace
}  // namespace rubiks
