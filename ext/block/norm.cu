// Batch norm of channel-major matrices (C, P) in training as operators: from row sums to coefficients, and to the
// gradients of its parameters. The matrix products and the shift use the coefficients.
#include "block/checks.h"
#include "block/norm_gradients.cuh"
#include "block/operators.h"
#include "common/dependent_launch.cuh"
#include "common/launch.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(rubiks, m) {
  // stats (4, C): mean, 1 / standard deviation, scale, bias. sums (2, C), or (parts, 2, C) to be added: of x and of x^2
  // over `count` columns. weight, beta, running_mean, running_var (C).
  m.def(
      "norm_coefficients(Tensor sums, int count, Tensor weight, Tensor beta, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? batches, float momentum, float eps) -> Tensor");
  // mix (3, C), grad_weight (C), grad_beta (C). sums (2, C), or (parts, 2, C) to be added: of g and of g * x over
  // `count` columns. stats (4, C).
  m.def("norm_gradients(Tensor sums, Tensor? more, int count, Tensor stats) -> (Tensor, Tensor, Tensor)");
}

namespace rubiks {
namespace {

constexpr int kNormColumns = 16, kNormGroups = 32;  // threads of a block: channels, and groups of parts

// Both sums of a channel over all parts, in a fixed order; valid where threadIdx.y is 0. sums (parts, 2, C).
__device__ inline double2 add_parts(const float* sums, int64_t parts, int c, int channel) {
  __shared__ double2 groups[kNormGroups][kNormColumns];
  double2 sum = {0, 0};
  if (channel < c) {
#pragma unroll 4
    for (int64_t part = threadIdx.y; part < parts; part += kNormGroups) {
      const float* row = sums + part * 2 * c + channel;
      sum = {sum.x + row[0], sum.y + row[c]};
    }
  }
#pragma unroll
  for (unsigned half = kNormGroups / 2; half > 0; half /= 2) {  // the upper half hands over to the lower half
    if (threadIdx.y >= half && threadIdx.y < 2 * half) groups[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y >= half) continue;
    const double2 part = groups[threadIdx.y + half][threadIdx.x];
    sum = {sum.x + part.x, sum.y + part.y};
  }
  return sum;
}

// sums (parts, 2, C) of x and of x^2 over `count` columns; weight, beta (C); running_mean, running_var (C) or null,
// updated in place, as is the number of batches, or null; stats (4, C): mean, 1 / standard deviation, scale, bias.
__global__ void __launch_bounds__(kNormColumns* kNormGroups)
    norm_coefficients_kernel(const float* sums, int64_t parts, int c, double count, const float* weight,
                             const float* beta, float* running_mean, float* running_var, int64_t* batches,
                             double momentum, double eps, float* stats) {
  wait_for_previous_kernel();
  const int channel = blockIdx.x * kNormColumns + threadIdx.x;
  const double2 sum = add_parts(sums, parts, c, channel);
  if (threadIdx.y > 0 || channel >= c) return;
  if (channel == 0 && batches != nullptr) ++*batches;
  const double mean = sum.x / count;
  double var = sum.y / count - mean * mean;
  if (var < 0) var = 0;  // by rounding; NaN stays
  const double rstd = 1 / sqrt(var + eps), scale = weight[channel] * rstd;
  stats[channel] = mean;
  stats[c + channel] = rstd;
  stats[2 * c + channel] = scale;
  stats[3 * c + channel] = beta[channel] - mean * scale;
  if (running_mean != nullptr) running_mean[channel] = (1 - momentum) * running_mean[channel] + momentum * mean;
  if (running_var != nullptr) {
    const double unbiased = var * (count / (count > 1 ? count - 1 : 1));  // of a single value there is no estimate
    running_var[channel] = (1 - momentum) * running_var[channel] + momentum * unbiased;
  }
}

// sums and, where not null, more (parts, 2, C): of g and of g * x.
__global__ void __launch_bounds__(kNormColumns* kNormGroups)
    norm_gradients_kernel(const float* sums, int64_t parts, const float* more, int64_t more_parts, int c,
                          const NormGradients norm) {
  wait_for_previous_kernel();
  const int channel = blockIdx.x * kNormColumns + threadIdx.x;
  double2 sum = add_parts(sums, parts, c, channel);
  if (more != nullptr) {
    __syncthreads();  // the sums of the groups have been read
    const double2 others = add_parts(more, more_parts, c, channel);
    sum = {sum.x + others.x, sum.y + others.y};
  }
  if (threadIdx.y > 0 || channel >= c) return;
  norm.write(sum.x, sum.y, c, channel);
}

const dim3 kThreads(kNormColumns, kNormGroups);

dim3 blocks(int64_t channels) { return dim3(static_cast<unsigned>(ceil_div(channels, kNormColumns))); }

}  // namespace

Tensor norm_coefficients(const Tensor& sums, int64_t count, const Tensor& weight, const Tensor& beta,
                         const MaybeTensor& running_mean, const MaybeTensor& running_var, const MaybeTensor& batches,
                         double momentum, double eps) {
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

std::tuple<Tensor, Tensor, Tensor> norm_gradients(const Tensor& sums, const MaybeTensor& more, int64_t count,
                                                  const Tensor& stats) {
  const Checks check("norm_gradients", sums);
  const int64_t parts = check.sums(sums, count), c = sums.size(sums.dim() - 1);
  const int64_t more_parts = more ? check.sums(*more, count) : 0;
  check.floats("stats", stats, {4, c});
  const torch::stable::accelerator::DeviceGuard guard(sums.get_device_index());
  Tensor mix = empty(sums, {3, c}, ScalarType::Float), grad_weight = empty(sums, {c}, ScalarType::Float),
         grad_beta = empty(sums, {c}, ScalarType::Float);
  if (c == 0) return {mix, grad_weight, grad_beta};
  const NormGradients norm = {static_cast<double>(count), pointer(stats), mutable_pointer(mix),
                              mutable_pointer(grad_weight), mutable_pointer(grad_beta)};
  launch(norm_gradients_kernel, blocks(c), kThreads, 0, sums, pointer(sums), parts, pointer(more), more_parts, c, norm);
  return {mix, grad_weight, grad_beta};
}

STABLE_TORCH_LIBRARY_IMPL(rubiks, CUDA, m) {
  m.impl("norm_coefficients", TORCH_BOX(&norm_coefficients));
  m.impl("norm_gradients", TORCH_BOX(&norm_gradients));
}

}  // namespace rubiks
