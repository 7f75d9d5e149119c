// The learnable shift: what its CPU and CUDA kernels share. rubiks/ops/reference.py is the definition in PyTorch.
#pragma once

#include "common/tensors.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

#ifdef __CUDACC__
#define RUBIKS_HOST_DEVICE __host__ __device__
#else
#define RUBIKS_HOST_DEVICE
#endif

namespace rubiks {

// One axis of the volume: lengths of x and of the output along it, and where output j reads: j * stride - padding.
struct Axis {
  int64_t length, out_length, stride, padding;
};

struct Problem {
  int64_t n, c;
  Axis t, h, w;
  bool temporal;  // shift has rows T, H, W; otherwise H, W, and time is not shifted
  bool quantize;
};

// Checks the arguments. x (N, T, C, H, W) in any layout; shift (3, C) or (2, C), float64 for float64 x, else float32.
Problem problem(const Tensor& x, const Tensor& shift, const std::vector<int64_t>& stride,
                const std::vector<int64_t>& padding, bool quantize);

// Checks the upstream gradient: shape of the output, dtype and device of x.
void check_grad(const Problem& p, const Tensor& grad, const Tensor& x);

// New tensor (N, t, C, h, w) with x's dtype and device: channel-major, (C, N, T, H, W) in memory, if x is; otherwise
// contiguous. rubiks/ops/operator.py has the same rule for fake tensors.
Tensor empty_volume(const Tensor& x, int64_t t, int64_t h, int64_t w);

// The two taps that a shift reads along one axis: base and base + 1, weighted 1 - fraction and fraction.
template <typename real>
struct Taps {
  int64_t base;
  real fraction;
};

// Past +-reach every tap lies outside the volume: there the base is +-reach, which also holds for NaN and infinity.
template <typename real>
RUBIKS_HOST_DEVICE inline Taps<real> taps(real shift, int64_t reach, bool quantize) {
  if (!(shift > -static_cast<real>(reach))) return {-reach, 0};  // NaN too
  if (!(shift < static_cast<real>(reach))) return {reach, 0};
  const real base = floor(quantize ? shift + static_cast<real>(0.5) : shift);
  return {static_cast<int64_t>(base), quantize ? static_cast<real>(0) : shift - base};
}

// A distance past which no tap of any output is inside.
RUBIKS_HOST_DEVICE inline int64_t reach(const Axis& a) { return a.length + 2 * a.padding + 3; }

}  // namespace rubiks
