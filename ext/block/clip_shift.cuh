// Batch norm, ReLU and the learnable shift of channel-major matrices on NVIDIA GPUs, forward and backward, where the
// frames of a pixel adjoin: columns in the order N, H, W, T. block/clip_shift.cu launches the kernels.
//
// A thread has all frames of a pixel in registers. So a shift in time moves between registers, one in space reads whole
// units of 16 bytes, and the threads of a warp read pixels that adjoin. Every thread makes a strip of a few rows of one
// column of the frame: rows in turn share what they read. blockIdx.y is the channel. Arithmetic is in float32.
#pragma once

#include "block/norm_gradients.cuh"
#include "block/pixels.cuh"

#include <cstdint>

namespace rubiks {
namespace {

constexpr unsigned kClipThreads = 128;  // of a block

struct ShiftSums {        // over the pixels of a channel
  float t, h, w;          // the gradient of the shift
  float result, product;  // of the gradient of x before its norm's coefficients, and of its product with x
};

struct ClipShift {
  const Unit* source;         // (C, source pixels): what is shifted or, backward, the upstream gradient
  const Unit* x;              // (C, pixels), backward only
  const float *scale, *bias;  // (C), or null
  const float* shift;         // (3, C) or (2, C), rows [T,] H, W
  Unit* result;               // (C, pixels)
  ShiftSums* sums;            // (C, blocks), backward only
  int height, width, source_height, source_width;  // of the result, and of the source
  unsigned strips, threads;                        // of a clip; of a channel
  int c, clips;
};

// Where along one axis a shift reads: at base and base + 1, weighted 1 - fraction and fraction.
struct Reads {
  int base;
  float fraction;

  // Beyond `far` nothing is inside: there, and for NaN, it stands for the shift.
  __device__ Reads(float shift, int far) {
    const float near = !(shift > -far) ? -far : !(shift < far) ? far : shift;
    base = static_cast<int>(floorf(near)), fraction = near - base;
  }
};

// Of column (y, x) of a plane; zeros outside.
template <int frames>
__device__ inline Pixel<frames> load(const Unit* plane, int y, int x, int height, int width) {
  const bool inside = static_cast<unsigned>(y) < static_cast<unsigned>(height) &&
                      static_cast<unsigned>(x) < static_cast<unsigned>(width);
  return Pixel<frames>::load(plane, y * width + x, inside);
}

// Calls f(t, values[t + base], values[t + base + 1]) for every frame t, with zeros for frames outside.
template <int frames, typename F>
__device__ inline void with_neighbours(const float (&values)[frames], int base, const F& f) {
  float v[frames];
#pragma unroll
  for (int t = 0; t < frames; ++t) v[t] = values[t];
  // For a base of 0 or -1, as nearly all shifts have, nothing is moved.
  if (base >= 0) {
#pragma unroll 1
    for (int i = min(base, frames); i > 0; --i) {
#pragma unroll
      for (int t = 0; t < frames; ++t) v[t] = t + 1 < frames ? v[t + 1] : 0;
    }
#pragma unroll
    for (int t = 0; t < frames; ++t) f(t, v[t], t + 1 < frames ? v[t + 1] : 0.0f);
  } else {
#pragma unroll 1
    for (int i = max(base + 1, -frames); i < 0; ++i) {
#pragma unroll
      for (int t = frames - 1; t >= 0; --t) v[t] = t > 0 ? v[t - 1] : 0;
    }
#pragma unroll
    for (int t = 0; t < frames; ++t) f(t, t > 0 ? v[t - 1] : 0.0f, v[t]);
  }
}

// The place of a thread's strip.
template <int rows>
struct Strip {
  int clip, y, x;

