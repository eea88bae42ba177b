"""Every op of the table: importing this package registers them. One file a family."""

from models.heads import dfl as _dfl
from models.heads import yolo as _yolo
from models.ops import conv, csp, ghost, merge, spp, transformer

__all__ = ["_dfl", "_yolo", "conv", "csp", "ghost", "merge", "spp", "transformer"]
