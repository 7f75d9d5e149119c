// The shift on the CPU.
//
// One walk serves forward and backward. It gathers a channel of a clip: each destination element is a weighted sum of
// two neighbouring taps of the source along W, H and T. Every source frame is interpolated along W and H once, into
// planes that stay in the cache, and these are combined along T straight into the result. Forward gathers from x. The
// gradient of x is a gather from the upstream gradient with mirrored taps, and the gradient of the shift is the sum of
// x times that gather with the interpolation of one axis replaced by its derivative.

#include <cstdint>

// Row functions are compiled a second time, for wider vectors; the C library picks one when this library is loaded.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")  // else the float16 conversion has branches and is not vectorised
#define RUBIKS_VECTORIZED __attribute__((flatten, target_clones("avx2", "default")))
#else
#define RUBIKS_VECTORIZED
#endif

#include "shift/shift.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>

namespace rubiks {
namespace {

template <typename T>
using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;  // arithmetic on T is done in this

// ---- Row functions

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
  real *plain, *along_h, *along_w;
};

// Backward along T: the gradient of x, and sums of x times the derivatives along T (before - after), H and W.
template <typename real>
RUBIKS_VECTORIZED void correlate(real* __restrict grad_x, double* sums, const real* __restrict x,
                                 const Planes<real>& near, const Planes<real>& far, const real* __restrict before,
                                 const real* __restrict after, real fraction, int64_t count) {
  const real *near_plain = near.plain, *near_h = near.along_h, *near_w = near.along_w;
  const real *far_plain = far.plain, *far_h = far.along_h, *far_w = far.along_w;
  const real rest = 1 - fraction;
  constexpr int64_t block = 2048;  // short enough for sums in float32
  for (int64_t begin = 0; begin < count; begin += block) {
    const int64_t end = std::min(count, begin + block);
    real t = 0, h = 0, w = 0;
#pragma omp simd reduction(+ : t, h, w)
    for (int64_t i = begin; i < end; ++i) {
      grad_x[i] = rest * near_plain[i] + fraction * far_plain[i];
      t += x[i] * (before[i] - after[i]);
      h += x[i] * (rest * near_h[i] + fraction * far_h[i]);
      w += x[i] * (rest * near_w[i] + fraction * far_w[i]);
    }
    sums[0] += t;
    sums[1] += h;
    sums[2] += w;
  }
}

// ---- The taps of one axis

int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// Evenly spaced sources and their places in a line of scratch.
struct Run {
  int64_t source, source_step, place, place_step, count;
};

// How a channel is gathered along one axis. On a line where source k lies at k * spread, with zeros elsewhere,
// destination j has tap i at j * step + first + i. Forward has spread 1, its transpose step 1.
template <typename real>
struct Line {
  int64_t sources, length;  // numbers of sources and of destinations
  int64_t step, spread, first;
  int64_t near, far;  // the taps that interpolation weighs by 1 - fraction and fraction
  real fraction;
  int64_t span;  // the derivative, in the transpose, is (tap 0 - tap span) / span

  Line(const Axis& a, real shift, bool quantize, bool transpose) {
    const Taps<real> tap = taps(shift, reach(a), quantize);
    fraction = tap.fraction;
    span = fraction == 0 ? 2 : 1;  // 2 at the kink: the mean of the one-sided derivatives, 0 - 1 and 1 - 2
    near = transpose;
    far = !transpose;
    if (transpose) {
      sources = a.out_length, length = a.length, step = 1, spread = a.stride, first = a.padding - tap.base - 1;
    } else {
      sources = a.length, length = a.out_length, step = a.stride, spread = 1, first = tap.base - a.padding;
    }
  }

  // In a line of scratch tap i of destination j is at j + i * gap().
  int64_t gap() const { return step == 1 ? 1 : length; }
  int64_t size() const { return step == 1 ? length + 2 : 2 * length; }

