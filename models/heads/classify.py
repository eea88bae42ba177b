"""The head of a classifier: one class for the whole image, by softmax.

Shape letters: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.structures import Targets
from models.labels import label_counts
from models.ops.merge import no_margin
from models.ops.primitives import Dropout
from models.registry import Shape, register_op


def classify_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    no_margin(inputs)
    return Shape(0, inputs[0].stride, "maps")


@register_op(infer=classify_shape, many=True)
class Classify(nn.Module):
    """The means of one or more maps over their cells side by side, dropout, and a linear layer: a score for each class.

    `options` are what its loss goes by: s of ``label_smoothing`` asks for ``1 - s + s / C`` of the true class and for
    ``s / C`` of every other one (Szegedy et al., arXiv 1512.00567, section 7).

    Shape: ``[[N, C_i, H_i, W_i], ...] -> [[N, C]]``, logits.
    """

    task = "classify"

    def __init__(self, inputs: Sequence[Shape], num_classes: int, *, dropout: Dropout = 0.0) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.options = {"label_smoothing": 0.0}
        self.strides = tuple(shape.stride for shape in inputs)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(sum(shape.channels for shape in inputs), num_classes)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        means = torch.cat([y.mean(dim=(2, 3)) for y in maps], dim=1)
        return [self.linear(self.dropout(means))]

    def decode(self, outputs: Sequence[Tensor]) -> Tensor:
        """The probability of every class, ``[N, C]``; a row sums to 1."""
        return outputs[0].softmax(dim=-1)

    def loss(self, outputs: Sequence[Tensor], targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean cross-entropy of a batch, which is its only part.

        An image that shows several classes, as two that were blended, should give each of its labels the same share.
        """
        logits_NC = outputs[0]
        counts_NC = label_counts(targets, logits_NC)
        goal_NC = counts_NC / counts_NC.sum(dim=-1, keepdim=True)
        loss = F.cross_entropy(logits_NC, goal_NC, label_smoothing=self.options["label_smoothing"])
        return loss, {"cls": loss.detach()}
