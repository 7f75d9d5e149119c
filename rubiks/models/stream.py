"""A network frame by frame: each block keeps the earlier frames that its shifts read."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rubiks.models.backbone import Backbone
from rubiks.models.inference_cpu import Block, Grid, InferenceNet
from rubiks.nn.shift import shift_clips
from rubiks.ops import shift3d


class Past(NamedTuple):
    """What a block keeps of earlier frames.

    Attributes:
        attended: what the temporal attention reads of the previous frame, (N, C, P); None if it reads nothing.
        shifted: the frames (N, C, P) that the shift reads, from the oldest to the newest.
    """

    attended: Tensor | None
    shifted: tuple[Tensor, ...]


class StreamState(NamedTuple):
    """What a stream keeps from one frame to the next.

    Attributes:
        frames: how many frames it has seen.
        own: the logits (N, classes) of the last frame alone.
        total: the sum (N, classes) of all frames' logits, float64.
        shape: of the frames, (N, 3, H, W).
        past: of each block.
    """

    frames: int
    own: Tensor
    total: Tensor
    shape: torch.Size
    past: tuple[Past, ...]


class FrameStream(nn.Module):
    """Classify frame by frame; `RubiksNet.stream` makes it.

    After t frames the logits are those of the network in evaluation mode for the clip of these t frames. All that is
    remembered is in the state, so one stream serves any number of videos.

    Args:
        backbone, classifier: of the network, whose weights are copied.

    Raises:
        ValueError: a shift reads a later frame.
    """

    def __init__(self, backbone: Backbone, classifier: nn.Linear) -> None:
        super().__init__()
        self.net = InferenceNet(backbone, classifier)
        self.blocks = nn.ModuleList(StreamedBlock(block) for block in self.net.blocks if isinstance(block, Block))
        self.eval()

    @torch.no_grad()
    def step(self, frame: Tensor, state: StreamState | None = None) -> tuple[Tensor, StreamState]:
        """Take the next frame.

        Args:
            frame: (N, 3, H, W), the next frame of each of N videos, float RGB normalised as for the network.
            state: that the step before returned; None for the first frame.

        Returns:
            logits (N, num_classes), the mean over the frames so far, and the state for the next step.

        Raises:
            ValueError: the frame is not (N, 3, H, W), or not of the shape of the frames before.
        """
        if frame.dim() != 4 or frame.shape[1] != 3:
            raise ValueError(f"frame must be (N, 3, H, W), got {tuple(frame.shape)}")
        if state is not None and frame.shape != state.shape:
            raise ValueError(f"frame must be {tuple(state.shape)} like the frames before, got {tuple(frame.shape)}")
        past = [None] * len(self.blocks) if state is None else state.past
        kept = []
        with torch.autocast(frame.device.type, enabled=False):
            x = F.conv2d(frame, self.net.stem, stride=2, padding=1)
            grid = Grid(len(x), 1, x.shape[2], x.shape[3], single=False)
            x = x.flatten(2)
            for block, before in zip(self.blocks, past, strict=True):
                x, grid, after = block(x, grid, before)
                kept.append(after)
            own = self.net.fc(self.net.rectify(x).mean(2))
        frames, total = 1, own.double()
        if state is not None:
            frames, total = frames + state.frames, total + state.total
        return (total / frames).to(own.dtype), StreamState(frames, own, total, frame.shape, tuple(kept))

    def state_bytes(self, height: int, width: int) -> int:
        """Memory of the state of one video with frames of this size, in bytes."""
        _, state = self.step(self.net.stem.new_zeros(1, 3, height, width))
        kept = [state.own, state.total]
        for past in state.past:
            kept += past.shifted if past.attended is None else (past.attended, *past.shifted)
        return sum(tensor.nbytes for tensor in kept)


class StreamedBlock(nn.Module):
    """A block in evaluation mode, one frame at a time.

    Args:
        block: for whole clips.

    Attributes:
        depth: how many earlier frames the shift reads.
        offsets: of the shift, of which those in time count from the earliest of these frames.
    """

    offsets: Tensor

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
        offsets = (block.shift + 0.5).floor() if block.quantize else block.shift.clone()
        self.depth, ahead = 0, False
        if len(offsets) == 3:
            ahead = bool(offsets[0].max() > 0)
            self.depth = math.ceil(-offsets[0].min().item())
            offsets[0] += self.depth
        if block.attention is not None:
            ahead |= bool(block.attention[2].any())
        if block.moved is not None:
            ahead |= block.looking_back < len(block.moved)
        if ahead:
            raise ValueError(
                "the network reads later frames, so it cannot classify frame by frame: classify a sliding window of "
                "frames, or train a network with causal=true"
            )
        self.register_buffer("offsets", offsets)

    def forward(self, x: Tensor, grid: Grid, past: Past | None) -> tuple[Tensor, Grid, Past]:
        """(N, C_in, P), which is overwritten, and what was kept -> (N, C_out, P'), and what to keep."""
        block = self.block
        attended = mixed = moved = None
        if block.attention is not None:
            attended = block.rectify(x)
            back, stay, _ = block.attention.flatten(2)
            # Frames before the first count as zero, which is the threshold here.
            mixed = attended * stay + back * _previous(past, block.rectify.threshold)
        elif block.moved is not None:
            attended = block.rectify_moved(x.index_select(1, block.moved))
            moved = _previous(past, block.rectify_moved.threshold).expand_as(attended)
        h = block.convolve(x, mixed, moved)
        frames = (*((torch.zeros_like(h),) * self.depth if past is None else past.shifted), h)
        clip = torch.stack(frames, dim=1).unflatten(3, (grid.height, grid.width))
        if len(self.offsets) == 3:  # with this stride in time it is computed for the last frame only
            z = shift3d(clip, self.offsets, stride=(len(frames), block.stride, block.stride))
        else:
            z = shift_clips(clip, self.offsets, block.stride, quantize=False)
        y, grid = block.finish(x, z, grid)
        return y, grid, Past(attended, frames[1:])


def _previous(past: Past | None, zero: Tensor) -> Tensor:
    """What the temporal attention reads of the previous frame."""
    return zero if past is None or past.attended is None else past.attended
