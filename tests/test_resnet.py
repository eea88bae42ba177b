"""Residual networks: the counts, the names and the numbers of torchvision's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from test_ops import scramble
from torch import Tensor
from torch.nn import functional as F

from data.structures import Fault
from models.__main__ import main
from models.checkpoint import load_checkpoint, restore
from models.cost import network_costs, totals
from models.efficientnet import NORMALIZATIONS
from models.foreign import import_weights
from models.graph import resolve
from models.network import Network, build
from models.ops.resnet import ResStage
from models.parse import parse, parse_text
from models.registry import OPS
from models.resnet import prefix_of, rows_of
from models.spec import ModelSpec

CFG = Path(__file__).resolve().parents[1] / "cfg" / "models"
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
# As counted for the networks of torchvision 0.28: parameters, and what a state dict holds.
COUNTS = {18: (11_689_512, 122), 34: (21_797_672, 218), 50: (25_557_032, 320), 101: (44_549_160, 626)}
GMACS = {18: 1.814, 34: 3.664, 50: 4.089, 101: 7.801}  # in torchvision's own table, at 224 px

SMALL = """\
nc: 5
activation: relu
backbone:
  - [-1, 1, Conv, [8, 7, 2, {{eps: 1e-5}}]]
  - [-1, 1, nn.MaxPool2d, [3, 2, 1]]
  - [-1, 1, ResStage, [16, 1, {{block: {block}}}]]
  - [-1, {number}, ResStage, [24, 2, {{block: {block}}}]]
head:
  - [-1, 1, Classify, [nc]]
"""
KINDS = ("basic", "bottleneck")


def small(block: str = "basic", number: int = 2) -> ModelSpec:
    return parse_text(SMALL.format(block=block, number=number), "mine.yaml")


def names_of_torchvision(size: int) -> list[str]:
    """The names of a state dict, as torchvision's classes define their parts."""
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    parts = (1, 2, 3) if size >= 50 else (1, 2)
    found = ["conv1.weight", *(f"bn1.{kind}" for kind in norm)]
    for stage, number in enumerate(BLOCKS[size], start=1):
        for index in range(number):
            block = f"layer{stage}.{index}"
            for part in parts:
                found += [f"{block}.conv{part}.weight", *(f"{block}.bn{part}.{kind}" for kind in norm)]
            if index == 0 and (stage > 1 or size >= 50):
                found += [f"{block}.downsample.0.weight", *(f"{block}.downsample.1.{kind}" for kind in norm)]
    return [*found, "fc.weight", "fc.bias"]


def under_their_names(network: Network, prefix: str = "") -> dict[str, Tensor]:
    found = {}
    for name, tensor in network.state_dict().items():
        _, row, inside = name.split(".", 2)
        if row == "0":
            theirs = inside.replace("conv.", "conv1.").replace("bn.", "bn1.")
        else:
            theirs = inside.replace("blocks.", f"layer{int(row) - 1}.").replace("linear.", "fc.")
        found[prefix + theirs] = tensor.clone()
    return found


