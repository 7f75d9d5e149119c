// The operators of the fused block on NVIDIA GPUs, as block/block.cu calls them; rubiks/ops/fused.py defines them.
#pragma once

#include "block/norm_gradients.cuh"

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace rubiks {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

std::tuple<Tensor, Tensor> pointwise_cuda(const Tensor& x, const Tensor& weight, MaybeTensor scale, MaybeTensor bias,
                                          MaybeTensor attention, int64_t frames, MaybeTensor offset,
                                          MaybeTensor residual, bool relu, bool stats, bool early);
std::tuple<Tensor, Tensor> pointwise_grad_cuda(const Tensor& g, const MaybeTensor& h, const MaybeTensor& mix,
                                               const Tensor& transposed, const MaybeTensor& x,
                                               const MaybeTensor& scale, const MaybeTensor& bias,
                                               const MaybeTensor& attention, int64_t frames, bool early);

// The gradient of a weight, of which parts (splits, M, K) are still to be added; it is there where there is one part.
struct WeightGradient {
  Tensor whole, parts;
};
WeightGradient weight_grad_parts_cuda(const Tensor& g, const MaybeTensor& h, const MaybeTensor& mix, const Tensor& x,
                                      const MaybeTensor& scale, const MaybeTensor& bias, const MaybeTensor& attention,
                                      int64_t frames);
// Adds the parts of up to 3 of them.
void add_parts_cuda(const std::vector<WeightGradient>& gradients);

Tensor clip_shift_cuda(const Tensor& x, const MaybeTensor& scale, const MaybeTensor& bias, const Tensor& shift,
                       Sizes geometry, int64_t stride);
// The gradients of the norm's result and of the shift; those of the norm by `to`.
std::tuple<Tensor, Tensor> clip_shift_backward_cuda(const Tensor& grad, const Tensor& x, const Tensor& stats,
                                                    const Tensor& shift, const Sizes& geometry, int64_t stride,
                                                    const NormGradients& to);

Tensor norm_coefficients_cuda(const Tensor& sums, int64_t count, const Tensor& weight, const Tensor& beta,
                              const MaybeTensor& running_mean, const MaybeTensor& running_var,
                              const MaybeTensor& batches, double momentum, double eps);
std::tuple<Tensor, Tensor, Tensor> norm_gradients_cuda(const Tensor& sums, const MaybeTensor& more, int64_t count,
                                                       const Tensor& stats);
std::tuple<Tensor, Tensor> norm_input_grad_cuda(const Tensor& g, const Tensor& x, const Tensor& mix,
                                                const MaybeTensor& residual, const MaybeTensor& part, Sizes geometry,
                                                int64_t stride, const MaybeTensor& scale, const MaybeTensor& bias,
                                                const MaybeTensor& attention);

// Squeeze-excite by the weights down (R, C) and up (C, R).
struct Excited {
  Tensor out, means, hidden, logits;  // (C, P); (C, N*T), (R, N*T), (C, N*T) float32
};
Excited excite_cuda(const Tensor& x, const Tensor& down, const Tensor& up, const Sizes& geometry);
// `out` again, and the gradients of x and of the weights, from that of `out`.
struct ExcitedGradient {
  Tensor out, x, down, up;
};
ExcitedGradient excite_backward_cuda(const Tensor& grad, const Tensor& x, const Tensor& means, const Tensor& hidden,
                                     const Tensor& logits, const Tensor& down, const Tensor& up, const Sizes& geometry);

Tensor every_cuda(const Tensor& x, Sizes geometry, int64_t stride);

}  // namespace rubiks
