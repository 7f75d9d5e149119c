"""Inference on a GPU: batch norms folded, or computed on the way, and a CUDA graph for every shape of input."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from rubiks.models.backbone import Backbone
from rubiks.models.block_plan import BlockPlan, norm_affine, read_plans, running_statistics
from rubiks.models.clips import as_clips
from rubiks.models.cuda_graphs import InferenceGraphs
from rubiks.models.geometry import Geometry
from rubiks.nn.shift import shift_clips
from rubiks.ops import library
from rubiks.ops.fused import (
    FRAMES,
    Activation,
    available,
    excite,
    mix_frames,
    pointwise,
    stem_columns,
    stem_matrix,
    strided_columns,
)


class Block(nn.Module):
    """A residual block on matrices (C, P): its first norm is computed on the way, the second folded.

    Args:
        plan: of the block.
        dtype: of matrices. What norms need stays in the type of arithmetic.
    """

    scale: Tensor
    bias: Tensor
    attention: Tensor | None
    conv2: Tensor
    conv2_bias: Tensor
    shift: Tensor
    se_reduce: Tensor | None
    se_expand: Tensor | None
    conv3: Tensor
    shortcut: Tensor | None

    def __init__(self, plan: BlockPlan, dtype: torch.dtype) -> None:
        super().__init__()
        exact = torch.promote_types(dtype, torch.float32)
        folded, temporal = plan.fold(), plan.attention
        self.stride, self.quantize = plan.shift.stride, plan.shift.quantize
        for name, value, kind in (
            ("scale", folded.scale, exact),
            ("bias", folded.bias, exact),
            ("attention", None if temporal is None or temporal.still else folded.attention, exact),
            ("conv2", folded.conv2, dtype),
            ("conv2_bias", folded.conv2_bias, exact),
            ("shift", folded.shift, folded.shift.dtype),
            ("se_reduce", folded.se_reduce, exact),
            ("se_expand", folded.se_expand, exact),
            ("conv3", folded.conv3, dtype),
            ("shortcut", folded.shortcut, dtype),
        ):
            self.register_buffer(name, None if value is None else value.to(kind))

    def forward(self, x: Tensor, geometry: Geometry, frames: int) -> tuple[Tensor, Geometry]:
        """(C_in, P) -> (C_out, P').

        A clip has `frames` frames. They are adjacent in the geometry, or the geometry has each frame as a clip of one.
        """
        if self.attention is None or geometry.frames in FRAMES:
            before = Activation(self.scale, self.bias, self.attention, frames)
            h, _ = pointwise(x, self.conv2, before, offset=self.conv2_bias, relu=True, early=True)
        else:
            a = torch.addcmul(self.bias[:, None], x, self.scale[:, None]).relu_()
            m = mix_frames(_by_frame(a, geometry, frames), self.attention.t()[..., None, None])
            mixed = m.movedim(2, 0).reshape(x.shape).to(x.dtype)
            h, _ = pointwise(mixed, self.conv2, offset=self.conv2_bias, relu=True)
        z, strided = self._shift(h, geometry, frames), geometry.strided(self.stride)
        if self.se_reduce is not None and self.se_expand is not None:
            z, _ = excite(z, self.se_reduce, self.se_expand, strided)
        if self.shortcut is not None:
            before = Activation(self.scale, self.bias)
            x, _ = pointwise(strided_columns(x, geometry, self.stride), self.shortcut, before, early=True)
        y, _ = pointwise(z, self.conv3, residual=x, early=True)
        return y, strided

    def _shift(self, x: Tensor, geometry: Geometry, frames: int) -> Tensor:
        """(C, P) -> (C, P')."""
        if geometry.frames not in FRAMES:
            shifted = shift_clips(_by_frame(x, geometry, frames), self.shift, self.stride, self.quantize)
            return shifted.movedim(2, 0).flatten(1)  # it stays channel-major
        offsets = self.shift.float()
        if self.quantize:
            offsets = (offsets + 0.5).floor()
        return torch.ops.rubiks.clip_shift(x, None, None, offsets, geometry, self.stride)


def _by_frame(x: Tensor, geometry: Geometry, frames: int) -> Tensor:
    """(C, P), where each frame is a clip of one -> view (N, T, C, H, W)."""
    return x.view(len(x), -1, frames, geometry.height, geometry.width).movedim(0, 2)


class CudaInferenceNet(nn.Module):
    """The logits of a network in evaluation mode, computed faster.

    It has its own weights, so further training of the network does not change it. It has no gradient, and batch norm
    uses the running statistics whatever the mode. The first call with a shape of input records a CUDA graph, which
    later calls replay; the graphs of the last few shapes are kept, with the memory that they need. It can be moved
    between devices, but not to another type.

    Args:
        backbone, classifier: of the network, whose weights are copied.
        dtype: of activations and matrices; the kernels are for bfloat16.
    """

    stem: Tensor
    scale: Tensor
    bias: Tensor

    @torch.no_grad()
    def __init__(self, backbone: Backbone, classifier: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        exact = torch.promote_types(dtype, torch.float32)
        self.dtype = dtype
        self.register_buffer("stem", stem_matrix(backbone.conv1.weight).to(dtype))
        self.blocks = nn.ModuleList(Block(plan, dtype) for plan in read_plans(backbone.blocks()))
        last = backbone.bn_last
        scale, bias = norm_affine(last.weight, last.bias, running_statistics(last))
        self.register_buffer("scale", scale[:, None].to(exact))
        self.register_buffer("bias", bias[:, None].to(exact))
        self.fc = copy.deepcopy(classifier).double()
        self.graphs = InferenceGraphs()
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def forward(self, clips: Tensor) -> Tensor:
        """(N, T, 3, H, W), or the official (N, T*3, H, W); any T, H and W -> logits (N, num_classes)."""
        clips = as_clips(clips)
        if not len(clips):
            return clips.new_empty(0, self.fc.out_features, dtype=self.dtype)
        if self.stem.dtype != self.dtype:
            raise TypeError(f"this network computes in {self.dtype}; call optimize_for_inference for another type")
        with torch.autocast(clips.device.type, enabled=False):
            # The shift in plain PyTorch reads its offsets on the CPU, which cannot be recorded.
            recordable = clips.is_cuda and library.load().compiled("CUDA")
            if not recordable or torch.cuda.is_current_stream_capturing():
                return self._classify(clips)
            return self.graphs(self._classify, clips)

    def _classify(self, clips: Tensor) -> Tensor:
        batch, frames, _, height, width = clips.shape
        # The kernels are for adjacent frames; where they do not run, the shift is faster on whole frames.
        together = self.dtype == torch.bfloat16 and frames in FRAMES and available(clips.device)
        layout = (batch, frames) if together else (batch * frames, 1)
        geometry = Geometry(*layout, -(-height // 2), -(-width // 2))
        x, _ = pointwise(stem_columns(clips.flatten(0, 1), geometry.frames, self.dtype), self.stem, early=True)
        for block in self.blocks:
            x, geometry = block(x, geometry, frames)
        # In float64, so that the order of the sums, which depends on the size of the batch, cannot be seen.
        activations = torch.addcmul(self.bias, x, self.scale).relu_().view(len(x), batch, -1)
        return self.fc(activations.mean(2, dtype=torch.float64).t()).to(self.scale.dtype)

    # Graphs read the weights at the addresses where they were recorded.

    def _apply(self, fn, recurse=True):
        self.graphs.forget()
        return super()._apply(fn, recurse)

    def load_state_dict(self, *args, **kwargs):
        self.graphs.forget()
        return super().load_state_dict(*args, **kwargs)
