"""Weights of another program: found by structure, told where they do not fit, and as good as they were there."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ops import scramble
from torch import Tensor, nn

from data.augment import letterbox
from data.config import read_data_spec
from data.dataset import ImageSet
from data.readers import read_split
from data.structures import Batch, Fault, Targets
from engine.evaluate import evaluate, in_corner
from models.checkpoint import load_checkpoint, restore, save_checkpoint
from models.efficientnet import NORMALIZATIONS, naming_of, rows_of
from models.foreign import import_weights
from models.fuse import fuse
from models.graph import resolve
from models.network import Network, build
from models.parse import parse, parse_text
from models.spec import ModelSpec

ROOT = Path(__file__).resolve().parents[1]
TEXT = """\
nc: {nc}
anchors: {anchors}
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 2, BottleneckCSP, [12, {{kernel: {kernel}}}]]
head:
  - [-1, 1, nn.Upsample, []]
  - [-1, 1, Conv, [{width}, 3, 4]]
  - [[1, 3], 1, Detect, [nc, anchors]]
"""
ANCHORS = "[[10, 13, 16, 30], [33, 23.5, 30, 61]]"


def a_spec(nc: int = 3, anchors: str = ANCHORS, kernel: int = 3, width: int = 16) -> ModelSpec:
    return parse_text(TEXT.format(nc=nc, anchors=anchors, kernel=kernel, width=width), "mine.yaml")


def a_network() -> Network:
    torch.manual_seed(0)
    network = build(a_spec())
    scramble(network)
    return network.eval()


def foreign(network: Network, rename: Callable[[str], str] = lambda name: name, prefix: str = "model.") -> dict:
    """The state dict that another program would have of this network: half precision, anchors in cells."""
    state = {
        prefix + rename(key.removeprefix("layers.")): tensor.half() if tensor.is_floating_point() else tensor
        for key, tensor in network.state_dict().items()
    }
    strides = torch.tensor(network.head.strides)
    state[f"{prefix}{len(network.layers) - 1}.anchors"] = (network.head.anchors / strides[:, None, None]).half()
    return state


def saved(tmp_path: Path, content: object) -> Path:
    torch.save(content, tmp_path / "state.pth")
    return tmp_path / "state.pth"


def logits(network: Network) -> list[Tensor]:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return network(images)[0]


def assert_same(found: Network, network: Network) -> None:
    for y, z in zip(logits(found), logits(network.half().float()), strict=True):
        torch.testing.assert_close(y, z, rtol=0, atol=1e-4)
    assert not found.training and found.head.anchors.dtype == torch.float32


def told(path: Path, spec: ModelSpec, names: list[str] | None = None) -> tuple[str, ...]:
    with pytest.raises(Fault) as caught:
        import_weights(path, spec, names)
    return tuple(line.replace(str(path), "state.pth") for line in caught.value.lines)


# ---- what fits


@pytest.mark.parametrize("prefix", ["model.", "module.model.", "", "_orig_mod.model.model."])
@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_weights_are_found_by_row_and_name(tmp_path, prefix, key):
    network = a_network()
    state = foreign(network, prefix=prefix)
    found, notes = import_weights(
        saved(tmp_path, {key: state, "epoch": 3} if key else state), a_spec(), ["a", "b", "c"]
    )
    assert notes == ()
    assert_same(found, network)


def test_other_names_are_found_by_shape_in_the_order_of_definition(tmp_path):
    network = a_network()

    def rename(name: str) -> str:
        return name.replace("cv", "branch").replace(".bn.", ".norm.").replace(".m.", ".inner.")

    found, notes = import_weights(saved(tmp_path, foreign(network, rename)), a_spec())
    assert notes == ()
    assert_same(found, network)


def test_counters_are_not_missed(tmp_path):
    network = a_network()
    state = {key: tensor for key, tensor in foreign(network).items() if "num_batches" not in key}
    found, notes = import_weights(saved(tmp_path, state), a_spec())
    assert notes == ()
    assert_same(found, network)


def test_classes_and_anchors_are_those_of_the_weights(tmp_path):
    network = a_network()
    path = saved(tmp_path, foreign(network))
    found, notes = import_weights(path, a_spec(nc=80, anchors="[[10, 13, 16, 30], [33, 23.5, 30, 62]]"))
    assert notes == (
        "anchors: 10 13 16 30; 33 23.5 30 62 in mine.yaml; taken from the weights: 10 13 16 30; 33 23.5 30 61",
        "nc: 80 in mine.yaml; taken from the weights: 3",
    )
    assert_same(found, network)
    found, notes = import_weights(path, a_spec(anchors="4"))
    assert notes == ("anchors: 4 a level in mine.yaml; taken from the weights: 10 13 16 30; 33 23.5 30 61",)
    assert_same(found, network)
    assert found.spec.anchors == network.spec.anchors


BRANCHED = """\
nc: 3
anchors: [[10, 13, 16, 30]]
backbone:
  - [-1, 1, Conv, [8, 3, 4]]
  - [-1, 1, RepConv, [8]]
  - [-1, 1, RepConv, [12, 3, 2]]
