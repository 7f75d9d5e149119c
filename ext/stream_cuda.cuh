// Passes over channel-major matrices (C, P) of bfloat16 on NVIDIA GPUs, as fast as memory: batch norm, ReLU and the mix
// of neighbouring frames, forward and backward; the windows of the stem; every second pixel. stream_cuda.cu launches them.
//
// blockIdx.y is the channel. A thread moves up to 16 bytes at a time and has several loads on their way. Arithmetic is
// in float32.
#pragma once

#include "order.cuh"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace rubiks {
namespace {

constexpr unsigned kThreads = 128;  // of a block
constexpr int kSumRows = 5;         // of norm_mix_backward: 2 of g, 3 of the gradient of weights
constexpr int kEveryFrames = 4;     // of a thread of every and add_every_

// Neighbouring elements that are moved in one access.
template <typename scalar, int count>
struct alignas(sizeof(scalar) * count) Vector {
  scalar values[count];
};

// The same in whole registers. What is loaded ahead stays in them until it is used: the compiler would otherwise split
// it into elements, for which it would wait at once.
template <typename V>
using Words = std::conditional_t<
    sizeof(V) == 16, uint4,
    std::conditional_t<sizeof(V) == 8, uint2, std::conditional_t<sizeof(V) == 4, unsigned, unsigned short>>>;

// Zeros where not `inside`.
template <typename V, typename scalar>
__device__ inline Words<V> load_words(const scalar* from, bool inside) {
  Words<V> words = {};
  if (inside) words = *reinterpret_cast<const Words<V>*>(from);
  return words;
}

template <int count, typename scalar>
__device__ inline Vector<scalar, count> load(const scalar* from, bool inside) {
  const auto words = load_words<Vector<scalar, count>>(from, inside);
  return reinterpret_cast<const Vector<scalar, count>&>(words);
}

template <typename scalar, int count>
__device__ inline void store(scalar* to, const Vector<scalar, count>& v) {
  using From = Words<Vector<scalar, count>>;
  __stwb(reinterpret_cast<From*>(to), reinterpret_cast<const From&>(v));  // always one access, unlike an assignment
}

template <int count>
__device__ inline void round_to(__nv_bfloat16* to, const float (&values)[count]) {
  Vector<__nv_bfloat16, count> rounded;
#pragma unroll
  for (int j = 0; j < count; ++j) rounded.values[j] = __float2bfloat16_rn(values[j]);
  store(to, rounded);
}

__device__ inline __nv_bfloat16 to_bfloat16(__nv_bfloat16 v) { return v; }
__device__ inline __nv_bfloat16 to_bfloat16(float v) { return __float2bfloat16_rn(v); }

// ---- norm_mix and its backward. A thread has a strip: `wide` neighbouring pixels of one channel and clip, in all
// frames.

struct Mix {
  const __nv_bfloat16 *x, *grad;  // (C, P); grad: upstream, backward only
  const float *scale, *bias;      // (C)
  const float* weights;           // (C, 3), of the previous, the same and the next frame
  __nv_bfloat16* result;          // (C, P); backward: g
  float* sums;                    // (blocks of a channel, 2, C): of g and of g * x, backward only
  float* grad_weights;            // (C, 3, blocks of a channel): parts of the gradient of weights, backward only
  int64_t p, frame;               // columns of the matrix and of one frame
  int frames;                     // of a clip
  unsigned strips;                // of a channel
};

template <int wide>
__device__ inline int64_t strip_offset(const Mix& a, unsigned strip) {
  const unsigned strips = static_cast<unsigned>(a.frame / wide);  // of a clip
  return blockIdx.y * a.p + strip / strips * a.frames * a.frame + strip % strips * wide;
}

// The frames of a strip in turn, loaded `depth` ahead of their use, and zeros after the last. The ring moves by one
// with each frame: in loops unrolled by `depth` that takes no instructions, as registers change names instead.
template <int wide, int depth>
struct Reader {
  using Pixels = Vector<__nv_bfloat16, wide>;
  Words<Pixels> ring[depth];
  const __nv_bfloat16* from;  // the next frame to load
  int64_t frame;
  int left;  // frames to load

  __device__ Reader(const __nv_bfloat16* strip, const Mix& a) : from(strip), frame(a.frame), left(a.frames) {
#pragma unroll
    for (int i = 0; i < depth; ++i) ring[i] = fetch();
  }

  __device__ Words<Pixels> fetch() {
    const auto words = load_words<Pixels>(from, left > 0);
    from += frame, --left;
    return words;
  }

