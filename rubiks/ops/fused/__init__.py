"""The operators of the fused residual block: compiled kernels, and their definition in plain PyTorch.

Activations are channel-major matrices (C, P): a row per channel, a column per pixel of every frame of every clip, in
the order N, H, W, T. The frames of a pixel are adjacent, so that a shift in time stays within a few bytes and one in
space moves whole runs of them. A 1x1 convolution is a matrix product, and batch norm scales and offsets rows. So each
operator is a product or a shift together with the norm, the ReLU, the mix of frames and the row sums that come before
or after it, and the output of a norm is never stored.

Products are computed in the type of x. All other arithmetic is in float64 for float64 x and in float32 otherwise, and
so are statistics, coefficients and the gradients of parameters. Row sums come in parts (parts, 2, C), which are still
to be added up, since each thread block of a kernel has its own.

The compiled kernels take bfloat16 on GPUs of compute capability 8.0 and up with enough shared memory, and clips of 8 or
16 frames. Everything else runs in PyTorch.
"""

from rubiks.ops.fused.conv1x1 import (
    Activation,
    pointwise,
    pointwise_grad,
    pointwise_weight_grad,
    strided_columns,
)
from rubiks.ops.fused.kernels import FRAMES, available, compiled
from rubiks.ops.fused.mix import mix_frames, norm_mix_backward
from rubiks.ops.fused.norm import (
    RunningStatistics,
    norm_coefficients,
    norm_gradients,
    norm_input_grad,
    row_sums,
)
from rubiks.ops.fused.shift import norm_shift, norm_shift_backward
from rubiks.ops.fused.squeeze_excite import Gate, excite, excite_, excite_backward
from rubiks.ops.fused.stem import stem_columns, stem_matrix, stem_weight_grad

__all__ = [
    "FRAMES",
    "Activation",
    "Gate",
    "RunningStatistics",
    "available",
    "compiled",
    "excite",
    "excite_",
    "excite_backward",
    "mix_frames",
    "norm_coefficients",
    "norm_gradients",
    "norm_input_grad",
    "norm_mix_backward",
    "norm_shift",
    "norm_shift_backward",
    "pointwise",
    "pointwise_grad",
    "pointwise_weight_grad",
    "row_sums",
    "stem_columns",
    "stem_matrix",
    "stem_weight_grad",
    "strided_columns",
]
