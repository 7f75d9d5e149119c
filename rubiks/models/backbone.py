"""The network before the classifier, as modules."""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

from rubiks.models.tiers import Tier, Variant
from rubiks.nn import RubiksBlock


class Backbone(nn.Module):
    """Stem, five stages of blocks and the last norm, under the official names.

    Attributes:
        frozen: how many of the `parts`, from the input, are frozen.
    """

    def __init__(self, tier: Tier, variant: Variant) -> None:
        super().__init__()
        self.frozen = 0
        self.conv1 = nn.Conv2d(3, tier.width, 3, stride=2, padding=1, bias=False)
        channels = tier.width
        # Stage 0 is one block at the stem's width; stages 1 to 4 double the width from there and halve the image.
        for stage, blocks in enumerate((1, *tier.blocks)):
            width = tier.width * 2 ** max(0, stage - 1)
            layer = nn.ModuleList()
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layer.append(
                    RubiksBlock(channels, width, stride, variant.temporal_attention, tier.reduction, variant.shift)
                )
                channels = width
            self.add_module(f"layer{stage}", layer)
        self.bn_last = nn.BatchNorm2d(channels)

    def layers(self) -> list[nn.ModuleList]:
        """Stages 0 to 4."""
        return [child for child in self.children() if isinstance(child, nn.ModuleList)]

    def stages(self, first: int = 0) -> list[list[RubiksBlock]]:
        """The blocks of stages 0 to 4, or of those from `first`.

        Raises:
            TypeError: something else has been put in the place of a block.
        """
        stages = []
        for layer in self.layers()[first:]:
            stages.append([block for block in layer if isinstance(block, RubiksBlock)])
            if len(stages[-1]) < len(layer):
                raise TypeError("the backbone has modules other than RubiksBlock in its stages")
        return stages

    def blocks(self) -> list[RubiksBlock]:
        """The blocks of all stages."""
        return [block for stage in self.stages() for block in stage]

    def parts(self) -> dict[str, nn.Module]:
        """What can be frozen, from the input: stem, layer0 to layer4, backbone (with it, everything is)."""
        stages = {f"layer{stage}": layer for stage, layer in enumerate(self.layers())}
        return {"stem": self.conv1, **stages, "backbone": self.bn_last}

    def freeze(self, last: str) -> None:
        """Stop training everything from the input up to and including this one of the `parts`.

        Frozen parameters have no gradient. Frozen batch norms use their running statistics and leave them as they are,
        in training mode too.
        """
        parts = self.parts()
        self.frozen = list(parts).index(last) + 1
        for part in itertools.islice(parts.values(), self.frozen):
            part.requires_grad_(False)
        self.train(self.training)

    @property
    def frozen_stages(self) -> int:
        """How many of the stages, from the first, are frozen."""
        return min(max(0, self.frozen - 1), len(self.layers()))

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        for part in itertools.islice(self.parts().values(), self.frozen):
            part.eval()
        return self

    def run_stages(self, images: Tensor, frames: int, count: int) -> Tensor:
        """The stem and the first `count` stages: (N*T, 3, H, W), clip after clip -> (N*T, C, H', W')."""
        x = self.conv1(images)
        for layer in self.layers()[:count]:
            for block in layer:
                x = block(x, frames)
        return x

    def feature_maps(self, images: Tensor, frames: int) -> Tensor:
        """(N*T, 3, H, W), clip after clip -> (N*T, C, H / 32, W / 32), rounded up."""
        return F.relu(self.bn_last(self.run_stages(images, frames, len(self.layers()))), inplace=True)

    def forward(self, images: Tensor, frames: int) -> Tensor:
        """(N*T, 3, H, W), clip after clip -> features (N*T, C)."""
        return self.feature_maps(images, frames).mean((2, 3))
