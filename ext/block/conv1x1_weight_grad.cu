// The gradient of a 1x1 convolution's weight as an operator: schema, checks, plan and launches.
#include "block/checks.h"
#include "block/conv1x1_weight_grad.cuh"
#include "block/operators.h"
#include "block/weight_grad_sum.cuh"
#include "common/launch.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(rubiks, m) {
  // gh @ f(x)^T (M, K), float32. gh = mix[0] * g + mix[1] * h + mix[2] in bfloat16, or g where h and mix are None;
  // f(x) = relu(scale * x + bias) in bfloat16, or x where scale and bias are None. g, h (M, P), x (K, P), mix (3, M),
  // scale, bias (K). With attention (K, 3), f(x) is mixed with the previous and the next frame, of which 8 or 16 are
  // adjacent.
  m.def(
      "pointwise_weight_grad(Tensor g, Tensor? h, Tensor? mix, Tensor x, Tensor? scale, Tensor? bias, "
      "Tensor? attention, int frames) -> Tensor");
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

template <int warps_k>
void run(const WeightGrad& a, const Tensor& x) {
  const int bytes = kTableBytes + std::max(a.stages * a.stage_bytes, warps_k < kMaxWarpsK ? kExchangeBytes : 0);
  constexpr auto kernel = conv1x1_weight_grad_kernel<warps_k>;
  allow_shared_memory<kernel>(x);
  launch(kernel, dim3(static_cast<unsigned>(a.tiles) * a.splits), dim3(kThreads), bytes, x, a);
}

WeightGrad arguments(const Upstream& upstream, const Activation& input) {
  constexpr const char* op = "pointwise_weight_grad";
  const auto& [g, h, mix] = upstream;
  const auto& [x, scale, bias, attention, frames] = input;
  STD_TORCH_CHECK(g.dim() == 2 && x.dim() == 2, op, ": g and x must have shapes (M, P) and (K, P), got ",
                  text(shape(g)), " and ", text(shape(x)));
  const int64_t m = g.size(0), k = x.size(0), p = g.size(1);
  STD_TORCH_CHECK(m >= 1 && m <= kMaxRows && k >= 1 && k <= kMaxRows, op, ": g and x must have 1 to ", kMaxRows,
                  " rows, got ", m, " and ", k);
  STD_TORCH_CHECK(p % kUnitElements == 0, op, ": P must be a multiple of ", kUnitElements, ", got ", p);
  STD_TORCH_CHECK(h.has_value() == mix.has_value(), op, ": h and mix must be given together");
  STD_TORCH_CHECK(scale.has_value() == bias.has_value(), op, ": scale and bias must be given together");
  STD_TORCH_CHECK(scale || !attention, op, ": attention needs scale and bias");
  const Checks check(op, g);
  check.units("g", g, m, p);
  check.units("x", x, k, p);
  if (h) check.units("h", *h, m, p), check.floats("mix", *mix, {3, m});
  if (scale) check.floats("scale", *scale, {k}), check.floats("bias", *bias, {k});
  if (attention) check.attention(*attention, k, frames, p);
  WeightGrad a = {};
  a.g = pointer<bfloat16>(g), a.h = pointer<bfloat16>(h), a.x = pointer<bfloat16>(x);
  a.mix = pointer(mix), a.scale = pointer(scale), a.bias = pointer(bias);
  a.attention = pointer(attention), a.frames = attention ? static_cast<int>(frames) : 0;
  a.m = static_cast<int>(m), a.k = static_cast<int>(k), a.p = p;
  return a;
}

}  // namespace

WeightGradient conv1x1_weight_grad(const Upstream& upstream, const Activation& input) {
  WeightGrad a = arguments(upstream, input);
  const Tensor& g = upstream.g;
  const torch::stable::accelerator::DeviceGuard guard(g.get_device_index());
  const int capability = attribute<cudaDevAttrComputeCapabilityMajor>(g);
  STD_TORCH_CHECK(capability >= 8, "pointwise_weight_grad: needs a GPU of compute capability 8.0 or more, got ",
                  capability, ".", attribute<cudaDevAttrComputeCapabilityMinor>(g));
  plan(a, g);
  const Tensor out = empty(g, {a.m, a.k}, ScalarType::Float);
  const Tensor parts = a.splits > 1 ? empty(g, {a.splits, a.m, a.k}, ScalarType::Float)
                                    : view(out, {1, a.m, a.k}, {int64_t{a.m} * a.k, a.k, 1});
  a.out = mutable_pointer(parts);
  if (a.tile_k <= kWarpK) {
    run<1>(a, g);
  } else if (a.tile_k <= 2 * kWarpK) {
    run<2>(a, g);
  } else {
    run<kMaxWarpsK>(a, g);
  }
  return {out, parts};
}

void add_parts(const std::vector<WeightGradient>& gradients) {
  WeightGradParts list = {};
  int count = 0;
  int64_t largest = 0;
  bool vectors = true;
  for (const auto& [whole, parts] : gradients) {
    if (parts.size(0) == 1) continue;
    list.at[count++] = {pointer(parts), mutable_pointer(whole), whole.numel(), static_cast<int>(parts.size(0))};
    largest = std::max(largest, whole.numel());
    vectors = vectors && whole.numel() % 4 == 0;
  }
  if (count == 0) return;
  const auto add = [&](auto vector) {
    constexpr int width = sizeof(vector) / sizeof(float);
    const dim3 blocks(static_cast<unsigned>(ceil_div(largest, kSumColumns * width)), count);
    launch(weight_grad_sum_kernel<decltype(vector)>, blocks, dim3(kSumColumns, kSumGroups), 0, gradients[0].whole,
           list);
  };
  vectors ? add(float4{}) : add(float{});
}

namespace {

Tensor pointwise_weight_grad_op(const Tensor& g, const MaybeTensor& h, const MaybeTensor& mix, const Tensor& x,
                                const MaybeTensor& scale, const MaybeTensor& bias, const MaybeTensor& attention,
                                int64_t frames) {
  const WeightGradient gradient = conv1x1_weight_grad({g, h, mix}, {x, scale, bias, attention, frames});
  const torch::stable::accelerator::DeviceGuard guard(g.get_device_index());
  add_parts({gradient});
  return gradient.whole;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rubiks, CUDA, m) { m.impl("pointwise_weight_grad", TORCH_BOX(&pointwise_weight_grad_op)); }

}  // namespace rubiks
