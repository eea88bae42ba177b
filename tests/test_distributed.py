"""Several processes as one run: the same weights, alphas and subnets everywhere, bit for bit; each image is seen once.

Run by torchrun, this file is one of two processes on the CPU: `main` does everything once and notes what it saw. The
tests below compare the two notes.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_resume import a_task
from test_train import MODEL, Killed, draw_data
from torch import nn

from data.dataset import ImageSet
from data.loader import batches
from data.structures import Fault, Sample
from engine import train as training
from engine.config import TrainConfig
from engine.distributed import (
    World,
    average,
    average_gradients,
    average_numbers,
    broadcast,
    check_shares,
    finish,
    gather_objects,
    start,
    together,
)
from engine.doors import door
from engine.train import train
from models.checkpoint import load_checkpoint
from models.supernet import Supernet

ROOT = Path(__file__).resolve().parents[1]
ALONE = World(0, 1, torch.device("cpu"))
# Subnets or mixtures that are activated in a weight step of a search. With two open kernels, a sandwich has the trunk,
# the three, and in half of the steps one more row that two of them have in common; in the others the random one is one
# of the others. That is 5 or 3, each as often.
STEPS = {"shared": 1, "independent": 1, "merge": 1, "sandwich": 4}


# ---- what each process does


def digest(module: nn.Module) -> str:
    """A short name for exactly these weights."""
    found = hashlib.sha256()
    for parameter in module.parameters():
        found.update(parameter.detach().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def main(folder: Path) -> None:
    atexit.register(note_threads, folder / f"threads{os.environ['RANK']}")  # runs last
    torch.set_num_threads(1)
    world = start("cpu")
    notes: dict[str, Any] = {"rank": world.rank, "size": world.size, "is_first": world.is_first, "text": str(world)}
    for name, note in (("basics", basics), ("gradients", gradients), ("faults", faults), ("fit", fit), ("find", find)):
        notes[name] = note(world, folder)
    (folder / f"rank{world.rank}.json").write_text(json.dumps(notes))


def note_threads(file: Path) -> None:
    """What is left of the processes' group on the way out: a thread of it that runs on ends some runs by SIGABRT."""
    assert start("cpu") == ALONE
    threads = Path("/proc/self/task").glob("*/comm")  # none but on Linux
    file.write_text(" ".join(sorted(thread.read_text().strip() for thread in threads if "gloo" in thread.read_text())))


def basics(world: World, folder: Path) -> dict[str, Any]:
    tensors = [torch.full((2, 3), world.rank + 1.0), torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)]
    before = [tensor.clone() for tensor in tensors]
    average(tensors, world)
    seen = gather_objects([tensor.tolist() for tensor in before], world)
    means = [sum(map(torch.tensor, values)) / world.size for values in zip(*seen, strict=True)]
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    unlike = digest(net)
    broadcast(net, world)
    return {
        "averages": [tensor.tolist() for tensor in tensors],
        "are_means": all(torch.allclose(tensor, mean) for tensor, mean in zip(tensors, means, strict=True)),
        "numbers": average_numbers({"loss": world.rank + 0.25, "box": float("nan") if world.rank else 1.0}, world),
        "gathered": gather_objects({"rank": world.rank, "text": "ü" * world.rank}, world),
        "unlike": unlike,
        "alike": digest(net),
    }


def gradients(world: World, folder: Path) -> dict[str, Any]:
    """Of five images, shared three and two: their weighted average is the gradient of the whole batch."""
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(5, 4, generator=generator), torch.randn(5, 1, generator=generator)
    torch.manual_seed(0)
    net, unused = nn.Linear(4, 1), nn.Linear(4, 1)
    share = slice(world.rank, None, world.size)
    loss = (net(x[share]) - y[share]).square().mean()
    (loss * len(x[share]) * world.size / len(x)).backward()
    both = nn.ModuleList([net, unused])
    average_gradients(both, world, check=True)
    averaged = [p.grad for p in net.parameters()]
    whole = torch.autograd.grad((net(x) - y).square().mean(), list(net.parameters()))
    apart = ""
    if world.rank == 1:
        unused(x).sum().backward()
    try:
        average_gradients(both, world, check=True)
    except RuntimeError as problem:
        apart = str(problem)
    return {
        "equal": all(torch.allclose(a, b) for a, b in zip(averaged, whole, strict=True)),
        "unused": all(p.grad is None for p in unused.parameters()) or world.rank == 1,
        "apart": apart,
    }