  __device__ Strip(const ClipShift& a, unsigned thread) {
    const unsigned rest = thread / a.width;
    x = thread % a.width, clip = rest / a.strips, y = rest % a.strips * rows;
  }
};

template <int frames, bool norm, bool temporal, int stride, int rows>
__global__ void __launch_bounds__(kClipThreads) clip_shift_kernel(const __grid_constant__ ClipShift a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  static_assert(stride == 1 || rows == 1);
  wait_for_kernel_before();
  const unsigned c = blockIdx.y, thread = blockIdx.x * kClipThreads + threadIdx.x;
  if (thread >= a.threads) return;
  constexpr int units = frames / kUnitElements;
  const float scale = norm ? a.scale[c] : 1, bias = norm ? a.bias[c] : 0;
  const float* shift = a.shift + c;
  const Reads t(temporal ? *shift : 0, frames + 1);
  if (temporal) shift += a.c;
  const Reads h(shift[0], a.source_height + 2), w(shift[a.c], a.source_width + 2);

  const Strip<rows> strip(a, thread);
  const int left = strip.x * stride + w.base, top = strip.y * stride + h.base;
  const int64_t plane = static_cast<int64_t>(c) * a.clips + strip.clip;
  const Unit* from = a.source + plane * a.source_height * a.source_width * units;
  Pixel<frames> pixels[rows + 1][2];
#pragma unroll
  for (int i = 0; i <= rows; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) pixels[i][j] = load<frames>(from, top + i, left + j, a.source_height, a.source_width);
  }
  const auto inside = [](int at, int length) { return static_cast<unsigned>(at) < static_cast<unsigned>(length); };
  const float of_left = inside(left, a.source_width) ? 1 - w.fraction : 0;
  const float of_right = inside(left + 1, a.source_width) ? w.fraction : 0;
  Unit* to = a.result + plane * a.height * a.width * units;
  float before[frames];
#pragma unroll
  for (int i = 0; i <= rows; ++i) {
    const bool row_inside = inside(top + i, a.source_height);
    const float weights[2] = {row_inside ? of_left : 0, row_inside ? of_right : 0};
    float row[frames] = {}, values[frames];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      pixels[i][j].unpack_to(values);
#pragma unroll
      for (int k = 0; k < frames; ++k) {
        row[k] = fmaf(weights[j], norm ? rectified(fmaf(scale, values[k], bias)) : values[k], row[k]);
      }
    }
    if (i > 0 && strip.y + i - 1 < a.height) {
      float mixed[frames], out[frames];
#pragma unroll
      for (int k = 0; k < frames; ++k) mixed[k] = out[k] = fmaf(h.fraction, row[k] - before[k], before[k]);
      if constexpr (temporal) {
        with_neighbours(mixed, t.base, [&](int k, float v0, float v1) { out[k] = fmaf(t.fraction, v1 - v0, v0); });
      }
      Pixel<frames>::rounded(out).store(to, (strip.y + i - 1) * a.width + strip.x);
    }
#pragma unroll
    for (int k = 0; k < frames; ++k) before[k] = row[k];
  }
#endif
}

// What comes back to a pixel of x from the upstream gradient, but for the shift in time: by the weights with which the
// outputs read the pixel, and by the derivatives of these weights by the shift in H and in W.
template <int frames>
struct Returns {
  float value[frames], by_h[frames], by_w[frames];
};

// The outputs along one axis that read a position: by which weight and, with the mean of both sides where the shift is
// whole, by which derivative of it. The output of a tap that is not there is -1.
template <int count>
struct Readers {
  int output[count];
  float weight[count], slope[count];

  __device__ Readers(int position, const Reads& reads, int stride) {
    const bool whole = reads.fraction == 0;
    const int first = position - reads.base - 1;
    int found = 0;
#pragma unroll
    for (int i = 0; i < count; ++i) output[i] = -1, weight[i] = slope[i] = 0;
#pragma unroll
    for (int i = 0; i < 3; ++i) {  // outputs at first, first + 1 and, for a whole shift only, first + 2
      const int at = first + i;
      if (at < 0 || at % stride || (i == 2 && !whole)) continue;
      const float of_value = i == 0 ? reads.fraction : i == 1 ? 1 - reads.fraction : 0;
      const float of_slope = whole ? 0.5f * (1 - i) : i == 0 ? 1 : -1;
#pragma unroll
      for (int j = 0; j < count; ++j) {
        if (j == found) output[j] = at / stride, weight[j] = of_value, slope[j] = of_slope;
      }
      ++found;
    }
  }
};

