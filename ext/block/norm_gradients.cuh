// The gradients of a batch norm's parameters, and the coefficients with which the gradient of its input is made, for
// the kernels that add up the sums.
#pragma once

#include <cuda_runtime.h>

namespace rubiks {

struct NormGradients {
  double count;                         // of the columns that the sums are over
  const float* stats;                   // (4, C)
  float *mix, *grad_weight, *grad_beta;  // (3, C), (C), (C): the gradient of x is mix[0] * g + mix[1] * x + mix[2]

  // From the sums of g and of g * x of one channel.
  __device__ void write(double sum, double product, int c, int channel) const {
    const double mean = stats[channel], rstd = stats[c + channel], scale = stats[2 * c + channel];
    const double weight = rstd * (product - mean * sum), slope = -scale * rstd * weight / count;
    mix[channel] = scale;
    mix[c + channel] = slope;
    mix[2 * c + channel] = -scale * sum / count - mean * slope;
    grad_weight[channel] = weight;
    grad_beta[channel] = sum;
  }
};

}  // namespace rubiks
