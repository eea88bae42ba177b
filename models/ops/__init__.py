"""Every op of the table: importing this package registers them. One file a family."""

from models.heads import yolo as _yolo
from models.ops import conv, csp, ghost, merge, spp, transformer

__all__ = ["_yolo", "conv", "csp", "ghost", "merge", "spp", "transformer"]