head:
  - [2, 1, Detect, [nc, anchors]]
"""


@pytest.mark.parametrize(("conv", "norm"), [("0", "1"), ("conv", "bn")], ids=["yolov7", "yolov6"])
def test_branches_of_a_repconv_are_found_by_their_published_names(conv, norm, tmp_path):
    """Theirs begin with the identity's norm, whose shapes are those of the two others."""
    torch.manual_seed(0)
    network = build(parse_text(BRANCHED)).eval()
    scramble(network)
    state = {}
    for key, tensor in foreign(network).items():
        for ours, theirs in {"conv1.": "rbr_dense.", "conv2.": "rbr_1x1."}.items():
            key = key.replace(f"{ours}conv.", f"{theirs}{conv}.").replace(f"{ours}bn.", f"{theirs}{norm}.")
        state[key.replace("model.1.bn.", "model.1.rbr_identity.")] = tensor
    assert {"model.1.rbr_identity.weight", f"model.2.rbr_1x1.{norm}.bias"} <= state.keys()
    state = dict(sorted(state.items(), key=lambda pair: "identity" not in pair[0]))
    found, notes = import_weights(saved(tmp_path, state), parse_text(BRANCHED))
    assert notes == ()
    assert_same(found, network)


# ---- what does not


def test_norms_that_are_folded_away_are_told(tmp_path):
    fused = fuse(a_network())
    state = foreign(fused)
    assert "model.0.conv.bias" in state
    lines = told(saved(tmp_path, state), a_spec())
    assert lines[0] == (
        "mine.yaml:4:5 layer 0 [-1, 1, Conv, [8, 3, 2]]: needs bn.weight [8], bn.bias [8], bn.running_mean [8] and 1 "
        "more; state.pth: its row 0 has conv.bias [8]: norms folded into convolutions; the file before that would be "
        "right"
    )


def test_a_file_of_a_program_without_rows_is_told(tmp_path):
    """As YOLOv6 names its tensors."""
    names = ("backbone.stem.rbr_dense.conv", "backbone.ERBlock_2.0.rbr_1x1.conv", "neck.Rep_p4.conv1.rbr_dense.conv")
    state = {f"{name}.weight": torch.zeros(8, 3, 3, 3) for name in (*names, "detect.stems.0.block.conv")}
    assert told(saved(tmp_path, state), a_spec()) == (
        "state.pth: 3 of its 4 tensors belong to no row, as model.0.conv.weight does: "
        + ", ".join(f"{name}.weight [8, 3, 3, 3]" for name in names)
        + "; it is not of a program that builds its networks from rows",
    )


def test_a_repconv_in_one_convolution_is_told(tmp_path):
    network = build(parse_text(BRANCHED)).eval()
    state = {key: tensor for key, tensor in foreign(network).items() if not key.startswith("model.1.")}
    state |= {"model.1.rbr_reparam.weight": torch.zeros(8, 8, 3, 3), "model.1.rbr_reparam.bias": torch.zeros(8)}
    (line,) = told(saved(tmp_path, state), parse_text(BRANCHED))
    assert "its row 1 has rbr_reparam.bias [8]: norms folded into convolutions" in line


