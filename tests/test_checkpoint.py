"""Checkpoints come back as they went, foreign files are told apart without being run, and weights can be a start."""

from __future__ import annotations

import errno
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data.structures import Fault
from models.anchors import with_anchors
from models.checkpoint import FORMAT, aligned, load_checkpoint, restore, save_checkpoint, warm_start
from models.network import SUPERNETS, Network, build
from models.parse import parse_text
from models.supernet import Supernet

TEXT = """\
nc: 3
activation: mish
anchors: 2
backbone:
  - [-1, 1, Conv, [8, {kernel}, 2]]
  - [-1, {count}, Bottleneck, [8, {{act: leaky}}]]
head:
  - [-1, {count}, BottleneckCSP2, [12, {{kernel: {kernel}, act: {act}}}]]
  - [2, 1, Detect, [nc, anchors]]
"""
NAMES = ["red", "green", "blue"]


def a_network(kernel: int = 3, count: int = 2, seed: int = 0) -> Network:
    """A plain network in eval mode whose norms look trained."""
    torch.manual_seed(seed)
    spec = parse_text(TEXT.format(kernel=kernel, count=count, act="relu"))
    network = build(with_anchors(spec, ((10.0, 13.5, 16.0, 30.0),))).eval()
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.data.uniform_(0.5, 1.5)
            norm.bias.data.normal_(0, 0.3)
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 1.5)
    return network


IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def outputs(network: Network) -> list[Tensor]:
    with torch.no_grad():
        return list(network(IMAGES)[0])


def told(path: Path) -> str:
    """What is told about a file that is no checkpoint of ours, in one line."""
    with pytest.raises(Fault) as caught:
        restore(load_checkpoint(path))
    (line,) = caught.value.lines
    assert "\n" not in line
    return line


# ---- there and back


def test_a_network_comes_back_with_its_outputs_and_all_that_was_said(tmp_path):
    network = a_network()
    training = {"epoch": 3, "optimizer": {"state": {0: torch.ones(2)}, "lr": [0.01]}}
    save_checkpoint(tmp_path / "a.pt", network, NAMES, imgsz=32, training=training, ap=0.5, picks={"2.kernel": 3})
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    again = restore(checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(outputs(network), outputs(again), strict=True))
    for a, b in zip(network.predict(IMAGES), again.predict(IMAGES), strict=True):
        assert torch.equal(a, b)  # the anchors travel in the YAML
    assert (checkpoint.names, checkpoint.imgsz) == (("red", "green", "blue"), 32)
    assert checkpoint.plain == {"ap": 0.5, "picks": {"2.kernel": 3}}
    assert checkpoint.training is not None and checkpoint.training["epoch"] == 3
    assert checkpoint.spec.anchors == network.spec.anchors
    assert not again.training
    assert os.listdir(tmp_path) == ["a.pt"]


