"""Exported files: they run without this program, find what the network finds, and none is left that does not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ops import scramble
from torch import Tensor, nn

from data.images import read_image
from data.shapes import draw_image
from data.structures import Detections, Fault
from engine import export, exported
from engine.draw import write_image
from engine.export import OUTPUTS, Exported, appearing, main, write_file
from engine.exported import CANDIDATES, is_exported, read_exported, read_file
from engine.infer import load
from engine.infer import main as detect
from engine.nms import Suppression, nms
from engine.parity import _matched, check_images, check_parity
from engine.validate import main as val
from models.checkpoint import save_checkpoint
from models.cost import count_params
from models.fuse import fuse
from models.network import Network, build
from models.parse import parse_text

TEXT = """
nc: 3
activation: mish
anchors: [[10, 13, 16, 30], [30, 61, 62, 45]]
backbone:
  - [-1, 1, Conv, [8, 3, 4]]
  - [-1, 1, BottleneckCSP, [12]]
  - [-1, 1, nn.ZeroPad2d, [[0, 1, 0, 1]]]  # as in yolov3-tiny: a max pool that sees zeros, not nothing, at the edge
  - [-1, 1, nn.MaxPool2d, [2, 1]]
head:
  - [-1, 1, Conv, [16, 3, 2]]
  - [[1, 4], 1, Detect, [nc, anchors]]
