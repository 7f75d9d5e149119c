"""The network before the classifier, as modules."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from rubiks.models.tiers import Tier, Variant
from rubiks.nn import RubiksBlock


class Backbone(nn.Module):
    """Stem, five stages of blocks and the last norm, under the official names."""

    def __init__(self, tier: Tier, variant: Variant) -> None:
        super().__init__()
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

    def stages(self) -> list[list[RubiksBlock]]:
        """The blocks of stages 0 to 4.

        Raises:
            TypeError: something else has been put in the place of a block.
        """
        stages = []
        for layer in self.layers():
            stages.append([block for block in layer if isinstance(block, RubiksBlock)])
            if len(stages[-1]) < len(layer):
                raise TypeError("the backbone has modules other than RubiksBlock in its stages")
        return stages

    def blocks(self) -> list[RubiksBlock]:
        """The blocks of all stages."""
        return [block for stage in self.stages() for block in stage]

    def forward(self, images: Tensor, frames: int) -> Tensor:
        """(N*T, 3, H, W), clip after clip -> features (N*T, C)."""
        return self.feature_maps(images, frames).mean((2, 3))

    def feature_maps(self, images: Tensor, frames: int) -> Tensor:
        """(N*T, 3, H, W), clip after clip -> (N*T, C, H / 32, W / 32), rounded up."""
        x = self.conv1(images)
        for layer in self.layers():
            for block in layer:
                x = block(x, frames)
        return F.relu(self.bn_last(x), inplace=True)
