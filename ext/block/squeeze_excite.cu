// Squeeze-excite (Hu et al., CVPR 2018) of channel-major matrices, for block.cu: a gate for each channel and frame,
// sigmoid(logit), around two small products. Columns are in the order N, H, W, T.
//
// A block has one clip of one channel, blockIdx.x = c * N + n, and its threads take the pixels in turn. Means, logits
// and gradients of either are (C, N, T), float32.
#include "block/geometry.h"
#include "block/operators.h"
#include "block/pixels.cuh"
#include "common/dependent_launch.cuh"
#include "common/reductions.cuh"
#include "common/shared_memory.cuh"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

STABLE_TORCH_LIBRARY_FRAGMENT(rubiks, m) {
  // x (C, P), whose columns are of 8 or 16 frames, times sigmoid(logits) of each frame; with the means (C, N*T) of the
  // frames, hidden = relu(reduce @ means) (R, N*T) and logits = expand @ hidden (C, N*T). reduce (R, C), expand (C, R)
  // float32; geometry N, T, H, W.
  m.def("excite(Tensor x, Tensor reduce, Tensor expand, int[] geometry) -> (Tensor, Tensor, Tensor, Tensor)");
}

namespace rubiks {
namespace {

constexpr unsigned kSqueezeThreads = 128;

template <int frames>
__device__ inline void load_gates(float (&gates)[frames], const float* logits) {
#pragma unroll
  for (int t = 0; t < frames; ++t) gates[t] = 1 / (1 + __expf(-logits[blockIdx.x * int64_t{frames} + t]));
}

// The mean of each frame.
template <int frames>
__global__ void __launch_bounds__(kSqueezeThreads) squeeze_kernel(const Unit* x, float* means, unsigned pixels) {
  wait_for_previous_kernel();
  float sums[frames] = {};
#pragma unroll 4
  for (unsigned i = threadIdx.x; i < pixels; i += kSqueezeThreads) {
    float values[frames];
    Pixel<frames>::load(x, int64_t{blockIdx.x} * pixels + i, true).unpack_to(values);
#pragma unroll
    for (int t = 0; t < frames; ++t) sums[t] += values[t];
  }
  const float sum = block_sums<kSqueezeThreads>(sums);
  if (threadIdx.x < frames) means[blockIdx.x * int64_t{frames} + threadIdx.x] = sum / pixels;
}

constexpr unsigned kGateThreads = 512, kGateParts = 8;

// use(row, t, weight (rows, depth) @ source[t]) for a clip's frames, in shared memory, and rows first to last - 1. A warp
// makes a row.
template <int frames, typename F>
__device__ inline void multiply_frames(const float* weight, const float* source, int first, int last, int depth,
                                       const F& use) {
  const unsigned lane = threadIdx.x % 32;
  for (int row = first + threadIdx.x / 32; row < last; row += kGateThreads / 32) {
    float sums[frames] = {};
    for (int k = lane; k < depth; k += 32) {
      const float w = weight[row * depth + k];
#pragma unroll
      for (int t = 0; t < frames; ++t) sums[t] = fmaf(w, source[t * depth + k], sums[t]);
    }
#pragma unroll
    for (int t = 0; t < frames; ++t) {
      const float sum = warp_sum(sums[t]);
      if (lane == t) use(row, t, sum);
    }
  }
}

// The gates' logits of a clip, blockIdx.x, from the means of its frames: up (c, r) @ relu(down (r, c) @ means), of which
// a block makes a part of the rows. Shared memory: means (frames, c), hidden (frames, r). A clip's results do not depend
// on the other clips.
template <int frames>
__global__ void __launch_bounds__(kGateThreads)
    gates_kernel(const float* means, const float* down, const float* up, float* hidden, float* logits, int c, int r) {
  float *const of_clip = reinterpret_cast<float*>(shared_memory_pointer()), *const own_hidden = of_clip + frames * c;
  const auto at = [&](int row, int t) { return (int64_t{row} * gridDim.x + blockIdx.x) * frames + t; };
  wait_for_previous_kernel();
  for (int i = threadIdx.x; i < frames * c; i += kGateThreads) {
    of_clip[i % frames * c + i / frames] = means[at(i / frames, i % frames)];
  }
  __syncthreads();
  multiply_frames<frames>(down, of_clip, 0, r, c, [&](int row, int t, float sum) {
    own_hidden[t * r + row] = sum = sum < 0 ? 0 : sum;  // NaN stays
    if (blockIdx.y == 0) hidden[at(row, t)] = sum;
  });
  __syncthreads();
  const int rows = (c + gridDim.y - 1) / gridDim.y, first = blockIdx.y * rows;
  multiply_frames<frames>(up, own_hidden, first, min(first + rows, c), r,
                          [&](int row, int t, float sum) { logits[at(row, t)] = sum; });
}

// out = x * gate + add / pixels, where there is an add (C, N, T). x may be out.
template <int frames>
__global__ void __launch_bounds__(kSqueezeThreads)
    excite_kernel(const Unit* x, const float* logits, const float* add, Unit* out, unsigned pixels) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  wait_for_previous_kernel();
  float gates[frames], adds[frames] = {};
  load_gates(gates, logits);
#pragma unroll
  for (int t = 0; t < frames; ++t) {
    if (add != nullptr) adds[t] = add[blockIdx.x * int64_t{frames} + t] / pixels;
  }
#pragma unroll 2
  for (unsigned i = threadIdx.x; i < pixels; i += kSqueezeThreads) {
    float values[frames];
    Pixel<frames>::load(x, int64_t{blockIdx.x} * pixels + i, true).unpack_to(values);
#pragma unroll
    for (int t = 0; t < frames; ++t) values[t] = fmaf(values[t], gates[t], adds[t]);
    Pixel<frames>::pack_from(values).store(out, int64_t{blockIdx.x} * pixels + i);
  }
#endif
}

// From the gradient g of the result: that of the logits. And x * gate again, `out`.
template <int frames>
__global__ void __launch_bounds__(kSqueezeThreads)
    excite_backward_kernel(const Unit* g, const Unit* x, const float* logits, Unit* out, float* grad_logits,
                           unsigned pixels) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  wait_for_previous_kernel();
  float gates[frames], sums[frames] = {};
  load_gates(gates, logits);
#pragma unroll 2
  for (unsigned i = threadIdx.x; i < pixels; i += kSqueezeThreads) {
    float values[frames], of_g[frames];
    Pixel<frames>::load(x, int64_t{blockIdx.x} * pixels + i, true).unpack_to(values);
    Pixel<frames>::load(g, int64_t{blockIdx.x} * pixels + i, true).unpack_to(of_g);
#pragma unroll
    for (int t = 0; t < frames; ++t) {
      sums[t] = fmaf(of_g[t], values[t], sums[t]);
      values[t] *= gates[t];
    }
    Pixel<frames>::pack_from(values).store(out, int64_t{blockIdx.x} * pixels + i);
  }
  const float sum = block_sums<kSqueezeThreads>(sums);
  if (threadIdx.x >= frames) return;
  const int64_t at = blockIdx.x * int64_t{frames} + threadIdx.x;
  const float gate = 1 / (1 + __expf(-logits[at]));
  grad_logits[at] = sum * gate * (1 - gate);
#endif
}

