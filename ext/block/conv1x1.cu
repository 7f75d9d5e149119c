// 1x1 convolutions as operators: schemas, checks, and the choice of a kernel.
#include "block/conv1x1.h"

#include "block/checks.h"
#include "block/operators.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(rubiks, m) {
  // [relu](weight @ f(x) + offset + residual) (M, P), and its row sums and those of its squares in parts (parts, 2, M),
  // empty unless `stats`. x (K, P), weight (M, K), residual (M, P) bfloat16; f(x) = relu(scale * x + bias), or x where
  // these are None; scale, bias (K), offset (M) float32. early: begin while the previous kernel in the stream ends,
  // which then must not write the weight. With attention (K, 3), f(x) is mixed with the previous and the
  // next frame, of which 8 or 16 are adjacent.
  m.def(
      "pointwise(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? attention, int frames, Tensor? offset, "
      "Tensor? residual, bool relu, bool stats, bool early) -> (Tensor, Tensor)");
  // transposed @ gh (K, P), 0 where scale * x + bias <= 0, and its row sums and those of its product with x in parts
  // (parts, 2, K), empty where x is None. g, h (M, P), transposed (K, M), x (K, P) bfloat16; gh = mix[0] * g + mix[1] *
  // h + mix[2], or g where these are None; mix (3, M), scale, bias (K) float32. With attention (K, 3), by which x's
  // frames were mixed, the result is transposed @ gh as it is, and the sums are of the gradient before the mix.
  m.def(
      "pointwise_grad(Tensor g, Tensor? h, Tensor? mix, Tensor transposed, Tensor? x, Tensor? scale, Tensor? bias, "
      "Tensor? attention, int frames, bool early) -> (Tensor, Tensor)");
}

namespace rubiks {
namespace {

// Checks and reads the arguments of one operator.
class Arguments {
 public:
  Arguments(const char* op, const Tensor& x, const Tensor& weight) : check_(op, x) {
    STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, op, ": x must be (K, P) and weight (M, K)");
    a.p = x.size(1), a.m = static_cast<int>(weight.size(0)), a.k = static_cast<int>(x.size(0));
    STD_TORCH_CHECK(a.p % 8 == 0 && a.k % 2 == 0, op, ": P must be a multiple of 8 and K even, got ", a.p, " and ",
                    a.k);
    a.x = matrix("x", x, a.k, a.p), a.weight = matrix("weight", weight, a.m, a.k);
  }

  const bfloat16* matrix(const char* name, const MaybeTensor& t, int64_t rows, int64_t columns) const {
    if (!t) return nullptr;
    check_.matrix(name, *t, rows, columns);
    check_.aligned(name, *t, columns % kUnitElements == 0 ? sizeof(Unit) : 4);  // the size of a copy
    return pointer<bfloat16>(*t);
  }

  const float* floats(const char* name, const MaybeTensor& t, const Sizes& sizes) const {
    if (t) check_.floats(name, *t, sizes);
    return pointer(t);
  }

  const float* attention(const MaybeTensor& t, int64_t rows, int64_t frames) {
    if (!t) return nullptr;
    check_.attention(*t, rows, frames, a.p);
    a.frames = static_cast<int>(frames);
    return pointer(*t);
  }

  // Makes y and its sums; these are empty where there are none.
  std::tuple<Tensor, Tensor> run(bool sum_rows, const Tensor& x) {
    const Tensor y = empty(x, {a.m, a.p}, ScalarType::BFloat16);
    a.y = mutable_pointer<bfloat16>(y);
    MaybeTensor sums;
    if (a.p && !conv1x1_sm90(a, sum_rows, x, &sums)) conv1x1_sm80(a, sum_rows, x, &sums);
    return {y, sums ? *sums : empty(x, {0}, ScalarType::Float)};
  }

  Conv1x1 a = {};

 private:
  Checks check_;
};

}  // namespace

std::tuple<Tensor, Tensor> conv1x1(const Activation& input, const Tensor& weight, const Conv1x1Options& options) {
  const auto& [x, scale, bias, attention, frames] = input;
  STD_TORCH_CHECK(!(options.sum_rows && options.offset), "pointwise: sums are of results without offset");
  STD_TORCH_CHECK(scale.has_value() == bias.has_value() && (scale || !attention),
                  "pointwise: scale and bias must be given together, and with attention");
  Arguments arguments("pointwise", x, weight);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Conv1x1& a = arguments.a;
  a.scale = arguments.floats("scale", scale, {a.k}), a.bias = arguments.floats("bias", bias, {a.k});
  a.attention = arguments.attention(attention, a.k, frames);
  a.offset = arguments.floats("offset", options.offset, {a.m});
  a.residual = arguments.matrix("residual", options.residual, a.m, a.p);
  a.relu = options.relu, a.early = options.early;
  return arguments.run(options.sum_rows, x);
}

std::tuple<Tensor, Tensor> conv1x1_grad(const Upstream& upstream, const Tensor& transposed,
                                        const std::optional<Activation>& input, bool early) {
  const auto& [g, h, mix] = upstream;
  STD_TORCH_CHECK(h.has_value() == mix.has_value(), "pointwise_grad: h and mix must be given together");
  Arguments arguments("pointwise_grad", g, transposed);
  const torch::stable::accelerator::DeviceGuard guard(g.get_device_index());
  Conv1x1& a = arguments.a;
  a.x2 = arguments.matrix("h", h, a.k, a.p), a.mix = arguments.floats("mix", mix, {3, a.k});
  if (input) {
    STD_TORCH_CHECK(input->scale && input->bias, "pointwise_grad: x, scale and bias must be given together");
    STD_TORCH_CHECK(h || !input->attention, "pointwise_grad: attention needs h, mix, x, scale and bias");
    a.mask = arguments.matrix("x", input->x, a.m, a.p);
    a.mask_scale = arguments.floats("scale", input->scale, {a.m});
    a.mask_bias = arguments.floats("bias", input->bias, {a.m});
    a.mask_attention = arguments.attention(input->attention, a.m, input->frames);
  }
  a.early = early;
  return arguments.run(false, g);
}

namespace {

std::tuple<Tensor, Tensor> pointwise_op(const Tensor& x, const Tensor& weight, MaybeTensor scale, MaybeTensor bias,
                                        MaybeTensor attention, int64_t frames, MaybeTensor offset,
                                        MaybeTensor residual, bool relu, bool stats, bool early) {
  return conv1x1({x, scale, bias, attention, frames}, weight, {offset, residual, relu, stats, early});
}

std::tuple<Tensor, Tensor> pointwise_grad_op(const Tensor& g, MaybeTensor h, MaybeTensor mix, const Tensor& transposed,
                                             MaybeTensor x, MaybeTensor scale, MaybeTensor bias, MaybeTensor attention,
                                             int64_t frames, bool early) {
  STD_TORCH_CHECK(x || !(scale || bias), "pointwise_grad: x, scale and bias must be given together");
  STD_TORCH_CHECK(x || !attention, "pointwise_grad: attention needs h, mix, x, scale and bias");
  std::optional<Activation> input;
  if (x) input = Activation{*x, scale, bias, attention, frames};
  return conv1x1_grad({g, h, mix}, transposed, input, early);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rubiks, CUDA, m) {
  m.impl("pointwise", TORCH_BOX(&pointwise_op));
  m.impl("pointwise_grad", TORCH_BOX(&pointwise_grad_op));
}

}  // namespace rubiks