"""
NAMES = ["red", "green", "blue"]
SIZE = 64
ASKED = Suppression(0.25, 0.45, 40)
KINDS = ["torch", "onnx"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return installed(request)


@pytest.fixture(params=[*KINDS, "openvino"])
def every_kind(request: pytest.FixtureRequest) -> str:
    return installed(request)


def installed(request: pytest.FixtureRequest) -> str:
    missing = [package for package in export.NEEDED[request.param] if find_spec(package) is None]
    if missing:
        extra = exported.EXTRAS[request.param]
        pytest.skip(f"{request.node.nodeid}: not installed: {', '.join(missing)} (the extra `{extra}`)")
    return request.param


def a_network(seed: int = 0) -> Network:
    """A plain network whose norms look trained and whose scores are spread from 0 to 1."""
    torch.manual_seed(seed)
    network = build(parse_text(TEXT)).eval()
    scramble(network)
    for layer in network.head.m:
        layer.weight.data.normal_(0, 0.05)
        layer.bias.data.normal_(0, 0.7)
    return network


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "best.pt", a_network(), NAMES, imgsz=SIZE)
    return tmp_path / "best.pt"


def outcome(capsys: pytest.CaptureFixture[str], *options: object) -> tuple[int, str, str]:
    code = main([str(option) for option in options])
    said = capsys.readouterr()
    bars = [line for line in said.err.splitlines() if not line.strip() or "latency:" in line]  # of a slow machine
    return code, said.out, "".join(f"{line}\n" for line in said.err.splitlines() if line not in bars)


# ---- there and back


@pytest.mark.parametrize("inside", [False, True], ids=["plain", "nms"])
def test_a_file_finds_what_the_network_finds(every_kind, inside, weights, capsys):
    kind = every_kind
    options = ["--nms", "--conf-thres", 0.3, "--max-det", 20] if inside else []
    code, said, errors = outcome(capsys, "--weights", weights, "--format", kind, *options)
    out = weights.with_suffix(export.ENDINGS[kind])
    files = [weights, out] + ([out.with_suffix(".bin")] if kind == "openvino" else [])
    assert (code, errors) == (0, "") and sorted(weights.parent.iterdir()) == sorted(files)
    wrote, parity, latency = said.splitlines()
    gives = "boxes, scores, labels, count" if inside else "boxes, scores"
    kept, all_of = count_params(fuse(a_network())), count_params(a_network())
    shape = "[batch, 3, 64, 64]" if kind == "torch" else "[batch, 3, height, width], multiples of 8"
    assert wrote == f"{out}: {shape} -> {gives}; {kept:,} of {all_of:,} parameters, the rest is folded"
    assert parity.startswith("parity: boxes ") and int(parity.split()[-6]) > 10
    assert latency.startswith("latency: torch ") and "torch fused " in latency

    images, network, run = check_images(None, SIZE).repeat(2, 1, 1, 1)[:5], a_network(), read_file(out, kind)
    any_size = [] if kind == "torch" else [images[:2, :, :24], images[:1, :, 8:16, :40]]
    for given in (images[:1], images[:2], images, *any_size):
        batch = len(given)
        with torch.no_grad():
            boxes, scores = network.predict(given)
        found = run(given)
        if not inside:
            torch.testing.assert_close(found[0], boxes, rtol=0, atol=1e-3)
            torch.testing.assert_close(found[1], scores, rtol=0, atol=1e-5)
            continue
        for index in range(batch):
            wanted = nms(boxes[index], scores[index], conf=0.3, iou=0.45, max_det=20, multi_label=False)
            count = int(found[3][index])
            assert count == len(wanted) and (found[1][index, count:] == 0).all()
            torch.testing.assert_close(found[0][index, :count], wanted.boxes, rtol=0, atol=1e-3)
            torch.testing.assert_close(found[1][index, :count], wanted.scores, rtol=0, atol=1e-5)
            assert found[2][index, :count].tolist() == wanted.labels.tolist()
    if kind != "torch":
        assert_same_detections(weights, out, capsys)
        if inside:
            assert_what_it_left_out_is_told(out, weights)
    if kind == "openvino" and not inside:
        assert_an_openvino_file_is_known_by_its_folder_and_whole(out)
        assert_same_measured(weights, out, a_data_set(weights.parent / "set"), capsys)
    if kind == "torch" and not inside:
        return  # the other file is looked at from outside
    outputs = OUTPUTS[inside]
    about = torch_says(out) if kind == "torch" else (onnx_says if kind == "onnx" else openvino_says)(out, outputs)
    assert json.loads(about["names"]) == NAMES and about["imgsz"] == "64" and json.loads(about["strides"]) == [4, 8]
    assert count_params(build(parse_text(about["yaml"]))) == all_of
    wanted = {"conf": 0.3, "iou": 0.45, "max_det": 20, "candidates": CANDIDATES}
    assert json.loads(about.get("nms") or "{}") == (wanted if inside else {})


def assert_same_detections(weights: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint and its file find the same in Python and by the same command: tall, wide, small, in batches."""
    folder = weights.parent / "pictures"
    folder.mkdir()
    for number, (height, width) in enumerate([(64, 64), (40, 100), (90, 33), (17, 20)]):
        write_image(folder / f"{number}.png", draw_image(100, np.random.default_rng(number))[0][:height, :width])
    pictures = sorted(folder.iterdir())
    asked = {"conf": 0.3, "max_det": 20}
    for batch_size in (1, 3):
        mine, other = (load(path)(pictures, **asked, batch_size=batch_size) for path in (weights, file))
        assert sum(map(len, mine)) > 20
        for wanted, found in zip(mine, other, strict=True):
            assert wanted.labels.tolist() == found.labels.tolist() and found.names == tuple(NAMES)
            np.testing.assert_allclose(found.boxes, wanted.boxes, rtol=0, atol=1e-3)
            np.testing.assert_allclose(found.scores, wanted.scores, rtol=0, atol=1e-5)
    rows = []
    for path in (weights, file):
        command = ["--source", folder, "--project", weights.parent / "runs", "--name", path.suffix[1:], "--save-json"]
        more = ["--device", "cpu", "--conf-thres", 0.3, "--max-det", 20, "--nosave"]
        assert detect([str(option) for option in ["--weights", path, *command, *more]]) == 0
        rows.append(json.loads((weights.parent / "runs" / path.suffix[1:] / "predictions.json").read_text()))
    for wanted, found in zip(*rows, strict=True):
        assert [entry["class"] for entry in wanted["detections"]] == [entry["class"] for entry in found["detections"]]
        for this, that in zip(wanted["detections"], found["detections"], strict=True):
            assert this["box"] == pytest.approx(that["box"], abs=0.011)  # written with two decimals
    capsys.readouterr()