def test_weights_made_for_use_have_no_training_state(tmp_path):
    save_checkpoint(tmp_path / "a.pt", a_network(), NAMES, imgsz=32)
    assert load_checkpoint(str(tmp_path / "a.pt")).training is None


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """``small_files(n)``: from now on no file of this process grows beyond n bytes."""
    resource = pytest.importorskip("resource")
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, limit[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.99, 0.9999])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, small_files, share):
    """Wherever the disk is full: torch has another word for it in the middle of a tensor and at the end of the file."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, a_network(seed=1), NAMES, imgsz=32)
    before = path.read_bytes()
    small_files(int(share * len(before)))
    with pytest.raises(OSError, match="File too large") as problem:
        save_checkpoint(path, a_network(seed=2), NAMES, imgsz=32)
    small_files(2 * len(before))
    assert problem.value.errno == errno.EFBIG and problem.value.filename == str(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["last.pt"]
    save_checkpoint(path, a_network(seed=1), NAMES, imgsz=32)
    assert path.read_bytes() == before


# ---- files that are not ours


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "a.pt", a_network(), NAMES, imgsz=32)
    return tmp_path / "a.pt"


def test_no_file_is_a_fault(tmp_path):
    assert told(tmp_path / "a.pt") == f"{tmp_path}/a.pt: no such checkpoint"
    assert told(tmp_path) == f"{tmp_path}: no such checkpoint"


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.5, 0.9, 0.9999])
def test_a_truncated_file_is_a_fault(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(len(content) * share)])
    assert told(saved).startswith(f"{saved}: ")


@pytest.mark.parametrize(
    "content", [b"no checkpoint", b"nc: 3\n", b"\x89PNG\r\n\x1a\n", b"PK\x03\x04zip", b"\x80\x02."]
)
def test_another_kind_of_file_is_a_fault(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    assert told(tmp_path / "a.pt").startswith(f"{tmp_path}/a.pt: ")


class Trap:
    """An object whose unpickling creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pickled_object_is_never_run(tmp_path, wrapped):
    trap, path = Trap(tmp_path / "ran"), tmp_path / "a.pt"
    if wrapped:
        torch.save({"format": FORMAT, "state": {"weight": torch.ones(1)}, "training": trap}, path)
    else:
        path.write_bytes(pickle.dumps(trap, protocol=2))
    assert told(path) == f"{path}: holds Python objects or is no checkpoint at all; it was not opened"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [{"format": "another 1"}, {"model": {}}, [1, 2], torch.ones(3)])
