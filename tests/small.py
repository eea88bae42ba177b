"""Small model files that several tests build."""

from __future__ import annotations

TINY = """
nc: 3
activation: mish
anchors: [[10, 13, 16, 30], [30, 61, 62, 45]]
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, {number}, BottleneckCSP, [16, {{kernel: {{choice: [3, 5]}}, act: {{choice: [relu, leaky, mish]}}}}]]
head:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, {number}, MBottleneckCSP2, [16]]
  - [[2, 4], 1, Detect, [nc, anchors]]
"""
SPECS = {
    "shared": TINY.format(number="{choice: [1, 2, 3]}"),
    "independent": TINY.format(number=2),
}
KINDS = ["shared", "independent"]

TWO_ROWS = """
nc: 2
anchors: [[10, 13, 16, 30]]
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, {choice: [1, 2, 3]}, MBottleneckCSP2, [8]]
head:
  - [-1, 2, MBottleneckCSP2, [8]]
  - [-1, 1, Detect, [nc, anchors]]
"""