// What a thread makes of each of its pixels: the gradient there, and the sums of its channel.
template <int frames, bool temporal>
struct Pass {
  float scale, bias;
  Reads t;
  ShiftSums sums;

  __device__ void finish(const Returns<frames>& r, const Pixel<frames>& pixel, Unit* plane, int index) {
    float x[frames], value[frames], shifted[frames], back[frames];
    pixel.unpack_to(x);
#pragma unroll
    for (int k = 0; k < frames; ++k) {
      shifted[k] = value[k] = rectified(fmaf(scale, x[k], bias)), back[k] = r.value[k];
    }
    if constexpr (temporal) {
      const auto slopes = [&](float by) {
        return [&, by](int k, float v0, float v1) { sums.t = fmaf(by * (v1 - v0), r.value[k], sums.t); };
      };
      if (t.fraction == 0) {  // the mean of both sides
        with_neighbours(value, t.base, slopes(0.5f));
        with_neighbours(value, t.base - 1, slopes(0.5f));
        with_neighbours(value, t.base, [&](int k, float v0, float) { shifted[k] = v0; });
      } else {
        with_neighbours(value, t.base, [&](int k, float v0, float v1) {
          const float slope = v1 - v0;
          shifted[k] = fmaf(t.fraction, slope, v0);
          sums.t = fmaf(slope, r.value[k], sums.t);
        });
      }
      with_neighbours(r.value, -t.base - 1,
                      [&](int k, float v0, float v1) { back[k] = fmaf(t.fraction, v0 - v1, v1); });
    }
    float out[frames];
#pragma unroll
    for (int k = 0; k < frames; ++k) {
      sums.h = fmaf(shifted[k], r.by_h[k], sums.h);
      sums.w = fmaf(shifted[k], r.by_w[k], sums.w);
      out[k] = value[k] == 0 ? 0 : back[k];
      sums.result += out[k];
      sums.product = fmaf(out[k], x[k], sums.product);
    }
    Pixel<frames>::rounded(out).store(plane, index);
  }
};

