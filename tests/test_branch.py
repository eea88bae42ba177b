"""Attention branches, and losses that rows have of their own: in plain networks and in both kinds of supernet."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_classify import draw_classes
from test_ops import scramble
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from data.structures import Batch, Fault, Letterbox, Targets
from engine.config import train_config
from engine.measure import one_step, repeated
from engine.runs import read_csv
from engine.train import train
from models.checkpoint import load_checkpoint, restore
from models.cost import count_params, network_costs, totals
from models.elastic import WithAux, elastic_leaves, plain_state
from models.graph import combinations, resolve
from models.network import build
from models.ops.branch import AttentionBranch
from models.parse import parse, parse_text
from models.supernet import Supernet, architecture_loss
from search.objective import Prices, architecture_step

CFG = Path(__file__).resolve().parents[1] / "cfg" / "models"
KINDS = ("shared", "independent")
CLASSES = 3
CLASSIFIER = """\
nc: 3
activation: relu
backbone:
  - [-1, 1, Conv, [8, 3, 4]]
  - [-1, 1, AttentionBranch, [nc, 1, {more}]]
head:
  - [-1, 1, Conv, [12, 3, 2]]
  - [-1, 1, FAL, [nc, 1, {more}]]
  - [[1, 3], 1, Classify, [nc]]
"""
DETECTOR = """\
nc: 3
activation: relu
anchors: [[10, 13, 16, 30], [30, 61, 62, 45]]
backbone:
  - [-1, 1, Conv, [8, 3, 4]]
  - [-1, 1, AttentionBranch, [nc, 1]]
head:
  - [-1, 1, Conv, [12, 3, 2]]
  - [[1, 2], 1, Detect, [nc, anchors]]
