"""The head of a segmentation network: a class for every pixel, by softmax.

Shape letters: N images, K classes, H and W rows and columns of the input, h and w those of the map that the head reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from data.structures import VOID, Targets
from models.ops.merge import no_margin
from models.registry import Shape, register_op


def segment_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    no_margin(inputs)
    if len(inputs) != 1:
        raise ValueError(f"the head reads one map, got {len(inputs)}")
    return Shape(0, inputs[0].stride, "maps")


@register_op(infer=segment_shape, many=True)
class SegHead(nn.Module):
    """A 1x1 convolution: a score for each class in every cell, enlarged to the pixels of the input.

    `options` are what its loss goes by: s of ``label_smoothing`` asks for ``1 - s + s / K`` of the true class and for
    ``s / K`` of every other one (Szegedy et al., arXiv 1512.00567, section 7).

    Shape: ``[[N, c_in, h, w]] -> [[N, K, h, w]]``, logits.
    """

    task = "segment"

    def __init__(self, inputs: Sequence[Shape], num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.options = {"label_smoothing": 0.0}
        self.strides = tuple(shape.stride for shape in inputs)
        self.conv = nn.Conv2d(inputs[0].channels, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [self.conv(maps[0])]

    def enlarged(self, outputs: Sequence[Tensor]) -> Tensor:
        """The logits ``[N, K, H, W]`` of every pixel of the input, linear between the middles of the cells."""
        # scale and not size: a file that is exported takes inputs of any size
        return F.interpolate(outputs[0], scale_factor=float(self.strides[0]), mode="bilinear", align_corners=False)

    def decode(self, outputs: Sequence[Tensor]) -> Tensor:
        """The probability of every class in every pixel of the input, ``[N, K, H, W]``; those of a pixel sum to 1."""
        return self.enlarged(outputs).softmax(dim=1)

    def loss(self, outputs: Sequence[Tensor], targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean cross-entropy of all pixels of a batch that are not void, which is its only part.

        A batch of nothing but void has a loss of 0, and gradients of 0.
        """
        assert targets.masks is not None, "a segmenter learns from masks"
        wanted = targets.masks.long()
        total = F.cross_entropy(
            self.enlarged(outputs),
            wanted,
            ignore_index=VOID,
            reduction="sum",
            label_smoothing=self.options["label_smoothing"],
        )
        loss = total / (wanted != VOID).sum().clamp(min=1)
        return loss, {"seg": loss.detach()}
