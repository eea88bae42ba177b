"""Masks of selective down-sampling: a predictor says which patches need their resolution, and a loss what they cost.

How maps are computed under a mask is in `models.ops.masked`, equations in docs/masked.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from data.structures import Targets
from models.elastic import WithAux
from models.ops.merge import no_margin
from models.ops.primitives import Width, batch_norm
from models.registry import Shape, register_op

SPREAD = 0.5  # of the logits of a light predictor, over patches, as it starts
Patch = Annotated[int, Field(ge=2, le=8)]
Widths = tuple[Width, Width, Width]
Share = Annotated[float, Field(gt=0, lt=1)]
Pace = Annotated[float, Field(gt=0, le=100)]
Price = Annotated[float, Field(ge=0)]
Batches = Annotated[int, Field(ge=0)]
Expected = Annotated[float, Field(ge=0, le=1)]


def mask_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    no_margin(inputs)
    return Shape(1, inputs[0].stride * args.get("patch", 2), "mask")


@register_op(infer=mask_shape)
class MaskPredictor(nn.Module):
    """Says for every patch of `patch` x `patch` cells whether it may be computed at low resolution.

    Three 3x3 convolutions of `widths` with a max pool of `patch` before the third, and one to two logits, high and low:
    the network of Hesse et al. `light` makes each of them a depth-wise and a 1x1 convolution, and has a norm behind the
    logits: a price on resolution pulls all of them the same way, harder than a task pulls them apart, and without a
    norm all patches become low together before it is known which should. `low` is the share of low patches that it
    starts from, roughly. `pace` multiplies the logits and so says how fast they change beside the other rows; behind a
    norm, how fast their share and sureness do. One that is sure of everything after a few steps has no gradient left to
    change its mind by; Hesse et al. give theirs, which has no norm, a hundredth of the learning rate.

    In training the mask is a straight-through sample: with Gumbel noise e, M = 1 where ``z_low + e_low > z_high +
    e_high``, and its gradient is that of the softmax of both. Noise comes from torch's generator, as a dropout's.
    Whoever reads the row, the loss as well, has this one mask. In use as many patches of an image are low as a sample
    would have on average, those with the largest ``z_low - z_high`` (`decided`); with `argmax`, as Hesse et al. have
    it, M = 1 where ``z_low > z_high``.

    Shape: ``[N, c_in, H, W] -> [N, 1, H // patch, W // patch]``, 0 and 1; auxiliary: the logits ``[N, 2, ...]``.
    """

    def __init__(
        self,
        c_in: int,
        widths: Widths = (128, 64, 64),
        patch: Patch = 2,
        light: bool = True,
        *,
        low: Share = 0.5,
        pace: Pace = 1.0,
        argmax: bool = False,
    ) -> None:
        super().__init__()
        self.pace, self.argmax = pace, argmax
        one, two, three = widths
        self.features = nn.Sequential(
            _predicting(c_in, one, light),
            nn.ReLU(),
            _predicting(one, two, light),
            nn.ReLU(),
            nn.MaxPool2d(patch, ceil_mode=True),
            _predicting(two, three, light),
            nn.ReLU(),
        )
        self.logits = _predicting(three, 2, light, bias=not light)
        self.bn = batch_norm(2) if light else nn.Identity()
        last = self.bn if light else self.logits
        assert isinstance(last, nn.BatchNorm2d | nn.Conv2d) and last.bias is not None
        with torch.no_grad():
            last.bias.copy_(torch.tensor([1 - low, low]).log() / pace)
            if light:
                last.weight.fill_(SPREAD / pace)

    def forward(self, x: Tensor) -> WithAux:
        z = self.pace * self.bn(self.logits(self.features(x)))
        return WithAux(sampled(z) if self.training else self._in_use(z), z)

    def _in_use(self, z: Tensor) -> Tensor:
        return (z[:, 1:] > z[:, :1]).to(z.dtype) if self.argmax else decided(z)

    def aux_parts(self, z: Tensor) -> dict[str, Tensor]:
        """For the log: the share of patches that would be low in use."""
        return {"S_in_use": self._in_use(z).mean()}


class OwnStart(nn.Conv2d):
    """A convolution that `Network` leaves as it was made."""

    own_start = True


def _predicting(c_in: int, c_out: int, light: bool, bias: bool = True) -> nn.Module:
    """A 3x3 convolution of a predictor. The light ones start such that values keep their size (He et al., arXiv
    1502.01852, by fan-in): with torch's own start nearly nothing arrives behind eight convolutions."""
    if not light:
        return OwnStart(c_in, c_out, 3, padding=1)
    depthwise, pointwise = OwnStart(c_in, c_in, 3, padding=1, groups=c_in), OwnStart(c_in, c_out, 1, bias=bias)
    nn.init.kaiming_normal_(depthwise.weight, nonlinearity="linear")
    nn.init.kaiming_normal_(pointwise.weight, nonlinearity="relu")
    return nn.Sequential(depthwise, pointwise)


def sampled(z: Tensor) -> Tensor:
    """A mask ``[N, 1, h, w]`` drawn by logits ``[N, 2, h, w]`` of high and low, exactly 0 and 1, with the gradient of
    the probabilities under the same noise (Gumbel softmax at temperature 1, straight through; arXiv 1611.01144)."""
    z = z.float()
    noisy = z - torch.empty_like(z).exponential_().log()
    soft = noisy.softmax(dim=1)[:, 1:]
    hard = (noisy[:, 1:] > noisy[:, :1]).to(soft.dtype)
    return hard + (soft - soft.detach())  # the bracket is 0.0


def decided(z: Tensor) -> Tensor:
    """The mask ``[N, 1, h, w]`` of 0 and 1 that logits ``[N, 2, h, w]`` of high and low stand for in use.

    Of each image the mean probability of low says how many patches are low, and their margin says which. Where a
    predictor is sure of every patch that is the arg-max. Where it is not, the arg-max is another network than the one
    that was trained: of p = .49 everywhere about half of the patches are low in samples, and none by the arg-max.
    """
    margins = (z[:, 1] - z[:, 0]).flatten(1).float()
    counts = (margins.sigmoid().mean(dim=1, keepdim=True) * margins.shape[1]).round()
    places = margins.argsort(dim=1, descending=True).argsort(dim=1)  # ranks: equal margins have different ones
    return (places < counts).view(z[:, 1:].shape).to(z.dtype)


def patch_side(inputs: Sequence[Shape]) -> int:
    """d, the side of a patch in cells of the map. Raises ValueError where map and mask do not fit together."""
    x, mask = inputs
    no_margin([x])
    if mask.stride % x.stride or mask.stride <= x.stride:
        raise ValueError(
            f"a mask at stride {mask.stride} has no whole patches of a map at stride {x.stride}; "
            f"a MaskPredictor that reads a map at this stride gives one"
        )
    return mask.stride // x.stride


def passes_map(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    patch_side(inputs)
    return inputs[0]


@register_op(infer=passes_map, takes=("map", "mask"))
class SelLoss(nn.Module):
    """A map as it came, and a price on what its mask leaves at high resolution.

    With S the share of low patches, ``L = price (1 - S)``; with a `target` share S*, ``L = price (S - S*)^2``, which is
    the loss of Hesse et al. The price is 0 for the first `start` batches and then rises over `ramp` batches: resolution
    has no worth to a network that has learned nothing, and the mask would be all low before it has.

    Shape: ``[[N, C, H, W], mask] -> [N, C, H, W]``, unchanged; auxiliary: the mask.
    """

    aux_name, is_price = "mask", True
    batches: Tensor

    def __init__(
        self,
        price: Price = 1.0,
        *,
        target: Annotated[float, Field(ge=0, le=1)] | None = None,
        start: Batches = 0,
        ramp: Batches = 0,
    ) -> None:
        super().__init__()
        self.price, self.target, self.start, self.ramp = price, target, start, ramp
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))  # of training, seen so far

    def forward(self, sources: Sequence[Tensor]) -> WithAux:
        x, mask = sources
        return WithAux(x, mask)

    def current_price(self) -> float:
        """The price of this batch."""
        past = int(self.batches) - self.start
        if past < 0:
            return 0.0
        return self.price * (min(1.0, past / self.ramp) if self.ramp else 1.0)

    def aux_loss(self, mask: Tensor, targets: Targets) -> Tensor:
        S = mask.float().mean()
        loss = self.current_price() * (1 - S if self.target is None else (S - self.target) ** 2)
        if self.training:
            self.batches += 1
        return loss

    def aux_parts(self, mask: Tensor) -> dict[str, Tensor]:
        """For the log: S of the sample, and of the images with the least and the most of it; all 1 is a collapse."""
        S_N = mask.detach().float().mean(dim=(1, 2, 3))
        return {"S": S_N.mean(), "S_least": S_N.min(), "S_most": S_N.max()}
