// Hopper's matrix instructions (wgmma) and what they need, only in code for architecture 9.0a.
#pragma once

#include <cstdint>

namespace rubiks {
namespace {

constexpr int kMatrixBytes = 128;   // of 8 x 8 elements of 16 bits
constexpr int kProductRows = 144;  // rows of b^T that one instruction takes

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Describes a matrix in shared memory to the instruction: blocks of 8 x 8 elements, `next_k` bytes apart along the sum
// and `next_row` bytes along the rows.
__device__ inline uint64_t descriptor(unsigned address, int next_k, int next_row) {
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t(next_k >> 4) << 16 | uint64_t(next_row >> 4) << 32;
}

// Makes what this thread has written to shared memory visible to the instruction.
__device__ inline void fence_shared_memory() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for this group's products, except those of its last `pending` commits.
template <int pending>
__device__ inline void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// sum (64, 144) [+]= a (64, 16) @ b (16, 144), b given by its descriptor; each warp has 16 rows, laid out as for
// multiply_add.
__device__ inline void multiply(float (&sum)[kProductRows / 2], const unsigned (&a)[4], uint64_t b, bool add) {
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

}  // namespace
}  // namespace rubiks
