"""Scores videos with a trained network, on any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from rubiks.models import RubiksNet
from rubiks.models.scoring import Mean, PixelNet, score_videos
from rubiks.nn import Normalize
from rubiks.ops import fused

FrameOrder = Literal["natural", "reversed", "shuffled"]


def fast_net(net: RubiksNet | PixelNet, device: torch.device, bf16: bool) -> nn.Module:
    """The fastest form of a network for scoring on this device; `bf16`: it may compute in bfloat16 on a GPU."""
    if isinstance(net, PixelNet):
        return net
    if device.type == "cpu":
        return net.optimize_for_inference()
    return net.optimize_for_inference(torch.bfloat16) if bf16 and fused.available(device) else net


class Scorer(pl.LightningModule):
    """Scores each video by the mean over its views, for `trainer.predict`.

    Scores do not depend on how videos are batched: on a CPU clips are scored one at a time, since matrix products of
    another size may round differently.

    Args:
        net: the network.
        mean: of the views' logits, or of their probabilities.
        orders: orders of the frames in time in which each video is scored.
        seed: for shuffled frames, whose order differs from video to video.
    """

    def __init__(
        self,
        net: RubiksNet | PixelNet,
        mean: Mean = "logits",
        orders: Sequence[FrameOrder] = ("natural",),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.net = net
        self.mean: Mean = mean
        self.orders = orders
        self.seed = seed
        self.normalize = nn.Identity() if isinstance(net, PixelNet) else Normalize()

    def on_predict_start(self) -> None:
        self.fast_net = fast_net(self.net, self.device, bf16=str(self.trainer.precision).startswith("bf16"))

    def predict_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Any]:
        """A batch with its scores: logits (B, orders, classes), label and index (B,), and reader, a list of names."""
        index = batch["index"].cpu()
        if len(index):
            logits, label = self(batch["views"], index.tolist()).cpu(), batch["label"][:, 0].cpu()
        else:  # no video of the batch could be read
            logits, label = torch.empty(0, len(self.orders), self.net.num_classes), batch["label"].flatten().cpu()
        return {"logits": logits, "label": label, "index": index, "reader": batch["reader"]}

    def forward(self, views: Tensor, indices: Sequence[int]) -> Tensor:
        """Views uint8 (B, V, T, 3, H, W) of the videos with these places in the list -> logits (B, orders, classes)."""
        at_once = 1 if views.device.type == "cpu" else len(views)
        scores = []
        for order in self.orders:
            ordered = torch.stack([self._in_order(video, order, i) for video, i in zip(views, indices, strict=True)])
            parts = [score_videos(self.fast_net, self.normalize, part, self.mean) for part in ordered.split(at_once)]
            scores.append(torch.cat(parts))
        return torch.stack(scores, dim=1)

    def _in_order(self, video: Tensor, order: FrameOrder, index: int) -> Tensor:
        """The frames of a video's views (V, T, 3, H, W) in another order."""
        if order == "natural":
            return video
        if order == "reversed":
            return video.flip(1)
        frames = np.random.default_rng((self.seed, index)).permutation(video.shape[1])
        return video[:, torch.from_numpy(frames).to(video.device)]
