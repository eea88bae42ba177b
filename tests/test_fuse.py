"""Fusion: fewer parameters, the same outputs, and nothing folded that a norm does not directly follow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_ops import ROW, ROWS, scramble, spec_with
from torch import Tensor, nn

from models.cost import count_params
from models.fuse import Folded, fuse
from models.graph import normalize, resolve
from models.network import Network, build, head_maximum
from models.ops.conv import Conv
from models.ops.rep import RepConv
from models.parse import parse
from models.registry import OPS, register_op
from models.spec import ModelSpec, Scaling
from models.supernet import Supernet

CFG = Path(__file__).resolve().parents[1] / "cfg" / "models"
ALLOWED = 1e-4  # of the head's largest logit


def plain_files() -> list[Path]:
    return [path for path in sorted(CFG.glob("**/*.yaml")) if not parse(path).choices]


def images(size: int) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def trained(network: Network) -> Network:
    torch.manual_seed(0)
    scramble(network)
    return network.eval()


def narrow(spec: ModelSpec) -> ModelSpec:
    """The same rows at an eighth of the channels and a third of the repeats, also those that no multiple scales."""

    def eighth(value: object) -> object:
        if isinstance(value, tuple):
            return tuple(eighth(item) for item in value)
        return value // 8 if isinstance(value, int) and value >= 16 else value

    unscaled = {"RepNCSPELAN4": 1, "ELAN1": 1, "SPPELAN": 1, "CBLinear": 0, "CBFuse": 0}  # from which argument on
    layers = []
    for layer in spec:
        first = unscaled.get(layer.op, len(layer.args))
        layers.append(replace(layer, args=(*layer.args[:first], *map(eighth, layer.args[first:]))))
    return replace(spec, layers=tuple(layers), scaling=Scaling(spec.scaling.depth / 3, spec.scaling.width / 8))


def worst_difference(one: Network, other: Network, x: Tensor) -> float:
    """The largest difference of two networks' logits, as a share of the largest logit."""
    with torch.no_grad():
        found = other(x)[0]
        wanted = one(x)[0][-len(found) :]  # a fused v10Detect has its second head only
    return max(float((y - z).abs().max()) for y, z in zip(wanted, found, strict=True)) / head_maximum(wanted)


def has_norms(network: Network) -> bool:
    return any(isinstance(module.bn, nn.BatchNorm2d) for module in network.modules() if isinstance(module, Conv))


@pytest.mark.parametrize("path", plain_files(), ids=lambda path: path.stem)
def test_a_fused_model_file_gives_the_same_logits(path: Path) -> None:
    network = trained(build(narrow(parse(path))))
    fused = fuse(network)
    assert worst_difference(network, fused, images(max(64, network.max_stride))) < ALLOWED
    assert count_params(fused) < count_params(network) and not has_norms(fused)


@pytest.mark.parametrize("row", ROWS)
def test_a_fused_op_gives_the_same_logits_behind_it(row: str) -> None:
    network = trained(build(spec_with(row)))
    fused = fuse(network)
    assert worst_difference(network, fused, images(64)) < ALLOWED and not has_norms(fused)
    assert not any(isinstance(module, RepConv) for module in fused.modules())  # each is one convolution now


def test_a_norm_that_is_not_folded_would_be_noticed() -> None:
    network = trained(build(spec_with("[-1, 1, Conv, [12, 3, 2]]")))
    forgotten = fuse(network)
    forgotten.layers[ROW].conv = network.layers[ROW].conv
    assert worst_difference(network, forgotten, images(64)) > 100 * ALLOWED


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [("yolov4-p5", 70_834_012, 70_794_268), ("yolov5n", 1_872_157, 1_867_405), ("yolov5s", 7_235_389, 7_225_885)],
)
def test_as_many_parameters_are_left_as_in_the_published_models(name: str, before: int, after: int) -> None:
    path = CFG / f"{name}.yaml"
    if not path.is_file():
        pytest.skip(f"no {path.name} in cfg/models")
    with torch.device("meta"):
        network = Network(resolve(parse(path)))
        assert (count_params(network), count_params(fuse(network))) == (before, after)


def test_a_searched_block_can_be_fused_once_it_is_derived() -> None:
    torch.manual_seed(0)
    net = Supernet(normalize(parse(CFG / "tiny-search.yaml")), "shared")
    scramble(net)
    picks = {choice.name: choice.options[-1] for choice in net.spec.choices}
    derived = net.derive(picks).eval()
    assert worst_difference(derived, fuse(derived), images(64)) < ALLOWED
    with pytest.raises(AssertionError, match="derived"):
        fuse(net.network)


def test_a_fused_network_cannot_be_trained_and_leaves_the_first_as_it_was() -> None:
    network = trained(build(spec_with("[-1, 1, BottleneckCSP, [12]]"))).train()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    fused = fuse(network)
    assert network.training and not fused.training
    assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())
    fused.train()
    with pytest.raises(RuntimeError, match="train the network it was made from"):
        fused(images(64))


def test_only_what_is_known_to_follow_is_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op of a user: its row of modules can be folded, its own forward cannot be read."""

    class Mine(nn.Module):
        def __init__(self, c_in: int, c_out: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(c_in, c_out, 1)
            self.bn = nn.BatchNorm2d(c_out)
            self.row = nn.Sequential(
                nn.Conv2d(c_out, c_out, 1), nn.BatchNorm2d(c_out), nn.ReLU(), nn.BatchNorm2d(c_out)
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.row(self.bn(self.conv(x).relu()))

    monkeypatch.setitem(OPS, "Mine", None)  # taken out again afterwards
    register_op()(Mine)
    network = trained(build(spec_with("[-1, 1, Mine, [12]]")))
    fused = fuse(network)
    assert [type(module) for module in fused.layers[ROW].row] == [nn.Conv2d, Folded, nn.ReLU, nn.BatchNorm2d]
    assert isinstance(fused.layers[ROW].bn, nn.BatchNorm2d)
    assert worst_difference(network, fused, images(64)) < ALLOWED


def test_shared_weights_are_folded_for_each_norm_on_its_own() -> None:
    shared = nn.Conv2d(4, 4, 3)
    towers = nn.ModuleList(nn.Sequential(shared, nn.BatchNorm2d(4)) for _ in range(2))
    scramble(towers)
    network = trained(build(spec_with("[-1, 1, Conv, [12]]")))
    network.add_module("towers", towers.eval())
    fused = fuse(network)
    x = torch.rand(2, 4, 8, 8)
    for tower, folded in zip(network.towers, fused.towers, strict=True):
        torch.testing.assert_close(tower(x), folded(x), rtol=1e-4, atol=1e-5)
