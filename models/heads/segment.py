"""The head of a segmentation network: a class for every pixel, by softmax. And a second one, which only training sees.

Shape letters: N images, K classes, H and W rows and columns of the input, h and w those of the map that the head reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from data.structures import VOID, Targets
from models.elastic import WithAux
from models.ops.merge import no_margin
from models.ops.primitives import Dropout, Width, wide
from models.ops.resnet import EPS, resnet_norm
from models.registry import Shape, register_op

PARTS = 4  # channels of an auxiliary head: a quarter of its map's, as torchvision has it

Gain = Annotated[float, Field(ge=0)]


def segment_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    no_margin(inputs)
    if len(inputs) != 1:
        raise ValueError(f"the head reads one map, got {len(inputs)}")
    return Shape(0, inputs[0].stride, "maps")


@register_op(infer=segment_shape, many=True)
class SegHead(nn.Module):
    """A 1x1 convolution: a score for each class in every cell, enlarged to the pixels of the input.

    `options` are what its loss goes by: s of ``label_smoothing`` asks for ``1 - s + s / K`` of the true class and for
    ``s / K`` of every other one (Szegedy et al., arXiv 1512.00567, section 7), and ``class_weights`` ``[K]`` are how
    much a pixel of each class counts, None for all alike.

    Shape: ``[[N, c_in, h, w]] -> [[N, K, h, w]]``, logits.
    """

    task = "segment"

    def __init__(self, inputs: Sequence[Shape], num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.options: dict[str, Any] = {"label_smoothing": 0.0, "class_weights": None}
        self.strides = tuple(shape.stride for shape in inputs)
        self.conv = nn.Conv2d(inputs[0].channels, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [self.conv(maps[0])]

    def enlarged(self, outputs: Sequence[Tensor]) -> Tensor:
        """The logits ``[N, K, H, W]`` of every pixel of the input, linear between the middles of the cells."""
        return enlarged(outputs[0], self.strides[0])

    def decode(self, outputs: Sequence[Tensor]) -> Tensor:
        """The probability of every class in every pixel of the input, ``[N, K, H, W]``; those of a pixel sum to 1."""
        return self.enlarged(outputs).softmax(dim=1)

    def loss(self, outputs: Sequence[Tensor], targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean cross-entropy of all pixels of a batch that are not void, which is its only part.

        With weights of classes it is the weighted mean. A batch of nothing but void has a loss of 0 and gradients of 0.
        """
        smoothing, weights = self.options["label_smoothing"], self.options["class_weights"]
        loss = pixel_loss(self.enlarged(outputs), targets, smoothing, weights)
        return loss, {"seg": loss.detach()}


def enlarged(logits: Tensor, stride: int) -> Tensor:
    """Scores of cells ``[N, K, h, w]`` for the pixels of the input, linear between the middles of the cells."""
    # scale and not size: a file that is exported takes inputs of any size
    return F.interpolate(logits, scale_factor=float(stride), mode="bilinear", align_corners=False)


def pixel_loss(logits: Tensor, targets: Targets, smoothing: float = 0.0, class_weights: Tensor | None = None) -> Tensor:
    """The mean cross-entropy of logits ``[N, K, H, W]`` over pixels that are not void, each counting by its class."""
    assert targets.masks is not None, "a segmenter learns from masks"
    wanted = targets.masks.long()
    weights = None if class_weights is None else class_weights.to(logits)
    total = F.cross_entropy(logits, wanted, weights, ignore_index=VOID, reduction="sum", label_smoothing=smoothing)
    asked = wanted != VOID
    if weights is None:
        return total / asked.sum().clamp(min=1)
    counted = (weights[wanted.where(asked, 0)] * asked).sum()
    return total / counted.where(counted > 0, 1)


@register_op()
class AuxSegHead(nn.Module):
    """A map as it came, and in training a second segmenter on it: a 3x3 convolution to a quarter of the channels, a
    norm, a ReLU, a dropout and a 1x1 convolution. Its loss, `weight` times the mean cross-entropy of all pixels that
    are not void, is added to that of the head, so that deep backbones learn (PSPNet, arXiv 1612.01105, section 3.3).

    In use it is not computed. Its attributes are those of torchvision's ``aux_classifier``, by number.

    Shape: ``[N, c_in, H, W]``, unchanged; auxiliary: logits ``[N, K, H, W]``.
    """

    aux_name, is_price = "aux", False

    def __init__(
        self, inputs: Sequence[Shape], num_classes: Width, weight: Gain = 0.4, *, dropout: Dropout = 0.1
    ) -> None:
        super().__init__()
        channels = inputs[0].channels
        self.weight, self.stride = weight, inputs[0].stride
        width = max(1, channels // PARTS)
        self.classifier = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            resnet_norm(width, "relu", 3, EPS),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(width, num_classes, 1),
        )

    def forward(self, x: Tensor) -> Tensor | WithAux:
        return WithAux(x, self.classifier(x)) if self.training else x

    def aux_loss(self, logits: Tensor, targets: Targets) -> Tensor:
        return self.weight * pixel_loss(enlarged(wide(logits), self.stride), targets)
