"""The parts of a search's training images: those that train the weights, and those that move alphas and judge."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from data.structures import Fault, Sample

JUDGING_PART, FEWEST_JUDGING, MOST_JUDGING = 0.2, 32, 2_000  # of the training images; the weights never see them


def split_train(samples: Sequence[Sample], by_class: bool = False) -> tuple[list[Sample], list[Sample]]:
    """Images for the weights, and images for alphas and judging: disjoint, chosen by the hash of the file's name.

    The second part is a fifth, at least 32 and at most 2,000 images, and never more than half. With `by_class` each
    class, which is that of an image's one box, gives its share.
    """
    ranked = sorted(samples, key=lambda sample: hashlib.sha256(sample.path.name.encode()).digest())
    count = round(JUDGING_PART * len(ranked))
    count = min(max(count, FEWEST_JUDGING), MOST_JUDGING, len(ranked) // 2)
    if count < 1:
        raise Fault(f"a search needs two or more training images, got {len(ranked)}")
    if by_class:
        ranked = spread_by_class(ranked)
    judging = {sample.path for sample in ranked[:count]}
    return [s for s in samples if s.path not in judging], [s for s in samples if s.path in judging]


def spread_by_class(samples: Sequence[Sample]) -> list[Sample]:
    """The same in such an order that any first part of them has its share of every class; else as they were."""
    classes = [int(sample.labels[0]) for sample in samples]
    sizes, seen = Counter(classes), Counter[int]()
    places = []
    for label in classes:
        places.append((seen[label] + 0.5) / sizes[label])
        seen[label] += 1
    order = sorted(range(len(samples)), key=lambda index: places[index])
    return [samples[index] for index in order]
