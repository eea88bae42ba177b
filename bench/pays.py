"""Does searching pay? A found subnet beside random ones that cost the same, and beside the usual choice.

python bench/pays.py --bccd ~/BCCD --fruit ~/fruit           # searches and trains what is missing, prints the table
python bench/pays.py --bccd ~/BCCD --fruit ~/fruit --plan    # measures an epoch, says how long all of it takes
python bench/pays.py --bccd ~/BCCD --cells kernel-act-found-0 kernel-act-random3-0
python bench/pays.py --show                                  # what was measured

Three spaces over cfg/models/tiny.yaml: `kernel-act` has kernel and activation of four neck blocks (the 1,296 subnets
of tiny-seed-search.yaml), `depth` has their depth as well, and `width` also that and the width of six
(tiny-wide-search.yaml, some 10^8). All three are searched on BCCD, `depth` also on fruit (`fruit-depth`), whose
training photos are divided: four fifths are trained on, a fifth are the validation images, its test photos are judged
on. The budget is the median of the multiply-adds of random subnets of a space.

- `found`: the best subnet of a search with that budget, one search for each seed;
- `random0` to `random7`: subnets drawn evenly from those that need 97 to 100 % of the budget, the same for each seed;
- `default`: 3x3 and Mish everywhere, as deep as the budget lets it be.

A cell is one training, kept as a JSON in bench/results; one that was stopped goes on where it was. All start from
random weights and have the same images, epochs, size and seed; a search's weights are not inherited. There is one
evaluation, after the last epoch: AP on the test images, which neither a search nor a training has seen. The best of the
random ones is the one with the highest AP on the validation images, as somebody would choose it who trains eight.

Intervals are of a jackknife over ten groups of the test images. They do not hold how seeds differ, so each is shown.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402

from bench import cells  # noqa: E402
from bench.bccd import RECIPE  # noqa: E402
from bench.learn import JUDGED_BY, interval, judged  # noqa: E402
from data.config import read_data_spec  # noqa: E402
from data.dataset import ImageSet  # noqa: E402
from data.readers import read_split  # noqa: E402
from data.split import split_data  # noqa: E402
from engine.doors import check_imgsz  # noqa: E402
from engine.evaluate import detections_of  # noqa: E402
from engine.runs import table, write_text  # noqa: E402
from models.checkpoint import load_checkpoint, restore  # noqa: E402
from models.graph import resolve  # noqa: E402
from models.network import build  # noqa: E402
from models.parse import dump, parse  # noqa: E402
from models.spec import ModelSpec  # noqa: E402
from search.costs import CostTable, cost_tables, format_cost  # noqa: E402
from search.space import Architecture, SearchSpace  # noqa: E402


@dataclass(frozen=True)
class Study:
    """A space, searched on a data set."""

    data: str
    model: str  # of cfg/models


STUDIES = {
    "kernel-act": Study("bccd", "tiny-seed-search"),
    "depth": Study("bccd", "tiny-search"),
    "width": Study("bccd", "tiny-wide-search"),
    "fruit-depth": Study("fruit", "tiny-search"),
}
RANDOM = tuple(f"random{number}" for number in range(8))
ROLES = ("found", "default", *RANDOM)
CELLS = [f"{study}-{role}-{seed}" for study in STUDIES for seed in cells.SEEDS for role in ROLES]
AS_DEAR = 0.03  # by how much a random subnet may be below the budget
DRAWN = 1_001  # random subnets whose median is the budget
LONGEST = 120  # minutes that everything may take
SPLITS = {"val": "chosen_by", "test": "judged_by"}


@dataclass(frozen=True)
class Place:
    """Where things are, and what holds for every cell."""

    work: Path
    folders: Mapping[str, Path | None]  # of the data sets
    imgsz: int
    epochs: int
    search_epochs: int
    candidates: int
    threads: int

    def data(self, study: str) -> Path:
        """The YAML of the data set, with images to train on, to choose by and to judge on."""
        name = STUDIES[study].data
        source = cells.data_yaml(name, self.folders[name], self.work)
        if read_data_spec(source).test is not None:
            return source
        divided = self.work / f"{name}-divided"
        if not (divided / "judged.yaml").exists():
            made = split_data(source, divided, {"train": 0.8, "val": 0.2}, of=("train",))
            judged = {**yaml.safe_load(made.read_text()), "test": read_data_spec(source).val}
            write_text(divided / "judged.yaml", yaml.safe_dump(judged))
        return divided / "judged.yaml"

    def options(self, study: str, seed: int) -> dict[str, Any]:
        """What a search and a training share."""
        recipe = {f"--{name.replace('_', '-')}": value for name, value in RECIPE.items()}
        return {"--data": self.data(study), "--imgsz": self.imgsz, "--seed": seed, "--device": "cpu", **recipe}


# ---- which subnets


def model_file(study: str) -> Path:
    return ROOT / "cfg" / "models" / f"{STUDIES[study].model}.yaml"


def space_of(study: str, place: Place) -> tuple[ModelSpec, SearchSpace, CostTable]:
    """The model file with its open places, what may stand there, and the multiply-adds of each subnet."""
    spec = parse(model_file(study))
    classes = len(read_data_spec(place.data(study)).names)
    graph = resolve(replace(spec, num_classes=classes))
    imgsz = check_imgsz(place.imgsz, build(graph.spec.freeze(first_options(graph.spec))).max_stride)
    return graph.spec, SearchSpace.of(graph.spec), cost_tables(graph, imgsz)["macs"]


def first_options(spec: ModelSpec) -> dict[str, Any]:
    return {choice.name: choice.options[0] for choice in spec.choices}


def budget(space: SearchSpace, macs: CostTable) -> int:
    """The median of the multiply-adds of random subnets."""
    rng = random.Random(0)
    return int(np.median([macs.of(space.sample(rng)) for _ in range(DRAWN)]))


def random_subnets(space: SearchSpace, macs: CostTable) -> list[Architecture]:
    """Different subnets, drawn evenly from those that need about as much as the budget allows."""
    rng, most = random.Random(1), budget(space, macs)
    found: dict[int, Architecture] = {}
    while len(found) < len(RANDOM):
        drawn = space.canonical(space.sample(rng))
        if 1 - AS_DEAR <= macs.of(drawn) / most <= 1:
            found[space.index(drawn)] = drawn
    return list(found.values())


def default_subnet(space: SearchSpace, macs: CostTable) -> Architecture:
    """3x3 and Mish, and of what else is open the dearest that the budget lets be, alike in all rows."""
    choices = space.choices
    wanted = {"kernel": 3, "act": "mish"}
    fitting = []
    for level in range(max(len(choice.options) for choice in choices)):
        picks = {}
        for choice in choices:
            value = wanted.get(choice.name.rpartition(".")[2])
            picks[choice.name] = sorted(choice.options)[min(level, len(choice.options) - 1)] if value is None else value
        subnet = space.canonical(Architecture(picks))
        if macs.of(subnet) <= budget(space, macs):
            fitting.append(subnet)
    return max(fitting, key=macs.of)


def searched(place: Place, study: str, seed: int, most: int) -> Path:
    """The YAML of the best subnet of a search, which goes on where it was stopped."""
    folder = place.work / "runs" / f"{study}-search-{seed}"
    if not (folder / "best.yaml").exists():
        options = {"--cfg": model_file(study), **place.options(study, seed)}
        options |= {"--epochs": place.search_epochs, "--candidates": place.candidates, "--budget": f"macs={most}"}
        options |= {"--project": folder.parent, "--name": folder.name}
        words = [word for pair in options.items() for word in pair]
        fresh = [sys.executable, "search.py", *words, "--exist-ok"]
        again = [sys.executable, "search.py", "--resume", folder]
        surroundings = {**os.environ, "OMP_NUM_THREADS": str(place.threads)}
        cells.timed_run(folder, fresh, again, folder / "last.pt", ROOT, surroundings)
    return folder / "best.yaml"


# ---- a cell


def measure(place: Place, cell: str) -> dict[str, Any]:
    """Find or draw a subnet, train it from random weights, and judge it."""
    whole, seed = cells.named(cell)
    study, _, role = whole.rpartition("-")
    spec, space, macs = space_of(study, place)
    most, file = budget(space, macs), place.work / f"{cell}.yaml"
    if role == "found":
        write_text(file, searched(place, study, seed, most).read_text())
    else:
        subnet = default_subnet(space, macs) if role == "default" else random_subnets(space, macs)[RANDOM.index(role)]
        write_text(file, dump(spec.freeze(subnet.picks)))
    options = {"--cfg": file, **place.options(study, seed)}
    best, minutes = cells.train(place.work / "runs" / cell, options, place.epochs, place.threads)
    network = restore(load_checkpoint(best)).eval()
    costs = cost_tables(resolve(parse(file)), place.imgsz)
    about = {
        "cell": cell,
        "epochs": place.epochs,
        "imgsz": place.imgsz,
        "budget": most,
        "macs": costs["macs"].fixed,
        "params": costs["params"].fixed,
        "minutes": minutes,
        "threads": place.threads,
        "torch": torch.__version__,
    }
    data = read_data_spec(place.data(study))
    for split, key in SPLITS.items():
        samples = read_split(data, split).samples
        images = ImageSet(samples, place.imgsz, None, seed=0, cache=False)
        found, _times = detections_of(network, images, batch_size=16, progress=False, **JUDGED_BY)
        about[key] = judged(samples, found, data.names)
    return about


# ---- the table


def best_random(results: cells.Results, study: str, seed: int) -> Mapping[str, Any] | None:
    """The random subnet that the validation images say is best."""
    there = [results[cell] for role in RANDOM if (cell := f"{study}-{role}-{seed}") in results]
    return max(there, key=lambda one: one["chosen_by"]["ap"]) if there else None


def numbers(one: Mapping[str, Any], key: str) -> tuple[float, np.ndarray]:
    """A number of the test images, and the same without each group of them."""
    return one["judged_by"][key], np.array(one["judged_by"]["without"][key])


def told(pairs: Sequence[tuple[float, np.ndarray]], sign: str = "") -> str:
    """The mean over seeds, the interval of it, and each seed's."""
    mean, wide = np.mean([value for value, _ in pairs]), interval(np.mean([without for _, without in pairs], axis=0))
    each = " ".join(f"{value:{sign}.3f}" for value, _ in pairs)
    if sign:
        return f"{mean:+.3f} ({mean - wide:+.3f} to {mean + wide:+.3f}; {each})"
    return f"{mean:.3f} +- {wide:.3f} ({each})"


