// Batch norm in training on channel-major matrices, on NVIDIA GPUs: launches the kernels, and registers the operators.
#include "fused_cuda.h"
#include "matrix_cuda.h"
#include "norm_cuda.cuh"

STABLE_TORCH_LIBRARY_FRAGMENT(rubiks, m) {
  // stats (4, C): mean, 1 / standard deviation, scale, bias. sums (2, C), or (parts, 2, C) to be added: of x and of x^2
  // over `count` columns. weight, beta, running_mean, running_var (C).
  m.def(
      "norm_coefficients(Tensor sums, int count, Tensor weight, Tensor beta, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? batches, float momentum, float eps) -> Tensor");
  // mix (3, C), grad_weight (C), grad_beta (C). sums (2, C), or (parts, 2, C) to be added: of g and of g * x over
  // `count` columns. stats (4, C).
  m.def("norm_gradients(Tensor sums, Tensor? more, int count, Tensor stats) -> (Tensor, Tensor, Tensor)");
  // mix[0] * g + mix[1] * x + mix[2] + residual, (C, P). mix (3, C).
  m.def("norm_input_grad(Tensor g, Tensor x, Tensor mix, Tensor? residual) -> Tensor");
}

namespace rubiks {
namespace {

const dim3 kThreads(kNormColumns, kNormGroups);

dim3 blocks(int64_t channels) { return dim3(static_cast<unsigned>(ceil_div(channels, kNormColumns))); }

}  // namespace

Tensor norm_coefficients_cuda(const Tensor& sums, int64_t count, const Tensor& weight, const Tensor& beta,
                              const MaybeTensor& running_mean, const MaybeTensor& running_var,
                              const MaybeTensor& batches, double momentum, double eps) {
  const Checks check("norm_coefficients", sums);
  const int64_t parts = check.sums(sums, count), c = sums.size(sums.dim() - 1);
  check.floats("weight", weight, {c});
  check.floats("beta", beta, {c});
  if (running_mean) check.floats("running_mean", *running_mean, {c});
  if (running_var) check.floats("running_var", *running_var, {c});
  STD_TORCH_CHECK(!batches || (batches->scalar_type() == ScalarType::Long && batches->numel() == 1 &&
                               batches->device() == sums.device()),
                  "norm_coefficients: batches must be one int64 on the device of sums");
  const torch::stable::accelerator::DeviceGuard guard(sums.get_device_index());
  Tensor stats = empty(sums, {4, c}, ScalarType::Float);
  if (c == 0) return stats;
  launch(norm_coefficients_kernel, blocks(c), kThreads, 0, sums, pointer(sums), parts, c, count, pointer(weight),
         pointer(beta), mutable_pointer(running_mean), mutable_pointer(running_var), mutable_pointer<int64_t>(batches),
         momentum, eps, mutable_pointer(stats));
  return stats;
}

std::tuple<Tensor, Tensor, Tensor> norm_gradients_cuda(const Tensor& sums, const MaybeTensor& more, int64_t count,
                                                       const Tensor& stats) {
  const Checks check("norm_gradients", sums);
  const int64_t parts = check.sums(sums, count), c = sums.size(sums.dim() - 1);
  const int64_t more_parts = more ? check.sums(*more, count) : 0;
  check.floats("stats", stats, {4, c});
  const torch::stable::accelerator::DeviceGuard guard(sums.get_device_index());
  Tensor mix = empty(sums, {3, c}, ScalarType::Float), grad_weight = empty(sums, {c}, ScalarType::Float),
         grad_beta = empty(sums, {c}, ScalarType::Float);
  if (c == 0) return {mix, grad_weight, grad_beta};
  const NormGradients to = {static_cast<double>(count), pointer(stats), mutable_pointer(mix),
                            mutable_pointer(grad_weight), mutable_pointer(grad_beta)};
  launch(norm_gradients_kernel, blocks(c), kThreads, 0, sums, pointer(sums), parts, pointer(more), more_parts, c, to);
  return {mix, grad_weight, grad_beta};
}

Tensor norm_input_grad_cuda(const Tensor& g, const Tensor& x, const Tensor& mix,
                            const std::optional<Tensor>& residual) {
  const Checks check("norm_input_grad", g);
  check.matrix("g", g);
  check.matrix("x", x);
  check.same_shape("x", x);
  const int64_t c = g.size(0), units = g.size(1) / kUnitElements;
  check.floats("mix", mix, {3, c});
  if (residual) {
    check.matrix("residual", *residual);
    check.same_shape("residual", *residual);
  }
  const torch::stable::accelerator::DeviceGuard guard(g.get_device_index());
  Tensor out = empty(g, {c, g.size(1)}, g.scalar_type());
  if (units == 0) return out;
  const int64_t blocks = ceil_div(units, kGradThreads * kGradUnits);
  STD_TORCH_CHECK(blocks * c < (int64_t{1} << 31), "norm_input_grad: g is too large, it takes ", blocks * c, " blocks");
  with_type(g, [&](auto element) {
    launch(norm_input_grad_kernel<decltype(element)>, dim3(static_cast<unsigned>(blocks * c)), dim3(kGradThreads), 0, g,
           pointer<Unit>(g), pointer<Unit>(x), pointer(mix), pointer<Unit>(residual), mutable_pointer<Unit>(out), c,
           units, blocks);
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(rubiks, CUDA, m) {
  m.impl("norm_coefficients", TORCH_BOX(&norm_coefficients_cuda));
  m.impl("norm_gradients", TORCH_BOX(&norm_gradients_cuda));
  m.impl("norm_input_grad", TORCH_BOX(&norm_input_grad_cuda));
}

}  // namespace rubiks
