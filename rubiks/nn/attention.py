"""The temporal attention shift of the AQ variant, soft and hard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from rubiks.ops.fused import mix_frames


def attention(logits: Tensor, temperature: Tensor) -> Tensor:
    """Weights (C, 3) of the previous, the same and the next frame from logits (C, 3); each row sums to 1.

    `temperature` is a scalar or (C, 1). At 0, the limit, the largest logit has weight 1 and the logits no gradient.
    """
    hard = temperature == 0
    soft = torch.softmax(_standardized(logits) / torch.where(hard, 1.0, temperature), dim=1)
    one_hot = torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    return torch.where(hard, one_hot, soft)


def _standardized(logits: Tensor) -> Tensor:
    return logits / (logits.std(dim=1, keepdim=True) + 1e-6)


def move_frames(x: Tensor, back: Tensor, ahead: Tensor) -> Tensor:
    """Shift some channels of x (N, T, C, H, W) by one frame; frames outside the clip are zero.

    Args:
        back, ahead: indices of the channels that take the previous and the next frame.
    """
    channels = torch.cat((back, ahead))
    if not len(channels):
        return x
    # `roll` wraps around: the frame that comes in from the other end is outside the clip.
    previous = x.index_select(2, back).roll(1, dims=1)
    previous[:, 0] = 0
    following = x.index_select(2, ahead).roll(-1, dims=1)
    following[:, -1] = 0
    return x.index_copy(2, channels, torch.cat((previous, following), dim=2))


class AttentionShift(nn.Module):
    """Mix each channel with its previous and next frame by attention weights (RubiksNet, ECCV 2020, section 3.3).

    Each channel has three logits, for one frame back, stay and one frame ahead. The weights are the softmax of the
    logits, divided by their standard deviation and by a temperature; frames outside the clip count as zero. As the
    temperature falls towards 0 the weights become one-hot and the mix becomes a whole-frame shift. `harden` completes
    this: then only the frames of the channels that move are copied.

    Args:
        channels: C.

    Attributes:
        weight: the logits (C, 3), drawn from U(0, 1).
        T: the temperature, a scalar buffer that the training schedule sets (2.0 at the start); 0 if hard.
        back, ahead: if hard, the indices of the channels that take the previous and the next frame; else None.
        causal: read no later frame: what the next frame would weigh, the same frame weighs in addition.
    """

    causal = False
    T: Tensor
    back: Tensor | None
    ahead: Tensor | None

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels, 3))
        self.register_buffer("T", torch.tensor(2.0))
        self.register_buffer("back", None, persistent=False)  # they follow from T and the logits
        self.register_buffer("ahead", None, persistent=False)

    @property
    def hard(self) -> bool:
        return self.back is not None

    @property
    def still(self) -> bool:
        """Whether it is hard and moves no channel, so that its result is its input."""
        return self.back is not None and self.ahead is not None and not len(self.back) and not len(self.ahead)

    def attention(self) -> Tensor:
        """The weights (C, 3) of the previous, the same and the next frame; each row sums to 1."""
        return self.allowed(attention(self.weight, self.T))

    def allowed(self, weights: Tensor) -> Tensor:
        """The weights (C, 3), with those of the next frame moved to the same frame if the shift is causal.

        The logit of the next frame stays: divided by their standard deviation, two logits would only have an order.
        """
        if not self.causal:
            return weights
        back, stay, ahead = weights.unbind(1)
        return torch.stack((back, stay + ahead, torch.zeros_like(ahead)), dim=1)

    def moves(self) -> Tensor:
        """Where each channel attends most (C,): -1 for back, 0 for stay, 1 for ahead."""
        if self.causal:
            return -(self.odds() > 0).long().to(self.weight.device)
        return self.weight.detach().argmax(1) - 1

    def odds(self) -> Tensor:
        """The log odds (C,) of each channel that it attends to another frame, on the CPU.

        They rank channels whose weights round to 0 and 1.
        """
        logits = _standardized(self.weight.detach().double().cpu()) / self.T.double().cpu().clamp(min=1e-3)
        others, same = ([0], [1, 2]) if self.causal else ([0, 2], [1])
        return torch.logsumexp(logits[:, others], dim=1) - torch.logsumexp(logits[:, same], dim=1)

    @torch.no_grad()
    def harden(self, moves: Tensor) -> None:
        """Become a whole-frame shift: `moves` (C,) is -1 for channels that look back, 0 for stay, 1 for look ahead."""
        choice = (moves + 1).to(self.weight.device)[:, None]
        self.weight.zero_().scatter_(1, choice, 1.0)
        self.weight.grad = None
        self.T.zero_()
        self._find_moves()

    def _find_moves(self) -> None:
        moves = self.moves()
        hard = self.T.item() == 0
        self.back = (moves == -1).nonzero().flatten() if hard else None
        self.ahead = (moves == 1).nonzero().flatten() if hard else None

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._find_moves()

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C, H, W) -> the same shape and dtype, for any number of frames."""
        if self.back is not None and self.ahead is not None:
            return move_frames(x, self.back, self.ahead)
        return mix_frames(x, self.attention().to(x.dtype).t()[:, :, None, None])

    def extra_repr(self) -> str:
        if self.back is not None and self.ahead is not None:
            return f"{len(self.weight)}, {len(self.back)} back, {len(self.ahead)} ahead"
        return f"{len(self.weight)}, temperature={self.T.item():g}"


def attention_weights(shifts: Sequence[AttentionShift | None]) -> Sequence[Tensor | None]:
    """The weights (C, 3) of each attention shift, all computed at once; None for each None."""
    found = [shift for shift in shifts if shift is not None]
    if not found:
        return [None] * len(shifts)
    lengths = [len(shift.weight) for shift in found]
    logits = torch.cat([shift.weight for shift in found])
    temperature = torch.cat([shift.T.expand(length) for shift, length in zip(found, lengths, strict=True)])[:, None]
    weights = iter(attention(logits, temperature).split(lengths))
    return [None if shift is None else shift.allowed(next(weights)) for shift in shifts]


def harden(shifts: Sequence[AttentionShift], budget: float, per_layer: bool = False) -> None:
    """Make attention shifts hard: at most floor(budget * channels) of their channels move, all others stay.

    A channel moves to where its attention is largest, unless that is "stay". If more channels would move than the
    budget allows, those whose attention is least off "stay" are left in place.

    Args:
        budget: share of the channels, 0 to 1.
        per_layer: the budget holds for the channels of each shift rather than for all together.
    """
    for group in [[shift] for shift in shifts] if per_layer else [shifts]:
        odds = torch.cat([shift.odds() for shift in group])
        moves = torch.cat([shift.moves().cpu() for shift in group])
        room = math.floor(Fraction(float(budget)) * len(moves))  # exact: a product of floats may be rounded up
        first = odds.masked_fill(moves == 0, -math.inf).argsort(descending=True, stable=True)
        moves[first[room:]] = 0
        for shift, own in zip(group, moves.split([len(shift.weight) for shift in group]), strict=True):
            shift.harden(own)