def shown(results: cells.Results, key: str = "ap") -> str:
    rows = []
    for study in STUDIES:
        found = cells.runs_of(results, f"{study}-found")
        rivals: dict[str, dict[int, tuple[float, np.ndarray]]] = {"random, mean": {}, "random, best": {}, "default": {}}
        costs: dict[str, list[float]] = {name: [] for name in rivals}
        for seed in cells.SEEDS:
            everyone = [results[cell] for role in RANDOM if (cell := f"{study}-{role}-{seed}") in results]
            sides = {
                "default": cells.runs_of(results, f"{study}-default").get(seed),
                "random, best": best_random(results, study, seed),
            }
            for name, one in sides.items():
                if one:
                    rivals[name][seed] = numbers(one, key)
                    costs[name].append(one["macs"])
            if len(everyone) == len(RANDOM):
                values = [numbers(one, key) for one in everyone]
                rivals["random, mean"][seed] = (
                    float(np.mean([value for value, _ in values])),
                    np.mean([without for _, without in values], axis=0),
                )
                costs["random, mean"] += [one["macs"] for one in everyone]
        ours = {seed: numbers(one, key) for seed, one in found.items()}
        if ours:
            cost = float(np.mean([one["macs"] for one in found.values()]))
            rows.append([study, "found", format_cost("macs", cost), told(list(ours.values())), None])
        for name, theirs in rivals.items():
            if theirs:
                both = sorted(ours.keys() & theirs.keys())
                apart = [(ours[seed][0] - theirs[seed][0], ours[seed][1] - theirs[seed][1]) for seed in both]
                cost = format_cost("macs", float(np.mean(costs[name])))
                rows.append([study, name, cost, told(list(theirs.values())), told(apart, "+") if apart else None])
    if not rows:
        return "nothing was measured yet"
    some = next(iter(results.values()))
    head = f"{some['imgsz']} px, {some['epochs']} epochs from random weights; {key.upper()} on the test images"
    columns = ("study", "subnet", "MACs", f"{key.upper()} (each seed)", "found - this (each seed)")
    return f"{head}\n\n{table(rows, columns)}"


