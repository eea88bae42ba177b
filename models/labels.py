"""Which classes an image shows as a whole, from the labels of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from data.structures import Targets


def label_counts(targets: Targets, like_NC: Tensor) -> Tensor:
    """How many labels of each class each image has, ``[N, C]``, of the type and on the device of `like_NC`."""
    counts_NC = torch.zeros_like(like_NC)
    return counts_NC.index_put_((targets.image_index, targets.labels), counts_NC.new_ones(()), accumulate=True)
