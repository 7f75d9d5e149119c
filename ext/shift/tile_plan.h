// How shift_kernel divides its work: the tiles of a launch.
#pragma once

#include "common/launch.h"
#include "shift/shift_kernel.cuh"

#include <algorithm>

namespace rubiks {
namespace {

int64_t window_length(const Line& a, int64_t results) {
  return std::min<int64_t>(a.source, (results - 1) * a.stride / a.dilation + 2);
}

// Copies of rows x cols elements of a volume whose planes are `width` wide.
Copy copies(const Volume& v, int64_t rows, int64_t cols, int64_t width, bool all, int64_t items, int size) {
  // A run may start anywhere in a unit of 16 bytes, but at the same distance for every clip.
  const bool planes = all && v.strides.w == 1 && v.strides.h == width && (items == 1 || v.strides.n * size % 16 == 0);
  const int64_t bytes = planes ? ceil_div(rows * width * size + 30, 16) * 16 : rows * cols * size;
  return {planes, static_cast<int>(bytes / size), 1, 0};
}

// Whether threads can make pairs of pixels and write them at once.
bool pairs(const Arguments& a) {
  const Strides &s = a.result_strides, &x = a.x.strides;
  const bool even = (s.n | s.t | s.c | s.h) % 2 == 0;
  const bool x_even = (x.n | x.t | x.c | x.h) % 2 == 0 && reinterpret_cast<uintptr_t>(a.x.data) % 4 == 0;
  return even && x_even && a.w.result % 2 == 0;
}

// The largest tiles that a block's threads, each with a patch of tall x wide pixels, and its shared memory take.
Plan plan_tiles(const Arguments& a, int size) {
  const bool strided = a.h.stride > 1 || a.w.stride > 1;
  const int wide = size == 2 && !strided && pairs(a) ? 2 : 1, tall = (strided ? 4 : 8) / wide;
  // Parts of equal size, at most `part`.
  const auto even = [](int64_t total, int64_t part) { return ceil_div(total, ceil_div(total, part)); };
  int64_t cols = std::min<int64_t>(a.w.result, kThreads * wide);
  int64_t rows = std::min<int64_t>(a.h.result, kThreads / ceil_div(cols, wide) * tall), items = a.n;
  Plan p = {};
  p.tall = tall, p.wide = wide, p.step = strided ? 2 : 1;
  for (;;) {
    cols = even(a.w.result, cols), rows = even(a.h.result, rows);
    if (cols < a.w.result) cols = ceil_div(cols, wide) * wide;
    if (rows < a.h.result && rows > tall) rows = ceil_div(rows, tall) * tall;
    const int64_t patches = ceil_div(rows, tall) * ceil_div(cols, wide);
    items = rows < a.h.result || cols < a.w.result
                ? 1
                : even(a.n, std::min(items, std::max<int64_t>(kThreads / patches, 1)));
    p.threads = static_cast<int>(ceil_div(items * patches, 32) * 32);
    const bool all = cols == a.w.result;
    p.source = copies(a.source, window_length(a.h, rows), window_length(a.w, cols), a.w.source, all, items, size);
    int64_t bytes = kHead + ceil_div(items * p.source.item_pitch * size, 16) * 16;
    if (a.need_shift) {
      p.x = copies(a.x, rows, cols, a.w.result, all, items, size);
      p.x_offset = static_cast<int>(bytes - kHead);
      bytes += ceil_div(items * p.x.item_pitch * size, 16) * 16;
    }
    if (p.threads <= kThreads && kStages * bytes + kSumBytes <= kSharedBytes) {
      p.stage_bytes = static_cast<int>(bytes);
      break;
    }
    int64_t& largest = items > 1 ? items : rows > 1 ? rows : cols;
    largest = ceil_div(largest, 2);
  }
  p.items = static_cast<int>(items), p.rows = static_cast<int>(rows), p.cols = static_cast<int>(cols);
  p.source.lanes = p.x.lanes = p.threads / p.items;
  p.row_tiles = static_cast<int>(ceil_div(a.h.result, rows));
  p.col_tiles = static_cast<int>(ceil_div(a.w.result, cols));
  // Setting up a tile costs as much as several frames of it, so a block continues with the same tile of more clips.
  const int64_t sets = ceil_div(a.n, items), blocks = sets * a.c * p.row_tiles * p.col_tiles;
  const int64_t runs = std::min(std::min<int64_t>(sets, kRuns), std::max<int64_t>(blocks / kBlocks, 1));
  p.runs = a.n % items ? 1 : static_cast<int>(runs);
  p.groups = static_cast<int>(ceil_div(sets, p.runs));
  const auto span = [&](const Volume& v, int64_t frames, int64_t elements) {
    return ((p.runs * items - 1) * v.strides.n + (frames - 1) * v.strides.t + elements) * size + 15;
  };
  p.source.span = span(a.source, a.t.source, window_length(a.h, rows) * a.w.source);
  p.x.span = span(a.x, a.t.result, rows * a.w.result);
  return p;
}

}  // namespace
}  // namespace rubiks
