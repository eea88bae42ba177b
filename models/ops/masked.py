"""Selective down-sampling: a mask says where a map needs its resolution, and only there it is computed at it.

Equations are those of docs/masked.md. A mask M ``[N, 1, h, w]`` has a cell for every patch of d x d cells of a map
``[N, C, d h, d w]``: 0 keeps the resolution (high), 1 gives the patch one value (low). With ``g`` the value of a patch

    x' = x in high patches, g(x) in every cell of a low one
    y  = (W * x') in high patches, its value at the first (upper left) cell everywhere in a low one

so that without low patches y is an ordinary (dilated) convolution, and without high ones that of the network with
stride d, each value d x d times. The idea is that of Hesse et al. (arXiv 2305.09504), who take g from the first cell.

Two forms give the same numbers. The *dense* one fills maps as the equations say; training, exported files and small low
shares use it. The *packed* one (`models.ops.packed`) computes no cell twice.

A row may also take no look at its mask: with ``resolution: high`` it is the dilated convolution everywhere, with
``resolution: low`` it is the network with stride d, from the same weights. A search chooses among the three.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from data.structures import Targets
from models.elastic import Elastic, WithAux
from models.ops.merge import no_margin
from models.ops.packed import Packing, Taps, convolved, convolved_map, pack, packing, taps_inside, taps_of_map, unpack
from models.ops.primitives import DEFAULT, Act, Count, Eps, Kernel, Step, Width, activation, batch_norm, conv, norm
from models.ops.resnet import EPS, EXPANSION, Bottleneck, ResStage, dilations, stage_shape
from models.registry import Shape, one_to_one, register_op
from models.spec import Choice

# The share of low patches from which on the packed form is faster: bench/masked.py --threshold measures it.
PACKED_FROM = 0.2
SPREAD = 0.5  # of the logits of a light predictor, over patches, as it starts

Patch = Annotated[int, Field(ge=2, le=8)]
Widths = tuple[Width, Width, Width]
Pool = Literal["pick", "avg", "max", "softmax"]
Backend = Literal["auto", "dense", "packed"]
PlainResolution = Literal["mask", "low", "high"]
Resolution = PlainResolution | Choice
Wide = Callable[[nn.Module, Tensor], Tensor]  # how a convolution with neighbours is computed
Share = Annotated[float, Field(gt=0, lt=1)]
Pace = Annotated[float, Field(gt=0, le=100)]
Price = Annotated[float, Field(ge=0)]
Batches = Annotated[int, Field(ge=0)]
Expected = Annotated[float, Field(ge=0, le=1)]


# ---- masks


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


# ---- maps under a mask, dense


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


class PatchPool(nn.Module):
    """g, the one value of every patch of d x d cells: its first cell (``pick``), mean, maximum, or the mean by weights
    ``softmax_cells(v * x)`` with a learned v for each channel (``softmax``; local importance-based pooling, arXiv
    1908.04156), which begins as the mean. A patch that the edge cuts has the value of the cells that it has.

    Shape: ``[N, C, H, W] -> [N, C, ceil(H / d), ceil(W / d)]``
    """

    def __init__(self, channels: int, d: int, pool: Pool) -> None:
        super().__init__()
        self.d, self.pool = d, pool
        if pool == "softmax":
            self.weigh = OwnStart(channels, 1, 1, bias=False)
            nn.init.zeros_(self.weigh.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.pool == "pick":
            return x[:, :, :: self.d, :: self.d]
        if self.pool == "avg":
            return self._mean(x)
        if self.pool == "max":
            return self._most(x)
        logits = self.weigh(x)
        weights = (logits - repeated(self._most(logits), self.d, x)).exp()
        return self._mean(x * weights) / self._mean(weights)

    def _mean(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.d, ceil_mode=True)

    def _most(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, self.d, ceil_mode=True)


def repeated(values: Tensor, d: int, like: Tensor) -> Tensor:
    """Every value of ``[N, C, h, w]`` in d x d cells, as many as `like` ``[N, ?, H, W]`` has."""
    height, width = like.shape[2:]
    return F.interpolate(values, scale_factor=float(d), mode="nearest")[:, :, :height, :width]


def filled(x: Tensor, mask: Tensor | None, values: Tensor | None = None) -> Tensor:
    """`x` ``[N, C, H, W]`` with `values` ``[N, C, h, w]`` in every cell of low patches; None: their first cells.

    Without a mask it stays as it is.
    """
    if mask is None:
        return x
    d = -(-x.shape[2] // mask.shape[2])
    low = repeated(mask.to(x.dtype), d, x)
    value = repeated(x[:, :, ::d, ::d] if values is None else values, d, x)
    # the product also mixes: gates of a search make a mask of anything between 0 and 1
    return x * (1 - low) + value * low if torch.is_grad_enabled() else torch.where(low > 0.5, value, x)


def padded(x: Tensor, d: int) -> Tensor:
    """`x` with rows of zeros below and columns of zeros on the right, up to whole patches."""
    below, right = -x.shape[2] % d, -x.shape[3] % d
    return F.pad(x, (0, right, 0, below)) if below or right else x


@register_op(infer=passes_map, takes=("map", "mask"))
class MaskedDownsample(nn.Module):
    """x', a map whose low patches have one value each.

    Shape: ``[[N, C, H, W], mask] -> [N, C, H, W]``
    """

    def __init__(self, inputs: Sequence[Shape], pool: Pool = "pick") -> None:
        super().__init__()
        self.pool = PatchPool(inputs[0].channels, patch_side(inputs), pool)

    def forward(self, sources: Sequence[Tensor]) -> Tensor:
        x, mask = sources
        return filled(x, mask, self.pool(x))


# ---- by the mask, always low, always high


class MaskInForce(nn.Module):
    """The mask that a row goes by: the one it reads, all low, or all high. Shape: ``[N, 1, h, w]``, unchanged."""

    def __init__(self, resolution: str) -> None:
        super().__init__()
        self.active = resolution

    def forward(self, mask: Tensor) -> Tensor:
        if self.active == "mask":
            return mask
        return torch.ones_like(mask) if self.active == "low" else torch.zeros_like(mask)


class ElasticMask(MaskInForce):
    """The same with a choice left open (`models.elastic`). No option has weights of its own: the same ones compute a
    patch at either resolution. A mixture is a mask of shares between 0 and 1, which mixes both values of a patch.
    """

    def __init__(self, choice: Choice) -> None:
        super().__init__(choice.options[0])
        self.choice = choice

    def option(self, value: str, mask: Tensor) -> Tensor:
        return MaskInForce(value)(mask)

    def plain(self) -> nn.Module:
        return MaskInForce(self.active)


def mask_in_force(resolution: Resolution) -> MaskInForce:
    return ElasticMask(resolution) if isinstance(resolution, Choice) else MaskInForce(resolution)


def low_share(module: nn.Module, low: float | None = None) -> float:
    """The share of low patches by which the multiply-adds of a row's dense form have to be lessened.

    By the mask it is `low`, None for the `expected` share that the row names. A row that is always low is computed at
    low resolution and counts as it is computed, unless choices hold it in its dense form.
    """
    resolution = getattr(module, "resolution", None)
    if not isinstance(resolution, MaskInForce) or resolution.active == "mask":
        return getattr(module, "expected", 0.0) if low is None else low
    return 1.0 if resolution.active == "low" and getattr(module, "is_open", False) else 0.0


def holds_choices(module: nn.Module) -> bool:
    """Whether it has a part that holds several options, as in a supernet."""
    return any(isinstance(part, Elastic) for part in module.modules())


# ---- convolutions under a mask


def filling(mask: Tensor | None) -> Wide:
    """Convolutions in dense form: first all cells, then one value in all cells of a low patch."""
    return lambda convolution, x: filled(convolution(x), mask)


def strided(d: int) -> Wide:
    """Convolutions where every patch is low: those of the network with stride d, on maps that have a cell a patch. A
    transition (`SelStage`) reads the whole map, and has the stride.
    """

    def wide(convolution: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(convolution, nn.Conv2d)
        dilation, padding = convolution.dilation[0], convolution.padding[0]
        assert isinstance(padding, int)
        shape = (d, padding, dilation) if dilation % d else (1, padding // d, dilation // d)
        return F.conv2d(x, convolution.weight, convolution.bias, *shape, convolution.groups)

    return wide


def sel_conv_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    patch_side(inputs)
    shape = one_to_one(inputs[:1], {**args, "stride": 1})
    if args.get("mode") == "transition" and args.get("pool", "pick") != "pick":
        raise ValueError(f"a transition reads the map as it is, so pool is pick; got {args['pool']}")
    return shape


@register_op(infer=sel_conv_shape, takes=("map", "mask"))
class SelConv(nn.Module):
    """Convolution under a mask, batch norm, activation: `Conv` with the same weights.

    ``dilated``: the equations above with dilation d. ``transition``: the convolution of a network whose stride is d, on
    the map as it is: where the mask is low only at every d-th cell, where it is high at each. `backend` is the form,
    ``auto`` the faster one in use. `unmasked` are the multiply-adds a cell that no mask saves. `resolution` and
    `expected` are those of a `SelStage`.

    Shape: ``[[N, c_in, H, W], mask] -> [N, c_out, H, W]``
    """

    folded = (("conv", "bn"),)  # by `models.fuse`

    def __init__(
        self,
        inputs: Sequence[Shape],
        c_out: Width,
        kernel: Kernel = 3,
        mode: Literal["dilated", "transition"] = "dilated",
        *,
        pool: Pool = "pick",
        groups: Step = 1,
        act: Act = DEFAULT,
        backend: Backend = "auto",
        resolution: Resolution = "mask",
        expected: Expected = 0.0,
    ) -> None:
        super().__init__()
        self.d, c_in = patch_side(inputs), inputs[0].channels
        self.dilated, self.backend = mode == "dilated", backend
        self.resolution, self.expected = mask_in_force(resolution), expected
        self.pool = PatchPool(c_in, self.d, pool)
        self.unmasked = c_in if pool == "softmax" else 0
        self.conv = conv(c_in, c_out, kernel, groups=groups, dilation=self.d if self.dilated else 1)
        self.bn = norm(c_out, feeds=act, after=kernel)
        self.act = activation(act)
        self.is_open = holds_choices(self)

    def forward(self, sources: Sequence[Tensor]) -> Tensor:
        x, mask = sources[0], self.resolution(sources[1])
        form = best_form(self, mask)
        if form == "packed":
            return self._packed(x, packing(mask, self.d))
        if form == "strided":
            pointwise = self.conv.kernel_size == (1, 1)
            small = self.pool(x) if self.dilated or pointwise else x
            y = self.conv(small) if pointwise else strided(self.d)(self.conv, small)
            return repeated(self.act(self.bn(y)), self.d, x)
        low = None if form == "plain" else mask
        y = self.conv(filled(x, low, self.pool(x)) if self.dilated and low is not None else x)
        return self.act(self.bn(filled(y, low)))

    def _packed(self, x: Tensor, packed: Packing) -> Tensor:
        height, width = x.shape[2:]
        assert isinstance(self.conv, nn.Conv2d)
        whole, kernel = padded(x, self.d), self.conv.kernel_size[0]
        if self.dilated or kernel == 1:
            taps = taps_inside(packed, kernel, 1) if kernel > 1 else None
            y = convolved(pack(whole, packed, self.pool(x)), packed, self.conv, taps)
        else:
            y = convolved_map(whole, packed, self.conv, taps_of_map(packed, kernel, 1))
        return unpack(_activated(self.act, _normed(self.bn, y)), packed)[:, :, :height, :width]


def sel_stage_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    d = patch_side(inputs)
    first, others = stage_dilations(d, args.get("dilation"), args.get("first_dilation"), args.get("pool", "pick"))
    if others % d:
        raise ValueError(f"dilation {others} is no multiple of {d}, the side of the mask's patches")
    if first % d and args.get("pool", "pick") != "pick":
        raise ValueError(
            f"first_dilation {first} is no multiple of {d}, the side of the mask's patches: it reads the map as it is, "
            f"so pool is pick; got {args['pool']}"
        )
    return stage_shape(inputs[:1], {**args, "stride": 1})


def stage_dilations(d: int, dilation: int | None, first_dilation: int | None, pool: str) -> tuple[int, int]:
    """The dilations of a `ResStage` at stride 1, of whole patches where the stage reads a pooled map."""
    first, others = dilations(1, dilation or d, first_dilation)
    if first_dilation is None and first % d and pool != "pick":
        first = others
    return first, others


@register_op(infer=sel_stage_shape, takes=("map", "mask"))
class SelStage(nn.Module):
    """A `ResStage` under a mask, with the same weights under the same names.

    Dilations are those of the `ResStage` at stride 1 whose place it takes: a multiple of d, which is the default; None
    for the first one is half of it. A first dilation that is no multiple of d is a transition: its convolution reads
    the map as it is, as in `SelConv`. So with ``pick`` the stage is the `ResStage` with dilation d where all is high,
    and the one with stride d where all is low. With the other pools the map is pooled first, and the first dilation is
    d as well. ``keep``: the map comes from a stage under the same mask, and is ``pick`` where it does not.

    `resolution` says whether the stage goes by the ``mask``, or is ``low`` or ``high`` everywhere and takes no look at
    it. `expected` is the share of low patches that costs count with where it goes by the mask.

    `backend` is the form, ``auto`` the faster one in use. `unmasked` are the multiply-adds a cell that no mask saves:
    of what a bottleneck has before its transition, and of the weights of a softmax.

    Shape: ``[[N, c_in, H, W], mask] -> [N, c_out, H, W]``
    """

    def __init__(
        self,
        inputs: Sequence[Shape],
        c_out: Width,
        number: Count = 1,
        *,
        block: Literal["basic", "bottleneck"] = "basic",
        pool: Pool | Literal["keep"] = "pick",
        dilation: Step | None = None,
        first_dilation: Step | None = None,
        act: Act = DEFAULT,
        eps: Eps = EPS,
        backend: Backend = "auto",
        resolution: Resolution = "mask",
        expected: Expected = 0.0,
    ) -> None:
        super().__init__()
        self.d, c_in = patch_side(inputs), inputs[0].channels
        self.backend = backend
        self.resolution, self.expected = mask_in_force(resolution), expected
        self.pool = PatchPool(c_in, self.d, "pick" if pool == "keep" else pool)
        first, others = stage_dilations(self.d, dilation, first_dilation, pool)
        self.transition = first % self.d != 0
        stage = ResStage(c_in, c_out, 1, number, block=block, dilation=others, first_dilation=first, act=act, eps=eps)
        self.blocks = stage.blocks
        narrow = c_in * c_out // EXPANSION if self.transition and block == "bottleneck" else 0
        self.unmasked = narrow + (c_in if pool == "softmax" else 0)
        self.is_open = holds_choices(self)

    def forward(self, sources: Sequence[Tensor]) -> Tensor:
        x, mask = sources[0], self.resolution(sources[1])
        assert x.shape[2:] == tuple(self.d * side for side in mask.shape[2:]), (x.shape, mask.shape)
        form = best_form(self, mask)
        if form == "packed":
            return self._packed(x, packing(mask, self.d))
        if form == "strided":
            return repeated(self._through(x, self.pool(x), strided(self.d)), self.d, x)
        if form == "plain":
            return self._through(x, x, filling(None))
        return self._through(x, filled(x, mask, self.pool(x)), filling(mask))

    def _through(self, x: Tensor, rest: Tensor, wide: Wide) -> Tensor:
        """All blocks. `rest` is the map as a patch's one value has it; a transition reads `x`, as it is."""
        x = x if self.transition else rest
        for block in active(self.blocks):
            y = x
            for at, (convolution, bn) in enumerate(_layers(block)):
                y = block.act(y) if at else y
                y = bn(convolution(y) if convolution.kernel_size == (1, 1) else wide(convolution, y))
            x = rest = block.act(y + (rest if block.downsample is None else block.downsample(rest)))
        return x

    def _packed(self, x: Tensor, packed: Packing) -> Tensor:
        seen: dict[tuple[int, int], Taps] = {}  # of each kernel and dilation: the same for all blocks

        def taps(convolution: nn.Conv2d) -> Taps | None:
            kernel, dilation = convolution.kernel_size[0], convolution.dilation[0] // self.d
            if kernel == 1:
                return None
            if (kernel, dilation) not in seen:
                seen[kernel, dilation] = taps_inside(packed, kernel, dilation)
            return seen[kernel, dilation]

        rest = pack(x, packed, None if self.pool.pool == "pick" else self.pool(x))
        for index, block in enumerate(active(self.blocks)):
            y, layers = rest, _layers(block)
            if self.transition and index == 0:
                y, layers = _entered(block, x, packed)
            for at, (convolution, bn) in enumerate(layers):
                y = convolved(_activated(block.act, y) if at else y, packed, convolution, taps(convolution))
                y = _normed(bn, y)
            if block.downsample is not None:
                convolution, bn = block.downsample.children()
                rest = _normed(bn, convolved(rest, packed, convolution, None))
            rest = _activated(block.act, y.add_(rest))
        return unpack(rest, packed)


