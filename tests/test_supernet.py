"""Supernets: what is shared, and that a derived network is the subnet. Gradients are in test_gradients.py."""

from __future__ import annotations

import random

import pytest
import torch
from small import KINDS, SPECS
from torch import Tensor

from data.structures import Targets
from engine.calibrate import calibrate
from models.cost import count_params
from models.elastic import ElasticConv2d, elastic_leaves
from models.network import build, head_maximum
from models.parse import dump, parse_text
from models.spec import Choice
from models.supernet import Supernet
from search.space import SearchSpace


def supernet(kind: str, dtype: torch.dtype = torch.float32) -> Supernet:
    torch.manual_seed(0)
    return Supernet(parse_text(SPECS["independent" if kind == "independent" else "shared"]), kind).to(dtype)


def a_batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Targets]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(4, 3, 64, 64, generator=generator, dtype=dtype)
    boxes = torch.tensor([[5.0, 6, 20, 30], [10, 10, 50, 60], [30, 2, 60, 20], [20, 20, 33, 37]])
    return images, Targets(boxes, torch.tensor([0, 1, 2, 0]), torch.arange(4))


def architectures(net: Supernet, count: int) -> list[dict]:
    space = SearchSpace.of(net.spec)
    rng = random.Random(3)
    return [dict(space.sample(rng).picks) for _ in range(count)]


def homogeneous(net: Supernet) -> list[dict]:
    """The same kernel and activation everywhere, at the largest and smallest depth."""
    found = []
    for kernel in (3, 5):
        for act in ("relu", "leaky", "mish"):
            for depth in (min, max):
                wanted = {"kernel": kernel, "act": act}
                found.append(
                    {c.name: wanted.get(c.name.rpartition(".")[2], depth(c.options, key=str)) for c in net.spec.choices}
                )
    return found


@pytest.mark.parametrize("kind", [*KINDS, "merge"])
def test_a_derived_network_is_the_activated_subnet_after_calibration(kind):
    net = supernet(kind)
    images, targets = a_batch()
    for picks in [*homogeneous(net), *architectures(net, 8)]:
        net.activate(picks)
        calibrate(net.network, [images])
        net.eval()
        with torch.no_grad():
            expected, _ = net.network(images)
            plain = net.derive(picks).eval()
            found, _ = plain(images)
        limit = 1e-5 * head_maximum(expected)
        for a, b in zip(expected, found, strict=True):
            assert (a - b).abs().max() <= limit
        rebuilt = build(parse_text(dump(plain.spec)))  # from its own YAML, without any trace of the search
        assert rebuilt.state_dict().keys() == plain.state_dict().keys()
        assert count_params(plain) == count_params(rebuilt) < count_params(net.network)
        assert not list(elastic_leaves(plain))


def test_the_3x3_kernel_is_the_centre_of_the_5x5():
    conv = ElasticConv2d(4, 6, Choice("k", (3, 5)))
    x = torch.randn(2, 4, 9, 9)
    ring = torch.zeros_like(conv.weight)
    ring[:, :, 1:4, 1:4] = conv.kernel(3).detach()
    small = conv.option(3, x)
    with torch.no_grad():
        conv.weight.copy_(ring)
    torch.testing.assert_close(conv.option(5, x), small)
