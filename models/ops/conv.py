"""Convolution blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from models.elastic import Channels
from models.ops.primitives import DEFAULT, EPS, Act, Eps, Inner, Kernel, Pad, Same, Step, Width, activation, conv, norm
from models.registry import Shape, one_to_one, register_op


def conv_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    """A dilated kernel reaches as far as a larger one; with the padding ``same`` any kernel fits."""
    border = args.get("border")
    if border is not None and len(border) != inputs[0].channels:
        raise ValueError(f"border has {len(border)} values for {inputs[0].channels} channels")
    if args.get("padding") == "same":
        return one_to_one(inputs, {**args, "kernel": 1, "padding": None})
    reach = args.get("dilation", 1) * (args.get("kernel", 1) - 1) + 1
    return one_to_one(inputs, {**args, "kernel": reach})


@register_op(infer=conv_shape)
class Conv(nn.Module):
    """Convolution, batch norm, activation: the block every YOLO is made of.

    ``padding=None`` keeps the map size at stride 1 (`kernel` must be odd for that, whatever its `dilation`);
    ``same`` is that of TensorFlow, which differs at stride 2. What is padded has the values of `border`, one a channel
    that comes in, or 0. `eps` is that of the batch norm.

    Shape: ``[N, c_in, H, W] -> [N, c_out, H // stride, W // stride]``
    """

    def __init__(
        self,
        c_in: Inner,
        c_out: Width | Channels,
        kernel: Kernel = 1,
        stride: Step = 1,
        padding: Pad | Same | None = None,
        groups: Width | Channels = 1,
        *,
        act: Act = DEFAULT,
        dilation: Step = 1,
        eps: Eps = EPS,
        border: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.conv = conv(c_in, c_out, kernel, stride, padding=padding, groups=groups, dilation=dilation, border=border)
        self.bn = norm(c_out, feeds=act, after=kernel, eps=eps)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


def focus_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    folded = replace(inputs[0], channels=4 * inputs[0].channels, stride=2 * inputs[0].stride)
    return one_to_one([folded], args)


@register_op(infer=focus_shape)
class Focus(nn.Module):
    """Every second pixel of every second row, four times, side by side as channels; then a `Conv` over them.

    The stem of yolov5 up to v5.0; an early form of it is the passthrough layer of YOLOv2 (arXiv 1612.08242).

    Shape: ``[N, c_in, H, W] -> [N, c_out, H // (2 * stride), W // (2 * stride)]``
    """

    def __init__(
        self,
        c_in: int,
        c_out: Width,
        kernel: Kernel = 1,
        stride: Step = 1,
        padding: Pad | None = None,
        groups: Width = 1,
        *,
        act: Act = DEFAULT,
    ) -> None:
        super().__init__()
        self.conv = Conv(4 * c_in, c_out, kernel, stride, padding, groups, act=act)

    def forward(self, x: Tensor) -> Tensor:
        # this order of the quarters is that of published weights; pixel_unshuffle has another
        quarters = [x[..., row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.conv(torch.cat(quarters, dim=1))
