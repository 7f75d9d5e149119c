// The shift on the CPU.
//
// One walk serves forward and backward. It gathers a channel of a clip: each destination element is a weighted sum of
// two neighbouring taps of the source along W, H and T. Every source frame is interpolated along W and H once, into
// planes that stay in the cache, and these are combined along T straight into the result. Forward gathers from x. The
// gradient of x is a gather from the upstream gradient with mirrored taps, and the gradient of the shift is the sum of
// x times that gather with the interpolation of one axis replaced by its derivative.

#include "shift/cpu_rows.h"

#include "shift/cpu_lines.h"
#include "shift/shift.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <type_traits>
#include <utility>

namespace rubiks {
namespace {

template <typename T>
using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;  // arithmetic on T is done in this

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
    interpolate(planes.interpolated, interpolated + near, interpolated + far, h.fraction, plane);
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
      interpolate(result, near.interpolated, far.interpolated, t.fraction, plane);
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
      correlate(grad_x, sums, x_plane, near, far, frame(j, 0).interpolated, frame(j, t.span).interpolated, t.fraction,
                plane);
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
