// Tensor cores from compute capability 8.0 on: loading fragments from shared memory, and the product of bfloat16.
#pragma once

namespace rubiks {
namespace {

// 8 x 8 matrices: lane l gives the address of row l % 8 of matrix l / 8, and gets elements 2 * (l % 4) and the next of
// row l / 4 of each.
__device__ inline void load_matrices(unsigned (&v)[4], unsigned row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
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

// The same, each matrix transposed.
__device__ inline void load_transposed(unsigned (&v)[4], unsigned row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(row)
               : "memory");
}

// c (16, 8) += a (16, 16) @ b (16, 8). a: its matrices at (row 0, column 0), (8, 0), (0, 8), (8, 8); b0, b1: those of
// b^T (8, 16) at columns 0 and 8; c: lane l has columns 2 * (l % 4) and the next of row l / 4, then of row l / 4 + 8.
__device__ inline void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace
}  // namespace rubiks