def logits_by_hand(state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The network of a state dict with torchvision's names, in eval mode, written with functions alone."""

    def normed(name: str, y: Tensor) -> Tensor:
        of = {kind: state[f"{name}.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias")}
        return F.batch_norm(y, *of.values(), training=False, eps=1e-5)

    def block(name: str, y: Tensor, stride: int) -> Tensor:
        strided = {"conv1": 1, "conv2": stride, "conv3": 1} if f"{name}.conv3.weight" in state else {"conv1": stride}
        z = y
        for part in (1, 2, 3):
            weight = state.get(f"{name}.conv{part}.weight")
            if weight is None:
                break
            z = F.relu(z) if part > 1 else z
            step = strided.get(f"conv{part}", 1)
            z = normed(f"{name}.bn{part}", F.conv2d(z, weight, stride=step, padding=weight.shape[-1] // 2))
        if f"{name}.downsample.0.weight" in state:
            y = normed(f"{name}.downsample.1", F.conv2d(y, state[f"{name}.downsample.0.weight"], stride=stride))
        return F.relu(y + z)

    y = F.relu(normed("bn1", F.conv2d(x, state["conv1.weight"], stride=2, padding=3)))
    y = F.max_pool2d(y, 3, 2, 1)
    names = sorted({tuple(map(int, name[5:].split(".")[:2])) for name in state if name.startswith("layer")})
    for stage, index in names:
        y = block(f"layer{stage}.{index}", y, 2 if stage > 1 and index == 0 else 1)
    return F.linear(y.mean((2, 3)), state["fc.weight"], state["fc.bias"])


def trained(spec: ModelSpec) -> Network:
    torch.manual_seed(0)
    network = build(spec)
    scramble(network)
    return network.eval()


# ---- the files


@pytest.mark.parametrize("size", COUNTS)
def test_every_tensor_of_torchvision_has_its_place(size: int) -> None:
    graph = resolve(parse(CFG / f"resnet{size}.yaml"))
    costs = network_costs(graph, 224)
    with torch.device("meta"):
        ours = Network(graph).state_dict()
    names = names_of_torchvision(size)
    params, macs = totals(costs)
    assert (params, len(names)) == COUNTS[size]
    assert macs / 1e9 == pytest.approx(GMACS[size], abs=6e-4)
    state = {f"module.{name}": torch.tensor(place) for place, name in enumerate(names)}
    assert prefix_of(state) == "module."
    rows, notes = rows_of(Path("state.pth"), state, "module.", graph)
    placed = {f"layers.{row}.{name}": int(place) for row, inside in rows.items() for name, place in inside.items()}
    assert placed == {name: place for place, name in enumerate(ours)}  # in the same order, too
    assert notes == []


@pytest.mark.parametrize("size", COUNTS)
def test_a_file_says_its_counts(size: int) -> None:
    text = (CFG / f"resnet{size}.yaml").read_text()
    assert f"{COUNTS[size][0]:,} parameters and\n# {GMACS[size]} GMACs at 224 px" in text


@pytest.mark.parametrize("size", [18, 50])
def test_a_pyramid_stands_on_the_same_rows(size: int) -> None:
    """So that a checkpoint of the classifier is a start for it."""
    plain, *others = (parse(CFG / f"resnet{size}{kind}.yaml").layers[:6] for kind in ("", "-fpn-cls", "-fpn-fal-cls"))
    assert all(
        [(row.op, row.args, row.kwargs) for row in other] == [(r.op, r.args, r.kwargs) for r in plain]
        for other in others
    )


# ---- the numbers


@pytest.mark.parametrize("block", KINDS)
def test_weights_of_torchvision_give_its_logits(block: str, tmp_path: Path) -> None:
    network = trained(small(block))
    state = under_their_names(network)
    images = torch.rand(2, 3, 64, 96)
    torch.save(state, tmp_path / "tv.pth")
    (tmp_path / "mine.yaml").write_text(SMALL.format(block=block, number=2).replace("nc: 5", "nc: 7"))
    for flags, normalization in ((["--normalization", "none"], "none"), ([], "imagenet")):
        files = [str(tmp_path / "tv.pth"), "--cfg", str(tmp_path / "mine.yaml"), "-o", str(tmp_path / "ours.pt")]
        assert main(["import", *files, "--imgsz", "64", *flags]) == 0
        found = restore(load_checkpoint(tmp_path / "ours.pt")).eval()
        mean, std = (torch.tensor(values)[:, None, None] for values in NORMALIZATIONS[normalization])
        with torch.no_grad():
            wanted = logits_by_hand(state, (images - mean) / std)
            torch.testing.assert_close(found(images)[0][0], wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("block", KINDS)
def test_a_stage_whose_stride_is_a_dilation_has_the_same_values_between_others(block: str) -> None:
    """Where a strided stage has cells: the first convolution loses its stride, all behind it look twice as far."""
    torch.manual_seed(0)
    strided = ResStage(8, 16, 2, 3, block=block, act="relu").eval()
    scramble(strided)
    dilated = ResStage(8, 16, 1, 3, block=block, dilation=2, act="relu").eval()
    dilated.load_state_dict(strided.state_dict())
    x = torch.randn(2, 8, 12, 16)
    with torch.no_grad():
        torch.testing.assert_close(dilated(x)[..., ::2, ::2], strided(x), rtol=0, atol=1e-5)
    twice = ResStage(16, 16, 1, 2, block=block, dilation=4, act="relu").eval()  # as layer4 at stride 8
    convolutions = [
        m.dilation[0] for m in twice.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)
    ]
    assert convolutions == ([2, 4, 4, 4] if block == "basic" else [2, 4])
    assert [*ResStage(8, 8, first_dilation=3, dilation=2).modules()][3].dilation == (3, 3)


def test_norms_are_those_of_torchvision() -> None:
    norms = [m for m in ResStage(8, 16, 2).modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-5, 0.1)}
    assert [float(norm.weight.detach().abs().sum()) for norm in norms] == [16, 0, 16]  # the branch begins as nothing


def test_a_sum_is_that_of_all_its_sources() -> None:
    maps = [torch.full((1, 2, 3, 3), float(value)) for value in (1, 2, 4)]
    assert torch.equal(OPS["Add"].module()(maps), torch.full((1, 2, 3, 3), 7.0))
    assert torch.equal(maps[0], torch.ones(1, 2, 3, 3))


# ---- what does not fit


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("[-1, 1, ResStage, [10, 1, {block: bottleneck}]]", "needs 4 times a whole number of channels, got 10"),
        ("[[0, 1], 1, Add, []]", "the sources have different strides [2, 4]; all must be at one"),
        ("[[-1, 2], 1, Add, []]", "the sources have different channels [8, 16]; a sum needs the same of all"),
    ],
)
def test_what_an_op_cannot_do_is_told(row: str, told: str) -> None:
    front = "nc: 2\nactivation: relu\nbackbone:\n"
    before = "[-1, 1, Conv, [8, 3, 2]]\n  - [-1, 1, Conv, [8, 3, 2]]\n  - [-1, 1, Conv, [16]]\n  - [1, 1, Conv, [8]]"
    with pytest.raises(Fault) as caught:
        resolve(parse_text(f"{front}  - {before}\n  - {row}\nhead:\n  - [-1, 1, Classify, [nc]]\n"))
    assert told in str(caught.value)


def test_weights_of_another_network_are_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "tv.pth"
    torch.save(under_their_names(trained(small(number=3))) | {"extra.weight": torch.zeros(2)}, path)

    def told(spec: ModelSpec) -> str:
        with pytest.raises(Fault) as caught:
            import_weights(path, spec)
        return str(caught.value).replace(str(tmp_path) + "/", "")

    assert told(small()) == "tv.pth: has stages of 1, 3 blocks, mine.yaml of 1, 2"
    assert "mine.yaml:6:5 layer 2 [-1, 1, ResStage, [16, 1, {block: bottleneck}]]: needs blocks.0.conv1.weight" in told(
        small("bottleneck", 3)
    )
    assert told(parse(CFG / "resnet18-fpn-cls.yaml")) == (
        f"tv.pth: is a residual network, but {CFG / 'resnet18-fpn-cls.yaml'} is no plain classifier of this kind; "
        f"import it with one as cfg/models/resnet50.yaml, then train.py --weights takes what fits"
    )
    _, notes = import_weights(path, small(number=3), normalization="none")
    assert notes == ("in no part of a residual network, not used: extra.weight [2]",)
