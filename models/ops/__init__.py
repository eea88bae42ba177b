"""Every op of the table: importing this package registers them. One file a family."""

from models.heads import classify as _classify
from models.heads import dfl as _dfl
from models.heads import segment as _segment
from models.heads import ssd as _ssd
from models.heads import yolo as _yolo
from models.heads import yolox as _yolox
from models.ops import (
    area,
    aspp,
    attention,
    branch,
    c3k2,
    cbnet,
    cib,
    conv,
    csp,
    elan,
    fusion,
    ghost,
    mask,
    masked,
    masked_csp,
    mbconv,
    merge,
    psa,
    rep,
    resize,
    resnet,
    spp,
    transformer,
    yolov7,
    yolox,
)

__all__ = [
    "_classify",
    "_dfl",
    "_segment",
    "_ssd",
    "_yolo",
    "_yolox",
    "area",
    "aspp",
    "attention",
    "branch",
    "c3k2",
    "cbnet",
    "cib",
    "conv",
    "csp",
    "elan",
    "fusion",
    "ghost",
    "mask",
    "masked",
    "masked_csp",
    "mbconv",
    "merge",
    "psa",
    "rep",
    "resize",
    "resnet",
    "spp",
    "transformer",
    "yolov7",
    "yolox",
]