  __device__ Pixels next() {
    const auto words = ring[0];
#pragma unroll
    for (int i = 0; i + 1 < depth; ++i) ring[i] = ring[i + 1];
    ring[depth - 1] = fetch();
    return reinterpret_cast<const Pixels&>(words);
  }
};

template <int wide>
__global__ void __launch_bounds__(kThreads) norm_mix_kernel(const Mix a) {
  wait_for_kernel_before();
  constexpr int depth = 4;  // of loads ahead
  const unsigned c = blockIdx.y, strip = blockIdx.x * kThreads + threadIdx.x;
  if (strip >= a.strips) return;
  const float scale = a.scale[c], bias = a.bias[c];
  const float back = a.weights[3 * c], stay = a.weights[3 * c + 1], ahead = a.weights[3 * c + 2];
  const int64_t offset = strip_offset<wide>(a, strip);
  Reader<wide, depth> x(a.x + offset, a);
  __nv_bfloat16* to = a.result + offset;
  float carried[wide] = {};  // from the previous frame to this one
  float mixed[wide] = {};    // the previous frame's result, but for what this one adds
#pragma unroll depth
  for (int t = 0; t < a.frames; ++t) {
    const auto pixels = x.next();
    float result[wide];
#pragma unroll
    for (int j = 0; j < wide; ++j) {
      const float normal = fmaf(scale, __bfloat162float(pixels.values[j]), bias);
      const float value = normal < 0 ? 0 : normal;  // NaN stays
      result[j] = fmaf(ahead, value, mixed[j]);
      mixed[j] = fmaf(stay, value, carried[j]);
      carried[j] = back * value;
    }
    if (t > 0) round_to(to, result), to += a.frame;
  }
  round_to(to, mixed);
}

__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int step = 16; step; step /= 2) v += __shfl_xor_sync(0xffffffff, v, step);
  return v;
}

// With value = relu(scale * x + bias): frame t of the upstream gradient meets the values of frames t - 1, t and t + 1,
// so the value of frame t meets the gradients of frames t + 1, t and t - 1.
template <int wide>
__global__ void __launch_bounds__(kThreads) norm_mix_backward_kernel(const Mix a) {
  wait_for_kernel_before();
  constexpr int depth = wide == 8 ? 2 : 4;  // for each of two matrices
  const unsigned c = blockIdx.y, channels = gridDim.y, strip = blockIdx.x * kThreads + threadIdx.x;
  float sums[kSumRows] = {};
  if (strip < a.strips) {
    const float scale = a.scale[c], bias = a.bias[c];
    const float back = a.weights[3 * c], stay = a.weights[3 * c + 1], ahead = a.weights[3 * c + 2];
    const int64_t offset = strip_offset<wide>(a, strip);
    Reader<wide, depth> grad(a.grad + offset, a), x(a.x + offset, a);
    __nv_bfloat16* to = a.result + offset;
    Vector<__nv_bfloat16, wide> before = {}, here = grad.next();
#pragma unroll depth
    for (int t = 0; t < a.frames; ++t) {
      const auto after = grad.next(), pixels = x.next();
      float result[wide];
#pragma unroll
      for (int j = 0; j < wide; ++j) {
        const float pixel = __bfloat162float(pixels.values[j]), normal = fmaf(scale, pixel, bias);
        const float value = normal < 0 ? 0 : normal;
        const float g0 = __bfloat162float(before.values[j]), g1 = __bfloat162float(here.values[j]);
        const float g2 = __bfloat162float(after.values[j]);
        result[j] = normal <= 0 ? 0 : fmaf(back, g2, fmaf(ahead, g0, stay * g1));
        sums[0] += result[j];
        sums[1] = fmaf(result[j], pixel, sums[1]);
        sums[2] = fmaf(g2, value, sums[2]);
        sums[3] = fmaf(g1, value, sums[3]);
        sums[4] = fmaf(g0, value, sums[4]);
      }
      round_to(to, result), to += a.frame;
      before = here, here = after;
    }
  }

  __shared__ float parts[kThreads / 32][kSumRows];
#pragma unroll
  for (int i = 0; i < kSumRows; ++i) {
    const float part = warp_sum(sums[i]);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32][i] = part;
  }
  __syncthreads();
  const unsigned row = threadIdx.x;
  if (row >= kSumRows) return;
  float sum = 0;
#pragma unroll
  for (const auto& part : parts) sum += part[row];
  if (row < 2) {
    a.sums[(blockIdx.x * 2 + row) * channels + c] = sum;
  } else {
    a.grad_weights[static_cast<int64_t>(3 * c + row - 2) * gridDim.x + blockIdx.x] = sum;
  }
}