def torch_says(path: Path) -> dict[str, str]:
    """What travels in the file, read by a process that knows nothing of this program."""
    script = (
        "import json, sys, torch\n"
        "about = dict.fromkeys(json.loads(sys.argv[2]), '')\n"
        "outputs = torch.export.load(sys.argv[1], extra_files=about).module()(torch.rand(4, 3, 64, 64))\n"
        "assert not {'models', 'engine', 'data'} & set(sys.modules)\n"
        "print(json.dumps([about, [list(y.shape) for y in outputs]]))\n"
    )
    keys = json.dumps(["names", "imgsz", "strides", "yaml", "nms"])
    run = subprocess.run([sys.executable, "-I", "-c", script, path, keys], cwd=path.parent, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    about, shapes = json.loads(run.stdout)
    assert shapes == [[4, 20, 4], [4, 20], [4, 20], [4]]
    return about


def onnx_says(path: Path, outputs: Sequence[str]) -> dict[str, str]:
    import onnx

    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    (images,) = model.graph.input
    batch, channels, *size = (d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim)
    assert (batch, channels) == ("batch", 3) and len(set(size)) == 2 and all(isinstance(side, str) for side in size)
    assert [y.name for y in model.graph.output] == list(outputs) and model.opset_import[0].version == export.OPSET
    return {entry.key: entry.value for entry in model.metadata_props}


def openvino_says(path: Path, outputs: Sequence[str]) -> dict[str, str]:
    import openvino

    model = openvino.Core().read_model(path)
    assert [sorted(y.names) for y in model.outputs] == [[name] for name in outputs]
    assert str(model.input("images").partial_shape) == "[?,3,?,?]"
    return dict(model.get_rt_info([exported.ABOUT]).value)


def a_data_set(folder: Path) -> Path:
    """Three pictures with a box each."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for number in range(3):
        write_image(folder / "images" / f"{number}.png", draw_image(SIZE, np.random.default_rng(number))[0])
        (folder / "labels" / f"{number}.txt").write_text(f"{number} 0.5 0.5 0.4 0.3\n")
    (folder / "data.yaml").write_text(f"train: images\nval: images\nnames: [{', '.join(NAMES)}]\n")
    return folder / "data.yaml"


def assert_an_openvino_file_is_known_by_its_folder_and_whole(file: Path) -> None:
    """Its folder, or the file of its weights, stand for it; a part of it does not."""
    weights, text = file.with_suffix(".bin"), file.read_bytes()
    for known in (file.parent, weights):
        assert read_exported(known).path == file and load(known).names == tuple(NAMES)
    content = weights.read_bytes()
    for damage in (weights.unlink, lambda: weights.write_bytes(content[:100])):
        damage()
        with pytest.raises(Fault, match="best.xml: not a whole OpenVINO file with its weights .*best.bin; export"):
            read_exported(file)
    weights.write_bytes(content)
    for damaged, told in (
        (text[:-20], "not a whole OpenVINO file; export it again"),
        (text.replace(b"oneshot_yolo", b"another_name"), "does not say which classes it finds; export.py writes Open"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(Fault, match=told):
            read_exported(file)
    file.write_bytes(text)


def test_a_file_of_two_appears_whole(tmp_path):
    """And the one of before is there until then, but never beside other weights."""
    out, bin = tmp_path / "a.xml", tmp_path / "a.bin"
    for content in ("old", "new"):
        with appearing(out, "openvino") as temporary:
            temporary.write_text(content)
            temporary.with_suffix(".bin").write_text(content)
            assert not out.exists() or out.read_text() == bin.read_text() == "old"
        assert out.read_text() == bin.read_text() == content
    with pytest.raises(Fault), appearing(out, "openvino") as temporary:
        temporary.write_text("half")
        raise Fault("it is another network")
    assert out.read_text() == bin.read_text() == "new" and len([*tmp_path.iterdir()]) == 2


def test_what_stands_for_an_exported_file(tmp_path, monkeypatch):
    assert [is_exported(name) for name in ("a.onnx", "a.xml", "a.bin", tmp_path, "a.pt", "a.pt2")] == [True] * 4 + [
        False
    ] * 2
    with pytest.raises(Fault, match="a folder with 0 .xml files; name a checkpoint"):
        load(tmp_path)
    monkeypatch.setattr(exported, "find_spec", lambda name: None)
    with pytest.raises(Fault, match=r"a.xml: needs openvino; pip install -e '.\[openvino\]'"):
        load(tmp_path / "a.bin")
    with pytest.raises(Fault, match=r"a.onnx: needs onnxruntime; pip install -e '.\[export\]'"):
        load(tmp_path / "a.onnx")


def test_a_static_file_takes_squares_only(weights, capsys, monkeypatch):
    written = []
    monkeypatch.setattr(export, "write_file", lambda path, *rest: written.append(rest[-1]) or path.touch())
    monkeypatch.setattr(export, "read_file", reading(a_network()))
    monkeypatch.setattr(export, "find_spec", lambda name: object())
    for options, shape in ((["--static"], "[batch, 3, 64, 64]"), ([], "[batch, 3, height, width], multiples of 8")):
        code, said, _ = outcome(capsys, "--weights", weights, "--format", "onnx", *options)
        assert code == 0 and f"{shape} -> boxes, scores;" in said
    assert written == [None, 8]


def assert_what_it_left_out_is_told(file: Path, weights: Path) -> None:
    """Of a file that suppresses at .3, .45 and 20."""
    picture, model = draw_image(SIZE, np.random.default_rng(0))[0], load(file)
    assert len(model(picture)) == len(load(weights)(picture, conf=0.3, max_det=20))
    assert len(model(picture, conf=0.5, max_det=3)) == len(load(weights)(picture, conf=0.5, max_det=3))
    for asked, told in (
        ({"conf": 0.1}, "--conf-thres 0.1: it left out all up to 0.3: "),
        ({"iou": 0.6}, "--iou-thres 0.6: it went by 0.45: "),
        ({"max_det": 30}, "--max-det 30: it gives 20 at most: "),
        ({"agnostic": True}, "--agnostic-nms: it compared boxes of one class only: "),
    ):
        with pytest.raises(Fault) as fault:
            model(picture, **asked)
        assert str(fault.value).startswith(told) and "export it again without --nms" in str(fault.value)


CLASSIFIER = """
nc: 3
activation: silu
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, MBConv, [8, 3, 2, 4]]
head:
  - [-1, 1, Classify, [nc, {dropout: 0.2}]]
