// What a matrix product of a 1x1 convolution computes: y (M, P) = weight (M, K) @ f(x (K, P)) on channel-major
// activations, with what comes before (batch norm and ReLU) and after (bias, residual, ReLU, row sums) done on the way.
// block/conv1x1_sm80.cuh has the kernel for all GPUs, block/conv1x1_sm90.cuh the one for many rows on Hopper.
#pragma once

#include <cuda_bf16.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace rubiks {

using bfloat16 = __nv_bfloat16;

// f(x) is x, relu(scale * x + bias), the same mixed with its neighbouring frames by attention, or mix[0] * x + mix[1] * x2
// + mix[2].
enum class Start { plain, norm, attend, mix };
// Of a row of x.
template <Start start>
constexpr int kCoefficients = start == Start::plain ? 0 : start == Start::norm ? 2 : start == Start::mix ? 3 : 5;

// What the result is besides written: summed; masked and summed; or written as it is, while what is summed is the gradient
// before f's mix of frames, masked.
enum class Ending { plain, sums, mask, attend };

struct Pointwise {
  const bfloat16* x;          // (K, P)
  const bfloat16* weight;     // (M, K)
  const bfloat16* x2;         // (K, P)
  const float *scale, *bias;  // (K)
  const float* attention;     // (K, 3), of the previous, the same and the next frame, or nullptr
  const float* mix;           // (3, K)
  const float* offset;        // (M), added to rows of y, or nullptr
  const bfloat16* residual;   // (M, P), added to y, or nullptr
  // Backward of f: y is 0 where mask_scale * mask + mask_bias <= 0.
  const bfloat16* mask;                 // (M, P)
  const float *mask_scale, *mask_bias;  // (M)
  const float* mask_attention;          // (M, 3), or nullptr
  bfloat16* y;                          // (M, P)
  float* sums;                          // (parts, 2, M): of y and of y^2, or of y and of y * mask; parts are blocks
  int64_t p;
  int m, k;
  int frames;  // of a clip, 8 or 16; where there is attention
  int slices;  // of the rows of y, which blocks share out
  bool relu;
  bool early;  // the kernel before in the stream does not write the weight
};

#ifdef __CUDACC__
// Coefficient `which` of a row of x.
template <Start start>
__device__ inline float coefficient_of(const Pointwise& a, int which, int row) {
  if (start == Start::mix) return a.mix[which * a.k + row];
  return which == 0 ? a.scale[row] : which == 1 ? a.bias[row] : a.attention[row * 3 + which - 2];
}
#endif

// Makes y and, unless the ending is plain, new `sums`, if there is a kernel for Hopper that takes the product: whether.
bool pointwise_hopper(Pointwise& a, Ending ending, const torch::stable::Tensor& x,
                      std::optional<torch::stable::Tensor>* sums);

}  // namespace rubiks
