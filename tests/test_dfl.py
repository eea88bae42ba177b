"""The anchor-free head and the block C2f in all that the program does with a network, from the YAML to a front."""

from __future__ import annotations

import csv
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from test_gradients import a_batch, mixture, one_hot, smooth_loss
from test_ops import scramble
from torch import nn

from data.shapes import draw_shapes
from engine import export
from engine.infer import main as detect
from engine.train import main as train
from engine.validate import main as val
from models.__main__ import main as models
from models.checkpoint import load_checkpoint, restore, save_checkpoint
from models.elastic import elastic_leaves
from models.fuse import fuse
from models.graph import resolve
from models.network import Network, build
from models.parse import dump, parse, parse_text
from models.supernet import Supernet
from search.costs import cost_tables
from search.run import main as search

ROOT = Path(__file__).resolve().parents[1]
FILE = """
nc: 80
depth_multiple: 1.0
width_multiple: 1.0
activation: relu
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 4]]
  - [-1, {number}, C2f, [16, {{shortcut: True, kernel: {kernel}, act: {act}}}]]
head:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, C2f, [16]]
  - [[2, 4], 1, DFLDetect, [nc, 8]]
"""
PLAIN = FILE.format(number=2, kernel=3, act="mish")
OPEN = FILE.format(
    number="{choice: [1, 3]}", kernel="{choice: [1, 3]}", act="{choice: [relu, silu]}, per_bottleneck: true"
)
FEW = FILE.format(number="{choice: [1, 2]}", kernel="{choice: [1, 3]}", act="relu")


# ---- C2f with its choices


def open_net(text: str = OPEN, kind: str = "shared") -> Supernet:
    torch.manual_seed(0)
    net = Supernet(parse_text(text), kind)
    for module in net.network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return net


def test_a_block_concatenates_both_halves_and_what_each_bottleneck_gives():
    """Counted by hand: 2 c c_in + 2 (9 c^2) n + (2 + n) c c_out weights of convolutions, with c half of c_out."""
    torch.manual_seed(0)
    block = build(parse_text(PLAIN)).eval().layers[2]
    weights = sum(p.numel() for p in block.parameters() if p.dim() == 4)
    assert weights == 2 * 8 * 16 + 2 * (2 * 9 * 8**2) + 4 * 8 * 16
    scramble(block)
    x = torch.rand(1, 16, 6, 6)
    first, second = block.cv1(x).chunk(2, dim=1)
    third = second + block.m[0].cv2(block.m[0].cv1(second))
    fourth = third + block.m[1].cv2(block.m[1].cv1(third))
    torch.testing.assert_close(block(x), block.cv2(torch.cat((first, second, third, fourth), dim=1)))


def test_gates_of_a_depth_equal_central_differences_in_float64():
    """A deeper option is asked what its further maps would be worth, not only a shallower one what it would save."""
    net = open_net().double().train()
    loss = smooth_loss(net, a_batch(torch.float64)[0])
    for depth in (1, 3):
        picks = {choice.name: choice.options[-1] for choice in net.spec.choices} | {"2.number": depth}
        _, gradients = net.gate_gradients(picks, loss)
        gates = {name: gate.requires_grad_() for name, gate in one_hot(net, picks).items()}
        with mixture(net, gates):
            expected = torch.autograd.grad(loss(net.network), list(gates.values()))
        for name, gradient, wanted in zip(gates, gradients.values(), expected, strict=True):
            torch.testing.assert_close(gradient, wanted, msg=lambda text, at=name: f"{at}: {text}")
        number = gradients["2.number"]
        assert abs(float(number[0] - number[1])) > 1e-6


def test_every_subnet_costs_what_its_table_says():
    graph = resolve(open_net(FEW).spec)
    tables = cost_tables(graph, 64)
    for picks in ({"2.number": 1, "2.kernel": 3}, {"2.number": 2, "2.kernel": 1}):
        plain = resolve(graph.spec.freeze(picks))
        ((choices, table),) = tables["params"].rows
        of_row = table[tuple(choice.index(picks[choice.name]) for choice in choices)]
        assert tables["params"].fixed + of_row == sum(p.numel() for p in Network(plain).parameters())


# ---- what the commands do with the head


