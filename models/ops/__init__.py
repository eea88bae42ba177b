"""Every op of the table: importing this package registers them. One file a family."""

from models.heads import classify as _classify
from models.heads import dfl as _dfl
from models.heads import ssd as _ssd
from models.heads import yolo as _yolo
from models.ops import attention, conv, csp, fusion, ghost, mbconv, merge, spp, transformer

__all__ = [
    "_classify",
    "_dfl",
    "_ssd",
    "_yolo",
    "attention",
    "conv",
    "csp",
    "fusion",
    "ghost",
    "mbconv",
    "merge",
    "spp",
    "transformer",
]
