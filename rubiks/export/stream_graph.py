"""A causal network, one frame at a time, in standard operators alone.

Shifts in space and in time commute, so each block shifts its frame in space first, and keeps the result for the frames
that follow. With this the first frames see zeros where there are no earlier ones, so every state begins with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rubiks.export.description import State
from rubiks.export.graph import Ends, Move, Residual, taps
from rubiks.models import RubiksNet
from rubiks.models.block_plan import BlockPlan, read_plans


class StreamBlock(Residual):
    """A residual block, for frames of one size, that reads no later frame.

    Attributes:
        keeps: shape, without batch, and meaning of each of its states.
    """

    along_w: Tensor  # (C, 1, 1, K)
    along_h: Tensor  # (C, 1, K, 1)
    along_t: Tensor  # (C, frames, 1, 1), from the oldest to this one
    back: Tensor  # (C_in, 1, 1)
    stay: Tensor  # (C_in, 1, 1)

    def __init__(self, plan: BlockPlan, height: int, width: int) -> None:
        super().__init__(plan)
        self.keeps: list[tuple[list[int], str]] = []
        if isinstance(self.temporal, Move):
            self.keeps.append(([len(self.temporal.back), height, width], "the channels that the next frame takes"))
        elif self.temporal is not None:
            back, stay, _ = self.temporal.weights[:, 0, :, :, None].unbind(1)
            self.register_buffer("back", back.clone())
            self.register_buffer("stay", stay.clone())
            self.keeps.append(([len(back), height, width], "what the attention of the next frame reads"))
        *time, h, w = plan.parameters.shift.detach()
        h, w = (taps(row, plan.shift.quantize, length) for row, length in ((h, height), (w, width)))
        self.register_buffer("along_w", w[:, None, None])
        self.register_buffer("along_h", h[:, None, :, None])
        t = taps(time[0], plan.shift.quantize, math.inf) if time else torch.ones(len(h), 1)
        t = t[:, : t.shape[1] // 2 + 1].clone()  # later frames have no weight
        self.register_buffer("along_t", t[:, :, None, None])
        if t.shape[1] > 1:
            shape = [len(t), t.shape[1] - 1, -(-height // self.stride), -(-width // self.stride)]
            self.keeps.append((shape, "earlier frames, shifted in space, from the oldest to the newest"))

    def forward(self, x: Tensor, past: Iterator[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """(N, C, H, W) and its states -> (N, C', H', W') and its next states."""
        a, kept = F.relu(self.norm(x)), []
        if self.shortcut is not None:
            x = F.conv2d(a, self.shortcut, stride=self.stride)
        if isinstance(self.temporal, Move):
            still, moved = (a.index_select(1, which) for which in (self.temporal.stay, self.temporal.back))
            kept.append(moved)
            a = torch.cat((still, next(past)), 1) if still.shape[1] else next(past)  # in the order of `Move`
        elif self.temporal is not None:
            kept.append(a)
            a = a * self.stay + next(past) * self.back
        h = F.relu(F.conv2d(a, self.conv2, self.bias2))
        for kernel, stride in ((self.along_w, (1, self.stride)), (self.along_h, (self.stride, 1))):
            padding = kernel.shape[2] // 2, kernel.shape[3] // 2
            h = F.conv2d(h, kernel, stride=stride, padding=padding, groups=len(kernel))
        if self.along_t.shape[1] > 1:
            frames = torch.cat((next(past), h.unsqueeze(2)), 2)
            kept.append(frames[:, :, 1:])
            h = (frames * self.along_t).sum(2)
        return F.conv2d(self.excite(h, 1), self.conv3) + x, kept


class StreamNet(Ends):
    """The logits of single frames by a causal network in evaluation mode, on the CPU in float32.

    Args:
        net, uint8: as in `Ends`; the network reads no later frames.
        height, width: of the frames.

    Attributes:
        states: what it keeps.
    """

    @torch.no_grad()
    def __init__(self, net: RubiksNet, height: int, width: int, uint8: bool = False) -> None:
        super().__init__(net, uint8)
        height, width = -(-height // 2), -(-width // 2)
        blocks, self.states = [], list[State]()
        for number, plan in enumerate(read_plans(net.backbone.blocks())):
            block = StreamBlock(plan, height, width)
            for shape, what in block.keeps:
                index = len(self.states)
                holds = f"block {number}: {what}"
                self.states.append(State(name=f"state_{index}", next=f"next_state_{index}", shape=shape, holds=holds))
            blocks.append(block)
            height, width = (-(-side // plan.shift.stride) for side in (height, width))
        self.blocks = nn.ModuleList(blocks)
        self.requires_grad_(False)
        self.eval()

    def forward(self, pixel_values: Tensor, *states: Tensor) -> Sequence[Tensor]:
        """(N, 3, H, W) and the states -> the frame's logits (N, classes) and the next states."""
        x, past, kept = self.stem(pixel_values), iter(states), list[Tensor]()
        for block in self.blocks:
            x, after = block(x, past)
            kept += after
        return self.classify(x), *kept
