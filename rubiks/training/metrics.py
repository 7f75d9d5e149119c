"""Training metrics, none of which makes a step wait for the GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy


class WeightedMean(Metric):
    """The weighted mean of values, over all processes.

    MeanMetric of torchmetrics either checks for NaN, which makes each step wait for the GPU, or ignores the weights.
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "weight"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")

    def update(self, value: Tensor, weight: Tensor | float) -> None:
        self.total += value * weight
        self.weight += weight

    def compute(self) -> Tensor:
        return self.total / self.weight


def accuracies(num_classes: int) -> MetricCollection:
    """Top-1 and top-5 accuracy; with fewer than five classes, the latter counts all of them."""
    return MetricCollection(
        {
            f"top{k}": MulticlassAccuracy(
                num_classes,
                top_k=min(k, num_classes),
                average="micro",
                validate_args=False,  # checks of the labels would make every step wait for the GPU
            )
            for k in (1, 5)
        }
    )
