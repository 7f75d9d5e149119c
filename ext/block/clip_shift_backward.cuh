// The backward kernels of batch norm, ReLU and shift; clip_shift.cuh says how the work is divided.
#pragma once

#include "block/clip_shift.cuh"
#include "block/norm_gradients.cuh"
#include "common/reductions.cuh"

namespace rubiks {
namespace {

// The gradient at a pixel before the shift in time is undone: upstream gradients of the outputs that read the pixel,
// added by the weights with which they read it, and by the derivatives of these weights with respect to the shift in H
// and W.
template <int frames>
struct Gathered {
  float value[frames], by_h[frames], by_w[frames];
};

// The outputs along one axis that read a position: by which weight and, with the mean of both sides where the shift is
// whole, by which derivative of it. The output of a tap that is not there is -1.
template <int count>
struct Readers {
  int output[count];
  float weight[count], slope[count];

  __device__ Readers(int position, const Taps& reads, int stride) {
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

// One thread's work: the gradient at each of its pixels, and its part of the sums of the channel.
template <int frames, bool temporal, int stride, int rows>
struct ClipShiftBackward {
  const ClipShift& a;
  const float scale, bias;
  const Taps t, h, w;
  ShiftSums sums;

  // Makes the gradient of a pixel and adds to the sums.
  __device__ void finish(const Gathered<frames>& r, const Pixel<frames>& pixel, Unit* plane, int index) {
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
    Pixel<frames>::pack_from(out).store(plane, index);
  }

  // A pixel from `count` outputs along each axis.
  template <int count>
  __device__ void gather(const Unit* from, const Unit* x, Unit* to, int column, int y) {
    const Readers<count> ys(y, h, stride), xs(column, w, stride);
    const Pixel<frames> own = load<frames>(x, y, column, a.height, a.width);
    Gathered<frames> gathered = {};
#pragma unroll
    for (int i = 0; i < count * count; ++i) {
      const int iy = i / count, ix = i % count;
      float g[frames];
      load<frames>(from, ys.output[iy], xs.output[ix], a.source_height, a.source_width).unpack_to(g);
      const float value = ys.weight[iy] * xs.weight[ix], by_h = ys.slope[iy] * xs.weight[ix];
      const float by_w = ys.weight[iy] * xs.slope[ix];
#pragma unroll
      for (int k = 0; k < frames; ++k) {
        gathered.value[k] = fmaf(value, g[k], gathered.value[k]);
        gathered.by_h[k] = fmaf(by_h, g[k], gathered.by_h[k]);
        gathered.by_w[k] = fmaf(by_w, g[k], gathered.by_w[k]);
      }
    }
    finish(gathered, own, to, y * a.width + column);
  }

  // A strip of pixels for stride 1 and shifts that are not whole: consecutive rows of outputs read a pixel by
  // h.fraction and by the rest to 1.
  __device__ void gather_strip(const Unit* from, const Unit* x, Unit* to, const Strip<rows>& strip) {
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
        Gathered<frames> gathered;
#pragma unroll
        for (int k = 0; k < frames; ++k) {
          gathered.by_h[k] = before[k] - row[k];
          gathered.value[k] = fmaf(h.fraction, gathered.by_h[k], row[k]);
          gathered.by_w[k] = fmaf(h.fraction, before_by_w[k] - row_by_w[k], row_by_w[k]);
        }
        finish(gathered, own[i - 1], to, (strip.y + i - 1) * a.width + strip.x);
      }
#pragma unroll
      for (int k = 0; k < frames; ++k) before[k] = row[k], before_by_w[k] = row_by_w[k];
    }
  }
};

// The source is the upstream gradient; the result is the gradient of x before the norm's coefficients.
template <int frames, bool temporal, int stride, int rows>
__global__ void __launch_bounds__(kClipThreads) clip_shift_backward_kernel(const __grid_constant__ ClipShift a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  static_assert(stride == 1 || rows == 1);
  wait_for_previous_kernel();
  constexpr int units = frames / kUnitElements;
  const unsigned c = blockIdx.y;
  const float* shift = a.shift + c;
  const Taps t(temporal ? *shift : 0, frames + 1);
  if (temporal) shift += a.c;
  const Taps h(shift[0], a.height + 2), w(shift[a.c], a.width + 2);
  const bool whole = h.fraction == 0 || w.fraction == 0;
  ClipShiftBackward<frames, temporal, stride, rows> backward = {a, a.scale[c], a.bias[c], t, h, w, {}};

#pragma unroll 1
  for (unsigned thread = blockIdx.x * kClipThreads + threadIdx.x; thread < a.threads;
       thread += gridDim.x * kClipThreads) {
    const Strip<rows> strip(a, thread);
    const int64_t plane = static_cast<int64_t>(c) * a.clips + strip.clip;
    const Unit* from = a.source + plane * a.source_height * a.source_width * units;
    const Unit* x = a.x + plane * a.height * a.width * units;
    Unit* to = a.result + plane * a.height * a.width * units;
    if (stride > 1 || whole) {
#pragma unroll 1
      for (int y = strip.y; y < min(strip.y + rows, a.height); ++y) {
        if (!whole) {
          if constexpr (stride > 1) backward.template gather<1>(from, x, to, strip.x, y);
        } else {
          backward.template gather<stride == 1 ? 3 : 2>(from, x, to, strip.x, y);
        }
      }
      continue;
    }
    if constexpr (stride == 1) backward.gather_strip(from, x, to, strip);
  }

  const ShiftSums& s = backward.sums;
  const float sums[kShiftSums] = {s.t, s.h, s.w, s.result, s.product};
  const float sum = block_sums<kClipThreads>(sums);
  float* to = reinterpret_cast<float*>(a.sums + static_cast<int64_t>(c) * gridDim.x + blockIdx.x);
  if (threadIdx.x < kShiftSums) to[threadIdx.x] = sum;
#endif
}

// A warp for each channel adds the sums of its blocks in a fixed order. sums (C, blocks), grad (3, C) or (2, C).
__global__ void clip_shift_grad_sum_kernel(const ShiftSums* sums, int blocks, float* grad, int c, bool temporal,
                                           const NormGradients norm) {
  wait_for_previous_kernel();
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
  norm.write(s.result, s.product, c, channel);
}

}  // namespace
}  // namespace rubiks
