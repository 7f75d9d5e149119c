// The gradient of batch norm's input as an operator, with that of the temporal attention shift after it.
#include "block/attention.cuh"
#include "block/operators.h"
#include "block/strided_pixels.cuh"
#include "common/dependent_launch.cuh"
#include "common/reductions.cuh"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(rubiks, m) {
  // mix[0] * g + mix[1] * x + mix[2] + residual, (C, P), mix (3, C). Columns are pixels of clips of 8 or 16 frames,
  // geometry N, T, H, W, in the order N, H, W, T; part (C, P') is added to g at every stride-th row and column of
  // pixels. With attention (C, 3), by which the frames of relu(scale * x + bias) were mixed, g is the gradient of the
  // mix. -> the gradient of x, and that of attention, which is empty without it.
  m.def(
      "norm_input_grad(Tensor g, Tensor x, Tensor mix, Tensor? residual, Tensor? part, int[] geometry, int stride, "
      "Tensor? scale, Tensor? bias, Tensor? attention) -> (Tensor, Tensor)");
}

namespace rubiks {
namespace {

constexpr int kGradThreads = 256, kGradPixels = 2;  // of a block, and of a thread

// The gradient of a norm's input. Matrices are of pixels, their columns in the order N, H, W, T.
struct InputGrad {
  StridedPixels grid;
  const Unit *g, *x, *residual;     // (C, pixels); residual may be null
  const Unit* part;                 // (C, strided pixels), added to g at every stride-th row and column, or null
  const float* mix;                 // (3, C)
  const float *scale, *bias;        // (C), of the norm; with attention only
  const float* attention;           // (C, 3), or null
  Unit* out;                        // (C, pixels): mix[0] * g + mix[1] * x + mix[2] + residual
  float* grad_attention;            // (C, 3, blocks of a channel), parts
  int c;
};

// The gradient g of the mix of frames becomes that of the norm's result, and the terms of the gradient of the weights
// are added to `sums`. x: the norm's input.
template <int frames>
__device__ inline void unmix_frames(float (&g)[frames], const float (&x)[frames], float scale, float bias,
                                    const float3& weights, float (&sums)[3]) {
  float previous = 0;
#pragma unroll
  for (int t = 0; t < frames; ++t) {
    const float same = g[t], next = t + 1 < frames ? g[t + 1] : 0;
    const float value = rectified(fmaf(scale, x[t], bias));
    sums[0] = fmaf(next, value, sums[0]);  // frame t + 1 of the mix reads this one
    sums[1] = fmaf(same, value, sums[1]);
    sums[2] = fmaf(previous, value, sums[2]);
    g[t] = value == 0 ? 0 : unmix(weights, previous, same, next);
    previous = same;
  }
}

// blockIdx.y is the channel. With attention g is the gradient of the mix of frames after the norm and its ReLU.
template <int frames, bool attends>
__global__ void __launch_bounds__(kGradThreads) norm_input_grad_kernel(const __grid_constant__ InputGrad a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  wait_for_previous_kernel();
  constexpr int pixels = attends && frames == 16 ? 1 : kGradPixels;
  const unsigned c = blockIdx.y, first = blockIdx.x * kGradThreads * kGradPixels + threadIdx.x;
  const int64_t start = static_cast<int64_t>(c) * a.grid.pixels;
  const float of_g = a.mix[c], of_x = a.mix[a.c + c], constant = a.mix[2 * a.c + c];
  [[maybe_unused]] float scale, bias, sums[3] = {};
  [[maybe_unused]] float3 weights;
  if constexpr (attends) {
    const float* from = a.attention + 3 * c;
    scale = a.scale[c], bias = a.bias[c], weights = {from[0], from[1], from[2]};
  }
#pragma unroll 1
  for (unsigned set = 0; set < kGradPixels / pixels; ++set) {
    Pixel<frames> of_pixel[pixels], x_pixel[pixels], r_pixel[pixels], part[pixels];
#pragma unroll
    for (int j = 0; j < pixels; ++j) {  // all loads are on their way before the first is used
      const unsigned pixel = first + (set * pixels + j) * kGradThreads;
      const bool inside = pixel < a.grid.pixels;
      of_pixel[j] = Pixel<frames>::load(a.g, start + pixel, inside);
      x_pixel[j] = Pixel<frames>::load(a.x, start + pixel, inside);
      r_pixel[j] = Pixel<frames>::load(a.residual, start + pixel, inside && a.residual != nullptr);
      if (a.part != nullptr) {
        const PixelPlace at(pixel, a.grid.height, a.grid.width);
        const int64_t strided = a.grid.to_strided(at);
        part[j] = Pixel<frames>::load(a.part, static_cast<int64_t>(c) * a.grid.strided_pixels + strided,
                                      inside && a.grid.is_strided(at));
      }
    }
#pragma unroll
    for (int j = 0; j < pixels; ++j) {
      const unsigned pixel = first + (set * pixels + j) * kGradThreads;
      if (pixel >= a.grid.pixels) continue;
      float g[frames], x[frames], out[frames];
      of_pixel[j].unpack_to(g), x_pixel[j].unpack_to(x);
      if constexpr (attends) unmix_frames(g, x, scale, bias, weights, sums);
      if (a.part != nullptr) {
        float term[frames];
        part[j].unpack_to(term);
#pragma unroll
        for (int t = 0; t < frames; ++t) g[t] += term[t];
      }
      r_pixel[j].unpack_to(out);
#pragma unroll
      for (int t = 0; t < frames; ++t) out[t] += fmaf(of_g, g[t], fmaf(of_x, x[t], constant));
      Pixel<frames>::pack_from(out).store(a.out, start + pixel);
    }
  }
  if constexpr (attends) {
    const float sum = block_sums<kGradThreads>(sums);
    if (threadIdx.x >= 3) return;
    a.grad_attention[static_cast<int64_t>(3 * c + threadIdx.x) * gridDim.x + blockIdx.x] = sum;
  }
#endif
}

// A warp for each row adds its parts in a fixed order. parts (rows, count), sums (rows).
__global__ void attention_grad_sum_kernel(const float* parts, float* sums, int count) {
  wait_for_previous_kernel();
  parts += static_cast<int64_t>(blockIdx.x) * count;
  float sum = 0;
  for (int i = threadIdx.x; i < count; i += 32) sum += parts[i];
  sum = warp_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

}  // namespace

std::tuple<Tensor, Tensor> norm_input_grad(const Tensor& g, const Tensor& x, const Tensor& mix,
                                           const MaybeTensor& residual, const MaybeTensor& part, const Sizes& sizes,
                                           int64_t stride, const MaybeTensor& scale, const MaybeTensor& bias,
                                           const MaybeTensor& attention) {
  const Geometry geometry("norm_input_grad", sizes);
  const StridedPixels grid("norm_input_grad", geometry, stride);
  const int64_t c = g.dim() ? g.size(0) : 0, columns = geometry.columns();
  const Checks check("norm_input_grad", g);
  check.units("g", g, c, columns);
  check.units("x", x, c, columns);
  check.floats("mix", mix, {3, c});
  if (residual) check.units("residual", *residual, c, columns);
  if (part) check.units("part", *part, c, grid.strided_pixels * geometry.frames);
  STD_TORCH_CHECK(!attention || (scale && bias), "norm_input_grad: attention needs scale and bias");
  const torch::stable::accelerator::DeviceGuard guard(g.get_device_index());
  Tensor out = empty(g, {c, columns}, ScalarType::BFloat16);
  Tensor grad_attention = empty(g, {attention ? c : 0, 3}, ScalarType::Float), parts = grad_attention;
  if (c == 0) return {out, grad_attention};
  STD_TORCH_CHECK(c < 65536, "norm_input_grad: g must have at most 65535 rows, got ", c);
  const int64_t blocks = std::max<int64_t>(ceil_div(grid.pixels, kGradThreads * kGradPixels), 1);
  InputGrad a = {grid};
  a.g = pointer<Unit>(g), a.x = pointer<Unit>(x), a.residual = pointer<Unit>(residual), a.part = pointer<Unit>(part);
  a.mix = pointer(mix), a.out = mutable_pointer<Unit>(out), a.c = static_cast<int>(c);
  if (attention) {
    parts = empty(g, {c, 3, blocks}, ScalarType::Float);
    check.floats("scale", *scale, {c});
    check.floats("bias", *bias, {c});
    check.floats("attention", *attention, {c, 3});
    a.scale = pointer(scale), a.bias = pointer(bias), a.attention = pointer(attention);
  }
  a.grad_attention = mutable_pointer(parts);
  const dim3 all_blocks(static_cast<unsigned>(blocks), static_cast<unsigned>(c));
  geometry.with_frames("norm_input_grad", [&](auto count) {
    if (!attention) return launch(norm_input_grad_kernel<count, false>, all_blocks, dim3(kGradThreads), 0, g, a);
    launch(norm_input_grad_kernel<count, true>, all_blocks, dim3(kGradThreads), 0, g, a);
    launch(attention_grad_sum_kernel, dim3(static_cast<unsigned>(3 * c)), dim3(32), 0, g, pointer(parts),
           mutable_pointer(grad_attention), blocks);
  });
  return {out, grad_attention};
}

STABLE_TORCH_LIBRARY_IMPL(rubiks, CUDA, m) { m.impl("norm_input_grad", TORCH_BOX(&norm_input_grad)); }

}  // namespace rubiks
