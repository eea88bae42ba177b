"""Atrous spatial pyramid pooling of DeepLabV3 (Chen et al., arXiv 1706.05587, section 3.3).

The order of the parts and every number are torchvision's, whose weights fit in their order.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import AfterValidator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.ops.conv import Conv
from models.ops.primitives import DEFAULT, Act, Dropout, Eps, Step, Width
from models.ops.resnet import EPS
from models.registry import register_op


def _some(rates: tuple[int, ...]) -> tuple[int, ...]:
    if not rates:
        raise ValueError("should be a list of at least one dilation")
    return rates


Rates = Annotated[tuple[Step, ...], AfterValidator(_some)]


@register_op()
class ASPP(nn.Module):
    """A 1x1 convolution, dilated 3x3 ones and the mean of the whole map, side by side, and a 1x1 over all of them.

    `dilations` 12, 24, 36 are for a map of stride 8, and half of them for one of stride 16. `dropout` is that of the
    output.

    Shape: ``[N, c_in, H, W] -> [N, c_out, H, W]``
    """

    def __init__(
        self,
        c_in: int,
        c_out: Width = 256,
        dilations: Rates = (12, 24, 36),
        *,
        dropout: Dropout = 0.5,
        act: Act = DEFAULT,
        eps: Eps = EPS,
    ) -> None:
        super().__init__()
        dilated = (Conv(c_in, c_out, 3, dilation=dilation, act=act, eps=eps) for dilation in dilations)
        self.convs = nn.ModuleList([Conv(c_in, c_out, 1, act=act, eps=eps), *dilated])
        self.pool = Conv(c_in, c_out, 1, act=act, eps=eps)
        self.project = Conv(c_out * (len(dilations) + 2), c_out, 1, act=act, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        seen = [convolution(x) for convolution in self.convs]
        return self.dropout(self.project(torch.cat([*seen, self.pooled(x).expand_as(seen[0])], dim=1)))

    def pooled(self, x: Tensor) -> Tensor:
        """What the mean of each image says, ``[N, c_out, 1, 1]``.

        The one value that a single image has is no batch to be normed by: the running statistics do it, and stay.
        """
        alone = [m for m in self.pool.modules() if isinstance(m, _BatchNorm) and m.training and len(x) == 1]
        for one in alone:
            one.eval()
        y: Tensor = self.pool(x.mean(dim=(2, 3), keepdim=True))
        for one in alone:
            one.train()
        return y