"""
PLAIN = CLASSIFIER.format(more="{task: classes}")
OPEN = {
    "shared": CLASSIFIER.format(more="{blocks: {choice: [light, none, abn]}, task: classes}"),
    "independent": CLASSIFIER.format(more="{blocks: {choice: [light, none, abn]}, task: classes}"),
}


def trained(network: Any, dtype: torch.dtype = torch.float32) -> Any:
    """With norms as some steps of training leave them."""
    scramble(network)
    return network.to(dtype)


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=dtype)


def labelled(labels: list[int], index: list[int]) -> Targets:
    boxes = torch.tensor([[5.0, 6, 20, 30]]).repeat(len(labels), 1)
    return Targets(boxes, torch.tensor(labels), torch.tensor(index))


ONE_EACH = labelled([2, 0], [0, 1])


# ---- the branch


def params_by_hand(channels: int, classes: int, depth: int, blocks: str) -> int:
    """Weights of convolutions, and two numbers a channel of norms."""
    wide, inside = (channels, channels // 4) if blocks == "light" else (2 * channels, channels // 2)

    def block(c_in: int) -> int:
        weights = c_in * inside + 9 * inside * inside + inside * wide
        projection = c_in * wide + 2 * wide if c_in != wide else 0
        return weights + 2 * (inside + inside + wide) + projection

    stack = block(channels) + (depth - 1) * block(wide) + 2 * wide
    maps = wide * classes + 2 * classes
    return stack + maps + (9 * classes + 2) + classes * classes


@pytest.mark.parametrize(
    ("channels", "classes", "blocks", "wanted"),
    [
        (256, 80, "light", 239_474),
        (128, 80, "light", 71_154),
        (256, 21, "abn", 951_970),
        (1024, 1000, "abn", 18_027_834),  # of the paper's ResNet-50: its layer4 has 14,964,736
    ],
)
def test_counts_are_those_worked_out_by_hand(channels: int, classes: int, blocks: Any, wanted: int) -> None:
    with torch.device("meta"):
        branch = AttentionBranch(channels, classes, blocks=blocks)
        aux = branch(torch.empty(2, channels, 6, 10)).aux
    assert count_params(branch) == wanted == params_by_hand(channels, classes, 3, blocks)
    assert aux["map"].shape == (2, 1, 6, 10) and aux["logits"].shape == (2, classes)


def test_a_branch_without_blocks_is_nothing() -> None:
    branch, x = AttentionBranch(8, 3, blocks="none"), torch.rand(2, 8, 4, 4)
    assert count_params(branch) == 0 and branch(x) is x


def test_a_map_of_zeros_changes_nothing_and_one_of_ones_doubles() -> None:
    torch.manual_seed(0)
    branch, x = AttentionBranch(8, 3).eval(), torch.randn(2, 8, 5, 7)
    branch.bn_att3.weight.data.zero_()
    for bias, factor in ((-200.0, 1), (200.0, 2)):  # the sigmoid is 0, and 1
        branch.bn_att3.bias.data.fill_(bias)
        said = branch(x)
        assert torch.equal(said.output, factor * x) and (said.aux["map"] == factor - 1).all()


def test_a_branch_without_the_product_says_the_same_and_changes_nothing() -> None:
    torch.manual_seed(0)
    branch, flat, x = AttentionBranch(8, 3), AttentionBranch(8, 3, product=False), torch.randn(2, 8, 5, 7)
    flat.load_state_dict(branch.state_dict())
    one, other = branch(x), flat(x)
    assert torch.equal(other.output, x) and all(torch.equal(one.aux[name], other.aux[name]) for name in one.aux)


@pytest.mark.parametrize("blocks", ["light", "abn"])
def test_a_branch_is_that_of_the_paper(blocks: Any) -> None:
    """Written once more with functions, from the state dict, whose names are those of the authors' code."""
    torch.manual_seed(0)
    branch = trained(AttentionBranch(8, 3, 2, blocks=blocks)).eval()
    state = branch.state_dict()

    def normed(name: str, y: Tensor) -> Tensor:
        of = (state[f"{name}.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(y, *of, eps=1e-5)

    x = torch.randn(2, 8, 5, 7)
    y = x
    for index in range(2):
        name = f"att_layer4.{index}"
        z = F.relu(normed(f"{name}.bn1", F.conv2d(y, state[f"{name}.conv1.weight"])))
        z = F.relu(normed(f"{name}.bn2", F.conv2d(z, state[f"{name}.conv2.weight"], padding=1)))
        z = normed(f"{name}.bn3", F.conv2d(z, state[f"{name}.conv3.weight"]))
        if f"{name}.downsample.0.weight" in state:
            y = normed(f"{name}.downsample.1", F.conv2d(y, state[f"{name}.downsample.0.weight"]))
        y = F.relu(y + z)
    a1 = normed("bn_att", y)
    a2 = F.relu(normed("bn_att2", F.conv2d(a1, state["att_conv.weight"])))
    attention = normed("bn_att3", F.conv2d(a2, state["att_conv3.weight"], padding=1)).sigmoid()
    with torch.no_grad():
        said = branch(x)
    torch.testing.assert_close(said.aux["map"], attention)
    torch.testing.assert_close(said.aux["logits"], F.conv2d(a2, state["att_conv2.weight"]).mean((2, 3)))
    torch.testing.assert_close(said.output, x * attention + x)


# ---- its loss


def test_presence_is_asked_of_each_class() -> None:
    """Logits 0 and log 3 are probabilities 1/2 and 3/4; the second image shows class 1 twice, the third nothing."""
    branch = AttentionBranch(8, 2, task="presence")
    logits = torch.tensor([[0.0, math.log(3)]] * 3)
    loss = branch.aux_loss({"logits": logits}, labelled([0, 1, 1], [0, 1, 1]))
    half, quarter, three = (-math.log(p) for p in (1 / 2, 1 / 4, 3 / 4))
    assert float(loss) == pytest.approx(((half + quarter) + (half + three) + (half + quarter)) / 6)


def test_classes_are_told_by_softmax() -> None:
    """A blend of two images is half of each; an image without a label counts nothing."""
    branch = AttentionBranch(8, 2, task="classes")
    logits = torch.tensor([[0.0, math.log(3)]] * 3)
    loss = branch.aux_loss({"logits": logits}, labelled([1, 0, 1], [0, 1, 1]))
    assert float(loss) == pytest.approx((-math.log(3 / 4) - (math.log(1 / 4) + math.log(3 / 4)) / 2) / 3)
    half = branch.aux_loss({"logits": logits.bfloat16()}, labelled([1, 0], [0, 1]))
    assert half.dtype == torch.float32


@pytest.mark.parametrize("text", [PLAIN, DETECTOR])
def test_the_loss_of_a_network_is_that_of_its_head_and_of_its_branches(text: str) -> None:
    torch.manual_seed(0)
    network = trained(build(parse_text(text))).train()
    outputs, aux = network(images())
    loss, parts = network.loss_from(outputs, ONE_EACH, aux)
    of_head, _ = network.head.loss(outputs, ONE_EACH)
    own = [network.layers[row].aux_loss(said, ONE_EACH) for row, said in aux.items()]
    assert sorted(aux) == [node.index for node in network.graph.nodes if node.op.name in ("AttentionBranch", "FAL")]
    torch.testing.assert_close(loss, of_head + sum(own))
    assert float(parts["att"]) == pytest.approx(sum(map(float, map(torch.detach, own))))
    torch.testing.assert_close(network.loss_from(outputs, ONE_EACH)[0], of_head)  # nothing said, nothing added
    assert not parts["att"].requires_grad


@pytest.mark.parametrize("text", [PLAIN, DETECTOR])
def test_gradients_come_through_both_losses(text: str) -> None:
    """The branch's own loss alone reaches its logits' weights; the head's alone reaches those of its map."""
    torch.manual_seed(0)
    network = trained(build(parse_text(text))).train()

    def reached(loss: Tensor) -> set[str]:
        names, weights = zip(*network.layers[1].named_parameters(), strict=True)
        found = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
        return {name for name, gradient in zip(names, found, strict=True) if gradient is not None and gradient.any()}

    outputs, aux = network(images())
    of_head, of_branch = network.head.loss(outputs, ONE_EACH)[0], network.layers[1].aux_loss(aux[1], ONE_EACH)
    every = {name for name, _ in network.layers[1].named_parameters()}
    assert every - reached(of_head) == {"att_conv2.weight"}
    assert every - reached(of_branch) == {"att_conv3.weight", "bn_att3.weight", "bn_att3.bias"}
    assert reached(network.loss_from(outputs, ONE_EACH, aux)[0]) == every


def test_a_step_and_the_search_for_a_batch_count_it_and_copies_hold_nothing() -> None:
    torch.manual_seed(0)
    network = build(parse_text(PLAIN)).train()
    pixels = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    batch = Batch(pixels, ONE_EACH, (Letterbox(32, 32, 1.0, 0, 0),) * 2, (0, 1))
    before = copy.deepcopy(network.state_dict()).keys()
    one_step(network, repeated(batch, 5), torch.device("cpu"), "off")
    assert all(network.layers[row].att_conv2.weight.grad.any() for row in (1, 3))
    average = AveragedModel(copy.deepcopy(network))  # after a forward: what a branch said is nowhere in it
    average.update_parameters(network)
    assert network.state_dict().keys() == before == average.module.state_dict().keys()


def test_a_training_writes_its_branches_loss_down_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    draw_classes(tmp_path / "train", 1, 0)
    draw_classes(tmp_path / "val", 1, 1)
    (tmp_path / "data.yaml").write_text("train: train\nval: val\nformat: folders\n")
    (tmp_path / "model.yaml").write_text(PLAIN)
    given = {"cfg": tmp_path / "model.yaml", "data": tmp_path / "data.yaml", "project": tmp_path / "runs"}
    options = {"epochs": 1, "batch_size": 3, "imgsz": 32, "device": "cpu", "noplots": True}
    folder = train(train_config({**given, **options}), progress=False).folder
    (row,) = read_csv(folder / "results.csv")
    assert list(row)[3:6] == ["loss", "cls", "att"]
    assert float(row["loss"]) == pytest.approx(float(row["cls"]) + float(row["att"]), rel=1e-4)
    network = restore(load_checkpoint(folder / "best.pt"))
    assert network.num_classes == network.layers[1].att_conv.out_channels == 6  # the data set's


def test_a_row_with_a_loss_of_its_own_is_not_repeated() -> None:
    for number in ("2", "{choice: [1, 2]}"):
        text = PLAIN.replace("[-1, 1, FAL", f"[-1, {number}, FAL")
        with pytest.raises(Fault) as caught:
            build(parse_text(text, "mine.yaml"), "shared" if "choice" in number else None)
        assert str(caught.value) == (
            f"mine.yaml:8:5 layer 3 [-1, {number}, FAL, [nc, 1, {{task: classes}}]]: FAL has a loss of its own, so "
            f"`number` is 1; got {number}; write a row for each"
        )
    with pytest.raises(Fault, match="blocks inside have the 4th part of the channels; 10 are not divided"):
        resolve(parse_text(PLAIN.replace("[12, 3, 2]", "[10, 3, 2]")))


# ---- a branch or none


def supernet(kind: str, dtype: torch.dtype = torch.float32) -> Supernet:
    torch.manual_seed(0)
    return trained(Supernet(parse_text(OPEN[kind]), kind), dtype).train()


@pytest.mark.parametrize("kind", KINDS)
def test_a_derived_network_is_the_active_subnet_and_has_its_loss(kind: str) -> None:
    net = supernet(kind).eval()
    for picks in combinations(net.spec.choices):
        net.activate(picks)
        derived = net.derive(picks)
        assert derived.state_dict().keys() == plain_state(net.network).keys()
        with torch.no_grad():
            wanted, parts = net.network.loss(images(), ONE_EACH)
            found, same = derived.loss(images(), ONE_EACH)
        assert found == wanted and same == parts and list(parts) == ["cls", "att"]
        branches = [option for option in picks.values() if option != "none"]
        assert (parts["att"] > 0) == bool(branches)
        assert len(net.network(images())[1]) == len(branches)


def test_a_shared_supernet_holds_options_side_by_side_where_one_choice_is_open() -> None:
    text = CLASSIFIER.format(more="{blocks: {choice: [light, none]}, task: {choice: [classes, presence]}}")
    with pytest.raises(Fault, match="AttentionBranch cannot share its weights over a choice in blocks; --supernet ind"):
        Supernet(parse_text(text), "shared")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_price", [True, False])
def test_an_architecture_step_moves_what_decides_on_branches(
    kind: str, is_price: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AttentionBranch, "is_price", is_price)
    net = supernet(kind)
    optimizer = torch.optim.SGD(net.alphas, lr=1.0)
    decided = net.decide({choice.name: "none" for choice in net.spec.choices})
    value, _ = architecture_step(net, optimizer, images(), ONE_EACH, decided, Prices(), entropy=0.0)
    _, gradients = net.gate_gradients(net.picks(decided), architecture_loss(images(), ONE_EACH), None, ONE_EACH)
    for decision, alpha in zip(net.decisions, net.alphas, strict=True):
        g = gradients[decision.name] / value  # the loss counts by its mean, which is itself in the first step
        torch.testing.assert_close(alpha.detach(), -(g - g.mean()) / 3)


@contextmanager
def mixture(net: Supernet, gates: Mapping[str, Tensor], targets: Targets) -> Iterator[list[Tensor]]:
    """Inside, every row is ``sum_k g_k o_k(x)``; what is given collects ``g_k a_k``, with the losses of their own."""
    own: list[Tensor] = []

    def mixed(leaf: Any, inputs: Any, _: Any) -> Tensor:
        total: Any = 0
        for gate, option in zip(gates[leaf.choice.name], leaf.choice.options, strict=True):
            y = leaf.option(option, *inputs)
            if isinstance(y, WithAux):
                if leaf.candidate(option).is_price:
                    own.append(gate * leaf.candidate(option).aux_loss(y.aux, targets))
                y = y.output
            total = total + gate * y
        return total

    hooks: list[Any] = [leaf.register_forward_hook(mixed) for _, leaf in elastic_leaves(net.network)]  # type: ignore[attr-defined]
    yield own
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_price", [True, False])
def test_gates_count_the_prices_of_branches_as_central_differences_in_float64_do(
    kind: str, is_price: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AttentionBranch, "is_price", is_price)
    net, x = supernet(kind, torch.float64), images(torch.float64)

    loss = architecture_loss(x, ONE_EACH)
    names = [decision.name for decision in net.decisions]
    for blocks in (("light", "none"), ("none", "abn"), ("abn", "abn")):
        picks = {choice.name: option for choice, option in zip(net.spec.choices, blocks, strict=True)}
        value, gradients = net.gate_gradients(picks, loss, targets=ONE_EACH)
        assert value == loss(net.network).detach()
        decided = net.decide(picks)
        active = {
            d.name: torch.tensor([float(option == decided[d.name]) for option in d.options], dtype=torch.float64)
            for d in net.decisions
        }
        for name, k in itertools.product(names, range(3)):
            values = []
            for sign in (1, -1):
                moved = active[name].clone()
                moved[k] += sign * 1e-6
                with torch.no_grad(), mixture(net, {**active, name: moved}, ONE_EACH) as own:
                    values.append(float(loss(net.network) + sum(own)))
            numeric = (values[0] - values[1]) / 2e-6
            assert float(gradients[name][k]) == pytest.approx(numeric, rel=1e-4, abs=1e-6)
    without = net.gate_gradients(picks, loss)[1]
    for name in names:  # a price near log 3 for a branch, none for its absence
        own = gradients[name] - without[name]
        assert own[1] == 0 and bool(own[0] > 0.5) == bool(own[2] > 0.5) == is_price


# ---- the files

FILES = {  # parameters, of which the branches', at nc of the file
    "resnet18-fpn-cls": (11_902_037, 0, 3.234, 256),
    "resnet50-fpn-cls": (26_875_989, 0, 9.05, 256),
    "resnet18-fpn-fal-cls": (12_016_025, 113_988, 3.518, 256),
    "resnet50-fpn-fal-cls": (27_311_513, 435_524, 10.15, 256),
    "yolov4-p5-fal": (71_144_640, 310_628, 84.15, 640),
}


@pytest.mark.parametrize("file", FILES)
def test_a_file_has_the_counts_that_it_says(file: str) -> None:
    params, of_branches, gmacs, imgsz = FILES[file]
    graph = resolve(parse(CFG / f"{file}.yaml"))
    costs = network_costs(graph, imgsz)
    assert totals(costs)[0] == params and totals(costs)[1] / 1e9 == pytest.approx(gmacs, abs=6e-3)
    branches = [cost.params for node, cost in zip(graph.nodes, costs, strict=True) if node.op.name == "AttentionBranch"]
    assert sum(branches) == of_branches and of_branches <= 0.05 * params
    text = (CFG / f"{file}.yaml").read_text()
    assert f"# {params:,} parameters" in text and f" {gmacs} GMACs at {imgsz} px" in text
    assert not branches or f"of which {of_branches:,} are the branches'" in text


@pytest.mark.parametrize("file", ["tiny", "yolov4-p5"])
def test_a_detector_with_branches_is_the_one_without_where_their_maps_are_zero(file: str) -> None:
    """Row by row the same weights; the branches stand where the pyramid's two finer levels end."""
    plain, fal = (resolve(parse(CFG / f"{name}.yaml")) for name in (file, f"{file}-fal"))
    rows = [node.index for node in fal.nodes if node.op.name != "AttentionBranch"]
    assert [row for row in range(len(fal.nodes)) if row not in rows] == [17, 23]
    assert [fal.nodes[row].output.stride for row in (17, 23)] == [16, 8]
    places = {-1: -1, **{row: place for place, row in enumerate(rows)}, 17: 16, 23: 21}
    for place, row in enumerate(rows):
        one, other = plain.nodes[place], fal.nodes[row]
        assert (one.op, one.arguments, one.repeats) == (other.op, other.arguments, other.repeats)
        assert one.sources == tuple(places[source] for source in other.sources)


def test_the_search_file_opens_every_level() -> None:
    spec = parse(CFG / "resnet18-fpn-fal-search.yaml")
    assert [choice.options for choice in spec.choices] == [("light", "none")] * 4
    with torch.device("meta"):
        for kind in KINDS:
            net = Supernet(spec, kind)
            assert sum(count_params(net.network.layers[row]) for row in range(20, 24)) == 4 * 113_988 // 2