def faults(world: World, folder: Path) -> dict[str, Any]:
    """What doors print and return when one process fails, and when all do."""
    outcomes = {}
    doors = {
        "training": lambda: training.main(["--cfg", "model.yaml", "--data", "gone.yaml", "--device", "cpu"]),
        "second": lambda: door_that_fails_in(1, world),
    }
    for name, opened in doors.items():
        told = io.StringIO()
        with contextlib.redirect_stderr(told):
            code = opened()
        outcomes[name] = [code, told.getvalue()]
    return outcomes


def door_that_fails_in(failing: int, world: World) -> int:
    @door
    def main(argv: Any = None) -> int:
        with together(world):
            if world.rank == failing:
                raise FileNotFoundError(2, "No such file or directory", "gone.yaml")
        return 0

    return main([])


def fit(world: World, folder: Path) -> dict[str, Any]:
    """Two trainings of two epochs, the second killed and resumed: the weights of every step and what is on disk."""
    steps: list[str] = []
    real = training.averaged

    def spying(network: nn.Module, total_steps: int) -> Any:
        ema = real(network, total_steps)
        update = ema.update_parameters

        def noted(model: nn.Module) -> None:
            steps.append(digest(model))
            update(model)

        ema.update_parameters = noted
        return ema

    training.averaged = spying  # type: ignore[assignment]
    options = {"cfg": folder / "model.yaml", "data": folder / "data.yaml", "epochs": 2, "batch_size": 4, "imgsz": 64}
    options["noplots"] = True  # type: ignore[assignment]
    config = TrainConfig(**options, device="cpu", project=folder / "runs")  # type: ignore[arg-type]
    result = train(config, progress=False)
    whole, steps[:] = list(steps), []
    lr_factor, calls = training.lr_factor, [0]

    def deadly(*given: Any) -> float:
        calls[0] += 1
        if calls[0] == 4:
            raise Killed
        return lr_factor(*given)

    training.lr_factor = deadly
    try:
        train(config, progress=False)
    except Killed:
        training.lr_factor = lr_factor
    gather_objects(None, world)  # the first one may not yet have written what both go on with
    resumed = train(TrainConfig(resume=folder / "runs" / "exp2"), progress=False)
    training.averaged = real
    return {
        "whole": whole,
        "resumed": steps,
        "ap": result.metrics.ap,
        "folders": [result.folder.name, resumed.folder.name],
    }


def find(world: World, folder: Path) -> dict[str, Any]:
    """A search of each kind: every subnet or mixture that ran, in order, and where alphas and weights ended."""
    found = {}
    for kind in STEPS:
        ran: list[str] = []
        activate, mixed = Supernet.activate, Supernet.mixed

        def noted(self: Supernet, picks: Any, ran: list[str] = ran, activate: Any = activate) -> None:
            ran.append(str(sorted(picks.items())))
            activate(self, picks)

        def noted_gates(self: Supernet, gates: Any, ran: list[str] = ran, mixed: Any = mixed) -> Any:
            ran.append(str({name: [value.hex() for value in gate.tolist()] for name, gate in gates.items()}))
            return mixed(self, gates)

        Supernet.activate, Supernet.mixed = noted, noted_gates  # type: ignore[method-assign]
        how = {"sandwich": True} if kind == "sandwich" else {}
        supernet_kind = "shared" if kind == "sandwich" else kind
        task = a_task(folder / "data.yaml", supernet_kind, weights_seed=world.rank, batch_size=4, **how)
        supernet = task.run(folder / kind)
        Supernet.activate, Supernet.mixed = activate, mixed  # type: ignore[method-assign]
        alphas = [[value.hex() for value in alpha.tolist()] for alpha in supernet.alphas]
        found[kind] = {"ran": ran, "alphas": alphas, "weights": digest(supernet.network)}
    return found