// A warp for each row adds its parts in a fixed order. parts (rows, count), sums (rows).
__global__ void sum_parts_kernel(const float* parts, float* sums, int count) {
  wait_for_kernel_before();
  parts += static_cast<int64_t>(blockIdx.x) * count;
  float sum = 0;
  for (int i = threadIdx.x; i < count; i += 32) sum += parts[i];
  sum = warp_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// ---- stem_columns

// images (B, 3, height, width) -> columns (28, P). A thread makes the 9 rows of its channel for `wide` neighbouring
// columns, so `units` threads make P. wide is 1, or 8 where width is a multiple of 16.
template <typename scalar, int wide>
__global__ void __launch_bounds__(kThreads)
    stem_columns_kernel(const scalar* images, __nv_bfloat16* columns, int height, int width, unsigned units) {
  wait_for_kernel_before();
  constexpr int count = wide == 1 ? 1 : 16 / sizeof(scalar), parts = 2 * wide / count;  // of an access; accesses
  const unsigned unit = blockIdx.x * kThreads + threadIdx.x;
  if (unit >= units) return;
  const unsigned rows = (height + 1) / 2, units_of_row = (width + 1) / 2 / wide, row = unit / units_of_row;
  const int left = unit % units_of_row * wide * 2, top = row % rows * 2 - 1;
  images += (static_cast<int64_t>(row / rows) * 3 + blockIdx.y) * height * width + left;
  Vector<scalar, 1> edge[3];  // column left - 1 of the image
  Vector<scalar, count> part[3][parts];
#pragma unroll
  for (int ky = 0; ky < 3; ++ky) {
    const bool inside = top + ky >= 0 && top + ky < height;
    const scalar* from = images + static_cast<int64_t>(top + ky) * width;
    edge[ky] = load<1>(from - 1, inside && left > 0);
#pragma unroll
    for (int i = 0; i < parts; ++i) part[ky][i] = load<count>(from + i * count, inside && left + i * count < width);
  }
  const int64_t p = static_cast<int64_t>(units) * wide;
  columns += blockIdx.y * 9 * p + static_cast<int64_t>(unit) * wide;
#pragma unroll
  for (int k = 0; k < 9; ++k) {
    Vector<__nv_bfloat16, wide> window;
#pragma unroll
    for (int j = 0; j < wide; ++j) {
      const int at = 2 * j + k % 3 - 1;  // from `left` on
      window.values[j] = to_bfloat16(at < 0 ? edge[k / 3].values[0] : part[k / 3][at / count].values[at % count]);
    }
    store(columns + k * p, window);
  }
  if (blockIdx.y == 2) store(columns + 9 * p, Vector<__nv_bfloat16, wide>{});  // the last row is zeros
}

// ---- every and add_every_. A thread has `wide` neighbouring pixels of the small matrix, at the same place in up to
// kEveryFrames frames: 1 pixel at any stride, or more at stride 2, where the large matrix is accessed together with the
// pixels between them.

struct Every {
  int64_t frame, width, stride;       // of the large matrix: pixels of a frame and of a row
  unsigned small_frame, small_width;  // the same of the small one
  unsigned frames, threads;           // of a channel
};

template <int wide>
struct Place {
  static constexpr int span = wide == 1 ? 1 : 2 * wide;  // of an access to the large matrix
  int64_t large, small;                                  // offsets of the first frame's pixels
  int frames;                                            // 0 past the last thread

  __device__ explicit Place(const Every& a) {
    const unsigned thread = blockIdx.x * kThreads + threadIdx.x;
    const unsigned places = a.small_frame / wide, row_places = a.small_width / wide;
    const unsigned place = thread % places, frame = thread / places * kEveryFrames;
    const int64_t first = static_cast<int64_t>(blockIdx.y) * a.frames + frame;
    large = first * a.frame + (place / row_places * a.width + place % row_places * wide) * a.stride;
    small = first * a.small_frame + place * wide;
    frames = thread < a.threads ? min(static_cast<int>(a.frames - frame), kEveryFrames) : 0;
  }
};

// x (C, P) -> out (C, P').
template <int wide>
__global__ void __launch_bounds__(kThreads) every_kernel(const Every a, const __nv_bfloat16* x, __nv_bfloat16* out) {
  wait_for_kernel_before();
  constexpr int span = Place<wide>::span;
  const Place<wide> place(a);
  Vector<__nv_bfloat16, span> pixels[kEveryFrames];
#pragma unroll
  for (int i = 0; i < kEveryFrames; ++i) pixels[i] = load<span>(x + place.large + i * a.frame, i < place.frames);
#pragma unroll
  for (int i = 0; i < kEveryFrames; ++i) {
    if (i >= place.frames) break;
    Vector<__nv_bfloat16, wide> taken;
#pragma unroll
    for (int j = 0; j < wide; ++j) taken.values[j] = pixels[i].values[2 * j];
    store(out + place.small + i * a.small_frame, taken);
  }
}

// g (C, P) += part (C, P').
template <int wide>
__global__ void __launch_bounds__(kThreads)
    add_every_kernel(const Every a, __nv_bfloat16* g, const __nv_bfloat16* part) {
  wait_for_kernel_before();
  constexpr int span = Place<wide>::span;
  const Place<wide> place(a);
  Vector<__nv_bfloat16, span> sums[kEveryFrames];
  Vector<__nv_bfloat16, wide> terms[kEveryFrames];
#pragma unroll
  for (int i = 0; i < kEveryFrames; ++i) {
    sums[i] = load<span>(g + place.large + i * a.frame, i < place.frames);
    terms[i] = load<wide>(part + place.small + i * a.small_frame, i < place.frames);
  }
#pragma unroll
  for (int i = 0; i < kEveryFrames; ++i) {
    if (i >= place.frames) break;
#pragma unroll
    for (int j = 0; j < wide; ++j) {
      __nv_bfloat16& sum = sums[i].values[2 * j];
      sum = __float2bfloat16_rn(__bfloat162float(sum) + __bfloat162float(terms[i].values[j]));
    }
    store(g + place.large + i * a.frame, sums[i]);
  }
}

}  // namespace
}  // namespace rubiks
