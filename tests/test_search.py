"""How a search splits its data."""

from __future__ import annotations

import random

import numpy as np
import pytest

from data.structures import Fault, Sample
from search.run import split_train


def test_weights_and_alphas_never_see_the_same_image(tmp_path):
    empty = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    samples = [Sample(tmp_path / f"{number}.jpg", *empty) for number in range(400)]
    weights, judging = split_train(samples)
    assert len(judging) == 80 and len(weights) == 320
    assert not {s.path for s in weights} & {s.path for s in judging}
    shuffled = random.Random(0).sample(samples, len(samples))
    assert {s.path for s in split_train(shuffled)[1]} == {s.path for s in judging}
    assert len(split_train(samples[:100])[1]) == 32 and len(split_train(samples[:20])[1]) == 10
    with pytest.raises(Fault, match="two or more training images"):
        split_train(samples[:1])