# ---- what the two of them saw


def in_two_processes(script: str | Path, *options: Any) -> str:
    """What a script prints that torchrun runs twice on this machine; fails with it where the script does."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [*torchrun, str(script), *map(str, options)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True) as process:
        try:
            printed, _ = process.communicate(timeout=600)
        except BaseException:
            process.terminate()  # which ends its two processes as well; to kill it would leave them behind
            raise
    assert process.returncode == 0, printed
    return printed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("two")
    draw_data(place, train=13)  # batches of 4 would leave 1 image for 2 processes
    (place / "model.yaml").write_text(MODEL)
    return place


@pytest.fixture(scope="module")
def notes(folder: Path) -> list[dict[str, Any]]:
    in_two_processes(__file__, folder)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_every_process_knows_its_place(notes: list[dict[str, Any]]) -> None:
    assert [(note["rank"], note["size"], note["is_first"]) for note in notes] == [(0, 2, True), (1, 2, False)]
    assert notes[1]["text"] == "cpu, 2 processes" and str(ALONE) == "cpu"


def test_nothing_of_the_group_is_left_when_a_process_ends(notes: list[dict[str, Any]], folder: Path) -> None:
    assert [(folder / f"threads{rank}").read_text() for rank in range(2)] == ["", ""]


def test_averages_are_means_and_the_same_bits_everywhere(notes: list[dict[str, Any]]) -> None:
    first, second = (note["basics"] for note in notes)
    assert first["averages"] == second["averages"] and first["averages"][0] == [[1.5] * 3] * 2
    assert first["are_means"] and second["are_means"]
    assert first["numbers"]["loss"] == second["numbers"]["loss"] == 0.75
    assert str(first["numbers"]["box"]) == str(second["numbers"]["box"]) == "nan"
    assert first["gathered"] == second["gathered"] == [{"rank": 0, "text": ""}, {"rank": 1, "text": "ü"}]
    assert first["unlike"] != second["unlike"] and first["alike"] == second["alike"] == first["unlike"]


def test_unequal_shares_give_the_gradient_of_the_whole_batch(notes: list[dict[str, Any]]) -> None:
    assert all(note["gradients"]["equal"] and note["gradients"]["unused"] for note in notes)
    for note in notes:
        assert note["gradients"]["apart"].startswith("1.weight has a gradient in process 1, but none in process 0:")


def test_a_fault_of_one_process_is_that_of_all_and_told_once(notes: list[dict[str, Any]]) -> None:
    for name, told in (("training", "gone.yaml: there is no such file"), ("second", "gone.yaml: No such file or dir")):
        (code, first), second = (note["faults"][name] for note in notes)
        assert code == 2 and first.startswith(told) and first.count("\n") == 1
        assert second == [2, ""]


def test_training_has_the_same_weights_everywhere_after_every_step(notes: list[dict[str, Any]], folder: Path) -> None:
    first, second = (note["fit"] for note in notes)
    assert len(first["whole"]) == 2 * 3  # batches of 4, 4 and 5
    assert first == second and len(set(first["whole"])) == 6
    assert first["folders"] == ["exp", "exp2"] and sorted(path.name for path in (folder / "runs").iterdir()) == [
        "exp",
        "exp2",
    ]


def test_a_killed_training_of_two_processes_ends_as_if_it_had_not_been(
    notes: list[dict[str, Any]], folder: Path
) -> None:
    first = notes[0]["fit"]
    assert first["resumed"] == [*first["whole"][:3], *first["whole"][3:]]
    one, other = (load_checkpoint(folder / "runs" / name / "last.pt") for name in ("exp", "exp2"))
    assert all(torch.equal(value, other.state[name]) for name, value in one.state.items())
    assert one.training is not None and one.training["processes"] == 2


@pytest.mark.parametrize("kind", STEPS)
def test_a_search_runs_the_same_subnets_and_ends_with_equal_alphas(kind: str, notes: list[dict[str, Any]]) -> None:
    first, second = (note["find"][kind] for note in notes)
    assert len(first["ran"]) == STEPS[kind] * 8 + 2 + 1 and len(set(first["ran"])) > 4
    assert first["ran"] == second["ran"]
    assert first["alphas"] == second["alphas"]  # bit for bit
    assert any(float.fromhex(value) for alpha in first["alphas"] for value in alpha)
    assert first["weights"] == second["weights"]


# ---- one process


def test_one_process_is_left_as_it_is() -> None:
    tensor = torch.randn(3)
    before = tensor.clone()
    average([tensor], ALONE)
    assert torch.equal(tensor, before) and gather_objects((1, 2), ALONE) == [(1, 2)]
    assert average_numbers({"loss": 0.1}, ALONE) == {"loss": 0.1}
    with pytest.raises(Fault, match="as it is"), together(ALONE):
        raise Fault("as it is")
    finish()


def test_only_torchrun_makes_several(monkeypatch: pytest.MonkeyPatch) -> None:
    assert start("cpu") == ALONE
    monkeypatch.setenv("WORLD_SIZE", "4")  # as some cluster's software does
    assert start("cpu") == ALONE
    with pytest.raises(Fault, match="4 processes cannot share batches of 3 images"):
        check_shares(3, World(0, 4, torch.device("cpu")))


def test_what_all_processes_find_wrong_the_first_one_tells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, told in (("0", "--epochs: input should be greater than or equal to 1, got '0'\n"), ("1", "")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert training.main(["--epochs", "0"]) == 2
        assert capsys.readouterr().err == told


def test_each_machine_tells_what_it_finds_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where something else than torchrun has numbered the machines."""
    monkeypatch.setenv("RANK", "1")
    for local in (None, "0"):
        if local:
            monkeypatch.setenv("LOCAL_RANK", local)
        assert training.main(["--epochs", "0"]) == 2 and "--epochs" in capsys.readouterr().err


