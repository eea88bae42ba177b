"""Attention branches: a small classifier beside a map says where it looks, and the map is amplified there.

From the attention branch network (Fukui et al., arXiv 1812.10025). With them on the levels of a feature pyramid that
explain a network's decisions badly, this is FAL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from data.structures import Targets
from models.elastic import WithAux
from models.labels import label_counts
from models.ops.primitives import Width, conv, wide
from models.ops.resnet import EPS, Bottleneck, resnet_norm
from models.registry import Shape, one_to_one, register_op

Depth = Annotated[int, Field(ge=1, le=100)]
Reduction = Annotated[int, Field(ge=1, le=64)]
Blocks = Literal["light", "abn", "none"]
Task = Literal["presence", "classes"]
ACT = "relu"  # of the paper, whatever a file's `activation:` is


def branch_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    source, parts = inputs[0], {"light": args.get("reduction", 4), "abn": 2, "none": 1}[args.get("blocks", "light")]
    if source.channels % parts:
        raise ValueError(f"blocks inside have the {parts}th part of the channels; {source.channels} are not divided")
    return one_to_one(inputs, {})


@register_op("FAL", infer=branch_shape)
@register_op(infer=branch_shape)
class AttentionBranch(nn.Module):
    """The map g amplified where a branch looks that tells the image's classes: ``g' = (1 + M) g``.

    Behind `depth` residual blocks and a norm, a 1x1 convolution gives a map for each of K classes. Of these come the
    attention map M in [0, 1], through a 3x3 convolution, a norm and the sigmoid, and the branch's own logits p, as the
    means of another 1x1 convolution (arXiv 1812.10025, section 3, and its authors' code).

    `blocks` are ``light``: bottlenecks that keep the C channels, `reduction` times fewer inside; ``abn``: those of the
    paper, as wide as the next stage of a ResNet, which give 2 C channels; ``none``: no branch and no weights, g' = g.

    What it says besides are ``map`` ``[N, 1, H, W]``, M, and ``logits`` ``[N, K]``, p. Its loss is added to that of the
    head: with `task` ``presence`` the binary cross-entropy of each class being somewhere in the image, for detectors;
    with ``classes`` the softmax cross-entropy of the image's class, for classifiers.

    Without `product` g' = g: the same parameters and the same loss, but nothing is amplified, for comparison.

    Its attributes have the names of the authors' code.

    Shape: ``[N, c_in, H, W]``, unchanged.
    """

    aux_name, is_price = "att", False
    side_by_side = ("blocks",)

    def __init__(
        self,
        c_in: int,
        num_classes: Width,
        depth: Depth = 3,
        reduction: Reduction = 4,
        *,
        blocks: Blocks = "light",
        task: Task = "presence",
        product: bool = True,
    ) -> None:
        super().__init__()
        self.task, self.present, self.product = task, blocks != "none", product
        self.folded = (("att_conv", "bn_att2"), ("att_conv3", "bn_att3")) if self.present else ()
        if not self.present:
            return
        c_out, width = (c_in, c_in // reduction) if blocks == "light" else (2 * c_in, c_in // 2)
        first = Bottleneck(c_in, c_out, act=ACT, width=width)
        others = [Bottleneck(c_out, c_out, act=ACT, width=width) for _ in range(depth - 1)]
        self.att_layer4 = nn.Sequential(first, *others)
        self.bn_att = resnet_norm(c_out, ACT, 1, EPS)
        self.att_conv = conv(c_out, num_classes, 1)
        self.bn_att2 = resnet_norm(num_classes, ACT, 1, EPS)
        self.att_conv2 = conv(num_classes, num_classes, 1)
        self.att_conv3 = conv(num_classes, 1, 3)
        self.bn_att3 = resnet_norm(1, "sigmoid", 3, EPS)

    def forward(self, x: Tensor) -> Tensor | WithAux:
        if not self.present:
            return x
        features = self.bn_att(self.att_layer4(x))
        classes = F.relu(self.bn_att2(self.att_conv(features)))
        attention = torch.sigmoid(self.bn_att3(self.att_conv3(classes)))
        logits = self.att_conv2(classes).mean(dim=(2, 3))
        return WithAux((1 + attention) * x if self.product else x, {"map": attention, "logits": logits})

    def aux_loss(self, aux: Mapping[str, Tensor], targets: Targets) -> Tensor:
        """The branch's own loss, the mean of a batch.

        An image with several labels should give each the same share under ``classes``; one without any counts 0 there.
        """
        logits_NK = aux["logits"]
        logits_NK = wide(logits_NK)
        counts_NK = label_counts(targets, logits_NK)
        if self.task == "presence":
            return F.binary_cross_entropy_with_logits(logits_NK, counts_NK.clamp(max=1))
        return F.cross_entropy(logits_NK, counts_NK / counts_NK.sum(dim=-1, keepdim=True).clamp(min=1))
