"""An order of classes in which those that are confused stand together."""

from __future__ import annotations

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform


def by_confusion(confusion: np.ndarray) -> np.ndarray:
    """Average linkage on the shares of videos of either class that are taken for the other; similar neighbours.

    Args:
        confusion: (C, C), videos by label and predicted class.

    Returns:
        (C,) the classes in their new order.
    """
    if len(confusion) < 3:
        return np.arange(len(confusion))
    shares = confusion / confusion.sum(1, keepdims=True).clip(min=1)
    distances = squareform(2 - shares - shares.T, checks=False)  # the diagonal does not count
    return leaves_list(linkage(distances, "average", optimal_ordering=True))