def test_another_programs_checkpoint_is_a_fault(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    assert told(tmp_path / "a.pt") == f"{tmp_path}/a.pt: not a checkpoint of this program (format {FORMAT!r})"


@pytest.mark.parametrize("key", ["yaml", "names", "imgsz", "state", "plain"])
@pytest.mark.parametrize("value", [None, 1.5])
def test_a_checkpoint_with_a_part_missing_is_a_fault(saved, key, value):
    content = torch.load(saved, weights_only=True)
    content[key] = value
    torch.save(content, saved)
    wanted = f"{saved}: a checkpoint without a usable {key!r}; it is damaged or not of this program"
    assert told(saved) == wanted
    del content[key]
    torch.save(content, saved)
    assert told(saved) == wanted


def test_a_state_of_other_things_than_tensors_is_a_fault(saved):
    content = torch.load(saved, weights_only=True)
    content["state"]["layers.0.conv.weight"] = [1.0]
    torch.save(content, saved)
    assert told(saved) == f"{saved}: a checkpoint whose 'state' holds other things than tensors"


def test_yaml_that_is_no_model_is_a_fault_in_the_checkpoint(saved):
    content = torch.load(saved, weights_only=True)
    content["yaml"] = content["yaml"].replace("nc: 3", "nc: many")
    torch.save(content, saved)
    assert told(saved) == f"{saved}[yaml]:3:5: nc is the number of classes, 1 to 100000; got 'many'"


@pytest.mark.parametrize("damage", ["missing", "surplus", "shape"])
def test_tensors_that_do_not_fit_are_a_fault(saved, damage):
    content = torch.load(saved, weights_only=True)
    if damage == "missing":
        del content["state"]["layers.0.conv.weight"]
    elif damage == "surplus":
        content["state"]["layers.0.conv.other"] = torch.ones(1)
    else:
        content["state"]["layers.0.conv.weight"] = torch.ones(8, 3, 5, 5)
    torch.save(content, saved)
    name = "other" if damage == "surplus" else "weight"
    assert told(saved) == f"{saved}: 1 of its tensors do not fit its YAML, such as 'layers.0.conv.{name}'"


# ---- weights as a start

KERNELS, ACTS, COUNTS = "{choice: [3, 5]}", "{choice: [mish, relu]}", "{choice: [1, 2]}"


def a_supernet(kind: str, count: object = COUNTS) -> Supernet:
    torch.manual_seed(7)
    spec = parse_text(TEXT.format(kernel=KERNELS, count=count, act=ACTS))
    return Supernet(with_anchors(spec, ((10.0, 13.5, 16.0, 30.0),)), kind).eval()


@pytest.mark.parametrize("kind", SUPERNETS)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
def test_a_warm_supernet_is_the_plain_network_for_both_kernels(kind, count, kernel):
    """The ring around a 3x3 is zero, so 5x5 does the same until it is trained."""
    plain = a_network(kernel=3, count=count)
    supernet = a_supernet(kind)
    warm_start(supernet.network, plain.state_dict())
    picks = {"0.kernel": kernel, "1.number": count, "2.kernel": kernel, "2.act": "relu", "2.number": count}
    supernet.activate(picks)
    for ours, theirs in zip(outputs(supernet.network), outputs(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    ring = supernet.network.state_dict()[
        "layers.0.conv.weight" if kind == "shared" else "layers.0.candidates.1.conv.weight"
    ]
    assert ring.shape[-1] == 5 and float(ring[..., 0].abs().max()) == 0


def test_what_does_not_fit_is_named_and_left_alone():
    network = a_network(seed=3)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = a_network(seed=4).state_dict()
    state["layers.3.m.0.weight"] = torch.ones(14, 8, 1, 1)  # a head of other classes
    del state["layers.0.conv.weight"]
    state["layers.9.conv.weight"] = torch.ones(1)
    loaded, missing = warm_start(network, state)
    assert missing == ["layers.0.conv.weight", "layers.3.m.0.weight"]
    assert set(loaded) | set(missing) == set(before) and not set(loaded) & set(missing)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name] if name in missing else state[name])


def test_a_larger_kernel_does_not_go_into_a_smaller_one():
    loaded, missing = warm_start(a_network(kernel=3), a_network(kernel=5).state_dict())
    assert "layers.0.conv.weight" in missing and "layers.0.bn.weight" in loaded


def test_a_warm_start_reaches_every_option():
    supernet = a_supernet("shared", count=2)
    loaded, missing = warm_start(supernet.network, a_network().state_dict())
    assert missing == [] and len(loaded) == len(supernet.network.state_dict())


DENSE = """\
nc: 3
activation: relu
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 2, ResStage, [8, 1]]
  - [-1, 2, ResStage, [16, 1, {dilation: 2}]]
head:
  - [-1, 1, Conv, [12, 3]]
  - [-1, 1, SegHead, [nc]]
"""
SELECTIVE = DENSE.replace(
    "  - [-1, 2, ResStage, [16, 1, {dilation: 2}]]\n",
    "  - [-1, 1, MaskPredictor, [[4, 4, 4]]]\n  - [[1, 2], 2, SelStage, [16, {dilation: 2}]]\n"
    "  - [[3, 2], 1, SelLoss, []]\n",
)


def test_weights_move_with_their_rows_where_others_were_put_between_them():
    dense, selective = build(parse_text(DENSE)), build(parse_text(SELECTIVE))
    _, missing = warm_start(selective, aligned(dense.state_dict(), selective))
    assert {name.split(".")[1] for name in missing} == {"2", "4"}  # the predictor, and the batches that its loss saw
    for ours, theirs in ((0, 0), (1, 1), (3, 2), (5, 3), (6, 4)):
        state = dense.layers[theirs].state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in selective.layers[ours].state_dict().items())


def test_weights_keep_their_rows_where_the_count_is_the_same_or_nothing_else_fits():
    dense, selective = build(parse_text(DENSE)), build(parse_text(SELECTIVE))
    state = dense.state_dict()
    assert aligned(state, build(parse_text(DENSE.replace("nc: 3", "nc: 5")))) is state
    wider = build(parse_text(SELECTIVE.replace("[8, 1]", "[24, 1]")))  # every tensor of row 1 has another shape
    moved = aligned(state, wider)
    assert torch.equal(moved["layers.1.blocks.0.conv1.weight"], state["layers.1.blocks.0.conv1.weight"])
    assert aligned(selective.state_dict(), dense).keys() >= dense.state_dict().keys()
