// Arithmetic on rows of numbers for shift_cpu.cpp, which includes this before anything else.
#pragma once

#include <cstdint>

// Row functions are compiled a second time, for wider vectors; the C library picks one when this library is loaded.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")  // else the float16 conversion has branches and is not vectorised
#define RUBIKS_VECTORIZED __attribute__((flatten, target_clones("avx2", "default")))
#else
#define RUBIKS_VECTORIZED
#endif

#include <algorithm>

namespace rubiks {
namespace {

template <typename To, typename From>
RUBIKS_VECTORIZED void copy(To* __restrict out, int64_t out_step, const From* __restrict in, int64_t in_step,
                            int64_t count) {
  if (out_step == 1 && in_step == 1) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<To>(in[i]);
  } else if (out_step == 1 && in_step == 2) {  // the stride of downsampling layers, known to the compiler
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<To>(in[i * 2]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i * out_step] = static_cast<To>(in[i * in_step]);
  }
}

template <typename real, typename T>
RUBIKS_VECTORIZED void interpolate(T* __restrict out, const real* __restrict near, const real* __restrict far,
                                   real fraction, int64_t count) {
  if (fraction == 0) {  // zero times a NaN or an infinity must not show
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(near[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>((1 - fraction) * near[i] + fraction * far[i]);
  }
}

template <typename real>
RUBIKS_VECTORIZED void subtract(real* __restrict out, const real* __restrict a, const real* __restrict b,
                                int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = a[i] - b[i];
}

// A frame after W and H: interpolated along both, and with the derivative along H or along W instead.
template <typename real>
struct Planes {
  real *interpolated, *along_h, *along_w;
};

// Backward along T: the gradient of x, and sums of x times the derivatives along T (before - after), H and W.
template <typename real>
RUBIKS_VECTORIZED void correlate(real* __restrict grad_x, double* sums, const real* __restrict x,
                                 const Planes<real>& near, const Planes<real>& far, const real* __restrict before,
                                 const real* __restrict after, real fraction, int64_t count) {
  const real *near_both = near.interpolated, *near_h = near.along_h, *near_w = near.along_w;
  const real *far_both = far.interpolated, *far_h = far.along_h, *far_w = far.along_w;
  const real rest = 1 - fraction;
  constexpr int64_t block = 2048;  // short enough for sums in float32
  for (int64_t begin = 0; begin < count; begin += block) {
    const int64_t end = std::min(count, begin + block);
    real t = 0, h = 0, w = 0;
#pragma omp simd reduction(+ : t, h, w)
    for (int64_t i = begin; i < end; ++i) {
      grad_x[i] = rest * near_both[i] + fraction * far_both[i];
      t += x[i] * (before[i] - after[i]);
      h += x[i] * (rest * near_h[i] + fraction * far_h[i]);
      w += x[i] * (rest * near_w[i] + fraction * far_w[i]);
    }
    sums[0] += t;
    sums[1] += h;
    sums[2] += w;
  }
}

}  // namespace
}  // namespace rubiks
