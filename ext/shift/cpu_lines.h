// The taps of one axis on the CPU: which sources a line of destinations reads.
#pragma once

#include "shift/shift.h"

#include <algorithm>
#include <array>

namespace rubiks {
namespace {

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

}  // namespace
}  // namespace rubiks
