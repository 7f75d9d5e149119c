"""RubiksNet for inference on a GPU: batch norms folded or computed on the way, and a CUDA graph for every shape."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rubiks.models.clips import as_clips
from rubiks.models.features import stem_matrix
from rubiks.models.inference import affine, exact_weight
from rubiks.nn import ChannelShift, RubiksBlock
from rubiks.nn.fused import Geometry
from rubiks.nn.recording import capture
from rubiks.ops import library
from rubiks.ops.fused import FRAMES, available, every, mix_frames, pointwise, stem_columns

if TYPE_CHECKING:
    from rubiks.models.rubiksnet import RubiksNet

GRAPHS = 4  # shapes of input whose graphs are kept


class Block(nn.Module):
    """A residual block on matrices (C, P): its first norm is computed on the way, the second folded.

    Args:
        block: whose weights to take.
        dtype: of matrices. What norms need stays in the type of arithmetic.
    """

    scale: Tensor
    bias: Tensor
    attention: Tensor | None
    conv2: Tensor
    offset: Tensor
    conv3: Tensor
    shortcut: Tensor | None

    def __init__(self, block: RubiksBlock, dtype: torch.dtype) -> None:
        super().__init__()
        exact = torch.promote_types(dtype, torch.float32)
        scale1, bias1 = affine(block.bn1)
        scale2, bias2 = affine(block.bn2)
        temporal = block.attention
        attention = None if temporal is None or temporal.still else temporal.attention().to(exact)
        shortcut = None if block.shortcut is None else exact_weight(block.shortcut).to(dtype)
        for name, value in (
            ("scale", scale1.to(exact)),
            ("bias", bias1.to(exact)),
            ("attention", attention),
            ("conv2", (scale2[:, None] * exact_weight(block.first_convolution)).to(dtype)),
            ("offset", bias2.to(exact)),
            ("conv3", exact_weight(block.conv3).to(dtype)),
            ("shortcut", shortcut),
        ):
            self.register_buffer(name, value)
        self.shift = copy.deepcopy(block.shift)
        self.se = None if block.se is None else copy.deepcopy(block.se).to(dtype)

    def forward(self, x: Tensor, geometry: Geometry, frames: int) -> tuple[Tensor, Geometry]:
        """(C_in, P) -> (C_out, P'). A clip has `frames`, which adjoin in the geometry or count as clips of one."""
        stride = self.shift.stride
        if self.attention is None or geometry.frames in FRAMES:
            norm = self.scale, self.bias, self.attention, frames
            h, _ = pointwise(x, self.conv2, *norm, offset=self.offset, relu=True, early=True)
        else:
            a = torch.addcmul(self.bias[:, None], x, self.scale[:, None]).relu_()
            m = mix_frames(by_frame(a, geometry, frames), self.attention.t()[..., None, None])
            h, _ = pointwise(m.movedim(2, 0).reshape(x.shape).to(x.dtype), self.conv2, offset=self.offset, relu=True)
        z = move(h, self.shift, geometry, frames)
        if self.se is not None:
            volume = geometry.strided(stride).volume(z)
            volume *= self.se.fc(volume.mean((3, 4)))[..., None, None]
        if self.shortcut is not None:
            x, _ = pointwise(every(x, geometry, stride), self.shortcut, self.scale, self.bias, early=True)
        y, _ = pointwise(z, self.conv3, residual=x, early=True)
        return y, geometry.strided(stride)


def by_frame(x: Tensor, geometry: Geometry, frames: int) -> Tensor:
    """(C, P), where each frame counts as a clip -> view (N, T, C, H, W)."""
    return x.view(len(x), -1, frames, geometry.height, geometry.width).movedim(0, 2)


def move(x: Tensor, shift: ChannelShift, geometry: Geometry, frames: int) -> Tensor:
    """A shift of matrices, (C, P) -> (C, P'); arguments as `Block.forward` has them."""
    if geometry.frames not in FRAMES:
        return shift(by_frame(x, geometry, frames)).movedim(2, 0).flatten(1)  # it stays channel-major
    offsets = shift.offsets().float()
    if shift.quantize:
        offsets = (offsets + 0.5).floor()
    return torch.ops.rubiks.clip_shift(x, None, None, offsets, geometry, shift.stride)


class CudaInferenceNet(nn.Module):
    """The logits of a network in evaluation mode, computed faster.

    It holds its own weights, so the network can be trained further without changing it. It has no gradient, and batch
    norm uses the running statistics whatever the mode. The first call with a shape of input records a CUDA graph, which
    later ones replay; the graphs of the last few shapes are kept, with the memory that they need. It can be moved
    between devices, not to another type.

    Args:
        net: whose weights to take.
        dtype: of activations and matrices; the kernels are for bfloat16.
    """

    stem: Tensor
    scale: Tensor
    bias: Tensor

    @torch.no_grad()
    def __init__(self, net: RubiksNet, dtype: torch.dtype) -> None:
        super().__init__()
        exact = torch.promote_types(dtype, torch.float32)
        self.dtype = dtype
        self.register_buffer("stem", stem_matrix(net.backbone.conv1.weight).to(dtype))
        blocks = [block for layer in net.backbone.layers() for block in layer]
        self.blocks = nn.ModuleList(Block(block, dtype) for block in blocks if isinstance(block, RubiksBlock))
        scale, bias = affine(net.backbone.bn_last)
        self.register_buffer("scale", scale[:, None].to(exact))
        self.register_buffer("bias", bias[:, None].to(exact))
        self.fc = copy.deepcopy(net.new_fc).to(exact)
        self.requires_grad_(False)
        self.eval()
        self._forget_graphs()

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
            with self._lock:  # a graph's input and result are always the same memory
                return self._replay(clips)

    def _replay(self, clips: Tensor) -> Tensor:
        stream = torch.cuda.current_stream(clips.device).cuda_stream
        key = (clips.shape, clips.dtype, clips.device, stream)
        if key not in self._graphs:
            self._graphs[key] = self._record(clips)
            if len(self._graphs) > GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        graph, source, logits = self._graphs[key]
        source.copy_(clips)
        graph.replay()
        return logits.clone()

    def _record(self, clips: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        # In inference mode, tensors would be made that cannot be written outside of it.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(clips.device):
            source = clips.contiguous().clone()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._classify(source)  # what is prepared at first use must not be recorded
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with capture(graph, torch.cuda.Stream()):
                logits = self._classify(source)
        return graph, source, logits

    def _classify(self, clips: Tensor) -> Tensor:
        batch, frames, _, height, width = clips.shape
        # The kernels are for frames that adjoin; where they do not serve, the shift is faster on whole frames.
        together = self.dtype == torch.bfloat16 and frames in FRAMES and available(clips.device)
        layout = (batch, frames) if together else (batch * frames, 1)
        geometry = Geometry(*layout, -(-height // 2), -(-width // 2))
        x, _ = pointwise(stem_columns(clips.flatten(0, 1), geometry.frames, self.dtype), self.stem, early=True)
        for block in self.blocks:
            x, geometry = block(x, geometry, frames)
        features = torch.addcmul(self.bias, x, self.scale).relu_().view(len(x), batch, -1).mean(2)
        return self.fc(features.t()).to(self.dtype)

    # Graphs read the weights where these were when they were recorded, and belong to their process.

    def _forget_graphs(self) -> None:
        self._graphs: OrderedDict[tuple, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    def _apply(self, fn, recurse=True):
        self._forget_graphs()
        return super()._apply(fn, recurse)

    def load_state_dict(self, *args, **kwargs):
        self._forget_graphs()
        return super().load_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_graphs", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_graphs()