// The source is the upstream gradient; the result is that of x before the norm's coefficients.
template <int frames, bool temporal, int stride, int rows>
__global__ void __launch_bounds__(kClipThreads) clip_shift_backward_kernel(const __grid_constant__ ClipShift a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  static_assert(stride == 1 || rows == 1);
  wait_for_kernel_before();
  constexpr int units = frames / kUnitElements;
  const unsigned c = blockIdx.y;
  const float* shift = a.shift + c;
  Pass<frames, temporal> pass = {a.scale[c], a.bias[c], Reads(temporal ? *shift : 0, frames + 1), {}};
  if (temporal) shift += a.c;
  const Reads h(shift[0], a.height + 2), w(shift[a.c], a.width + 2);
  const bool whole = h.fraction == 0 || w.fraction == 0;

#pragma unroll 1
  for (unsigned thread = blockIdx.x * kClipThreads + threadIdx.x; thread < a.threads;
       thread += gridDim.x * kClipThreads) {
    const Strip<rows> strip(a, thread);
    const int64_t plane = static_cast<int64_t>(c) * a.clips + strip.clip;
    const Unit* from = a.source + plane * a.source_height * a.source_width * units;
    const Unit* x = a.x + plane * a.height * a.width * units;
    Unit* to = a.result + plane * a.height * a.width * units;

    // One pixel, from `count` outputs along each axis.
    const auto single = [&](int y, auto number) {
      constexpr int count = number.value;
      const Readers<count> ys(y, h, stride), xs(strip.x, w, stride);
      const Pixel<frames> own = load<frames>(x, y, strip.x, a.height, a.width);
      Returns<frames> returns = {};
#pragma unroll
      for (int i = 0; i < count * count; ++i) {
        const int iy = i / count, ix = i % count;
        float g[frames];
        load<frames>(from, ys.output[iy], xs.output[ix], a.source_height, a.source_width).unpack_to(g);
        const float value = ys.weight[iy] * xs.weight[ix], by_h = ys.slope[iy] * xs.weight[ix];
        const float by_w = ys.weight[iy] * xs.slope[ix];
#pragma unroll
        for (int k = 0; k < frames; ++k) {
          returns.value[k] = fmaf(value, g[k], returns.value[k]);
          returns.by_h[k] = fmaf(by_h, g[k], returns.by_h[k]);
          returns.by_w[k] = fmaf(by_w, g[k], returns.by_w[k]);
        }
      }
      pass.finish(returns, own, to, y * a.width + strip.x);
    };
    if (stride > 1 || whole) {
#pragma unroll 1
      for (int y = strip.y; y < min(strip.y + rows, a.height); ++y) {
        if (!whole) {
          if constexpr (stride > 1) single(y, std::integral_constant<int, 1>{});
        } else {
          single(y, std::integral_constant<int, stride == 1 ? 3 : 2>{});
        }
      }
      continue;
    }
    if constexpr (stride == 1) {
      // Rows of outputs in turn read a pixel by h.fraction and by the rest to 1.
      const int left = strip.x - w.base - 1, top = strip.y - h.base - 1;
      Pixel<frames> g[rows + 1][2], own[rows];
#pragma unroll
      for (int i = 0; i <= rows; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) g[i][j] = load<frames>(from, top + i, left + j, a.height, a.width);
      }
#pragma unroll
      for (int i = 0; i < rows; ++i) own[i] = load<frames>(x, strip.y + i, strip.x, a.height, a.width);
      float before[frames], before_by_w[frames];
#pragma unroll
      for (int i = 0; i <= rows; ++i) {
        float g0[frames], g1[frames], row[frames], row_by_w[frames];
        g[i][0].unpack_to(g0), g[i][1].unpack_to(g1);
#pragma unroll
        for (int k = 0; k < frames; ++k) {
          row_by_w[k] = g0[k] - g1[k];
          row[k] = fmaf(w.fraction, row_by_w[k], g1[k]);
        }
        if (i > 0 && strip.y + i - 1 < a.height) {
          Returns<frames> returns;
#pragma unroll
          for (int k = 0; k < frames; ++k) {
            returns.by_h[k] = before[k] - row[k];
            returns.value[k] = fmaf(h.fraction, returns.by_h[k], row[k]);
            returns.by_w[k] = fmaf(h.fraction, before_by_w[k] - row_by_w[k], row_by_w[k]);
          }
          pass.finish(returns, own[i - 1], to, (strip.y + i - 1) * a.width + strip.x);
        }
#pragma unroll
        for (int k = 0; k < frames; ++k) before[k] = row[k], before_by_w[k] = row_by_w[k];
      }
    }
  }

  __shared__ ShiftSums parts[kClipThreads / 32];
  const ShiftSums& s = pass.sums;
  const ShiftSums total = {warp_sum(s.t), warp_sum(s.h), warp_sum(s.w), warp_sum(s.result), warp_sum(s.product)};
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x > 0) return;
  ShiftSums sum = {};
#pragma unroll
  for (const auto& part : parts) {
    sum = {sum.t + part.t, sum.h + part.h, sum.w + part.w, sum.result + part.result, sum.product + part.product};
  }
  a.sums[static_cast<int64_t>(c) * gridDim.x + blockIdx.x] = sum;
#endif
}

// A warp for each channel adds the sums of its blocks in a fixed order. sums (C, blocks), grad (3, C) or (2, C).
__global__ void shift_sums_kernel(const ShiftSums* sums, int blocks, float* grad, int c, bool temporal,
                                  const NormGradients to) {
  wait_for_kernel_before();
  const int channel = blockIdx.x;
  ShiftSums s = {};
  for (int i = threadIdx.x; i < blocks; i += 32) {
    const ShiftSums part = sums[static_cast<int64_t>(channel) * blocks + i];
    s = {s.t + part.t, s.h + part.h, s.w + part.w, s.result + part.result, s.product + part.product};
  }
  s = {warp_sum(s.t), warp_sum(s.h), warp_sum(s.w), warp_sum(s.result), warp_sum(s.product)};
  if (threadIdx.x > 0) return;
  if (temporal) *(grad + channel) = s.t, grad += c;
  grad[channel] = s.h, grad[c + channel] = s.w;
  to.write(s.result, s.product, c, channel);
}

}  // namespace
}  // namespace rubiks
