// The forward kernel of batch norm, ReLU and shift; clip_shift.cuh says how the work is divided.
#pragma once

#include "block/clip_shift.cuh"

namespace rubiks {
namespace {

template <int frames, bool norm, bool temporal, int stride, int rows>
__global__ void __launch_bounds__(kClipThreads) clip_shift_kernel(const __grid_constant__ ClipShift a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  static_assert(stride == 1 || rows == 1);
  wait_for_previous_kernel();
  const unsigned c = blockIdx.y, thread = blockIdx.x * kClipThreads + threadIdx.x;
  if (thread >= a.threads) return;
  constexpr int units = frames / kUnitElements;
  const float scale = norm ? a.scale[c] : 1, bias = norm ? a.bias[c] : 0;
  const float* shift = a.shift + c;
  const Taps t(temporal ? *shift : 0, frames + 1);
  if (temporal) shift += a.c;
  const Taps h(shift[0], a.source_height + 2), w(shift[a.c], a.source_width + 2);

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
      Pixel<frames>::pack_from(out).store(to, (strip.y + i - 1) * a.width + strip.x);
    }
#pragma unroll
    for (int k = 0; k < frames; ++k) before[k] = row[k];
  }
#endif
}

}  // namespace
}  // namespace rubiks