  // What to copy into a line of zeros; a run may be empty.
  std::array<Run, 2> runs() const {
    std::array<Run, 2> runs{};
    if (step == 1) {
      const int64_t begin = std::max<int64_t>(0, floor_div(first + spread - 1, spread));
      const int64_t end = std::min(sources, floor_div(first + size() - 1, spread) + 1);
      if (begin < end) runs[0] = {begin, 1, begin * spread - first, spread, end - begin};
      return runs;
    }
    for (int64_t tap = 0; tap < (fraction == 0 ? 1 : 2); ++tap) {
      const int64_t begin = std::max<int64_t>(0, floor_div(step - 1 - first - tap, step));
      const int64_t end = std::min(length, floor_div(sources - 1 - first - tap, step) + 1);
      if (begin < end) runs[tap] = {begin * step + first + tap, step, tap * length + begin, 1, end - begin};
    }
    return runs;
  }

  // The source at a tap of destination j; -1 where there is none.
  int64_t source(int64_t j, int64_t tap) const {
    const int64_t at = j * step + first + tap;
    return at >= 0 && at % spread == 0 && at / spread < sources ? at / spread : -1;
  }
};

template <typename real>
struct Lines {
  Line<real> t, h, w;
};

// Per channel, the shifts of T, H and W.
template <typename real>
using Shifts = std::vector<std::array<real, 3>>;

template <typename real>
Shifts<real> read_shifts(const Problem& p, const Tensor& shift) {
  const real* data = static_cast<const real*>(shift.const_data_ptr());
  const int64_t absent = p.temporal ? 0 : 1;  // rows: that of T stays zero
  Shifts<real> shifts(p.c);
  for (int64_t c = 0; c < p.c; ++c) {
    for (int64_t axis = absent; axis < 3; ++axis) {
      const real value = data[(axis - absent) * shift.stride(0) + c * shift.stride(1)];
      STD_TORCH_CHECK(std::isfinite(value),
                      "shift holds NaN or infinity; check the learning rate of the shift parameters");
      shifts[c][axis] = value;
    }
  }
  return shifts;
}

// ---- The walk

template <typename T>
struct Volume {
  T* data;
  int64_t n, t, c, h, w;  // strides
};

template <typename T>
Volume<const T> read(const Tensor& x) {
  return {static_cast<const T*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.stride(4)};
}

template <typename T>
Volume<T> write(const Tensor& x) {
  return {static_cast<T*>(x.mutable_data_ptr()), x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.stride(4)};
}

// What a thread works in: a few planes.
template <typename real, bool derive>
struct Scratch {
  int64_t line, rows, plane;  // sizes
  std::vector<real> memory;
  real* source_row;
  real *interpolated, *derived;        // rows after W, a line of them along H
  std::array<Planes<real>, 3> frames;  // of the last sources along T
  Planes<real> none;                   // of a source that does not exist
  real *x, *grad_x;