def _entered(block: Any, x: Tensor, packed: Packing) -> tuple[Tensor, list[tuple[Any, Any]]]:
    """The rows behind the transition of a stage's first block, which reads the map as it is, and the layers that are
    left to do."""
    layers = _layers(block)
    while layers[0][0].kernel_size == (1, 1):
        convolution, bn = layers.pop(0)
        x = _activated(block.act, bn(convolution(x)))
    convolution, bn = layers.pop(0)
    taps = taps_of_map(packed, convolution.kernel_size[0], convolution.dilation[0])
    return _activated(block.act, _normed(bn, convolved_map(x, packed, convolution, taps))), layers


def active(blocks: nn.Module) -> list[Any]:
    """The blocks of a row that run."""
    every = list(blocks.children())
    return every[: blocks.active] if isinstance(blocks, Elastic) else every


def _layers(block: Any) -> list[tuple[Any, Any]]:
    """The convolutions of a residual branch with their norms; an activation is between two of them."""
    found = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
    return [*found, (block.conv3, block.bn3)] if isinstance(block, Bottleneck) else found


def _normed(bn: nn.Module, rows: Tensor) -> Tensor:
    """A batch norm in use, on rows ``[R, C]``; one that was folded into its convolution does nothing."""
    if not isinstance(bn, nn.BatchNorm2d):
        return bn(rows)
    return F.batch_norm(rows, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)


def _activated(act: nn.Module, y: Tensor) -> Tensor:
    """The activation of what nobody else reads: in place, where that is known how."""
    return y.relu_() if isinstance(act, nn.ReLU) else act(y)


def best_form(module: Any, mask: Tensor) -> Literal["packed", "dense", "plain", "strided"]:
    """How an op under a mask is to be computed: in packed form, in dense form, dense without a look at a mask that has
    no low patch, or as the strided network where there is no high one.

    The mask is looked at in use only. What has gradients, is exported or holds choices is dense.
    """
    if module.is_open:
        return "dense"
    if module.resolution.active != "mask":
        return "strided" if module.resolution.active == "low" else "plain"
    if module.training or mask.is_meta or torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return "dense"
    if torch.jit.is_tracing():
        return "dense"
    low = float((mask > 0.5).float().mean())
    wanted = module.backend == "packed" or (module.backend == "auto" and low >= PACKED_FROM)
    if wanted and not torch.is_grad_enabled():
        return "packed"
    return "dense" if low else "plain"
