// What the matrix kernels use of the hardware, from compute capability 8.0 on: shared memory by its own 32-bit
// addresses, asynchronous copies to it, tensor cores, and elements in pairs of 16 bits.
#pragma once

#include "common/dependent_launch.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

namespace rubiks {
namespace {

constexpr int kUnitElements = 8;

// 8 elements of 16 bits: what one access moves.
struct alignas(16) Unit {
  unsigned pairs[4];
};

// The block's dynamic shared memory.
__device__ inline unsigned shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return static_cast<unsigned>(__cvta_generic_to_shared(memory));
}

template <typename T>
__device__ inline T load_shared(unsigned from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  T value;
  auto& v = reinterpret_cast<unsigned(&)[sizeof(T) / 4]>(value);
  if constexpr (sizeof(T) == 4) {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v[0]) : "r"(from) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(from) : "memory");
  } else {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(from)
                 : "memory");
  }
  return value;
}

template <typename T>
__device__ inline void store_shared(unsigned to, const T& value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  const auto& v = reinterpret_cast<const unsigned(&)[sizeof(T) / 4]>(value);
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(v[0]) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to), "r"(v[0]), "r"(v[1]) : "memory");
  } else {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
  }
}

// 16 bytes to shared memory; zeros, and nothing is read, where not `inside`.
__device__ inline void copy_async(unsigned to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}

// The same of `bytes` bytes, 4 or 16.
template <int bytes>
__device__ inline void copy_async(unsigned to, const void* from, bool inside) {
  if constexpr (bytes == 16) {
    copy_async(to, from, inside);
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(inside ? 4 : 0) : "memory");
  }
}

// Ends a group of this thread's copies.
__device__ inline void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's copies but for those of its last `pending` groups.
template <int pending>
__device__ inline void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// 8 x 8 matrices: lane l gives the address of row l % 8 of matrix l / 8, and gets elements 2 * (l % 4) and the next of
// row l / 4 of each.
__device__ inline void load_matrices(unsigned (&v)[4], unsigned row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(row)
               : "memory");
}

// The same, of the matrices transposed.
__device__ inline void load_transposed(unsigned (&v)[4], unsigned row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(row)
               : "memory");
}

__device__ inline void load_matrices(unsigned (&v)[2], unsigned row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(v[0]), "=r"(v[1])
               : "r"(row)
               : "memory");
}

// c (16, 8) += a (16, 16) @ b (16, 8). a: its matrices at (row 0, column 0), (8, 0), (0, 8), (8, 8); b0, b1: those of
// b^T (8, 16) at columns 0 and 8; c: lane l has columns 2 * (l % 4) and the next of row l / 4, then of row l / 4 + 8.
template <typename scalar>
__device__ inline void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  if constexpr (std::is_same_v<scalar, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

template <typename scalar>
__device__ inline float2 unpack(unsigned pair) {
  if constexpr (std::is_same_v<scalar, __half>) {
    return __half22float2(reinterpret_cast<const __half2&>(pair));
  } else {
    // Each is the upper half of its float. The library's conversion takes an instruction more.
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  }
}

template <typename scalar>
__device__ inline unsigned pack(float2 v) {
  unsigned pair;
  if constexpr (std::is_same_v<scalar, __half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(v.y), "f"(v.x));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(v.y), "f"(v.x));
  }
  return pair;
}

// Rounds max(v, 0); NaN stays NaN, as in PyTorch's relu.
template <typename scalar>
__device__ inline unsigned pack_relu(float2 v) {
  unsigned pair;
  if constexpr (std::is_same_v<scalar, __half>) {
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(v.y), "f"(v.x));
  } else {
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(v.y), "f"(v.x));
  }
  return pair;
}

}  // namespace
}  // namespace rubiks
