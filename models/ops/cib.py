"""Compact blocks and down-sampling of YOLOv10 (Wang et al., arXiv 2405.14458, section 3.3.1).

Channels are mixed by 1x1 convolutions and places by depth-wise ones, never both at once.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.ops.conv import Conv
from models.ops.csp import csp_shape, start_as_nothing
from models.ops.dense import dense, gather
from models.ops.primitives import DEFAULT, Act, Acts, Count, Fraction, Kernel, Kernels, Step, Width, each
from models.ops.rep import RepConv
from models.registry import register_op

LARGE = 7  # kernel of the depth-wise convolution in the middle where it is a large one


@register_op()
class SCDown(nn.Module):
    """1x1 to the channels wanted, then depth-wise to the size wanted, without activation.

    Shape: ``[N, c_in, H, W] -> [N, c_out, H // stride, W // stride]``
    """

    def __init__(self, c_in: int, c_out: Width, kernel: Kernel = 3, stride: Step = 2, *, act: Act = DEFAULT) -> None:
        super().__init__()
        self.cv1 = Conv(c_in, c_out, 1, act=act)
        self.cv2 = Conv(c_out, c_out, kernel, stride, groups=c_out, act="identity")

    def forward(self, x: Tensor) -> Tensor:
        return self.cv2(self.cv1(x))


class CIB(nn.Module):
    """Depth-wise, 1x1 to twice the channels, depth-wise, 1x1 back, depth-wise. Shape: ``[N, channels, H, W]``.

    With `large` the one in the middle is 7 x 7 with a 3 x 3 beside it, which folds.
    """

    def __init__(self, channels: int, shortcut: bool, large: bool, kernel: Kernel, act: Act) -> None:
        super().__init__()
        wide = 2 * channels
        middle: nn.Module = Conv(wide, wide, kernel, groups=wide, act=act)
        if large:
            middle = RepConv(wide, wide, LARGE, groups=wide, beside=3, identity=False, act=act)
        self.cv1 = nn.Sequential(
            Conv(channels, channels, kernel, groups=channels, act=act),
            Conv(channels, wide, 1, act=act),
            middle,
            Conv(wide, channels, 1, act=act),
            Conv(channels, channels, kernel, groups=channels, act=act),
        )
        self.add = shortcut
        if self.add:
            start_as_nothing(self.cv1[-1])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv1(x) if self.add else self.cv1(x)


@register_op(infer=csp_shape)
class C2fCIB(nn.Module):
    """`C2f` with compact blocks. Shape: ``[N, c_in, H, W] -> [N, c_out, H, W]``"""

    def __init__(
        self,
        c_in: int,
        c_out: Width,
        number: Count = 1,
        shortcut: bool = False,
        large: bool = False,
        expansion: Fraction = 0.5,
        *,
        kernel: Kernels = 3,
        act: Acts = DEFAULT,
    ) -> None:
        super().__init__()
        first = each(act, 0)
        hidden = int(c_out * expansion)
        self.cv1 = Conv(c_in, 2 * hidden, 1, act=first)
        self.cv2 = gather(hidden, c_out, number, first)
        self.m = dense(number, lambda index: CIB(hidden, shortcut, large, each(kernel, index), each(act, index)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv2(self.m(self.cv1(x)))
