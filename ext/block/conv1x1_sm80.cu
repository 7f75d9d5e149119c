// Matrix products of 1x1 convolutions: checks, plans and launches, and registers the operators.
#include "block/operators.h"
#include "common/tensors.h"
#include "block/conv1x1_sm80.cuh"

namespace rubiks {
namespace {

// Blocks of a kernel that a multiprocessor holds. The last answer is kept: asking takes longer than a launch.
template <auto function, int threads>
int resident(size_t bytes, const Tensor& x) {
  static thread_local int device = -1, blocks = 0;
  static thread_local size_t asked = 0;
  allow_shared_memory<function>(x);
  if (device != x.get_device_index() || asked != bytes) {
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, threads, bytes));
    device = x.get_device_index(), asked = bytes;
  }
  return blocks;
}

// Launches with as many blocks as are resident at once. Those of a slice each leave a part of `sums`.
template <typename shape, Start start, Ending ending>
void run(Pointwise& a, const Tensor& x, MaybeTensor* sums) {
  constexpr auto function = kernel<shape, start, ending>;
  const size_t bytes = shape::template shared_bytes<start, ending>(a.k);
  const int processors = attribute<cudaDevAttrMultiProcessorCount>(x);
  const int blocks = processors * resident<function, shape::threads>(bytes, x);
  a.slices = (a.m + shape::all_rows - 1) / shape::all_rows;
  const int64_t tile_count = (a.p + kColumns - 1) / kColumns;
  const int64_t per_slice = std::min<int64_t>(tile_count, std::max(1, blocks / a.slices));
  if constexpr (ending != Ending::plain) {
    *sums = empty(x, {per_slice, 2, a.m}, ScalarType::Float);
    a.sums = mutable_pointer(*sums);
  }
  launch(function, dim3(static_cast<unsigned>(per_slice * a.slices)), dim3(shape::threads), bytes, x, a);
}

template <typename shape, Start start>
void choose(Pointwise& a, Ending ending, const Tensor& x, MaybeTensor* sums) {
  if (ending == Ending::plain) return run<shape, start, Ending::plain>(a, x, sums);
  if constexpr (start != Start::mix) {
    if (ending == Ending::sums) return run<shape, start, Ending::sums>(a, x, sums);
  }
  if constexpr (start == Start::plain || start == Start::mix) {
    if (ending == Ending::mask) return run<shape, start, Ending::mask>(a, x, sums);
  }
  if constexpr (start == Start::mix) run<shape, start, Ending::attend>(a, x, sums);
}

template <typename shape>
void choose(Pointwise& a, Ending ending, const Tensor& x, MaybeTensor* sums) {
  if (a.attention) return choose<shape, Start::attend>(a, ending, x, sums);
  if (a.mix) return choose<shape, Start::mix>(a, ending, x, sums);
  if (a.scale) return choose<shape, Start::norm>(a, ending, x, sums);
  choose<shape, Start::plain>(a, ending, x, sums);
}

void choose(Pointwise& a, Ending ending, const Tensor& x, MaybeTensor* sums) {
  if (pointwise_hopper(a, ending, x, sums)) return;
  if (a.k > 288) return choose<Shape<4, 4, 4, 2>>(a, ending, x, sums);
  // Fewest rows of padding.
  int best = 9, fewest = 1 << 30;
  for (const int tiles : {9, 7, 5, 4}) {
    const int rows = (a.m + 16 * tiles - 1) / (16 * tiles) * 16 * tiles;
    if (rows < fewest) best = tiles, fewest = rows;
  }
  switch (best) {
    case 4:
      return choose<Shape<4, 4, 4, 4>>(a, ending, x, sums);
    case 5:
      return choose<Shape<5, 4, 4, 4>>(a, ending, x, sums);
    case 7:
      return choose<Shape<7, 4, 3, 3>>(a, ending, x, sums);
    default:
      return choose<Shape<9, 4, 3, 2>>(a, ending, x, sums);
  }
}

const float* floats(const MaybeTensor& t, int64_t length, const char* name, const Tensor& x) {
  if (t) Checks("pointwise", x).floats(name, *t, {length});
  return pointer(t);
}

const bfloat16* matrix(const Tensor& t, int64_t rows, int64_t columns, const char* name, const Tensor& x) {
  Checks("pointwise", x).bfloat16(name, t, rows, columns);
  const int64_t alignment = columns % kUnitElements == 0 ? sizeof(Unit) : 4;  // of what is copied at once
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % alignment == 0, "pointwise: ", name,
                  " must start at a multiple of ", alignment, " bytes");
  return pointer<bfloat16>(t);
}

// Of the previous, the same and the next frame.
const float* weights_of_frames(Pointwise& a, const Tensor& attention, int64_t rows, int64_t frames, const Tensor& x) {
  Checks("pointwise", x).floats("attention", attention, {rows, 3});
  STD_TORCH_CHECK((frames == 8 || frames == 16) && a.p % frames == 0,
                  "pointwise: with attention columns must be clips of 8 or 16 frames, got ", frames, " and P = ", a.p);
  a.frames = static_cast<int>(frames);
  return pointer(attention);
}