  Scratch(const Line<real>& h, const Line<real>& w)
      : line(w.size()), rows(h.size() * w.length), plane(h.length * w.length),
        memory(line + (derive ? 2 * rows + 12 * plane : rows + 4 * plane)) {
    real* end = memory.data();
    const auto take = [&](int64_t size, bool needed) { return needed ? std::exchange(end, end + size) : nullptr; };
    source_row = take(line, true);
    interpolated = take(rows, true);
    derived = take(rows, derive);
    for (auto& f : frames) f = {take(plane, true), take(plane, derive), take(plane, derive)};
    real* zeros = take(plane, true);
    none = {zeros, zeros, zeros};
    x = take(plane, derive);
    grad_x = take(plane, derive);
  }
};

// Gathers one channel of one clip into `out`, unless that has no data. With `derive` also adds to `sums` those of x
// times the derivatives along T, H and W.
template <bool derive, typename T, typename real>
void walk(const Lines<real>& lines, const Volume<const T>& source, const Volume<T>& out, const Volume<const T>& x,
          Scratch<real, derive>& scratch, double* sums) {
  const Line<real>&t = lines.t, &h = lines.h, &w = lines.w;
  const auto h_runs = h.runs(), w_runs = w.runs();
  const int64_t plane = scratch.plane;
  real *const row = scratch.source_row, *const interpolated = scratch.interpolated, *const derived = scratch.derived;
  // Frames write the same places, so that zeros around these stay.
  std::fill_n(row, scratch.line, real(0));
  std::fill_n(interpolated, scratch.rows, real(0));
  if (derive) std::fill_n(derived, scratch.rows, real(0));

  const auto fill = [&](const Planes<real>& planes, const T* frame) {
    for (const Run& hr : h_runs) {
      for (int64_t i = 0; i < hr.count; ++i) {
        const T* in = frame + (hr.source + i * hr.source_step) * source.h;
        for (const Run& wr : w_runs) {
          if (!wr.count) continue;
          copy(row + wr.place, wr.place_step, in + wr.source * source.w, wr.source_step * source.w, wr.count);
        }
        const int64_t place = (hr.place + i * hr.place_step) * w.length;
        interpolate(interpolated + place, row + w.near * w.gap(), row + w.far * w.gap(), w.fraction, w.length);
        if (derive) subtract(derived + place, row, row + w.span, w.length);
      }
    }
    const int64_t near = h.near * h.gap() * w.length, far = h.far * h.gap() * w.length;
    interpolate(planes.plain, interpolated + near, interpolated + far, h.fraction, plane);
    if (derive) {
      subtract(planes.along_h, interpolated, interpolated + h.span * w.length, plane);
      interpolate(planes.along_w, derived + near, derived + far, h.fraction, plane);
    }
  };

  std::array<int64_t, 3> held{-1, -1, -1};  // the sources that scratch.frames are of
  const auto frame = [&](int64_t j, int64_t tap) -> const Planes<real>& {
    const int64_t k = t.source(j, tap);
    if (k < 0) return scratch.none;
    const int64_t slot = k % 3;  // the taps of one destination reach over at most three
    if (held[slot] != k) fill(scratch.frames[slot], source.data + k * source.t);
    held[slot] = k;
    return scratch.frames[slot];
  };

  for (int64_t j = 0; j < t.length; ++j) {
    const Planes<real>& near = frame(j, t.near);
    const Planes<real>& far = t.fraction == 0 ? scratch.none : frame(j, t.far);
    T* const result = out.data ? out.data + j * out.t : nullptr;
    if constexpr (!derive) {
      interpolate(result, near.plain, far.plain, t.fraction, plane);
    } else {
      const T* x_frame = x.data + j * x.t;
      const real* x_plane = scratch.x;
      real* grad_x = scratch.grad_x;
      bool dense = false;
      if constexpr (std::is_same_v<T, real>) {  // frames that need no conversion are used where they are
        dense = x.w == 1 && x.h == w.length;
        if (dense) x_plane = x_frame;
        if (result) grad_x = result;
      }
      for (int64_t i = 0; i < h.length && !dense; ++i) {
        copy(scratch.x + i * w.length, 1, x_frame + i * x.h, x.w, w.length);
      }
      correlate(grad_x, sums, x_plane, near, far, frame(j, 0).plain, frame(j, t.span).plain, t.fraction, plane);
      if (!std::is_same_v<T, real> && result) copy(result, 1, grad_x, 1, plane);
    }
  }
}

// Walks all channels of all clips in parallel. x and sums, 3 for each channel of each clip, are used with `derive`.
template <bool derive, typename T>
void walk_all(const Problem& p, const Shifts<Real<T>>& shifts, bool quantize, bool transpose,
              const Volume<const T>& source, const Volume<T>& out, const Volume<const T>& x, double* sums) {
  const auto lines = [&](int64_t c) -> Lines<Real<T>> {
    const auto& [t, h, w] = shifts[c];
    return {{p.t, t, quantize, transpose}, {p.h, h, quantize, transpose}, {p.w, w, quantize, transpose}};
  };
  const auto at = [](auto volume, int64_t n, int64_t c) {
    if (volume.data) volume.data += n * volume.n + c * volume.c;
    return volume;
  };
  const auto any = lines(0);
  const int64_t work = any.t.length * any.h.length * any.w.length;
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, work));
  torch::stable::parallel_for(0, p.n * p.c, grain, [&](int64_t begin, int64_t end) {
    Scratch<Real<T>, derive> scratch(any.h, any.w);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / p.c, c = item % p.c;
      walk<derive>(lines(c), at(source, n, c), at(out, n, c), at(x, n, c), scratch,
                   derive ? sums + 3 * item : nullptr);
    }
  });
}

