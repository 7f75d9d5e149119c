// A residual block in training, forward and backward, as one operator each; rubiks/models/training_block.py defines it.
// With some twenty kernels a block, calling them one by one from Python would take longer than they run.
//
// Products may begin early: their weights are cast at the start of forward, with other kernels in between.
#include "block/geometry.h"
#include "block/operators.h"
#include "common/dependent_launch.cuh"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>

STABLE_TORCH_LIBRARY_FRAGMENT(rubiks, m) {
  // x (C_in, P) bfloat16, its row sums, geometry N, T, H, W, and of both norms: weight, bias, running mean and
  // variance, number of batches, momentum, eps. attention (C_in, 3). down (R, C_out), up (C_out, R): of squeeze-excite.
  // -> y (C_out, P'), its row sums; for the backward h (C_out, P), z (C_out, P'), the coefficients of both norms, the
  // weights of conv2, conv3 and the shortcut in bfloat16, each as it is and transposed, and of squeeze-excite the
  // means, hidden values and logits, empty where there is none.
  m.def(
      "block_forward(Tensor x, Tensor sums, int[] geometry, int stride, Tensor weight1, Tensor bias1, "
      "Tensor(a!) mean1, Tensor(b!) var1, Tensor(c!) batches1, float momentum1, float eps1, Tensor weight2, "
      "Tensor bias2, Tensor(d!) mean2, Tensor(e!) var2, Tensor(f!) batches2, float momentum2, float eps2, "
      "Tensor conv2, Tensor shift, Tensor conv3, Tensor? shortcut, Tensor? attention, Tensor? down, Tensor? up) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // gy (C_out, P') and what block_forward took and gave -> the gradients of x, weight1, bias1, conv2, weight2, bias2,
  // shift, conv3, shortcut, attention, down and up; the last four empty where there are none.
  m.def(
      "block_backward(Tensor gy, Tensor x, Tensor h, Tensor z, Tensor stats1, Tensor stats2, Tensor weights, "
      "Tensor? means, Tensor? hidden, Tensor? logits, int[] geometry, int stride, Tensor shift, Tensor? attention, "
      "Tensor? down, Tensor? up, bool has_shortcut) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor, "
      "Tensor, Tensor, Tensor, Tensor)");
}

namespace rubiks {
namespace {

constexpr int kMatrices = 3, kCastThreads = 256;

struct Cast {  // (rows, columns) float32, to bfloat16 and to its transpose
  const float* from;
  bfloat16 *to, *transposed;
  int rows, columns;
};

struct Casts {
  Cast at[kMatrices];
};

__global__ void cast_weights_kernel(const __grid_constant__ Casts casts) {
  wait_for_previous_kernel();
  const Cast& c = casts.at[blockIdx.y];
  const int i = blockIdx.x * kCastThreads + threadIdx.x;
  if (i >= c.rows * c.columns) return;
  c.to[i] = __float2bfloat16_rn(c.from[i]);
  const int row = i % c.rows, column = i / c.rows;
  c.transposed[i] = __float2bfloat16_rn(c.from[row * c.columns + column]);
}

// Where the matrices of a block lie in one tensor of bfloat16, for each the matrix and its transpose.
class Weights {
 public:
  Weights(int64_t in, int64_t out, bool shortcut) : in_(in), out_(out), count_(shortcut ? 3 : 2) {
    int64_t end = 0;
    for (int i = 0; i < count_; ++i) {
      for (int transposed = 0; transposed < 2; ++transposed) {
        offset_[i][transposed] = end;
        end += ceil_div(out_ * columns(i), kUnitElements) * kUnitElements;
      }
    }
    size_ = end;
  }

  // conv2 (0), conv3 (1) or the shortcut (2).
  Tensor get(const Tensor& all, int i, bool transposed) const {
    const Sizes sizes = transposed ? Sizes{columns(i), out_} : Sizes{out_, columns(i)};
    return view(all, sizes, contiguous_strides(sizes), offset_[i][transposed]);
  }

  Tensor cast(const Tensor& x, const std::array<const Tensor*, kMatrices>& from) const {
    const Tensor all = empty(x, {size_}, ScalarType::BFloat16);
    auto* to = mutable_pointer<bfloat16>(all);
    Casts casts = {};
    int64_t largest = 0;
    for (int i = 0; i < count_; ++i) {
      const Tensor& weight = *from[i];
      STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float && weight.is_contiguous() &&
                          weight.size(0) == out_ && weight.numel() == out_ * columns(i),
                      "block_forward: weights must be float32, contiguous, of shape ", text({out_, columns(i), 1, 1}),
                      ", got ", text(shape(weight)));
      casts.at[i] = {pointer(weight), to + offset_[i][0], to + offset_[i][1], static_cast<int>(out_),
                     static_cast<int>(columns(i))};
      largest = std::max(largest, out_ * columns(i));
    }
    const dim3 blocks(static_cast<unsigned>(ceil_div(largest, kCastThreads)), count_);
    launch(cast_weights_kernel, blocks, dim3(kCastThreads), 0, x, casts);
    return all;
  }

 private:
  int64_t columns(int i) const { return i == 1 ? out_ : in_; }

  int64_t in_, out_;
  int count_;
  int64_t offset_[kMatrices][2], size_;
};

// weight @ g. From this size on cuBLAS is the faster one (measured on an H100).
Tensor product(const Tensor& weight, const Tensor& g) {
  if (weight.size(0) * weight.size(1) >= 200 * 200) return torch::stable::matmul(weight, g);
  return std::get<0>(conv1x1({g}, weight, {{}, {}, false, false, true}));
}

// Scale and bias are rows 2 and 3 of a norm's coefficients (4, C).
Tensor scale(const Tensor& stats) { return view(stats, {stats.size(1)}, {1}, 2 * stats.size(1)); }
Tensor bias(const Tensor& stats) { return view(stats, {stats.size(1)}, {1}, 3 * stats.size(1)); }

// x after the norm and its ReLU, and the temporal attention where there is one.
Activation activation(const Tensor& x, const Tensor& stats, const MaybeTensor& attention = {}, int64_t frames = 0) {
  return {x, scale(stats), bias(stats), attention, frames};
}

Sizes strided(const Sizes& geometry, int64_t stride) {
  return Geometry("block", geometry).strided("block", stride).sizes();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> block_forward(
    const Tensor& x, const Tensor& sums, Sizes geometry, int64_t stride, const Tensor& weight1, const Tensor& bias1,
    const Tensor& mean1, const Tensor& var1, const Tensor& batches1, double momentum1, double eps1,
    const Tensor& weight2, const Tensor& bias2, const Tensor& mean2, const Tensor& var2, const Tensor& batches2,
    double momentum2, double eps2, const Tensor& conv2, const Tensor& shift, const Tensor& conv3,
    MaybeTensor shortcut, MaybeTensor attention, MaybeTensor down, MaybeTensor up) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Weights weights(x.size(0), conv3.size(0), shortcut.has_value());
  const Tensor cast = weights.cast(x, {&conv2, &conv3, shortcut ? &*shortcut : nullptr});
  const Tensor stats1 = norm_coefficients(sums, x.size(1), weight1, bias1, mean1, var1, batches1, momentum1, eps1);
  const auto [h, h_sums] = conv1x1(activation(x, stats1, attention, geometry[1]), weights.get(cast, 0, false),
                                   {{}, {}, false, true, true});
  const Tensor stats2 = norm_coefficients(h_sums, h.size(1), weight2, bias2, mean2, var2, batches2, momentum2, eps2);
  const Tensor z = clip_shift(h, scale(stats2), bias(stats2), shift, geometry, stride);
  const Tensor none = empty(x, {0}, ScalarType::Float);
  const Excited excited = down ? excite(z, *down, *up, strided(geometry, stride)) : Excited{z, none, none, none};
  Tensor residual = x;
  if (shortcut) {
    const Activation columns = activation(subsample(x, geometry, stride), stats1);
    residual = std::get<0>(conv1x1(columns, weights.get(cast, 2, false), {{}, {}, false, false, true}));
  }
  const auto [y, y_sums] = conv1x1({excited.out}, weights.get(cast, 1, false), {{}, residual, false, true, true});
  return {y, y_sums, h, z, stats1, stats2, cast, excited.means, excited.hidden, excited.logits};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
block_backward(const Tensor& gy, const Tensor& x, const Tensor& h, const Tensor& z, const Tensor& stats1,
               const Tensor& stats2, const Tensor& cast, MaybeTensor means, MaybeTensor hidden, MaybeTensor logits,
               Sizes geometry, int64_t stride, const Tensor& shift, MaybeTensor attention, MaybeTensor down,
               MaybeTensor up, bool has_shortcut) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Weights weights(x.size(0), gy.size(0), has_shortcut);
  const Tensor none = empty(x, {0}, ScalarType::Float);
  const Activation input = activation(x, stats1, attention, geometry[1]);
  std::vector<WeightGradient> gradients;  // of conv3, conv2 and the shortcut
  // The gradient of h is mix2[0] * g2 + mix2[1] * h + mix2[2]: what uses it computes it on the way.
  const int64_t c = h.size(0);
  const Tensor mix2 = empty(h, {3, c}, ScalarType::Float), g_weight2 = empty(h, {c}, ScalarType::Float),
               g_bias2 = empty(h, {c}, ScalarType::Float);
  Tensor g2 = none, g_shift = none, g_down = none, g_up = none;
  {
    Tensor gz = product(weights.get(cast, 1, true), gy), excited = z;
    if (down) {
      STD_TORCH_CHECK(up && means && hidden && logits, "block_backward: squeeze-excite needs what its forward kept");
      const ExcitedGradient e = excite_backward(gz, z, *means, *hidden, *logits, *down, *up, strided(geometry, stride));
      excited = e.out, gz = e.x, g_down = e.down, g_up = e.up;
    }
    gradients.push_back(conv1x1_weight_grad({gy}, {excited}));
    const NormGradients norm2 = {static_cast<double>(h.size(1)), pointer(stats2), mutable_pointer(mix2),
                                 mutable_pointer(g_weight2), mutable_pointer(g_bias2)};
    std::tie(g2, g_shift) = clip_shift_backward(gz, h, stats2, shift, geometry, stride, norm2);
  }
  gradients.push_back(conv1x1_weight_grad({g2, h, mix2}, input));
  const auto [g1, sums1] = conv1x1_grad({g2, h, mix2}, weights.get(cast, 0, true), input, true);
  g2 = none;  // its memory serves what comes next

  MaybeTensor more, residual = gy, part;
  if (has_shortcut) {
    const Activation columns = activation(subsample(x, geometry, stride), stats1);
    gradients.push_back(conv1x1_weight_grad({gy}, columns));
    std::tie(part, more) = conv1x1_grad({gy}, weights.get(cast, 2, true), columns, true);
    residual = {};
  }
  add_parts(gradients);
  const auto [mix1, g_weight1, g_bias1] = norm_gradients(sums1, more, x.size(1), stats1);
  const auto [gx, g_attention] =
      norm_input_grad(g1, x, mix1, residual, part, geometry, stride, input.scale, input.bias, attention);
  const auto of_weight = [&](int i) {  // (M, K, 1, 1)
    const Tensor& whole = gradients[i].whole;
    return view(whole, {whole.size(0), whole.size(1), 1, 1}, {whole.size(1), 1, 1, 1});
  };
  const Tensor g_shortcut = has_shortcut ? of_weight(2) : none;
  return {gx,      g_weight1,    g_bias1,    of_weight(1), g_weight2, g_bias2,
          g_shift, of_weight(0), g_shortcut, g_attention,  g_down,    g_up};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rubiks, CUDA, m) {
  m.impl("block_forward", TORCH_BOX(&block_forward));
  m.impl("block_backward", TORCH_BOX(&block_backward));
}

}  // namespace rubiks
