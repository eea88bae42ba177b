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

from models.elastic import Elastic
from models.ops.mask import OwnStart, passes_map, patch_side
from models.ops.packed import Packing, Taps, convolved, convolved_map, pack, packing, taps_inside, taps_of_map, unpack
from models.ops.primitives import DEFAULT, Act, Count, Eps, Kernel, Step, Width, activation, conv, norm
from models.ops.resnet import EPS, EXPANSION, Bottleneck, ResStage, dilations, stage_shape
from models.registry import Shape, one_to_one, register_op
from models.spec import Choice

# The share of low patches from which on the packed form is faster: bench/masked.py --threshold measures it.
PACKED_FROM = 0.2

Pool = Literal["pick", "avg", "max", "softmax"]
Backend = Literal["auto", "dense", "packed"]
PlainResolution = Literal["mask", "low", "high"]
Resolution = PlainResolution | Choice
Wide = Callable[[nn.Module, Tensor], Tensor]  # how a convolution with neighbours is computed
Expected = Annotated[float, Field(ge=0, le=1)]


# ---- maps under a mask, dense


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
