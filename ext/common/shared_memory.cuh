// Shared memory by 32-bit addresses: with pointers, the address space may be worked out at every access.
#pragma once

#include <cuda_runtime.h>

namespace rubiks {
namespace {

// The block's dynamic shared memory, by a pointer and by its address.
__device__ inline char* shared_memory_pointer() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}
__device__ inline unsigned shared_memory() {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared_memory_pointer()));
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

}  // namespace
}  // namespace rubiks