// Sets values to 0 where the result or the input of a ReLU is not positive; NaN stays.
__global__ void relu_mask_kernel(float* values, const float* relu, int64_t count) {
  wait_for_previous_kernel();
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i < count && relu[i] <= 0) values[i] = 0;
}

unsigned plane_size(const Geometry& g) { return static_cast<unsigned>(g.height * g.width); }

dim3 blocks(const Tensor& x, const Geometry& g) {
  STD_TORCH_CHECK(x.size(0) * g.clips < (int64_t{1} << 31) && g.height * g.width < (int64_t{1} << 31),
                  "squeeze: x is too large, ", text(shape(x)));
  return dim3(static_cast<unsigned>(x.size(0) * g.clips));
}

Tensor transposed(const Tensor& t) { return view(t, {t.size(1), t.size(0)}, {1, t.size(1)}); }

void mask_by_relu(const Tensor& values, const Tensor& relu) {
  constexpr int threads = 256;
  launch(relu_mask_kernel, dim3(static_cast<unsigned>(ceil_div(values.numel(), threads))), dim3(threads), 0, values,
         mutable_pointer(values), pointer(relu), values.numel());
}

}  // namespace

Excited excite(const Tensor& x, const Tensor& down, const Tensor& up, const Sizes& sizes) {
  const Geometry g("squeeze", sizes);
  const int64_t c = x.size(0);
  const Checks check("squeeze", x);
  check.units("x", x, c, g.columns());
  check.floats("down", down, {down.size(0), c});
  check.floats("up", up, {c, down.size(0)});
  const int64_t r = down.size(0), images = g.clips * g.frames;
  const Tensor means = empty(x, {c, images}, ScalarType::Float), logits = empty(x, {c, images}, ScalarType::Float),
               hidden = empty(x, {r, images}, ScalarType::Float);
  const Tensor out = empty(x, {c, g.columns()}, ScalarType::BFloat16);
  if (x.numel() == 0) return {out, means, hidden, logits};
  const dim3 grid = blocks(x, g), threads(kSqueezeThreads);
  g.with_frames("squeeze", [&](auto frames) {
    launch(squeeze_kernel<frames>, grid, threads, 0, x, pointer<Unit>(x), mutable_pointer(means), plane_size(g));
  });
  g.with_frames("squeeze", [&](auto frames) {
    constexpr auto kernel = gates_kernel<frames>;
    allow_shared_memory<kernel>(x);
    launch(kernel, dim3(static_cast<unsigned>(g.clips), kGateParts), dim3(kGateThreads), (c + r) * frames * sizeof(float), x,
           pointer(means), pointer(down), pointer(up), mutable_pointer(hidden), mutable_pointer(logits),
           static_cast<int>(c), static_cast<int>(r));
    launch(excite_kernel<frames>, grid, threads, 0, x, pointer<Unit>(x), pointer(logits), nullptr,
           mutable_pointer<Unit>(out), plane_size(g));
  });
  return {out, means, hidden, logits};
}

