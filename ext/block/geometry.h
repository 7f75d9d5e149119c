// What the columns of a channel-major matrix are: pixels of clips, in the order N, H, W, T.
#pragma once

#include "block/checks.h"
#include "common/launch.h"

#include <type_traits>

namespace rubiks {

struct Geometry {
  int64_t clips, frames, height, width;

  Geometry(const char* op, const Sizes& sizes) {
    STD_TORCH_CHECK(sizes.size() == 4 && std::all_of(sizes.begin(), sizes.end(), [](int64_t s) { return s >= 0; }), op,
                    ": geometry must be N, T, H, W, got ", text(sizes));
    clips = sizes[0], frames = sizes[1], height = sizes[2], width = sizes[3];
  }

  Sizes sizes() const { return {clips, frames, height, width}; }
  int64_t columns() const { return clips * frames * height * width; }

  // Of every stride-th row and column of pixels.
  Geometry strided(const char* op, int64_t stride) const {
    STD_TORCH_CHECK(stride >= 1, op, ": stride must be at least 1, got ", stride);
    Geometry result = *this;
    result.height = ceil_div(height, stride), result.width = ceil_div(width, stride);
    return result;
  }

  // Calls f with the number of frames as a constant.
  template <typename F>
  void with_frames(const char* op, const F& f) const {
    check_frames(op, frames, columns());
    frames == 8 ? f(std::integral_constant<int, 8>{}) : f(std::integral_constant<int, 16>{});
  }
};

}  // namespace rubiks
