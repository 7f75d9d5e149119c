// The operators of the fused block on NVIDIA GPUs, as block.cu calls them; rubiks/ops/fused defines them.
// Activations are matrices (C, P) of bfloat16, everything else is float32.
#pragma once

#include "block/norm_gradients.cuh"
#include "common/tensors.h"

#include <tuple>
#include <vector>

namespace rubiks {

// What a product reads: x (K, P), or relu(scale * x + bias), scale and bias (K). With attention (K, 3) its frames are
// mixed.
struct Activation {
  Tensor x;
  MaybeTensor scale, bias, attention;
  int64_t frames = 0;  // of a clip, for attention
};

// The gradient of a product's result (M, P): g, or mix[0] * g + mix[1] * h + mix[2] with h (M, P) and mix (3, M).
struct Upstream {
  Tensor g;
  MaybeTensor h, mix;
};

struct Conv1x1Options {
  MaybeTensor offset, residual;  // (M), (M, P), added to the result
  bool relu = false;             // of the result
  bool sum_rows = false;
  bool early = false;  // begin before the previous kernel has ended; it must not write the weight
};

// The result (M, P) for weight (M, K), and its row sums and those of its square in parts (parts, 2, M), or an empty
// tensor.
std::tuple<Tensor, Tensor> conv1x1(const Activation& input, const Tensor& weight, const Conv1x1Options& options);

// transposed (K, M) @ upstream. Where the norm of the input is given, 0 where its ReLU gave 0, and the row sums and
// those of the product with x in parts (parts, 2, K); otherwise an empty tensor. With attention the result is
// as it is, and the sums are of the gradient before the mix.
std::tuple<Tensor, Tensor> conv1x1_grad(const Upstream& upstream, const Tensor& transposed,
                                        const std::optional<Activation>& input, bool early);

// The gradient of a weight (M, K); where it was made in more than one part, (parts, M, K) are still to be added.
struct WeightGradient {
  Tensor whole, parts;
};
WeightGradient conv1x1_weight_grad(const Upstream& upstream, const Activation& input);
// Adds the parts of up to 3 of them.
void add_parts(const std::vector<WeightGradient>& gradients);

Tensor clip_shift(const Tensor& x, const MaybeTensor& scale, const MaybeTensor& bias, const Tensor& shift,
                  const Sizes& sizes, int64_t stride);
// The gradients of the norm's result and of the shift; those of the norm go to `norm`.
std::tuple<Tensor, Tensor> clip_shift_backward(const Tensor& grad, const Tensor& x, const Tensor& stats,
                                               const Tensor& shift, const Sizes& sizes, int64_t stride,
                                               const NormGradients& norm);

Tensor norm_coefficients(const Tensor& sums, int64_t count, const Tensor& weight, const Tensor& beta,
                         const MaybeTensor& running_mean, const MaybeTensor& running_var, const MaybeTensor& batches,
                         double momentum, double eps);
std::tuple<Tensor, Tensor, Tensor> norm_gradients(const Tensor& sums, const MaybeTensor& more, int64_t count,
                                                  const Tensor& stats);
std::tuple<Tensor, Tensor> norm_input_grad(const Tensor& g, const Tensor& x, const Tensor& mix,
                                           const MaybeTensor& residual, const MaybeTensor& part, const Sizes& sizes,
                                           int64_t stride, const MaybeTensor& scale, const MaybeTensor& bias,
                                           const MaybeTensor& attention);

// Squeeze-excite by the weights down (R, C) and up (C, R).
struct Excited {
  Tensor out, means, hidden, logits;  // (C, P); (C, N*T), (R, N*T), (C, N*T) float32
};
Excited excite(const Tensor& x, const Tensor& down, const Tensor& up, const Sizes& sizes);
// `out` again, and the gradients of x and of the weights, from that of `out`.
struct ExcitedGradient {
  Tensor out, x, down, up;
};
ExcitedGradient excite_backward(const Tensor& grad, const Tensor& x, const Tensor& means, const Tensor& hidden,
                                const Tensor& logits, const Tensor& down, const Tensor& up, const Sizes& sizes);

// The columns at rows and columns 0, stride, 2 * stride, ... of every frame.
Tensor subsample(const Tensor& x, const Sizes& sizes, int64_t stride);

}  // namespace rubiks
