"""What does a step of a search cost, measured in steps of a plain subnet?

python bench/step_cost.py                                   # all cells: about 45 minutes on 2 idle cores
python bench/step_cost.py --cells shared --pairs 3 --imgsz 64   # a quick look
python bench/step_cost.py --show                            # the table of what was measured

A step is forward, loss, backward, clipping, optimizer, zero_grad and moving average, as in train.py. A pair is one step
of a search and one of a plain network, derived from the same supernet with the same options; which of the two comes
first is drawn. The options are strictly fair, so that the plain steps are those of the mean subnet. The ratio is that
of the summed times; its 95 % interval is a bootstrap over whole periods of architecture steps.

shared             one set of weights; a weight step
shared-alphas      and a step of alphas, every option looked at, before every fifth weight step
independent-full   whole blocks side by side, with such steps of alphas
independent-two    with steps of alphas that look at two options
merge              one set of weights; a weight step of the mixture of all subnets
merge-alphas       and a step of alphas through the mixture before every fifth weight step
sandwich           one set of weights; a weight step of the largest, a random and the smallest subnet, what they begin
                   with in common run once, the largest teaching the others
reference          ML-TANGO's scheme, rebuilt: a step of alphas before every weight step, and in both of them every
                   candidate runs in the backward pass

Memory is the most that torch's allocator holds at once during a step, weights, moving average, optimizer and images
included, with the largest subnet active; beside it that of the largest subnet's own plain step. Cells are kept as JSON
in bench/results, and one that is there is not measured again. Exits with 1 where more than what is asked was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.optim.swa_utils import AveragedModel  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data.structures import Targets  # noqa: E402
from engine.doors import keep_freed_memory  # noqa: E402
from engine.optim import averaged, make_optimizer  # noqa: E402
from engine.runs import table, write_text  # noqa: E402
from models.distill import distillation_loss  # noqa: E402
from models.elastic import IndependentRow  # noqa: E402
from models.graph import resolve  # noqa: E402
from models.network import Network  # noqa: E402
from models.parse import parse  # noqa: E402
from models.supernet import Supernet  # noqa: E402
from search.costs import cost_tables  # noqa: E402
from search.objective import Prices, architecture_step  # noqa: E402
from search.sampling import drawn_options, fair_options, sandwich_options  # noqa: E402
from search.sandwich import TAUGHT, backward, sizes  # noqa: E402
from search.train import mixed_gates  # noqa: E402

RESULTS = ROOT / "bench" / "results"
ANCHORS = tuple(tuple(float(v) for v in range(8 + 40 * k, 8 + 40 * k + 8)) for k in range(3))  # any will do
RESAMPLES = 5000
WARMUP = 2


@dataclass(frozen=True)
class Scheme:
    """How a search takes its steps: which supernet, weight steps to a step of alphas (0: none), by which paths; and
    what is asked of it.
    """

    kind: str
    every: int
    paths: str = "full"
    asked: float | None = None
    asked_memory: float | None = None


SCHEMES = {
    "shared": Scheme("shared", 0, asked=1.05, asked_memory=1.15),
    "shared-alphas": Scheme("shared", 5),
    "independent-full": Scheme("independent", 5, asked=1.35),
    "independent-two": Scheme("independent", 5, "two", asked=1.35),
    "merge": Scheme("merge", 0, asked=1.15),
    "merge-alphas": Scheme("merge", 5),
    "sandwich": Scheme("shared", 0, "sandwich", asked=1.6),
    "reference": Scheme("independent", 1, "reference"),
}
MODELS = {
    "tiny-search": (
        "shared",
        "shared-alphas",
        "merge",
        "sandwich",
    ),  # with depth, a row has more options than whole blocks are held for
    "tiny-seed-search": tuple(SCHEMES),
}


@dataclass(frozen=True)
class Trained:
    """A network and what moves it."""

    network: Network
    optimizer: torch.optim.Optimizer
    average: AveragedModel


def trained(network: Network) -> Trained:
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(network, "AdamW", lr=1e-3, momentum=0.9, weight_decay=5e-4)
    return Trained(network.train(), optimizer, averaged(network, 1_000))


def a_batch(size: int, imgsz: int, classes: int) -> tuple[Tensor, Targets]:
    """Noise, with eight boxes an image."""
    rng = np.random.default_rng(0)
    centres, sides = rng.uniform(0.2, 0.8, (8 * size, 2)), rng.uniform(0.05, 0.4, (8 * size, 2))
    boxes = torch.from_numpy(np.hstack((centres - sides / 2, centres + sides / 2)) * imgsz).float()
    labels, owners = torch.from_numpy(rng.integers(0, classes, 8 * size)), torch.arange(size).repeat_interleave(8)
    images = torch.from_numpy(rng.random((size, 3, imgsz, imgsz), dtype=np.float32))
    return images.contiguous(memory_format=torch.channels_last), Targets(boxes, labels, owners)


# ---- steps


def weight_step(
    own: Trained, images: Tensor, targets: Targets, add_gradients: Callable[[], None] | None = None
) -> None:
    if add_gradients is None:
        own.network.loss(images, targets)[0].backward()
    else:
        add_gradients()
    nn.utils.clip_grad_norm_(own.network.parameters(), 10.0)
    own.optimizer.step()
    own.optimizer.zero_grad(set_to_none=True)
    own.average.update_parameters(own.network)


def search_step(
    supernet: Supernet, own: Trained, alphas: torch.optim.Optimizer, scheme: Scheme, images: Tensor, targets: Targets
) -> Callable[[int, Mapping[str, Any]], None]:
    """A step of a search as a function of its number and its options. Alphas begin at 0 and hardly move."""
    tables = cost_tables(resolve(supernet.spec), images.shape[-1])
    largest, smallest = sizes(tables["macs"])

    def mixture(rng: np.random.Generator, alphas: Iterable[Tensor]) -> dict[str, Tensor]:
        return mixed_gates(supernet, alphas, rng, 0.5)  # in the middle of the search

    def step(number: int, decided: Mapping[str, Any]) -> None:
        rng = np.random.default_rng(number + WARMUP)
        if scheme.every and (number + 1) % scheme.every == 0:
            drawn = drawn_options(supernet.decisions, supernet.probabilities(), rng)
            if scheme.paths == "reference":
                with every_candidate(supernet, drawn) as gates:
                    supernet.network.loss(images, targets)[0].backward()
                supernet.set_alpha_gradients({name: gate.grad for name, gate in gates.items()})  # type: ignore[misc]
                alphas.step()
                alphas.zero_grad(set_to_none=True)
            else:
                settings: dict[str, Any] = {"tables": tables, "paths": scheme.paths, "rng": rng}
                if scheme.kind == "merge":
                    settings["mixture"] = mixture(rng, supernet.alphas)
                architecture_step(supernet, alphas, images, targets, drawn, Prices(), **settings)
        supernet.activate(supernet.picks(decided))
        if scheme.paths == "reference":
            with every_candidate(supernet, decided):
                weight_step(own, images, targets)
        elif scheme.kind == "merge":
            with supernet.mixed(mixture(rng, [alpha.detach() for alpha in supernet.alphas])):
                weight_step(own, images, targets)
        elif scheme.paths == "sandwich":
            three = sandwich_options(supernet.decisions, largest, smallest, 0, number + WARMUP)
            weight_step(own, images, targets, lambda: sandwiched(supernet, three, images, targets))
        else:
            weight_step(own, images, targets)

    return step


def sandwiched(supernet: Supernet, three: Sequence[Mapping[str, Any]], images: Tensor, targets: Targets) -> None:
    """The gradients of a sandwich, as `search.sandwich.add_sandwich` adds them."""
    teacher: list[Tensor] = []

    def loss_of(place: int, outputs: Any, aux: Mapping[int, Any]) -> Tensor:
        loss, _ = supernet.network.loss_from(outputs, targets, aux)
        if place == 0:
            teacher.extend(y.detach() for y in outputs)
            return loss / len(three)
        distance = distillation_loss(supernet.network, outputs, supernet.network, teacher)
        return ((1 - TAUGHT) * loss + TAUGHT * distance) / len(three)

    backward(supernet, three, images, supernet.network.run, loss_of)


class EveryCandidate(torch.autograd.Function):
    """One candidate forward; in the backward pass its own gradient for x, and all the others for the gates'.

    As in the reference, the candidate's weights get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, row: IndependentRow) -> Tensor:
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.y = row.option(row.active, ctx.x)
        ctx.row = row
        return ctx.y.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        (dx,) = torch.autograd.grad(ctx.y, ctx.x, dy)
        row, x = ctx.row, ctx.x.detach()
        outputs = (ctx.y.detach() if option == row.active else row.option(option, x) for option in row.choice.options)
        return dx, torch.stack([(output * dy).sum() for output in outputs]), None


