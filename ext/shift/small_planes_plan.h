// Whether the kernel for small planes takes a shift, and how it divides the work.
#pragma once

#include "common/launch.h"
#include "shift/small_planes.cuh"

#include <algorithm>
#include <cstring>

namespace rubiks {
namespace {

// The pack of planes that a warp makes; no planes where shift_kernel has to be used.
Pack plan_pack(const Arguments& a, bool backward, int size) {
  Pack p = {};
  for (const Line* l : {&a.t, &a.h, &a.w}) {
    if (l->source != l->result || l->stride > 1 || l->dilation > 1) return p;
  }
  const int64_t t = a.t.source, plane = int64_t{a.h.source} * a.w.source;
  p.lanes = static_cast<int>(std::min<int64_t>(ceil_div(a.h.source, kTall) * (a.w.source / kWide), 33));
  const Strides& s = a.source.strides;
  const auto suits = [&](const void* data, const Strides& v) {  // laid out as the source, in whole units
    return std::memcmp(&v, &s, sizeof(Strides)) == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  };
  if (size > 4 || a.w.source % kWide || p.lanes > 32 || s.w != 1 || s.h != a.w.source) return p;
  if (!suits(a.source.data, s) || (a.x.data && !suits(a.x.data, a.x.strides))) return p;
  if (a.result && !suits(a.result, a.result_strides)) return p;
  p.clips = s.t == plane && s.n == t * plane;
  if (!p.clips && s.c != plane) return p;
  const int64_t others = p.clips ? s.c : (s.t | s.n), piece = (p.clips ? t : 1) * plane * size;
  const int items = p.clips ? a.n : a.c, rest = p.clips ? a.c : a.n;
  int planes = 32 / p.lanes;
  while (planes && (items % planes || planes * piece % 16)) --planes;
  if (others * size % 16 || planes * p.lanes < 16 || rest > 65535) return p;
  p.runs = p.clips ? 1 : a.t.source;
  const int64_t head = p.clips ? ceil_div((t - 1) * plane * size + kZeros, 16) * 16 : kZeros;
  const int64_t bytes = head + planes * piece;
  if (bytes * (p.clips ? 1 : t) * (backward && a.need_shift ? 2 : 1) + kZeros > kSharedBytes) return p;
  p.run_bytes = static_cast<int>(planes * piece), p.data = static_cast<int>(head);
  p.plane = static_cast<int>(piece), p.frame = static_cast<int>(p.clips ? plane * size : bytes);
  p.bytes = static_cast<int>(bytes * (p.clips ? 1 : t));
  p.planes = planes;
  return p;
}

}  // namespace
}  // namespace rubiks
