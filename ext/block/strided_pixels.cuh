// Every stride-th row and column of the pixels of each frame, as a strided convolution reads them.
#pragma once

#include "block/geometry.h"
#include "block/pixels.cuh"

namespace rubiks {
namespace {

struct StridedPixels {
  int height, width, strided_height, strided_width, stride;
  unsigned pixels, strided_pixels;  // of a channel

  StridedPixels(const char* op, const Geometry& all, int64_t stride) : stride(static_cast<int>(stride)) {
    const Geometry strided = all.strided(op, stride);
    const int64_t frames = std::max<int64_t>(all.frames, 1), count = all.columns() / frames;
    STD_TORCH_CHECK(count < (int64_t{1} << 31) - 1024, op, ": too large, it has ", count, " pixels in each channel");
    height = static_cast<int>(all.height), width = static_cast<int>(all.width);
    strided_height = static_cast<int>(strided.height), strided_width = static_cast<int>(strided.width);
    pixels = static_cast<unsigned>(count), strided_pixels = static_cast<unsigned>(strided.columns() / frames);
  }

  __device__ bool is_strided(const PixelPlace& at) const { return at.row % stride == 0 && at.column % stride == 0; }

  // Which of the strided pixels of a channel a pixel is.
  __device__ unsigned to_strided(const PixelPlace& at) const {
    return (at.clip * strided_height + at.row / stride) * strided_width + at.column / stride;
  }

  // Which pixel of a channel a strided one is, given by its place among the strided ones.
  __device__ unsigned from_strided(const PixelPlace& at) const {
    return (at.clip * height + at.row * stride) * width + at.column * stride;
  }
};

}  // namespace
}  // namespace rubiks