@contextmanager
def every_candidate(supernet: Supernet, decided: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    """Inside, open rows run by the reference's scheme; gives the gates, which gather gradients."""
    supernet.activate(supernet.picks(decided))
    gates = {d.name: torch.zeros(len(d.options), requires_grad=True) for d in supernet.decisions}
    rows = [row for row in supernet.network.layers if isinstance(row, IndependentRow)]
    for row in rows:
        row.forward = lambda x, row=row: EveryCandidate.apply(x, gates[row.choice.name], row)  # type: ignore
    try:
        yield gates
    finally:
        for row in rows:
            del row.forward


# ---- time and memory


def measured(model: str, scheme: Scheme, pairs: int, imgsz: int, batch: int) -> dict[str, Any]:
    torch.manual_seed(0)
    supernet = Supernet(replace(parse(ROOT / "cfg" / "models" / f"{model}.yaml"), anchors=ANCHORS), scheme.kind).train()
    images, targets = a_batch(batch, imgsz, supernet.network.num_classes)
    own = trained(supernet.network)
    alphas = torch.optim.Adam(supernet.alphas, lr=1e-4, betas=(0.0, 0.999))
    step = search_step(supernet, own, alphas, scheme, images, targets)
    rng = np.random.default_rng(0)
    times = np.empty((pairs, 2, 2))
    for number in tqdm(range(-WARMUP, pairs), f"{model} {imgsz} px", unit="pair", leave=False):
        decided = fair_options(supernet.decisions, 0, number + WARMUP)
        plain = trained(supernet.derive(supernet.picks(decided)))
        weight_step(plain, images, targets)  # its first step allocates what the later ones find
        for which in rng.permutation(2):
            wall, cpu = time.perf_counter(), time.process_time()
            if which == 0:
                step(number, decided)
            else:
                weight_step(plain, images, targets)
            if number >= 0:
                times[number, which] = time.perf_counter() - wall, time.process_time() - cpu
    cell = {"pairs": pairs, **summarized(times, scheme.every or 1)}
    largest = cost_tables(resolve(supernet.spec), imgsz)["macs"].extreme(largest=True)[1]
    plain = trained(supernet.derive(largest.picks))
    weight_step(plain, images, targets)
    alone = peak_bytes(plain, images, lambda: weight_step(plain, images, targets))
    turn = (scheme.every or 1) - 1  # of a step with alphas
    together = peak_bytes(own, images, lambda: step(turn, supernet.decide(largest.picks)))
    cell["memory"] = {"plain_bytes": alone, "search_bytes": together, "ratio": together / alone}
    return cell


def summarized(times: np.ndarray, period: int) -> dict[str, Any]:
    """Mean seconds of both and the ratio of their sums, from ``[pairs, 2, 2]``: search and plain, wall and CPU time."""
    rng = np.random.default_rng(0)
    groups = times[: len(times) // period * period].reshape(-1, period, 2, 2).sum(axis=1)
    assert len(groups), f"{len(times)} pairs are less than one period of {period}"
    drawn = groups[rng.integers(0, len(groups), (RESAMPLES, len(groups)))].sum(axis=1)
    found: dict[str, Any] = {}
    for index, clock in enumerate(("wall", "cpu")):
        search, plain = groups[:, :, index].sum(axis=0)
        count = len(groups) * period
        found[clock] = {
            "search_s": search / count,
            "plain_s": plain / count,
            "ratio": search / plain,
            "interval": np.percentile(drawn[:, 0, index] / drawn[:, 1, index], (2.5, 97.5)).tolist(),
        }
    return found


def peak_bytes(own: Trained, images: Tensor, step: Callable[[], None]) -> int:
    """The most that is held at once while `step` runs, by torch's own record of what it allocates and frees."""
    kept = [*own.network.state_dict().values(), *own.average.state_dict().values(), images]
    kept += [value for state in own.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    before = sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    assert record.profiler is not None
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return before + int(np.cumsum(changes).max())


# ---- the table


def shown(results: list[dict[str, Any]]) -> str:
    header = ("model", "scheme", "pairs", "plain s", "step s", "ratio", "95 %", "CPU ratio", "asked", "memory", "asked")
    rows = []
    for result in results:
        wall, (low, high), scheme = result["wall"], result["wall"]["interval"], SCHEMES[result["scheme"]]
        rows.append(
            (
                f"{result['model']} {result['imgsz']}",
                result["scheme"],
                result["pairs"],
                wall["plain_s"],
                wall["search_s"],
                wall["ratio"],
                f"{low:.3f} to {high:.3f}",
                result["cpu"]["ratio"],
                f"<= {scheme.asked}" if scheme.asked else "",
                result["memory"]["ratio"],
                f"<= {scheme.asked_memory}" if scheme.asked_memory else "",
            )
        )
    return table(rows, header)


def too_much(result: dict[str, Any]) -> bool:
    scheme = SCHEMES[result["scheme"]]
    slow = scheme.asked is not None and result["wall"]["ratio"] > scheme.asked
    return slow or (scheme.asked_memory is not None and result["memory"]["ratio"] > scheme.asked_memory)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--cells", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--pairs", type=int, default=60, help="rounded up to whole periods of architecture steps")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch; default: all cores")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as train.py and search.py do
    results = []
    for model in options.models:
        for name in [name for name in MODELS[model] if name in options.cells]:
            file = options.out / f"step-cost-{model}-{name}.json"
            if not file.exists() and not options.show:
                period = SCHEMES[name].every or 1
                pairs = -(-options.pairs // period) * period
                cell = measured(model, SCHEMES[name], pairs, options.imgsz, options.batch_size)
                about = {"model": model, "scheme": name, "imgsz": options.imgsz, "batch_size": options.batch_size}
                about |= {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "torch": torch.__version__}
                options.out.mkdir(parents=True, exist_ok=True)
                write_text(file, json.dumps(about | cell, indent=1) + "\n")
            if file.exists():
                results.append(json.loads(file.read_text()))
    print(shown(results))
    return int(any(map(too_much, results)))


if __name__ == "__main__":
    raise SystemExit(main())
