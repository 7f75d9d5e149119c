// The gradient of a pointwise convolution's weight on NVIDIA GPUs: plans and launches, and registers the operator.
#include "fused_cuda.h"
#include "matrix_cuda.h"
#include "weight_grad_cuda.cuh"

STABLE_TORCH_LIBRARY_FRAGMENT(rubiks, m) {
  // gh @ f(x)^T (M, K), float32. gh = mix[0] * g + mix[1] * h + mix[2] in g's type, or g where h and mix are None;
  // f(x) = relu(scale * x + bias) in x's type, or x where scale and bias are None. g, h (M, P), x (K, P), mix (3, M),
  // scale, bias (K).
  m.def("pointwise_weight_grad(Tensor g, Tensor? h, Tensor? mix, Tensor x, Tensor? scale, Tensor? bias) -> Tensor");
}

namespace rubiks {
namespace {

// The largest tiles of which two stages or more fit shared memory, and as many blocks for each as the chip holds.
void plan(WeightGrad& a, const Tensor& x) {
  const int64_t ring = attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(x) - kTableBytes;
  const int64_t tiles_m = ceil_div(a.m, kTileM);
  a.tile_m = static_cast<int>(ceil_div(a.m, tiles_m));
  for (int64_t tiles_k = ceil_div(a.k, kTileK); a.stages < 2; ++tiles_k) {
    // Whole fragments of x, so that pairs of outputs stay pairs in memory.
    a.tile_k = static_cast<int>(ceil_div(ceil_div(a.k, tiles_k), 8) * 8);
    a.stage_bytes = (a.tile_m * (a.mix ? 2 : 1) + a.tile_k) * kRowBytes;
    a.stages = static_cast<int>(std::min<int64_t>(ring / a.stage_bytes, kMaxStages));
    STD_TORCH_CHECK(a.stages >= 2 || a.tile_k > 8, "pointwise_weight_grad: this GPU has too little shared memory, ",
                    ring + kTableBytes, " bytes for a block");
  }
  a.tiles_k = static_cast<int>(ceil_div(a.k, a.tile_k));
  const int64_t tiles = ceil_div(a.m, a.tile_m) * a.tiles_k, chunks = ceil_div(a.p, kColumns);
  STD_TORCH_CHECK(tiles < (int64_t{1} << 31) && chunks < (int64_t{1} << 30), "pointwise_weight_grad: too large");
  a.tiles = static_cast<int>(tiles);
  const int64_t blocks = attribute<cudaDevAttrMultiProcessorCount>(x) / tiles;
  a.splits = static_cast<int>(std::max<int64_t>(std::min(blocks, chunks), 1));
}

template <typename scalar, int warps_k>
void launch(const WeightGrad& a, const Tensor& x, cudaStream_t stream) {
  const int bytes = kTableBytes + std::max(a.stages * a.stage_bytes, warps_k < kMaxWarpsK ? kExchangeBytes : 0);
  constexpr auto kernel = weight_grad_kernel<scalar, warps_k>;
  allow_shared_memory<kernel>(x);
  kernel<<<static_cast<unsigned>(a.tiles) * a.splits, kThreads, bytes, stream>>>(a);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void sum_partials(const float* partial, float* out, int64_t size, int splits, cudaStream_t stream) {
  const auto add = [&](auto vector) {
    using type = decltype(vector);
    const int64_t count = size * sizeof(float) / sizeof(type);
    const dim3 threads(kSumColumns, kSumGroups);
    sum_partials_kernel<<<static_cast<unsigned>(ceil_div(count, kSumColumns)), threads, 0, stream>>>(
        reinterpret_cast<const type*>(partial), reinterpret_cast<type*>(out), count, splits);
  };
  size % 4 == 0 ? add(float4{}) : add(float{});
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

Tensor pointwise_weight_grad_cuda(const Tensor& g, const std::optional<Tensor>& h, const std::optional<Tensor>& mix,
                                  const Tensor& x, const std::optional<Tensor>& scale,
                                  const std::optional<Tensor>& bias) {
  const Checks check("pointwise_weight_grad", g);
  check.matrix("g", g);
  check.matrix("x", x);
  const int64_t m = g.size(0), k = x.size(0), p = g.size(1);
  STD_TORCH_CHECK(x.size(1) == p, "pointwise_weight_grad: g and x must have the same number of columns, got ", p,
                  " and ", x.size(1));
  STD_TORCH_CHECK(h.has_value() == mix.has_value(), "pointwise_weight_grad: h and mix must be given together");
  STD_TORCH_CHECK(scale.has_value() == bias.has_value(),
                  "pointwise_weight_grad: scale and bias must be given together");
  if (h) {
    check.matrix("h", *h);
    check.same_shape("h", *h);
    check.floats("mix", *mix, {3, m});
  }
  if (scale) {
    check.floats("scale", *scale, {k});
    check.floats("bias", *bias, {k});
  }
  const torch::stable::accelerator::DeviceGuard guard(g.get_device_index());
  const int capability = attribute<cudaDevAttrComputeCapabilityMajor>(g);
  STD_TORCH_CHECK(capability >= 8, "pointwise_weight_grad: needs a GPU of compute capability 8.0 or more, got ",
                  capability, ".", attribute<cudaDevAttrComputeCapabilityMinor>(g));
  WeightGrad a = {};
  a.g = g.const_data_ptr(), a.h = pointer<void>(h), a.x = x.const_data_ptr();
  a.mix = pointer(mix), a.scale = pointer(scale), a.bias = pointer(bias);
  a.m = static_cast<int>(m), a.k = static_cast<int>(k), a.p = p;
  plan(a, x);
  Tensor out = empty(g, {m, k}, ScalarType::Float);
  const Tensor partial = a.splits > 1 ? empty(g, {a.splits, m, k}, ScalarType::Float) : out;
  a.out = static_cast<float*>(partial.mutable_data_ptr());
  const cudaStream_t stream = current_stream(g);
  with_type(g, [&](auto element) {
    using scalar = decltype(element);
    if (a.tile_k <= kWarpK) return launch<scalar, 1>(a, x, stream);
    if (a.tile_k <= 2 * kWarpK) return launch<scalar, 2>(a, x, stream);
    launch<scalar, kMaxWarpsK>(a, x, stream);
  });
  if (a.splits > 1) sum_partials(a.out, static_cast<float*>(out.mutable_data_ptr()), m * k, a.splits, stream);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(rubiks, CUDA, m) { m.impl("pointwise_weight_grad", TORCH_BOX(&pointwise_weight_grad_cuda)); }

}  // namespace rubiks