def test_gpus_are_shared_out_one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "3"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(Fault, match="--device cuda:1: of 3 processes each takes a GPU of its own"):
        start("cuda:1")
    with pytest.raises(Fault, match="3 processes, but this machine has 2 usable GPUs; --nproc_per_node 2"):
        start("")


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 6))
def test_shares_make_up_the_batches_and_none_is_empty(count: int, batch_size: int, size: int) -> None:
    if min(count, batch_size) < size:
        return
    images = ImageSet([Sample(Path(f"{i}.png"), [], []) for i in range(count)], 32)  # type: ignore[arg-type]
    given = {"epoch": 3, "seed": 5, "shuffle": True, "world_size": size}
    ranks = [batches(images, batch_size, **given, rank=rank).lists for rank in range(size)]  # type: ignore[arg-type]
    assert len({len(lists) for lists in ranks}) == 1
    whole = []
    for shares in zip(*ranks, strict=True):
        lengths = [len(share) for share in shares]
        assert min(lengths) >= 1 and max(lengths) - min(lengths) <= 1
        whole.append([shares[place % size][place // size] for place in range(sum(lengths))])
    alone = batches(images, batch_size, epoch=3, seed=5, shuffle=True).lists
    assert sum(whole, []) == sum(alone, [])  # type: ignore[arg-type]
    joined = 0 < count % batch_size < size
    assert len(whole) == len(alone) - joined and whole[:-1] == alone[: len(whole) - 1]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