def test_the_commands_show_and_draw_it(tmp_path, capsys):
    file = ROOT / "cfg" / "models" / "yolov8n.yaml"
    assert models(["show", str(file)]) == 0
    *_, head, sums = capsys.readouterr().out.splitlines()
    assert head.split() == "22 15, 18, 21 1 897,664 1,810.6 M 8400x144 DFLDetect nc".split()
    assert sums == f"{file}: 23 rows, 3,157,200 parameters, 4.371 GMACs at 640 px"
    for out in (tmp_path / "p.html", tmp_path / "p.svg"):
        assert models(["draw", str(file), "-o", str(out)]) == 0 and "DFLDetect" in out.read_text()
    spec = parse(file)
    assert dump(parse_text(dump(spec))) == dump(spec)


def test_a_fused_network_predicts_the_same():
    torch.manual_seed(0)
    network = build(parse_text(PLAIN)).eval()
    scramble(network)
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for wanted, found in zip(network.predict(images), fuse(network).predict(images), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    assert sum(isinstance(module, nn.BatchNorm2d) for module in fuse(network).modules()) == 0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_shapes(tmp_path_factory.mktemp("shapes"), train=24, val=6, size=64, seconds=0.2)


@pytest.fixture(scope="module")
def trained(data: Path) -> Path:
    """The run's folder."""
    folder = data.parent
    (folder / "plain.yaml").write_text(PLAIN)
    options = ["--cfg", folder / "plain.yaml", "--data", data, "--epochs", 2, "--batch-size", 8, "--imgsz", 64]
    assert train(list(map(str, [*options, "--project", folder / "train", "--device", "cpu"]))) == 0
    return folder / "train" / "exp"


def test_it_is_trained_measured_and_run(trained: Path, data: Path):
    rows = list(csv.DictReader((trained / "results.csv").open()))
    assert {"box", "cls", "dfl"} <= set(rows[0]) and all(0 < float(row["dfl"]) < 100 for row in rows)
    best = trained / "best.pt"
    assert val(["--weights", str(best), "--data", str(data)]) == 0
    found = ["--weights", best, "--source", data.parent / "images" / "val", "--project", data.parent / "detect"]
    assert detect(list(map(str, [*found, "--conf-thres", 0.001]))) == 0
    assert len(list((data.parent / "detect" / "exp").glob("*.jpg"))) == 6
    network = restore(load_checkpoint(best))
    assert network.num_classes == 5 and network.head.bins == 8


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_an_exported_file_finds_the_same(kind, trained: Path, tmp_path, capsys, request):
    missing = [package for package in export.PACKAGES if find_spec(package) is None]
    if kind == "onnx" and missing:
        pytest.skip(f"{request.node.nodeid}: not installed: {', '.join(missing)} (the extra `export`)")
    weights, network = tmp_path / "best.pt", restore(load_checkpoint(trained / "best.pt"))
    torch.manual_seed(0)
    for scores in network.head.cv3:  # spread from 0 to 1: after two epochs none is over a thousandth
        scores[-1].weight.data.normal_(0, 0.1)
        scores[-1].bias.data.normal_(0, 0.7)
    save_checkpoint(weights, network, ["a", "b", "c", "d", "e"], imgsz=64)
    options = ["--weights", str(weights), "--format", kind, *(["--nms"] if kind == "torch" else [])]
    assert export.main(options) == 0
    assert "parity: boxes " in capsys.readouterr().out


def test_a_search_in_front_of_it_leaves_plain_networks(data: Path):
    folder = data.parent
    (folder / "search.yaml").write_text(FEW)
    for kind in ("shared", "independent"):
        options = ["--cfg", folder / "search.yaml", "--data", data, "--epochs", 3, "--batch-size", 4, "--imgsz", 64]
        options += ["--candidates", 2, "--calibration", 8, "--supernet", kind, "--project", folder / "search"]
        assert search(list(map(str, [*options, "--name", kind]))) == 0
        best = restore(load_checkpoint(folder / "search" / kind / "best.pt"))
        assert best.spec.choices == () and not list(elastic_leaves(best)) and best.head.bins == 8


def test_names_of_weights_are_those_of_the_published_block_and_head():
    """``model.2.m.0.cv1.conv.weight`` there is ``layers.2.m.0.cv1.conv.weight`` here, so that an import finds them."""
    names = set(build(parse_text(PLAIN)).state_dict())
    assert {"layers.2.cv1.conv.weight", "layers.2.cv2.bn.bias", "layers.2.m.1.cv2.conv.weight"} <= names
    assert {"layers.5.cv2.0.0.conv.weight", "layers.5.cv2.1.2.bias", "layers.5.cv3.1.1.bn.weight"} <= names
    assert json.dumps(sorted(name for name in names if name.startswith("layers.5.dfl"))) == '["layers.5.dfl.weight"]'
