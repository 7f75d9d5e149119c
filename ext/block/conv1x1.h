// The matrix product of a 1x1 convolution: y (M, P) = weight (M, K) @ f(x (K, P)) on channel-major activations. A
// prologue makes f(x) as x is read (batch norm and ReLU, ...), an epilogue changes or sums y as it is written.
// conv1x1_sm80.cuh has the kernel for all GPUs, conv1x1_sm90.cuh the one for many rows on Hopper; both take the same
// arguments and share conv1x1_ring.cuh, conv1x1_prologue.cuh and conv1x1_epilogue.cuh.
#pragma once

#include "common/bfloat16.cuh"
#include "common/tensors.h"

#include <type_traits>

namespace rubiks {

// Prologues, with the number of coefficients of each row of x and of the matrices that are read. They are types, not
// numbers, so that a profile shows their names.
struct Identity {  // x
  static constexpr int coefficients = 0, sources = 1;
};
struct NormRelu {  // relu(scale * x + bias)
  static constexpr int coefficients = 2, sources = 1;
};
struct Attention {  // the same, its frames mixed by `attention`
  static constexpr int coefficients = 5, sources = 1;
};
struct Mix {  // mix[0] * x + mix[1] * x2 + mix[2]: the gradient of a norm's input
  static constexpr int coefficients = 3, sources = 2;
};

// Epilogues: whether they sum rows, and whether they read the mask.
struct Store {  // y + offset + residual
  static constexpr bool sums = false, masks = false;
};
struct Sums {  // y + residual, and the row sums of y and of y^2
  static constexpr bool sums = true, masks = false;
};
struct Mask {  // 0 where mask_scale * mask + mask_bias <= 0, and the row sums of y and of y * mask
  static constexpr bool sums = true, masks = true;
};
struct AttentionMask {  // y as it is; the row sums are as for Mask, but of the gradient before the mix of frames
  static constexpr bool sums = true, masks = true;
};

struct Conv1x1 {  // pointers that a step does not use are nullptr
  const bfloat16* x;                    // (K, P)
  const bfloat16* weight;               // (M, K)
  const bfloat16* x2;                   // (K, P)
  const float *scale, *bias;            // (K)
  const float* attention;               // (K, 3), weights of the previous, the same and the next frame
  const float* mix;                     // (3, K)
  const float* offset;                  // (M), added to rows of y, or nullptr
  const bfloat16* residual;             // (M, P), added to y, or nullptr
  const bfloat16* mask;                 // (M, P)
  const float *mask_scale, *mask_bias;  // (M)
  const float* mask_attention;          // (M, 3)
  bfloat16* y;                          // (M, P)
  float* sums;                          // (parts, 2, M); a part is a block's, over its columns
  int64_t p;
  int m, k;
  int frames;  // of a clip, 8 or 16; for attention
  int slices;  // of the rows of y, a block makes one; conv1x1_sm80 only
  bool relu;   // of y; not with a mask
  bool early;  // the kernel before in the stream does not write the weight
};

// Makes y and, with `sum_rows` or a mask, new `sums`. conv1x1_sm90 returns whether it did: it takes products with 145
// to 288 rows on Hopper.
void conv1x1_sm80(Conv1x1& a, bool sum_rows, const Tensor& x, MaybeTensor* sums);
bool conv1x1_sm90(Conv1x1& a, bool sum_rows, const Tensor& x, MaybeTensor* sums);

// Calls run(prologue, epilogue) with the types that the arguments ask for.
template <typename F>
auto with_steps(const Conv1x1& a, bool sum_rows, const F& run) {
  if (a.mix) {
    if (a.mask_attention) return run(Mix{}, AttentionMask{});
    return a.mask ? run(Mix{}, Mask{}) : run(Mix{}, Store{});
  }
  if (a.attention) return sum_rows ? run(Attention{}, Sums{}) : run(Attention{}, Store{});
  if (a.scale) return sum_rows ? run(NormRelu{}, Sums{}) : run(NormRelu{}, Store{});
  if (a.mask) return run(Identity{}, Mask{});
  return sum_rows ? run(Identity{}, Sums{}) : run(Identity{}, Store{});
}

}  // namespace rubiks