def test_a_part_of_a_row_that_does_not_fit_is_named(tmp_path):
    state = foreign(a_network())
    state["model.1.attention"] = torch.zeros(4, 2)
    state["ema.decay"] = torch.zeros(1)
    _, notes = import_weights(saved(tmp_path, state), a_spec(kernel=5))
    assert notes == (
        "in no row model.<number>, not used: ema.decay [1]",
        "row 1 BottleneckCSP: not in the file, left at its start: "
        "m.0.cv2.conv.weight [6, 6, 5, 5], m.1.cv2.conv.weight [6, 6, 5, 5]",
        "row 1 BottleneckCSP: in the file, but not used: "
        "m.0.cv2.conv.weight [6, 6, 3, 3], m.1.cv2.conv.weight [6, 6, 3, 3], attention [4, 2]",
    )


def test_a_row_that_does_not_fit_at_all_is_a_fault(tmp_path):
    state = foreign(a_network())
    assert told(saved(tmp_path, state), a_spec(width=24)) == (
        "mine.yaml:8:5 layer 3 [-1, 1, Conv, [24, 3, 4]]: needs conv.weight [24, 12, 3, 3], bn.weight [24], "
        "bn.bias [24] and 2 more; state.pth: its row 3 has conv.weight [16, 12, 3, 3], bn.weight [16], "
        "bn.bias [16] and 2 more",
    )
    moved = {key.replace("model.3.", "model.2.").replace("model.4.", "model.5."): t for key, t in state.items()}
    assert told(saved(tmp_path, moved), a_spec()) == (
        "mine.yaml:7:5 layer 2 [-1, 1, nn.Upsample, []]: has no weights; state.pth: its row 2 has "
        "conv.weight [16, 12, 3, 3], bn.weight [16], bn.bias [16] and 2 more",
        "mine.yaml:8:5 layer 3 [-1, 1, Conv, [16, 3, 4]]: needs conv.weight [16, 12, 3, 3], bn.weight [16], "
        "bn.bias [16] and 2 more; state.pth: it has no row 3",
        "mine.yaml:9:5 layer 4 [[1, 3], 1, Detect, [nc, anchors]]: needs m.0.weight [16, 12, 1, 1], m.0.bias [16], "
        "m.1.weight [16, 16, 1, 1] and 1 more; state.pth: it has no row 4",
        "state.pth: its row 5 has m.0.weight [16, 12, 1, 1], m.0.bias [16], m.1.weight [16, 16, 1, 1] and 2 more, "
        "but mine.yaml ends with row 4",
    )


def test_a_head_that_cannot_be_ours_is_a_fault(tmp_path):
    state = foreign(a_network())
    for level in (0, 1):
        for name in ("weight", "bias"):
            state[f"model.4.m.{level}.{name}"] = state[f"model.4.m.{level}.{name}"][:15]
    assert told(saved(tmp_path, state), a_spec()) == (
        "mine.yaml:9:5 layer 4 [[1, 3], 1, Detect, [nc, anchors]]: 2 anchors of 5 + classes do not make the 15 outputs "
        "a level of state.pth",
    )
    state["model.4.anchors"] = torch.zeros(3, 2, 2)
    assert told(saved(tmp_path, state), a_spec()) == (
        "mine.yaml:9:5 layer 4 [[1, 3], 1, Detect, [nc, anchors]]: reads 2 levels; state.pth has anchors [3, 2, 2], "
        "where [2, anchors a level, 2] would fit",
    )


def test_as_many_names_as_classes(tmp_path):
    path = saved(tmp_path, foreign(a_network()))
    assert told(path, a_spec(), ["a", "b"]) == ("state.pth: was trained on 3 classes, but 2 names are given",)


class Whole(nn.Module):
    """A network that is saved as an object."""