"""


def a_classifier() -> Network:
    torch.manual_seed(0)
    network = build(parse_text(CLASSIFIER)).eval()
    scramble(network)
    network.head.linear.weight.data.normal_(0, 2)
    return network


def test_a_file_of_a_classifier_ranks_as_the_network_does(kind, tmp_path, capsys):
    weights = tmp_path / "best.pt"
    save_checkpoint(weights, a_classifier(), NAMES, imgsz=SIZE)
    code, said, errors = outcome(capsys, "--weights", weights, "--format", kind)
    out = weights.with_suffix(export.ENDINGS[kind])
    assert (code, errors) == (0, "")
    wrote, parity, latency = said.splitlines()
    shape = "[batch, 3, height, width], multiples of 4" if kind == "onnx" else "[batch, 3, 64, 64]"
    assert wrote.startswith(f"{out}: {shape} -> scores; ") and latency.startswith("latency: torch ")
    assert re.fullmatch(r"parity: scores \S+e-\d+, their logarithms \S+e-\d+ of the largest, 4 images", parity)
    images, network, run = check_images(None, SIZE, crops=True), a_classifier(), read_file(out, kind)
    for given in (images, images[:1], *([images[:2, :, :24]] if kind == "onnx" else [])):
        with torch.no_grad():
            wanted = network.predict(given)
        (found,) = run(given)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.sum(dim=1), torch.ones(len(given)))
    if kind == "torch":
        return
    about = onnx_says(out, ("scores",))
    assert about["task"] == "classify" and "boxes" not in about and "nms" not in about
    assert "its middle, a square of 7/8 of its shorter side" in about["input"]
    (tmp_path / "pictures").mkdir()
    for number, (height, width) in enumerate([(64, 64), (40, 100), (90, 33)]):
        picture = draw_image(100, np.random.default_rng(number))[0][:height, :width]
        write_image(tmp_path / "pictures" / f"{number}.png", picture)
    pictures = sorted((tmp_path / "pictures").iterdir())
    for mine, other in zip(*(load(path)(pictures, batch_size=2) for path in (weights, out)), strict=True):
        assert mine.labels.tolist() == other.labels.tolist() and other.names == tuple(NAMES)
        np.testing.assert_allclose(other.scores, mine.scores, rtol=0, atol=1e-5)
    rows = []
    for path in (weights, out):
        words = ["--weights", path, "--source", tmp_path / "pictures", "--project", tmp_path, "--name", path.suffix[1:]]
        assert detect([str(word) for word in [*words, "--save-txt", "--nosave", "--device", "cpu"]]) == 0
        rows.append([file.read_text() for file in sorted((tmp_path / path.suffix[1:] / "labels").iterdir())])
    assert rows[0] == rows[1] and len(rows[0]) == 3
    for name in NAMES:
        (tmp_path / "set" / name).mkdir(parents=True)
        write_image(tmp_path / "set" / name / "a.png", draw_image(80, np.random.default_rng(len(name)))[0])
    (tmp_path / "data.yaml").write_text(f"train: set\nval: set\nformat: folders\nnames: [{', '.join(NAMES)}]\n")
    assert_same_measured(weights, out, tmp_path / "data.yaml", capsys)
    squares = tmp_path / "squares.onnx"
    assert outcome(capsys, "--weights", weights, "--format", kind, "--static", "-o", squares)[0] == 0
    assert val(["--weights", str(squares), "--data", str(tmp_path / "data.yaml"), "--imgsz", "32"]) == 2
    told = f"{squares}: takes images of 64 px only, not 32; export it without --static\n"
    assert capsys.readouterr().err == told


def assert_same_measured(weights: Path, file: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """val.py finds the same numbers with the file as with its checkpoint."""
    found = []
    for path in (weights, file):
        project = data.parent / "measured"
        words = ["--weights", path, "--data", data, "--project", project, "--name", path.suffix[1:], "--noplots"]
        assert val([*map(str, words), "--save-json", "--device", "cpu"]) == 0, capsys.readouterr().err
        metrics = json.loads((project / path.suffix[1:] / "metrics.json").read_text())
        for part in metrics.values():
            part.pop("ms_per_image", None)
        found.append(metrics)
    capsys.readouterr()
    assert_near(*found)


def assert_near(one: object, other: object) -> None:
    if isinstance(one, dict):
        assert isinstance(other, dict) and one.keys() == other.keys()
        for name in one:
            assert_near(one[name], other[name])
    elif isinstance(one, list):
        assert isinstance(other, list) and len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_near(*pair)
    elif isinstance(one, float):
        assert one == pytest.approx(other, abs=1e-3)
    else:
        assert one == other


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda network: network.head.linear.bias.data.add_(torch.tensor([0.01, 0, 0])), "scores differ by "),
        (lambda network: network.head.linear.weight.data.fill_(torch.nan), "scores differ by nan"),
        # sure of itself, in other digits: scores hardly say it
        (lambda network: network.head.linear.bias.data.add_(torch.tensor([90.0, 0, 0.01])), "logarithms of scores "),
    ],
)
def test_a_file_that_is_another_classifier_is_told(change, told, tmp_path, capsys, monkeypatch):
    mine, other = a_classifier(), a_classifier()
    if "logarithms" in told:
        mine.head.linear.bias.data.add_(torch.tensor([90.0, 0, 0]))
        mine.head.linear.weight.data.mul_(0.01)
        other.head.linear.weight.data.mul_(0.01)
        for network in (mine, other):
            network.head.linear.bias.data[0] -= 75
    change(other)
    save_checkpoint(tmp_path / "best.pt", mine, NAMES, imgsz=SIZE)
    monkeypatch.setattr(export, "write_file", lambda path, *_: path.write_bytes(b"the new one"))
    monkeypatch.setattr(export, "read_file", lambda path, kind, conf=None: lambda images: (other.predict(images),))
    code, said, errors = outcome(capsys, "--weights", tmp_path / "best.pt", "--format", "torch")
    assert (code, said) == (2, "") and "was not written: not the same: " in errors and told in errors
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


SSD = """
nc: 3
activation: relu
backbone:
  - [-1, 1, Conv, [8, 3, 4]]
  - [-1, 1, CABlock, [12, {stride: 2}]]