# ---- the plan


def plan(place: Place, missing: Sequence[str]) -> None:
    """Says how many minutes the missing trainings take, by two short ones; a search takes about as long as three."""
    spec, space, macs = space_of("width", place)
    file = place.work / "plan.yaml"
    write_text(file, dump(spec.freeze(default_subnet(space, macs).picks)))
    options = {"--cfg": file, **place.options("width", 0)}
    first, epoch = cells.epoch_minutes(
        place.work / "plan", lambda folder, epochs: cells.train(folder, options, epochs, place.threads)[1]
    )
    minutes = len(missing) * (first + (place.epochs - 1) * epoch)
    searches = sum("-found-" in cell for cell in missing)
    print(f"an epoch takes {60 * epoch:.1f} s; {len(missing)} trainings of {place.epochs} epochs {minutes:.0f} minutes")
    print(f"{searches} searches of {place.search_epochs} epochs come to that")
    if minutes > LONGEST:
        print(f"That is more than {LONGEST} minutes; --cells and --epochs take less.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bccd", type=Path, help="folder of the data set; default as cfg/data/bccd.yaml says")
    parser.add_argument("--fruit", type=Path, help="likewise")
    parser.add_argument("--cells", nargs="+", default=CELLS, choices=CELLS, metavar="CELL")
    parser.add_argument("--imgsz", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=24, help="of each training")
    parser.add_argument("--search-epochs", type=int, default=16)
    parser.add_argument("--candidates", type=int, default=24)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench" / "pays", help="folder of all runs")
    parser.add_argument("--out", type=Path, default=cells.RESULTS, help="folder of the results")
    parser.add_argument("--plan", action="store_true", help="measure how long it takes, and stop")
    parser.add_argument("--show", action="store_true", help="train nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    files = {cell: options.out / f"pays-{cell}.json" for cell in CELLS}
    missing = [cell for cell in CELLS if cell in options.cells and not files[cell].exists()]
    if not options.show:
        work = options.work.resolve()
        for folder in (work, options.out):
            folder.mkdir(parents=True, exist_ok=True)
        how = (options.imgsz, options.epochs, options.search_epochs, options.candidates, options.threads)
        given = {"bccd": options.bccd, "fruit": options.fruit}
        place = Place(work, {name: folder and folder.resolve() for name, folder in given.items()}, *how)
        if options.plan:
            plan(place, missing)
            return 0
        cells.fill(files, missing, lambda cell: measure(place, cell))
    results = cells.read(files)
    print(*(shown(results, key) for key in ("ap", "ap50")), sep="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(cells.guarded(main))