// ---- The operators

// Calls f with a zero of the dtype.
template <typename F>
void dispatch(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Double: return f(0.0);
    case ScalarType::Float: return f(0.0f);
    case ScalarType::Half: return f(torch::headeronly::Half(0));
    default: return f(torch::headeronly::BFloat16(0));  // problem() refuses all others
  }
}

Tensor forward(const Tensor& x, const Tensor& shift, std::vector<int64_t> stride, std::vector<int64_t> padding,
               bool quantize) {
  const Problem p = problem(x, shift, stride, padding, quantize);
  Tensor out = empty_volume(x, p.t.out_length, p.h.out_length, p.w.out_length);
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto shifts = read_shifts<Real<T>>(p, shift);
    walk_all<false, T>(p, shifts, quantize, false, read<T>(x), write<T>(out), {}, nullptr);
  });
  return out;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& shift,
                                    std::vector<int64_t> stride, std::vector<int64_t> padding, bool quantize,
                                    bool need_x, bool need_shift) {
  const Problem p = problem(x, shift, stride, padding, quantize);
  check_grad(p, grad, x);
  const int64_t rows = p.temporal ? 3 : 2;
  Tensor grad_x = need_x ? empty_volume(x, p.t.length, p.h.length, p.w.length) : torch::stable::new_empty(x, {0});
  Tensor grad_shift = need_shift ? torch::stable::new_empty(shift, {rows, p.c}) : torch::stable::new_empty(shift, {0});
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using real = Real<T>;
    const auto shifts = read_shifts<real>(p, shift);
    // With quantize the gradient of the shift is still that of the interpolation, so that of x takes its own walk.
    const bool together = need_x && need_shift && !quantize;
    if (need_x && !together) {
      walk_all<false, T>(p, shifts, quantize, true, read<T>(grad), write<T>(grad_x), {}, nullptr);
    }
    if (!need_shift) return;
    std::vector<double> sums(p.n * p.c * 3);
    walk_all<true, T>(p, shifts, false, true, read<T>(grad), together ? write<T>(grad_x) : Volume<T>{}, read<T>(x),
                      sums.data());
    real* result = static_cast<real*>(grad_shift.mutable_data_ptr());
    const std::array<Axis, 3> axes{p.t, p.h, p.w};
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t axis = row + 3 - rows;
      for (int64_t c = 0; c < p.c; ++c) {
        double sum = 0;  // in a fixed order: the same bits for any number of threads
        for (int64_t n = 0; n < p.n; ++n) sum += sums[3 * (n * p.c + c) + axis];
        result[row * p.c + c] = static_cast<real>(sum / Line<real>(axes[axis], shifts[c][axis], false, true).span);
      }
    }
  });
  return {grad_x, grad_shift};
}

}  // namespace
}  // namespace rubiks

STABLE_TORCH_LIBRARY_IMPL(rubiks, CPU, m) {
  m.impl("shift", TORCH_BOX(&rubiks::forward));
  m.impl("shift_backward", TORCH_BOX(&rubiks::backward));
}
