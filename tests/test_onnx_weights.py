"""A YOLOX that was exported to ONNX comes back as the same function, and can be trained on."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from test_ops import scramble
from test_train import draw_data
from torch import Tensor, nn

from data.structures import Fault
from engine.config import train_config
from engine.runs import read_csv
from engine.train import train
from engine.unfold import folded, unfold, with_statistics
from models.__main__ import main
from models.checkpoint import load_checkpoint, restore, save_checkpoint
from models.fuse import fuse
from models.network import Network, build
from models.onnx_weights import add_only, adds_only, convolutions_of, import_onnx, places_of
from models.ops.conv import Conv
from models.parse import parse, parse_text
from models.spec import ModelSpec

onnx = pytest.importorskip("onnx")

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT.parent / "shared" / "data" / "weights" / "yolox_nano.onnx"
TEXT = """
nc: {nc}
backbone:
  - [-1, 1, Focus, [8, 3]]
  - [-1, 1, SeparableConv, [16, 3, 2]]
  - [-1, 2, C3Separable, [{width}]]
  - [-1, 1, SPP, [16]]  # 3: stride 4
head:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, C3, [16, False]]  # 5: stride 8
  - [[3, 5], 1, YOLOXHead, [nc, True]]
"""


def a_spec(nc: int = 3, width: int = 16) -> ModelSpec:
    return parse_text(TEXT.format(nc=nc, width=width), "mine.yaml")


def a_network(nc: int = 3) -> Network:
    torch.manual_seed(0)
    network = build(a_spec(nc))
    scramble(network)
    return network.eval()


def exported(network: Network, file: Path, extra: list | None = None) -> Path:
    """What an exporter would leave of a network: convolutions with their norms folded, in the order of YOLOX.

    Written by hand from the network with its norms folded, so that reading and writing have nothing in common but the
    order. What is between the convolutions is left out, since nobody reads it.
    """
    helper, numpy = onnx.helper, onnx.numpy_helper
    fused = fuse(network)
    order = []
    for node, layer in zip(fused.graph.nodes, fused.layers, strict=True):
        names = [name for name, module in layer.named_modules() if isinstance(module, nn.Conv2d)]
        if node.op.name.startswith("C3"):
            names.sort(key=lambda name: ["cv1", "cv2", "m", "cv3"].index(name.split(".")[0]))
        if node.op.name == "YOLOXHead":
            parts = ["stems", "cls_convs", "cls_preds", "reg_convs", "reg_preds", "obj_preds"]
            names.sort(key=lambda name: (int(name.split(".")[1]), parts.index(name.split(".")[0])))
        order += [layer.get_submodule(name) for name in names]
    first = order[0]
    with torch.no_grad():  # it saw blue, green, red from 0 to 255
        quarters = [quarter.flip(1) / 255 for quarter in first.weight.split(3, dim=1)]
        first.weight.copy_(torch.cat(quarters, dim=1))
    nodes, tensors = [], []
    for number, conv in enumerate(order):
        given = {"strides": list(conv.stride), "pads": list(conv.padding) * 2, "group": conv.groups}
        nodes.append(helper.make_node("Conv", ["x", f"{number}.w", f"{number}.b"], [f"{number}.y"], **given))
        tensors.append(numpy.from_array(conv.weight.detach().numpy(), f"{number}.w"))
        tensors.append(numpy.from_array(conv.bias.detach().numpy(), f"{number}.b"))
    graph = helper.make_graph(nodes + (extra or []), "net", [], [], tensors)
    onnx.save(helper.make_model(graph), str(file))
    return file


def heads_alike(one: Network, other: Network, images: Tensor, atol: float = 1e-4) -> None:
    with torch.no_grad():
        for a, b in zip(one(images)[0], other(images)[0], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=atol)


def test_an_exported_network_comes_back_as_the_same_function(tmp_path):
    network = a_network()
    found, notes = import_onnx(exported(network, tmp_path / "net.onnx"), a_spec())
    heads_alike(found, network, torch.rand(2, 3, 64, 64))
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in found.modules())
    assert notes == (
        "images are red, green and blue in [0, 1] here, so row 0 turns them into the file's: BGR, 0 to 255",
        f"{norms} norms were folded into convolutions; they get statistics from the images that the network is trained "
        "on",
    )
    assert len(folded(found)) == norms and not found.training


def test_the_number_of_classes_is_that_of_the_file(tmp_path):
    file = exported(a_network(5), tmp_path / "net.onnx")
    found, notes = import_onnx(file, a_spec(3))
    assert found.num_classes == 5 and notes[0] == "nc: 3 in mine.yaml; taken from the weights: 5"
    with pytest.raises(Fault) as fault:
        import_onnx(file, a_spec(3), ["a", "b"])
    assert str(fault.value) == f"{file}: was trained on 5 classes, but 2 names are given"


def test_what_does_not_fit_says_where(tmp_path):
    file = exported(a_network(), tmp_path / "net.onnx")
    with pytest.raises(Fault) as fault:
        import_onnx(file, a_spec(width=24))
    assert str(fault.value) == (
        "mine.yaml:6:5 layer 2 [-1, 2, C3Separable, [24]]: needs 12x16x1x1, stride 1, padding 0; convolution 3 of "
        f"{file} is 8x16x1x1, stride 1, padding 0"
    )
    with pytest.raises(Fault) as fault:
        import_onnx(file, parse(ROOT / "cfg" / "models" / "tiny.yaml"))
    assert "ends with Detect; of ONNX files only those of YOLOX are read" in str(fault.value)


def test_what_is_no_such_file_says_why(tmp_path):
    helper = onnx.helper
    file = tmp_path / "net.onnx"
    with pytest.raises(Fault, match="no such file"):
        convolutions_of(file)
    file.write_bytes(b"not a network")
    with pytest.raises(Fault, match="is no ONNX file|has no convolution"):
        convolutions_of(file)
    norm = helper.make_node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"])
    with pytest.raises(Fault, match="has a norm of its own, 'y'"):
        convolutions_of(exported(a_network(), file, [norm]))
    outside = helper.make_node("Conv", ["x", "from elsewhere"], ["y"])
    with pytest.raises(Fault, match="the weights 'from elsewhere' are computed or come from outside"):
        convolutions_of(exported(a_network(), file, [outside]))


def test_weights_in_another_file_are_not_looked_for(tmp_path):
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[1, 1, 1, 1], data_location=1)
    tensor.external_data.add(key="location", value="../../secret")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Conv", ["x", "w"], ["y"])], "net", [], [], [tensor])
    (tmp_path / "net.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    with pytest.raises(Fault, match="keeps 'w' in another file; save it as one file"):
        convolutions_of(tmp_path / "net.onnx")


def test_a_norm_that_only_adds_is_known_from_all_others():
    norm, x = nn.BatchNorm2d(4, eps=1e-3).eval(), torch.randn(2, 4, 3, 3)
    assert not adds_only(norm)
    add_only(norm, torch.arange(4.0))
    torch.testing.assert_close(norm(x), x + torch.arange(4.0)[:, None, None], rtol=0, atol=1e-6)
    assert adds_only(norm)
    norm.train()(x)
    assert not adds_only(norm)


# ---- before it is trained on


def test_an_unfolded_network_is_the_same_function_and_survives_training_mode(tmp_path):
    """In training mode with just the images that gave the statistics, each norm sees just these."""
    network = a_network()
    found, _ = import_onnx(exported(network, tmp_path / "net.onnx"), a_spec())
    images = torch.rand(8, 3, 64, 64)
    broken = deepcopy(found)
    unfold(found, [images[:4], images[4:]])
    assert folded(found) == []
    heads_alike(found, network, torch.rand(2, 3, 64, 64))
    heads_alike(found.train(), network, images, atol=1e-3)
    with torch.no_grad():
        wrong, right = broken.train()(images)[0], network(images)[0]
    assert max(float((a - b).abs().max()) for a, b in zip(wrong, right, strict=True)) > 0.1, "this is what it is for"


def test_an_unfolded_filter_is_as_large_as_a_new_one(tmp_path):
    found, _ = import_onnx(exported(a_network(), tmp_path / "net.onnx"), a_spec())
    unfold(found, [torch.rand(4, 3, 64, 64)])
    torch.manual_seed(1)
    new = build(a_spec())
    for (_, ours), (_, theirs) in zip(pairs(found), pairs(new), strict=True):
        lengths = [conv.weight.detach().flatten(1).norm(dim=1) for conv in (ours, theirs)]
        assert float(lengths[0].std()) < 1e-4  # all alike
        assert 0.5 < float(lengths[0].mean() / lengths[1].square().mean().sqrt()) < 2


def pairs(network: Network) -> list[tuple[str, nn.Conv2d]]:
    rows = network.layers[:-1].named_modules()  # a head starts by its own rule
    return [(name, module.conv) for name, module in rows if isinstance(module, Conv)]


def test_a_checkpoint_without_folded_norms_stays_as_it_is(tmp_path):
    network, names = a_network(), ("a", "b", "c")
    save_checkpoint(tmp_path / "own.pt", network, names, imgsz=64)
    own = load_checkpoint(tmp_path / "own.pt")
    assert with_statistics(own, lambda: pytest.fail("nobody asks for images")) == (own, None)

    found, _ = import_onnx(exported(network, tmp_path / "net.onnx"), a_spec())
    save_checkpoint(tmp_path / "net.pt", found, names, imgsz=64)
    changed, line = with_statistics(load_checkpoint(tmp_path / "net.pt"), lambda: [torch.rand(4, 3, 64, 64)])
    assert line == (
        f"{tmp_path / 'net.pt'}: {len(folded(found))} norms were folded into convolutions, they get statistics of "
        "these images"
    )
    start = build(a_spec())
    start.load_state_dict(changed.state)
    heads_alike(start.eval(), network, torch.rand(1, 3, 64, 64))


def test_a_run_starts_from_it_with_statistics_and_ends_with_calm_epochs(tmp_path, capsys):
    """The last epoch, the only one without mosaics, has the L1 distance in its loss. The classes are others."""
    draw_data(tmp_path)
    found, _ = import_onnx(exported(a_network(), tmp_path / "net.onnx"), a_spec())
    save_checkpoint(tmp_path / "net.pt", found, ("a", "b", "c"), imgsz=64)
    given = {"weights": tmp_path / "net.pt", "data": tmp_path / "data.yaml", "epochs": 2, "batch_size": 4, "imgsz": 64}
    result = train(train_config({**given, "device": "cpu", "noplots": True, "project": tmp_path / "runs"}))
    told = capsys.readouterr().out
    norms, tensors = len(folded(found)), len(found.state_dict())
    assert f"net.pt: {norms} norms were folded into convolutions, they get statistics of these images\n" in told
    assert f"net.pt: {tensors - 4} of {tensors} tensors loaded, missing: layers.6.cls_preds.0.weight" in told
    distances = [float(row["l1"]) for row in read_csv(result.folder / "results.csv")]
    assert distances[0] == 0 < distances[1]
    assert folded(restore(load_checkpoint(result.best))) == []


# ---- the published file


@pytest.fixture(scope="module")
def nano() -> Network:
    if not NANO.is_file():
        pytest.skip(f"{NANO} is not there")
    return import_onnx(NANO, parse(ROOT / "cfg" / "models" / "yolox-nano.yaml"))[0]


def test_every_weight_of_the_published_file_has_a_place(nano):
    theirs = convolutions_of(NANO)
    assert len(list(places_of(nano))) == len(theirs) == 113
    folded_count = sum(one.weight.numel() + len(one.bias) for one in theirs)
    assert folded_count == 904_463 == sum(p.numel() for p in fuse(nano).parameters())


def test_it_gives_what_the_published_file_gives(nano):
    """Held against another program that runs the file itself, BGR from 0 to 255; its scores are no logits."""
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(str(NANO), options, providers=["CPUExecutionProvider"])
    images = torch.rand(1, 3, 416, 416, generator=torch.Generator().manual_seed(0))
    (expected,) = session.run(None, {"images": (images.flip(1) * 255).numpy()})
    with torch.no_grad():
        outputs, _ = nano(images)
    y = torch.cat([level.flatten(1, 2) for level in outputs], dim=1)
    y = torch.cat((y[..., :4], y[..., 4:].sigmoid()), dim=-1)
    torch.testing.assert_close(y, torch.from_numpy(expected), rtol=0, atol=1e-4)


def test_the_command_imports_it(nano, tmp_path, capsys):
    cfg, output = ROOT / "cfg" / "models" / "yolox-nano.yaml", tmp_path / "nano.pt"
    given = ["import", str(NANO), "--cfg", str(cfg), "-o", str(output), "--imgsz", "416"]
    assert main([*given, "--normalization", "imagenet"]) == 2
    assert capsys.readouterr().err == f"--normalization imagenet: {NANO} is an ONNX file, whose input is known\n"
    assert main(given) == 0
    assert "classes are called 0 to 79; --names FILE names them" in capsys.readouterr().err
    checkpoint = load_checkpoint(output)
    assert checkpoint.imgsz == 416 and checkpoint.spec.num_classes == 80