Pointwise arguments(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "pointwise: x must be (K, P) and weight (M, K)");
  Pointwise a = {};
  a.p = x.size(1), a.m = static_cast<int>(weight.size(0)), a.k = static_cast<int>(x.size(0));
  STD_TORCH_CHECK(a.p % 8 == 0 && a.k % 2 == 0, "pointwise: P must be a multiple of 8 and K even, got ", a.p, " and ",
                  a.k);
  a.x = matrix(x, a.k, a.p, "x", x), a.weight = matrix(weight, a.m, a.k, "weight", x);
  return a;
}

}  // namespace

std::tuple<Tensor, Tensor> pointwise_cuda(const Tensor& x, const Tensor& weight, MaybeTensor scale, MaybeTensor bias,
                                          MaybeTensor attention, int64_t frames, MaybeTensor offset,
                                          MaybeTensor residual, bool relu, bool stats, bool early) {
  STD_TORCH_CHECK(!(stats && offset), "pointwise: sums are of results without offset");
  STD_TORCH_CHECK(scale.has_value() == bias.has_value() && (scale || !attention),
                  "pointwise: scale and bias must be given together, and with attention");
  Pointwise a = arguments(x, weight);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  a.scale = floats(scale, a.k, "scale", x), a.bias = floats(bias, a.k, "bias", x);
  if (attention) a.attention = weights_of_frames(a, *attention, a.k, frames, x);
  a.offset = floats(offset, a.m, "offset", x);
  if (residual) a.residual = matrix(*residual, a.m, a.p, "residual", x);
  a.relu = relu, a.early = early;
  Tensor y = empty(x, {a.m, a.p}, ScalarType::BFloat16);
  a.y = static_cast<__nv_bfloat16*>(y.mutable_data_ptr());
  MaybeTensor sums;
  if (a.p) choose(a, stats ? Ending::sums : Ending::plain, x, &sums);
  return {y, sums ? *sums : empty(x, {0}, ScalarType::Float)};
}

std::tuple<Tensor, Tensor> pointwise_grad_cuda(const Tensor& g, const MaybeTensor& h, const MaybeTensor& mix,
                                               const Tensor& transposed, const MaybeTensor& x,
                                               const MaybeTensor& scale, const MaybeTensor& bias,
                                               const MaybeTensor& attention, int64_t frames, bool early) {
  STD_TORCH_CHECK(h.has_value() == mix.has_value(), "pointwise_grad: h and mix must be given together");
  STD_TORCH_CHECK(x.has_value() == scale.has_value() && x.has_value() == bias.has_value(),
                  "pointwise_grad: x, scale and bias must be given together");
  STD_TORCH_CHECK(!attention || (x && h), "pointwise_grad: attention needs h, mix, x, scale and bias");
  Pointwise a = arguments(g, transposed);
  a.early = early;
  const torch::stable::accelerator::DeviceGuard guard(g.get_device_index());
  if (h) {
    Checks("pointwise_grad", g).floats("mix", *mix, {3, a.k});
    a.x2 = matrix(*h, a.k, a.p, "h", g), a.mix = pointer(mix);
  }
  if (x) {
    a.mask = matrix(*x, a.m, a.p, "x", g);
    a.mask_scale = floats(scale, a.m, "scale", g), a.mask_bias = floats(bias, a.m, "bias", g);
  }
  if (attention) a.mask_attention = weights_of_frames(a, *attention, a.m, frames, g);
  Tensor y = empty(g, {a.m, a.p}, ScalarType::BFloat16);
  a.y = static_cast<__nv_bfloat16*>(y.mutable_data_ptr());
  MaybeTensor sums;
  if (a.p) choose(a, attention ? Ending::attend : x ? Ending::mask : Ending::plain, g, &sums);
  return {y, sums ? *sums : empty(g, {0}, ScalarType::Float)};
}

STABLE_TORCH_LIBRARY_FRAGMENT(rubiks, m) {
  // [relu](weight @ f(x) + offset + residual) (M, P), and its row sums and those of its squares in parts (parts, 2, M),
  // empty unless `stats`. x (K, P), weight (M, K), residual (M, P) bfloat16; f(x) = relu(scale * x + bias), or x where
  // these are None; scale, bias (K), offset (M) float32. early: begin while the kernel before in the stream ends, which
  // then must not be the one that writes the weight. With attention (K, 3), f(x) is mixed with the previous and the next
  // frame, of which 8 or 16 adjoin.
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

STABLE_TORCH_LIBRARY_IMPL(rubiks, CUDA, m) {
  m.impl("pointwise", TORCH_BOX(&pointwise_cuda));
  m.impl("pointwise_grad", TORCH_BOX(&pointwise_grad_cuda));
}

}  // namespace rubiks
