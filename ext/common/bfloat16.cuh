// bfloat16 in pairs (32 bits) and in units of 8 (16 bytes, what one access moves).
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace rubiks {

using bfloat16 = __nv_bfloat16;

namespace {

constexpr int kUnitElements = 8;

struct alignas(16) Unit {
  unsigned pairs[4];
};

__device__ inline float2 unpack(unsigned pair) {
  // Each is the upper half of its float. The library's conversion takes one more instruction.
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

__device__ inline unsigned pack(float2 v) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(v.x, v.y);
  return reinterpret_cast<const unsigned&>(pair);
}

// max(v, 0), rounded; NaN stays NaN, as in PyTorch's relu. From compute capability 8.0 on.
__device__ inline unsigned pack_relu(float2 v) {
  unsigned pair;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(v.y), "f"(v.x));
  return pair;
}

// Always one access, unlike an assignment.
__device__ inline void store_unit(void* to, const Unit& unit) {
  __stwb(static_cast<uint4*>(to), reinterpret_cast<const uint4&>(unit));
}

}  // namespace
}  // namespace rubiks