def test_a_file_that_is_no_state_dict_is_a_fault(tmp_path):
    spec, network = a_spec(), a_network()
    assert told(saved(tmp_path, Whole()), spec) == (
        "state.pth: holds Python objects or is no checkpoint at all; it was not opened",
    )
    for content in ({"epoch": 3}, [torch.zeros(2)], {"model": {"epoch": 1}}):
        (line,) = told(saved(tmp_path, content), spec)
        assert line.startswith("state.pth: holds no state dict")
    assert told(saved(tmp_path, {"weight": torch.zeros(2, 3)}), spec) == (
        "state.pth: none of its tensors belongs to a row, as model.0.conv.weight does: weight [2, 3]",
    )
    save_checkpoint(tmp_path / "state.pth", network, ["a", "b", "c"], imgsz=32)
    assert told(tmp_path / "state.pth", spec) == (
        "state.pth: is a checkpoint of this program already; give it as --weights",
    )
    state = foreign(network)
    state["model.0.conv.weight"][0, 0, 0, 0] = float("nan")
    assert told(saved(tmp_path, state), spec) == (
        "state.pth: 1 of its tensors hold numbers that are not finite, such as 'model.0.conv.weight'",
    )


# ---- EfficientNets

SMALL_EFFICIENTNET = """\
nc: 5
backbone:
  - [-1, 1, Conv, [8, 3, 2, {padding}, {{eps: {eps}}}]]
  - [-1, 1, MBConv, [8, 3, 1, 1, {squeeze}, {{padding: {padding}, eps: {eps}}}]]
  - [-1, {number}, MBConv, [12, 3, 2, 6, {squeeze}, {{padding: {padding}, eps: {eps}}}]]
head:
  - [-1, 1, Conv, [16, 1, 1, {{eps: {eps}}}]]
  - [-1, 1, Classify, [nc]]
"""
USUAL, TENSORFLOW = {"padding": "None", "eps": 1e-5}, {"padding": "same", "eps": 1e-3}
PROGRAMS = {"timm": USUAL, "torchvision": USUAL, "efficientnet_pytorch": TENSORFLOW}
with (ROOT / "tests" / "golden" / "efficientnet-b0.csv").open(newline="") as file:
    NAMES = list(csv.DictReader(file))  # our name of each tensor of EfficientNet-B0, those of the programs, its shape


def small_efficientnet(**values: object) -> ModelSpec:
    values = USUAL | {"number": 2, "squeeze": 0.25} | values
    return parse_text(SMALL_EFFICIENTNET.format(**values), "mine.yaml")


def an_efficientnet(**values: object) -> Network:
    torch.manual_seed(0)
    network = build(small_efficientnet(**values))
    scramble(network)
    return network.eval()