ExcitedGradient excite_backward(const Tensor& grad, const Tensor& x, const Tensor& means, const Tensor& hidden,
                                const Tensor& logits, const Tensor& down, const Tensor& up, const Sizes& sizes) {
  const Geometry g("squeeze", sizes);
  const int64_t c = x.size(0);
  const Tensor grad_logits = empty(x, {c, g.clips * g.frames}, ScalarType::Float);
  const Tensor out = empty(x, {c, g.columns()}, ScalarType::BFloat16);
  const Tensor grad_x = empty(x, {c, g.columns()}, ScalarType::BFloat16);
  const dim3 grid = blocks(x, g), threads(kSqueezeThreads);
  g.with_frames("squeeze", [&](auto frames) {
    launch(excite_backward_kernel<frames>, grid, threads, 0, x, pointer<Unit>(grad), pointer<Unit>(x), pointer(logits),
           mutable_pointer<Unit>(out), mutable_pointer(grad_logits), plane_size(g));
  });
  Tensor grad_hidden = torch::stable::matmul(transposed(up), grad_logits);
  mask_by_relu(grad_hidden, hidden);
  const Tensor grad_means = torch::stable::matmul(transposed(down), grad_hidden);
  g.with_frames("squeeze", [&](auto frames) {
    launch(excite_kernel<frames>, grid, threads, 0, x, pointer<Unit>(grad), pointer(logits), pointer(grad_means),
           mutable_pointer<Unit>(grad_x), plane_size(g));
  });
  return {out, grad_x, torch::stable::matmul(grad_hidden, transposed(means)),
          torch::stable::matmul(grad_logits, transposed(hidden))};
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> excite_op(const Tensor& x, const Tensor& reduce, const Tensor& expand,
                                                     Sizes geometry) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Excited e = excite(x, reduce, expand, geometry);
  return {e.out, e.means, e.hidden, e.logits};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rubiks, CUDA, m) { m.impl("excite", TORCH_BOX(&excite_op)); }

}  // namespace rubiks
