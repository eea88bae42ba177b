"""How sure a score is: the delete-a-group jackknife (Kott, Journal of Official Statistics 17, 2001).

Image n belongs to group n modulo the number of groups. Each group is left out in turn, and the score measured again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

JACKKNIFE_GROUPS = 10


def groups_of(images: int) -> int:
    """How many groups: 10, with fewer than 20 images half as many as there are images, with fewer than 4 none."""
    groups = min(JACKKNIFE_GROUPS, images // 2)
    return groups if groups > 1 else 0


def remaining(images: int) -> list[np.ndarray]:
    """The places of the images that remain where each group is left out in turn; nothing without groups."""
    groups, places = groups_of(images), np.arange(images)
    return [places[places % groups != group] for group in range(groups)]


def jackknife_error(without: Sequence[float] | np.ndarray) -> float:
    """The standard error of a value, from the same value with each of g equal groups of images left out in turn:
    ``se^2 = (g - 1) / g * sum (v_i - mean v)^2`` (Tukey's jackknife, by groups). nan without two groups.
    """
    values = np.asarray(without, float)
    groups = len(values)
    if groups < 2:
        return math.nan
    return math.sqrt((groups - 1) / groups * float(((values - values.mean()) ** 2).sum()))