def named_by(program: str, network: Network, prefix: str = "") -> dict[str, Tensor]:
    """The state dict of a small network under the names that the first blocks, the stem and the end of B0 have."""
    theirs = {row["ours"].removeprefix("layers."): row[program] for row in NAMES}
    theirs |= {name.replace("3.m.0.", "2.m.1.", 1): other for name, other in theirs.items() if name[:6] == "3.m.0."}
    theirs |= {name.replace("13.", "3.", 1): other for name, other in theirs.items() if name.startswith("13.")}
    theirs |= {name.replace("14.", "4.", 1): other for name, other in theirs.items() if name.startswith("14.")}
    return {prefix + theirs[name.removeprefix("layers.")]: tensor for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_tensor_of_efficientnet_has_its_name_its_shape_and_its_place(program):
    file = "tf-efficientnet-b0" if PROGRAMS[program] is TENSORFLOW else "efficientnet-b0"
    graph = resolve(parse(ROOT / "cfg" / "models" / f"{file}.yaml"))
    with torch.device("meta"):
        ours = Network(graph).state_dict()
    assert [row["ours"] for row in NAMES] == list(ours)
    assert [row["shape"] for row in NAMES] == [" ".join(map(str, tensor.shape)) for tensor in ours.values()]
    state = {row[program]: torch.tensor(place) for place, row in enumerate(NAMES)}
    for prefix in ("", "module."):
        there = {prefix + name: tensor for name, tensor in state.items()}
        found = naming_of(there)
        assert found is not None and found[1] == prefix
        rows, notes = rows_of(Path("state.pth"), there, *found, graph)
        placed = {f"layers.{row}.{name}": int(place) for row, inside in rows.items() for name, place in inside.items()}
        assert placed == {name: place for place, name in enumerate(ours)}
        assert len(notes) == (program == "timm")  # whose names leave padding and eps open


@pytest.mark.parametrize("counters", [True, False])
@pytest.mark.parametrize("program", PROGRAMS)
def test_an_efficientnet_is_found_by_name(tmp_path, program, counters):
    network = an_efficientnet(**PROGRAMS[program])
    state = named_by(program, network, "module.")
    if not counters:
        state = {name: tensor for name, tensor in state.items() if "num_batches" not in name}
    found, notes = import_weights(
        saved(tmp_path, {"state_dict": state}), small_efficientnet(**PROGRAMS[program]), normalization="none"
    )
    assert all(torch.equal(found.state_dict()[k], v) for k, v in network.state_dict().items() if "num_b" not in k)
    assert torch.equal(logits(found)[0], logits(network)[0])
    assert [note.partition(";")[0] for note in notes] == (
        ["timm names tensors alike whatever computes with them"] if program == "timm" else []
    )


def test_classes_of_an_efficientnet_are_those_of_the_weights_and_order_is_a_check(tmp_path):
    state = named_by("torchvision", an_efficientnet())
    moved = dict(sorted(state.items())) | {"extra.weight": torch.zeros(2)}
    spec = replace(small_efficientnet(), num_classes=7)
    found, notes = import_weights(saved(tmp_path, moved), spec, normalization="none")
    assert torch.equal(logits(found)[0], logits(an_efficientnet())[0])
    assert tuple(note.replace(str(tmp_path), "") for note in notes) == (
        "in no part of an EfficientNet, not used: extra.weight [2]",
        "tensors of /state.pth stand in another order than those of mine.yaml; only names were followed",
        "nc: 7 in mine.yaml; taken from the weights: 5",
    )


@pytest.mark.parametrize("computing", [USUAL, TENSORFLOW])
@pytest.mark.parametrize("normalization", ["imagenet", "half", "lite"])
def test_normalization_moves_into_the_first_convolution(tmp_path, computing, normalization):
    network = an_efficientnet(**computing)
    path = saved(tmp_path, named_by("timm", network))
    found, notes = import_weights(path, small_efficientnet(**computing), normalization=normalization)
    assert notes[-1] == f"images are in [0, 1] here, so row 0 does what {normalization!r} did to them before"
    mean, std = (torch.tensor(values)[:, None, None] for values in NORMALIZATIONS[normalization])
    images = torch.rand(2, 3, 32, 64)
    with torch.no_grad():
        theirs, ours = network((images - mean) / std)[0][0], found(images)[0][0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    save_checkpoint(tmp_path / "ours.pt", found, list("abcde"), imgsz=32)
    again = restore(load_checkpoint(tmp_path / "ours.pt"))
    assert torch.equal(logits(again)[0], logits(found)[0])  # its YAML has the border
    assert len(found.state_dict()) == len(network.state_dict())


def test_an_efficientnet_has_the_usual_normalization_of_its_kind(tmp_path):
    for program, squeeze, usual in (
        ("timm", 0.25, "imagenet"),
        ("timm", 0, "half"),
        ("torchvision", 0.25, "imagenet"),
        ("efficientnet_pytorch", 0.25, "imagenet"),
        ("efficientnet_pytorch", 0, "lite"),
    ):
        values = PROGRAMS[program] | {"squeeze": squeeze}
        path = saved(tmp_path, named_by(program, an_efficientnet(**values)))
        _, notes = import_weights(path, small_efficientnet(**values))
        assert f"what {usual!r} did" in notes[-1], program


def test_a_normalization_needs_a_first_convolution(tmp_path):
    text = "nc: 2\nbackbone:\n  - [-1, 1, Focus, [8]]\nhead:\n  - [-1, 1, Classify, [nc]]\n"
    spec = parse_text(text, "mine.yaml")
    path = saved(tmp_path, {k.replace("layers", "model"): v for k, v in build(spec).state_dict().items()})
    with pytest.raises(Fault) as fault:
        import_weights(path, spec, normalization="imagenet")
    assert fault.value.lines == (
        "mine.yaml:3:5 layer 0 [-1, 1, Focus, [8]]: only one Conv can be made to normalize its input; got imagenet",
    )
    assert import_weights(path, spec)[1] == ()


def test_an_efficientnet_that_does_not_fit_is_a_fault(tmp_path):
    state = named_by("efficientnet_pytorch", an_efficientnet())
    path = saved(tmp_path, state)
    assert told(path, small_efficientnet()) == (
        "state.pth: weights with the names of EfficientNet-PyTorch want padding same and eps 0.001, mine.yaml has "
        "padding on all sides alike and eps 1e-05; cfg/models/tf-efficientnet-b0.yaml has them so",
    )
    assert told(path, small_efficientnet(**TENSORFLOW, number=1)) == (
        "state.pth: has 3 inverted bottlenecks, mine.yaml has 2",
    )
    assert told(path, a_spec()) == (
        "state.pth: is an EfficientNet with the names of EfficientNet-PyTorch, but mine.yaml is no classifier of this "
        "kind; import it with one as cfg/models/efficientnet-b0.yaml, then train.py --weights takes what fits",
    )
    assert told(path, small_efficientnet(**TENSORFLOW, squeeze=0))[0] == (
        "mine.yaml:4:5 layer 1 [-1, 1, MBConv, [8, 3, 1, 1, 0, {padding: same, eps: 0.001}]]: needs nothing more; "
        "state.pth has m.0.se.reduce.weight [2, 8, 1, 1], m.0.se.reduce.bias [2], m.0.se.expand.weight [8, 2, 1, 1] "
        "and 1 more"
    )
    del state["_blocks.1._bn0.bias"]
    assert told(saved(tmp_path, state), small_efficientnet(**TENSORFLOW)) == (
        "mine.yaml:5:5 layer 2 [-1, 2, MBConv, [12, 3, 2, 6, 0.25, {padding: same, eps: 0.001}]]: needs "
        "m.0.expand.bn.bias [48]; state.pth lacks it",
    )


# ---- a published detector

SIZES = [(32, 64), (48, 32), (64, 64)]


def test_an_image_in_the_corner_keeps_its_pixels_and_boxes():
    pictures = [np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8) for seed, size in enumerate(SIZES)]
    squares = [letterbox(picture, 64) for picture in pictures]
    images = torch.stack([torch.from_numpy(square).permute(2, 0, 1) for square, _ in squares])
    boxes = [box.to_network(np.array([[1, 2, 20, 10]], np.float32)) for _, box in squares]
    targets = Targets(torch.from_numpy(np.concatenate(boxes)), torch.zeros(3), torch.arange(3))
    moved = in_corner(Batch(images, targets, tuple(box for _, box in squares), (0, 1, 2)))
    for index, (square, box) in enumerate(squares):
        height, width = 64 - 2 * box.pad_y, 64 - 2 * box.pad_x
        inside = torch.from_numpy(square[box.pad_y :, box.pad_x :][:height, :width]).permute(2, 0, 1)
        assert torch.equal(moved.images[index, :, :height, :width], inside)
        assert (moved.images[index, :, height:] == 114).all() and (moved.images[index, :, :, width:] == 114).all()
        original = moved.letterboxes[index].to_original(moved.targets.boxes[index].numpy())
        assert original == pytest.approx(np.array([1, 2, 20, 10]), abs=1e-4)


def test_a_published_detector_is_as_good_here(shared_data):
    """yolov5n on the first 16 of 128 images; on all of them AP50 is .542, as published (`bench/import_ap.py`)."""
    spec = parse(ROOT / "cfg" / "models" / "yolov5n.yaml")
    data = read_data_spec(shared_data / "coco256" / "data.yaml")
    network, notes = import_weights(shared_data / "weights" / "yolov5n_state_dict_fp16.pth", spec, data.names)
    assert notes == ()
    samples = read_split(data, "val").samples[:16]
    metrics = evaluate(network, ImageSet(samples, 640), names=data.names, corner=True, progress=False)
    assert (metrics.ap, metrics.ap50) == (pytest.approx(0.402, abs=0.005), pytest.approx(0.574, abs=0.005))
