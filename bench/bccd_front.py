"""Do the points of a search's front beat random subnets that cost the same? Blood cells, one search, one seed.

python bench/bccd_front.py                                    # three quarters of an hour on 2 idle cores
python bench/bccd_front.py --imgsz 64 --search-epochs 4 --epochs 2 --candidates 8 --name quick     # a quick look
python bench/bccd_front.py --show                             # the table of what was measured

A search with the multiply-adds as the only cost. Of its front come three points: the cheapest, the dearest and one
between; where the front has only two, the highest AP of what it leaves is the third. Beside each stands a subnet drawn
evenly from all that need as many multiply-adds, within 1 %. All six start from the supernet's weights with batch norms
of their own, and are trained alike: the same images, epochs, seed. Their APs are those of the last epoch, on the test
split, which took no part in anything. +- is the standard error of a difference over these images; another seed of
training moves it further. It is an anecdote, no study.
Each network is a JSON in bench/results, and one that is there is not trained again. Needs the data set as
cfg/data/bccd.yaml says.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from bench.bccd import RECIPE  # noqa: E402
from data.config import read_data_spec  # noqa: E402
from data.dataset import ImageSet  # noqa: E402
from data.readers import read_split  # noqa: E402
from engine.calibrate import calibrate  # noqa: E402
from engine.doors import check_imgsz  # noqa: E402
from engine.evaluate import calibration_images  # noqa: E402
from engine.jackknife import jackknife_error  # noqa: E402
from engine.runs import read_csv, table, write_text  # noqa: E402
from engine.train import train  # noqa: E402
from models.checkpoint import load_checkpoint, restore, save_checkpoint  # noqa: E402
from models.graph import resolve  # noqa: E402
from models.network import Network  # noqa: E402
from models.supernet import Supernet  # noqa: E402
from search.config import SearchConfig  # noqa: E402
from search.costs import CostTable, cost_tables, format_cost  # noqa: E402
from search.front import SURE, ranks  # noqa: E402
from search.judge import judge  # noqa: E402
from search.retrain import continued  # noqa: E402
from search.run import search, split_train  # noqa: E402
from search.space import Architecture, SearchSpace  # noqa: E402

RESULTS = ROOT / "bench" / "results"
DATA = ROOT / "cfg" / "data" / "bccd.yaml"
PLACES = ("cheapest", "middle", "dearest")
AS_DEAR = 0.01  # relative difference in multiply-adds


def searched(config: SearchConfig, minutes: Path) -> float:
    """Runs the search, or goes on with it; the minutes that it took in all."""
    folder = config.project / config.name
    spent = json.loads(minutes.read_text()) if minutes.exists() else 0.0
    if not (folder / "best.pt").exists():
        began = time.perf_counter()
        search(SearchConfig(resume=folder) if (folder / "last.pt").exists() else config)
        spent += (time.perf_counter() - began) / 60
        write_text(minutes, json.dumps(spent))
    return spent


def chosen(folder: Path, space: SearchSpace, macs: CostTable) -> dict[str, int]:
    """Three of the judged subnets and a random one as dear as each: the ends of the front and its middle point, or all
    points of a shorter front and the highest AP of the next one.
    """
    rows = [(int(row["subnet"]), float(row["ap"]), float(row["macs"])) for row in read_csv(folder / "front.csv")]
    rank = ranks(np.array([[-ap, cost] for _, ap, cost in rows]))
    first = sorted((row for row, place in zip(rows, rank, strict=True) if place == 0), key=lambda row: row[2])
    if len(first) < len(PLACES):
        rest = sorted(zip(rank, rows, strict=True), key=lambda pair: (pair[0], -pair[1][1]))[len(first) :]
        first = sorted([*first, *(row for _, row in rest[: len(PLACES) - len(first)])], key=lambda row: row[2])
    numbers = [first[at][0] for at in (0, (len(first) - 1) // 2, len(first) - 1)]
    found = {f"{place}, found": number for place, number in zip(PLACES, numbers, strict=True)}
    rng = random.Random(0)
    for place, number in zip(PLACES, numbers, strict=True):
        cost = macs.of(space.at(number))
        while True:
            drawn = space.canonical(space.sample(rng))
            if space.index(drawn) not in found.values() and abs(macs.of(drawn) / cost - 1) <= AS_DEAR:
                break
        found[f"{place}, random"] = space.index(drawn)
    return found


def start_of(subnet: Architecture, supernet: Supernet, calibration: list[torch.Tensor]) -> Network:
    network = supernet.derive(subnet.picks).eval()
    calibrate(network, calibration)
    return network


def on_test(network: Network, imgsz: int) -> dict[str, Any]:
    """AP of a network on the test split, and with each group of its images left out."""
    data = read_data_spec(DATA)
    images = ImageSet(read_split(data, "test").samples, imgsz)
    (verdict,) = judge([network], 0, [], images, names=data.names, batch_size=16, device=torch.device("cpu"))
    return {"ap": verdict.metrics.ap, "ap50": verdict.metrics.ap50, "ap_without": verdict.without}


def shown(cells: dict[str, dict[str, Any]]) -> str:
    rows: list[tuple[Any, ...]] = []
    for place in PLACES:
        pair = [cells.get(f"{place}, {kind}") for kind in ("found", "random")]
        for kind, cell in zip(("found", "random"), pair, strict=True):
            if cell:
                about = (str(cell["subnet"]), format_cost("macs", cell["macs"]), format_cost("params", cell["params"]))
                rows.append((f"{place}, {kind}", *about, cell["start"]["ap"], cell["ap"], cell["ap50"], None, None, ""))
        if all(pair):
            apart = pair[0]["ap"] - pair[1]["ap"]
            error = jackknife_error(np.subtract(pair[0]["ap_without"], pair[1]["ap_without"]))
            word = "a tie" if abs(apart) <= SURE * error else "found" if apart > 0 else "random"
            rows.append(("", "", "", "", None, None, None, apart, error, word))
    header = ("", "subnet", "macs", "params", "inherited AP", "AP", "AP50", "found - random", "+-", "better")
    return table(rows, header)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="hour", help="of this experiment: names its runs and results")
    parser.add_argument("--cfg", type=Path, default=ROOT / "cfg" / "models" / "tiny-search.yaml")
    parser.add_argument("--imgsz", type=int, default=192)
    parser.add_argument("--search-epochs", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=12, help="of each of the six trainings")
    parser.add_argument("--candidates", type=int, default=24)
    parser.add_argument("--show", action="store_true", help="measure nothing")
    options = parser.parse_args()
    files = {
        f"{place}, {kind}": RESULTS / f"bccd-front-{options.name}-{place}-{kind}.json"
        for place in PLACES
        for kind in ("found", "random")
    }

    if not options.show:
        project = ROOT / "runs" / "bench" / f"bccd-front-{options.name}"
        project.mkdir(parents=True, exist_ok=True)
        config = SearchConfig(
            cfg=options.cfg,
            data=DATA,
            epochs=options.search_epochs,
            imgsz=options.imgsz,
            candidates=options.candidates,
            project=project,
            name="search",
            exist_ok=True,
            **RECIPE,
        )
        minutes = searched(config, project / "minutes.json")
        checkpoint = load_checkpoint(project / "search" / "last.pt")
        supernet = Supernet(checkpoint.spec, config.supernet, config.norms)
        supernet.network.load_state_dict(checkpoint.state)
        space = SearchSpace.of(supernet.spec)
        tables = cost_tables(resolve(supernet.spec), check_imgsz(options.imgsz, supernet.network.max_stride))
        weight_samples, _ = split_train(read_split(read_data_spec(DATA), "train").samples)
        images = ImageSet(weight_samples, options.imgsz, None, config.seed)
        calibration = list(calibration_images(images, config.calibration, config.seed, "cpu"))
        for cell, number in chosen(project / "search", space, tables["macs"]).items():
            if files[cell].exists():
                continue
            subnet = space.at(number)
            network = start_of(subnet, supernet, calibration)
            start = project / f"{number}.pt"
            save_checkpoint(start, network, checkpoint.names, imgsz=options.imgsz)
            began = time.perf_counter()
            result = train(continued(config, start, options.epochs, project, str(number)))
            content = {
                "subnet": number,
                "picks": {name: pick for name, pick in subnet.picks.items()},
                "macs": tables["macs"].of(subnet),
                "params": tables["params"].of(subnet),
                "start": on_test(network, options.imgsz),
                **on_test(restore(load_checkpoint(result.best)), options.imgsz),
                "training_minutes": (time.perf_counter() - began) / 60,
                "search_minutes": minutes,
                "options": {key: str(value) for key, value in vars(options).items() if key != "cfg"},
                "threads": torch.get_num_threads(),
                "cores": os.cpu_count(),
                "torch": torch.__version__,
            }
            write_text(files[cell], json.dumps(content, indent=1) + "\n")

    cells = {cell: json.loads(file.read_text()) for cell, file in files.items() if file.exists()}
    if not cells:
        print("nothing was measured yet")
        return
    print(shown(cells))
    spent = next(iter(cells.values()))["search_minutes"] + sum(cell["training_minutes"] for cell in cells.values())
    print(f"\n{spent:.0f} minutes for the search and {len(cells)} trainings")


if __name__ == "__main__":
    main()
