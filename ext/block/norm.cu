// Batch norm in training on channel-major matrices, on NVIDIA GPUs: launches the kernels, and registers the operators.
#include "block/operators.h"
#include "block/geometry.h"
#include "block/norm.cuh"

STABLE_TORCH_LIBRARY_FRAGMENT(rubiks, m) {
  // stats (4, C): mean, 1 / standard deviation, scale, bias. sums (2, C), or (parts, 2, C) to be added: of x and of x^2
  // over `count` columns. weight, beta, running_mean, running_var (C).
  m.def(
      "norm_coefficients(Tensor sums, int count, Tensor weight, Tensor beta, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? batches, float momentum, float eps) -> Tensor");
  // mix (3, C), grad_weight (C), grad_beta (C). sums (2, C), or (parts, 2, C) to be added: of g and of g * x over
  // `count` columns. stats (4, C).
  m.def("norm_gradients(Tensor sums, Tensor? more, int count, Tensor stats) -> (Tensor, Tensor, Tensor)");
  // mix[0] * g + mix[1] * x + mix[2] + residual, (C, P), mix (3, C). Columns are pixels of clips of 8 or 16 frames,
  // geometry N, T, H, W, in the order N, H, W, T; part (C, P') is added to g at every stride-th row and column of pixels.
  // With attention (C, 3), by which the frames of relu(scale * x + bias) were mixed, g is the gradient of the mix: with
  // the gradient of attention, which else is empty.
  m.def(
      "norm_input_grad(Tensor g, Tensor x, Tensor mix, Tensor? residual, Tensor? part, int[] geometry, int stride, "
      "Tensor? scale, Tensor? bias, Tensor? attention) -> (Tensor, Tensor)");
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

std::tuple<Tensor, Tensor> norm_input_grad_cuda(const Tensor& g, const Tensor& x, const Tensor& mix,
                                                const MaybeTensor& residual, const MaybeTensor& part, Sizes sizes,
                                                int64_t stride, const MaybeTensor& scale, const MaybeTensor& bias,
                                                const MaybeTensor& attention) {
  const Geometry geometry("norm_input_grad", sizes), small = geometry.strided("norm_input_grad", stride);
  const int64_t c = g.dim() ? g.size(0) : 0, columns = geometry.columns(), frames = geometry.frames;
  const Checks check("norm_input_grad", g);
  check.pixels("g", g, c, columns);
  check.pixels("x", x, c, columns);
  check.floats("mix", mix, {3, c});
  if (residual) check.pixels("residual", *residual, c, columns);
  if (part) check.pixels("part", *part, c, small.columns());
  STD_TORCH_CHECK(!attention || (scale && bias), "norm_input_grad: attention needs scale and bias");
  const torch::stable::accelerator::DeviceGuard guard(g.get_device_index());
  Tensor out = empty(g, {c, columns}, ScalarType::BFloat16);
  Tensor grad_attention = empty(g, {attention ? c : 0, 3}, ScalarType::Float), parts = grad_attention;
  if (c == 0) return {out, grad_attention};
  const int64_t pixels = columns / std::max<int64_t>(frames, 1);
  const int64_t blocks = std::max<int64_t>(ceil_div(pixels, kGradThreads * kGradPixels), 1);
  STD_TORCH_CHECK(pixels < (int64_t{1} << 31) && c < 65536, "norm_input_grad: g is too large, ", text(shape(g)));
  InputGrad a = {pointer<Unit>(g), pointer<Unit>(x), pointer<Unit>(residual), pointer<Unit>(part), pointer(mix)};
  if (attention) {
    parts = empty(g, {c, 3, blocks}, ScalarType::Float);
    check.floats("scale", *scale, {c});
    check.floats("bias", *bias, {c});
    check.floats("attention", *attention, {c, 3});
    a.scale = pointer(scale), a.bias = pointer(bias), a.attention = pointer(attention);
  }
  a.out = static_cast<Unit*>(out.mutable_data_ptr()), a.grad_attention = mutable_pointer(parts);
  a.pixels = static_cast<unsigned>(pixels), a.part_pixels = static_cast<unsigned>(small.columns() / frames);
  a.height = static_cast<int>(geometry.height), a.width = static_cast<int>(geometry.width);
  a.part_height = static_cast<int>(small.height), a.part_width = static_cast<int>(small.width);
  a.stride = static_cast<int>(stride), a.c = static_cast<int>(c);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(c));
  geometry.with_frames("norm_input_grad", [&](auto count) {
    if (!attention) return launch(norm_input_grad_kernel<count, false>, grid, dim3(kGradThreads), 0, g, a);
    launch(norm_input_grad_kernel<count, true>, grid, dim3(kGradThreads), 0, g, a);
    launch(sum_parts_kernel, dim3(static_cast<unsigned>(3 * c)), dim3(32), 0, g, pointer(parts),
           mutable_pointer(grad_attention), blocks);
  });
  return {out, grad_attention};
}

STABLE_TORCH_LIBRARY_IMPL(rubiks, CUDA, m) {
  m.impl("norm_coefficients", TORCH_BOX(&norm_coefficients_cuda));
  m.impl("norm_gradients", TORCH_BOX(&norm_gradients_cuda));
  m.impl("norm_input_grad", TORCH_BOX(&norm_input_grad_cuda));
}

}  // namespace rubiks
