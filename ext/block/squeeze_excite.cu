// Squeeze-excite of channel-major matrices on NVIDIA GPUs, for block/block.cu: the kernels of block/squeeze_excite.cuh and two small
// products.
#include "block/operators.h"
#include "block/geometry.h"
#include "block/squeeze_excite.cuh"

namespace rubiks {
namespace {

unsigned plane(const Geometry& g) { return static_cast<unsigned>(g.height * g.width); }

dim3 blocks(const Tensor& x, const Geometry& g) {
  STD_TORCH_CHECK(x.size(0) * g.clips < (int64_t{1} << 31) && g.height * g.width < (int64_t{1} << 31),
                  "squeeze: x is too large, ", text(shape(x)));
  return dim3(static_cast<unsigned>(x.size(0) * g.clips));
}

Tensor transposed(const Tensor& t) { return view(t, {t.size(1), t.size(0)}, {1, t.size(1)}); }

Tensor product(const Tensor& a, const Tensor& b) { return torch::stable::matmul(a, b); }

void close(Tensor& values, const Tensor& of) {
  constexpr int threads = 256;
  launch(close_kernel, dim3(static_cast<unsigned>(ceil_div(values.numel(), threads))), dim3(threads), 0, values,
         static_cast<float*>(values.mutable_data_ptr()), pointer(of), values.numel());
}

}  // namespace

Excited excite_cuda(const Tensor& x, const Tensor& down, const Tensor& up, const Sizes& sizes) {
  const Geometry g("squeeze", sizes);
  const int64_t c = x.size(0);
  const Checks check("squeeze", x);
  check.pixels("x", x, c, g.columns());
  check.floats("down", down, {down.size(0), c});
  check.floats("up", up, {c, down.size(0)});
  const Tensor means = empty(x, {c, g.clips * g.frames}, ScalarType::Float);
  Tensor out = empty(x, {c, g.columns()}, ScalarType::BFloat16);
  const dim3 grid = blocks(x, g), threads(kSqueezeThreads);
  g.with_frames("squeeze", [&](auto frames) {
    launch(squeeze_kernel<frames>, grid, threads, 0, x, pointer<Unit>(x), mutable_pointer(means), plane(g));
  });
  Tensor hidden = product(down, means);
  close(hidden, hidden);
  const Tensor logits = product(up, hidden);
  g.with_frames("squeeze", [&](auto frames) {
    launch(excite_kernel<frames>, grid, threads, 0, x, pointer<Unit>(x), pointer(logits), nullptr,
           static_cast<Unit*>(out.mutable_data_ptr()), plane(g));
  });
  return {out, means, hidden, logits};
}

ExcitedGradient excite_backward_cuda(const Tensor& grad, const Tensor& x, const Tensor& means, const Tensor& hidden,
                                     const Tensor& logits, const Tensor& down, const Tensor& up, const Sizes& sizes) {
  const Geometry g("squeeze", sizes);
  const int64_t c = x.size(0);
  const Tensor grad_logits = empty(x, {c, g.clips * g.frames}, ScalarType::Float);
  const Tensor out = empty(x, {c, g.columns()}, ScalarType::BFloat16);
  const Tensor grad_x = empty(x, {c, g.columns()}, ScalarType::BFloat16);
  const dim3 grid = blocks(x, g), threads(kSqueezeThreads);
  g.with_frames("squeeze", [&](auto frames) {
    launch(excite_backward_kernel<frames>, grid, threads, 0, x, pointer<Unit>(grad), pointer<Unit>(x), pointer(logits),
           mutable_pointer<Unit>(out), mutable_pointer(grad_logits), plane(g));
  });
  Tensor grad_hidden = product(transposed(up), grad_logits);
  close(grad_hidden, hidden);
  const Tensor grad_means = product(transposed(down), grad_hidden);
  g.with_frames("squeeze", [&](auto frames) {
    launch(excite_kernel<frames>, grid, threads, 0, x, pointer<Unit>(grad), pointer(logits), pointer(grad_means),
           mutable_pointer<Unit>(grad_x), plane(g));
  });
  return {out, grad_x, product(grad_hidden, transposed(means)), product(grad_logits, transposed(hidden))};
}

}  // namespace rubiks