head:
  - [-1, 1, CABlock, [12, {stride: 2}]]
  - [[2, 1], 1, UpFusion, [12, 2]]
  - [[3, 2], 1, DownFusion, [12, 2]]
  - [[3, 4], 1, SSDHead, [nc]]
"""


@pytest.mark.parametrize("inside", [False, True], ids=["plain", "nms"])
def test_a_file_of_an_ssd_head_finds_what_the_network_finds(kind, inside, tmp_path, capsys):
    torch.manual_seed(0)
    network = build(parse_text(SSD)).eval()
    scramble(network)
    weights = tmp_path / "best.pt"
    save_checkpoint(weights, network, NAMES, imgsz=SIZE)
    options = ["--nms", "--conf-thres", 0.15, "--max-det", 20] if inside else []
    code, said, errors = outcome(capsys, "--weights", weights, "--format", kind, *options)
    assert (code, errors) == (0, "")
    parity = re.search(r"parity: boxes (\S+), scores (\S+) of their largest; (\d+) detections", said)
    assert parity and float(parity[1]) < 1e-4 and float(parity[2]) < 1e-4 and int(parity[3]) > 5
    if kind == "onnx":  # another size than the one it was checked at, and one object the same way by both
        picture = draw_image(96, np.random.default_rng(1))[0]
        asked = {"conf": 0.15, "max_det": 20}
        mine, other = (load(path, imgsz=96)(picture, **asked) for path in (weights, weights.with_suffix(".onnx")))
        assert mine.labels.tolist() == other.labels.tolist() and len(mine)
        np.testing.assert_allclose(other.boxes, mine.boxes, rtol=0, atol=1e-3)


# ---- suppression inside the file


class Given(nn.Module):
    """Stands for a network: boxes, and scores of three classes, are what the "images" ``[N, 7, M, 1]`` say."""

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        y = images[..., 0].transpose(1, 2)
        return y[..., :4], y[..., 4:]


def test_suppression_inside_is_that_outside(tmp_path):
    """On crowds, chains of boxes that each overlap the next, boxes without area, and nothing at all."""
    rng = np.random.default_rng(0)

    def crowd(count: int, spread: float) -> Tensor:
        centre, half = rng.uniform(50, 50 + spread, (count, 2)), rng.uniform(5, 30, (count, 2))
        return torch.from_numpy(np.concatenate([centre - half, centre + half, rng.uniform(0, 1, (count, 3))], axis=1))

    chain = torch.tensor([[float(x), 0, x + 20, 20, 1 - x / 2000, 0, 0] for x in range(0, 1500, 5)])
    flat = crowd(300, 100)
    flat[::2, 2] = flat[::2, 0]
    cases = [crowd(300, 20), crowd(300, 100), crowd(300, 1000), chain, flat, torch.zeros(300, 7)]
    batch = torch.stack([case.float() for case in cases]).transpose(1, 2)[..., None].contiguous()
    exported = Exported(Given(), Suppression(0.3, 0.5, 50))  # type: ignore[arg-type]
    write_file(tmp_path / "a.pt2", "torch", exported.eval(), torch.zeros(2, 7, 300, 1), {})
    boxes, scores, labels, count = read_file(tmp_path / "a.pt2", "torch")(batch)
    for index, case in enumerate(cases):
        wanted = nms(case[:, :4], case[:, 4:], conf=0.3, iou=0.5, max_det=50, multi_label=False)
        kept = int(count[index])
        assert kept == len(wanted)
        torch.testing.assert_close(boxes[index, :kept], wanted.boxes, rtol=0, atol=0)
        torch.testing.assert_close(scores[index, :kept], wanted.scores, rtol=0, atol=0)
        assert labels[index, :kept].tolist() == wanted.labels.tolist()
    assert count[-1] == 0 and count[0] > 5 and count[3] == 50


# ---- the check


def reading(network: Network) -> Callable[..., exported.Run]:
    """`read_file` of a file that holds this network, whatever was written."""

    def read(path: Path, kind: str, conf: float | None = None) -> exported.Run:
        return lambda images: network.predict(images)

    return read


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda network: network.head.m[0].bias.data.add_(0.01), "boxes differ by "),
        (lambda network: network.head.m[0].bias.data[4:8].add_(0.01), "scores differ by "),
        (lambda network: network.head.anchors.mul_(1.001), "boxes differ by "),
        (lambda network: network.head.m[1].bias.data.fill_(torch.nan), "boxes differ by nan"),
    ],
)
def test_a_file_that_is_not_the_network_is_told_and_not_left_behind(change, told, weights, capsys, monkeypatch):
    other = a_network()
    change(other)
    monkeypatch.setattr(export, "write_file", lambda path, *_: path.write_bytes(b"the new one"))
    monkeypatch.setattr(export, "read_file", reading(other))
    out = weights.with_suffix(".pt2")
    out.write_bytes(b"an older one")
    code, said, errors = outcome(capsys, "--weights", weights, "--format", "torch")
    assert (code, said, len(errors.splitlines())) == (2, "", 1)
    assert errors.startswith(f"{out}: was not written: not the same: ") and told in errors
    assert sorted(weights.parent.iterdir()) == sorted([weights, out]) and out.read_bytes() == b"an older one"


def test_another_threshold_inside_is_told(weights, capsys, monkeypatch):
    """The file suppresses at IoU .9: it gives boxes that should be gone."""

    def read(path: Path, kind: str, conf: float | None = None) -> exported.Run:
        def run(images: Tensor) -> tuple[Tensor, ...]:
            (boxes, scores), network_conf = a_network().predict(images), 0.25 if conf is None else conf
            found = [
                nms(b, s, conf=network_conf, iou=0.9, max_det=300, multi_label=False)
                for b, s in zip(boxes, scores, strict=True)
            ]
            lists = ([f.boxes for f in found], [f.scores for f in found], [f.labels for f in found])
            return *(nn.utils.rnn.pad_sequence(y, batch_first=True) for y in lists), torch.tensor(list(map(len, found)))

        return torch.no_grad()(run)

    monkeypatch.setattr(export, "write_file", lambda path, *_: None)
    monkeypatch.setattr(export, "read_file", read)
    code, _, errors = outcome(capsys, "--weights", weights, "--format", "torch", "--nms")
    assert code == 2 and "not the same: 0 of " in errors


def detections(*rows: tuple[float, ...]) -> Detections:
    y = torch.tensor(rows).reshape(-1, 6)
    return Detections(y[:, :4], y[:, 4], y[:, 5].long())


def test_detections_are_matched_one_to_one():
    one, two = (0.0, 0.0, 100.0, 100.0, 0.9, 1.0), (50.0, 0.0, 90.0, 100.0, 0.5, 0.0)
    near = (0.1, 0.0, 100.0, 100.0, 0.8995, 1.0)
    wanted = detections(one, two)
    assert _matched(wanted, detections(two, near), 0.25, 300) == ([0, 1], [1, 0])
    for found in (
        detections(one),
        detections(one, two, near),
        detections(one, (*two[:5], 1.0)),  # another label
        detections(one, (*two[:4], 0.502, 0.0)),  # another score
        detections(one, (*two[:2], 89.0, 100.0, 0.5, 0.0)),  # another box
        detections(),
    ):
        with pytest.raises(Fault, match="not the same"):
            _matched(wanted, found, 0.25, 300)
    # at the threshold, and at the end of a full list, rounding decides
    assert _matched(wanted, detections(one), 0.5, 300) == ([0], [0])
    assert _matched(wanted, detections(one, (0.0, 0.0, 9.0, 9.0, 0.5, 0.0)), 0.25, 2) == ([0], [0])
    assert _matched(detections(), detections(), 0.25, 300) == ([], [])


def test_a_network_that_sees_nothing_is_checked_all_the_same():
    """No score reaches what is asked for: the check looks lower by itself."""
    network = a_network()
    for layer in network.head.m:
        layer.bias.data.view(2, -1)[:, 4] -= 6
    images, asked = check_images(None, SIZE), Suppression(0.9, 0.45, 300)

    def read(conf: float | None) -> exported.Run:
        return lambda images: network.predict(images)

    assert check_parity(network, read, images, asked, inside=False).detections > 20


# ---- the door


def test_what_cannot_be_exported_is_told_in_one_line(weights, tmp_path, capsys, monkeypatch):
    def told(*options: object) -> str:
        code, said, errors = outcome(capsys, "--weights", weights, *options)
        assert (code, said) == (2, "")
        return errors.strip()

    assert told("--format", "torch", "--imgsz", 60) == (
        "--imgsz 60: this network needs a multiple of 8; 56 or 64 would do"
    )
    assert told("--format", "torch", "-o", tmp_path / "a.onnx") == (
        f"-o {tmp_path}/a.onnx: a file of --format torch ends in .pt2: {tmp_path}/a.pt2"
    )
    assert told("--format", "torch", "--iou-thres", 2) == "--iou-thres 2.0: must be between 0 and 1"
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in told("--format", "torch", "--source", tmp_path / "empty")
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else object())
    assert told("--format", "onnx") == (
        "--format onnx needs onnxscript, not installed here: pip install -e '.[export]'"
    )
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "openvino" else object())
    assert told("--format", "openvino") == (
        "--format openvino needs openvino, not installed here: pip install -e '.[openvino]'"
    )
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["best.pt"]


def test_the_check_takes_images_of_the_user(tmp_path):
    picture = draw_image(48, np.random.default_rng(5))[0]
    write_image(tmp_path / "a.png", picture)
    (tmp_path / "note.txt").write_text("no image")
    images = check_images(str(tmp_path), 48)
    assert images.shape == (3, 3, 48, 48) and torch.equal(images[0], images[2])
    assert torch.equal(
        (images[0] * 255).round().byte(), torch.from_numpy(read_image(tmp_path / "a.png")).permute(2, 0, 1)
    )
