"""How many images does a subnet's calibration need?

python bench/calibration.py                        # trains a supernet first; about an hour on 2 idle cores
python bench/calibration.py --weights runs/search/exp/last.pt     # of a supernet that a search has trained
python bench/calibration.py --weights runs/bench/bccd-front-hour/search/last.pt --also val test    # of bccd_front.py
python bench/calibration.py --train 200 --epochs 2 --judging 16 --subnets 3 --counts 32 --run /tmp/run --out /tmp/out
python bench/calibration.py --show                 # the table of what was measured

AP of the same subnets, drawn at random, with batch norms calibrated on N training images and on 4N, which hold those N;
once on images as the search takes them (plain), once as training shows them (augmented). Beside it the AP with the
running statistics that the supernet's training left behind. Judged on images that the weights never saw; with few of
them, AP itself jumps by half a point. A cell is a kind and a count, kept as a JSON that grows by subnets. Exits with 1
where fewer than 95 % of the subnets have both APs within half a point, or where their mean is under .1, which proves
nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import sys
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from data.config import read_data_spec  # noqa: E402
from data.dataset import ImageSet  # noqa: E402
from data.loader import batches  # noqa: E402
from data.readers import read_split  # noqa: E402
from data.shapes import draw_shapes  # noqa: E402
from data.structures import Fault  # noqa: E402
from engine.config import checked, read_options, save_config  # noqa: E402
from engine.distributed import start  # noqa: E402
from engine.evaluate import CALIBRATION_BATCH, calibration_images, pixels  # noqa: E402
from engine.prepare import augmentation, describe  # noqa: E402
from engine.runs import table, write_text  # noqa: E402
from models.checkpoint import load_checkpoint  # noqa: E402
from models.supernet import Supernet  # noqa: E402
from search.config import SearchConfig  # noqa: E402
from search.judge import TOGETHER, Verdict, first_choice, judge  # noqa: E402
from search.run import split_train  # noqa: E402
from search.space import SearchSpace  # noqa: E402
from search.train import reopen, train_supernet  # noqa: E402

RESULTS = ROOT / "bench" / "results"
RECIPE: dict[str, Any] = {"optimizer": "AdamW", "lr0": 0.003, "cls": 2.0, "mosaic": 0.3, "scale": 0.3, "amp": "off"}
HALF_A_POINT, ENOUGH = 0.005, 0.95
LEAST_AP = 0.1  # of a supernet that has learned something: APs of nothing agree
DEVICE = torch.device("cpu")


# ---- the supernet


def train(options: argparse.Namespace) -> Path:
    """Trains the bench's own supernet, or goes on with it; returns its checkpoint."""
    data = draw_shapes(ROOT / "datasets" / f"shapes-{options.train}", train=options.train, seconds=0)
    folder = options.run
    if (folder / "last.pt").exists():
        config, folder, _ = reopen(SearchConfig(resume=folder))
    else:
        folder.mkdir(parents=True, exist_ok=True)
        about = {"cfg": options.cfg, "data": data, "epochs": options.epochs, "imgsz": options.imgsz, "batch_size": 8}
        config = SearchConfig(**about, supernet=options.supernet, norms=options.norms, **RECIPE)
        save_config(folder / "config.yaml", config)
    weight_samples, judge_samples = split_train(read_split(read_data_spec(data), "train").samples)
    torch.manual_seed(config.seed)
    spec = describe(config, read_data_spec(data), None, weight_samples, print)
    supernet = Supernet(spec, config.supernet, config.norms)
    supernet.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    weight_images = ImageSet(weight_samples, config.imgsz, augmentation(config), config.seed)
    judge_images = ImageSet(judge_samples, config.imgsz, None, config.seed)
    train_supernet(supernet, weight_images, judge_images, [], {}, config, folder, start("cpu"), True, print)
    return folder / "last.pt"


def made(weights: Path, judging: int, splits: Sequence[str]) -> tuple[Supernet, ImageSet, ImageSet, tuple[str, ...]]:
    """The trained supernet, the images of its weights, augmented as in training, and some that judge; the classes.

    Those that judge are the search's own and, behind them, those of `splits`.
    """
    options = weights.parent / "config.yaml"
    config = checked(SearchConfig, read_options(options, SearchConfig), str(options))
    checkpoint = load_checkpoint(weights)
    supernet = Supernet(checkpoint.spec, config.supernet, config.norms)
    supernet.network.load_state_dict(checkpoint.state)
    supernet.network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.data is None:
        raise Fault(f"{options}: names no data")
    data = read_data_spec(config.data)
    weight_samples, judge_samples = split_train(read_split(data, "train").samples)
    for split in splits:
        judge_samples += read_split(data, split).samples
    seen = ImageSet(weight_samples, config.imgsz, augmentation(config), config.seed)
    return supernet, seen, ImageSet(judge_samples[:judging], config.imgsz, None, config.seed), tuple(data.names)


# ---- cells


def shown_in_training(images: ImageSet, number: int) -> Iterator[Tensor]:
    """`number` images in the order and shape in which an endless training would show them."""
    every = (
        batch
        for epoch in count(1)
        for batch in batches(images, CALIBRATION_BATCH, epoch=epoch, shuffle=True, drop_last=True)
    )
    for batch in islice(every, math.ceil(number / CALIBRATION_BATCH)):
        yield pixels(batch, DEVICE)


def calibrations(kind: str, images: ImageSet, number: int) -> list[Tensor]:
    if kind == "running":
        return []
    if kind == "augmented":
        return list(shown_in_training(images, number))
    return list(calibration_images(images, number, 0, DEVICE))


def measure(
    file: Path, about: dict[str, Any], kind: str, number: int, parts: tuple[Any, ...], numbers: Sequence[int]
) -> None:
    """Judges the subnets that `file` lacks; it is written anew after each."""
    supernet, seen, judging, names = parts
    space = SearchSpace.of(supernet.spec)
    about = about | {"kind": kind, "images": number}
    content = json.loads(file.read_text()) if file.exists() else {}
    if not about.items() <= content.items():  # nothing yet, or of another supernet
        content = about | {"ap": {}}
    missing = [one for one in numbers if str(one) not in content["ap"]]
    trunk = first_choice(supernet.network, [choice.name for choice in space.choices])
    images = calibrations(kind, seen, number) if missing else []
    for at in range(0, len(missing), TOGETHER):
        part = missing[at : at + TOGETHER]
        networks = [supernet.derive(space.at(one).picks).eval() for one in part]

        def done(place: int, verdict: Verdict, part: list[int] = part) -> None:
            content["ap"][str(part[place])] = verdict.metrics.ap
            write_text(file, json.dumps(content, indent=1) + "\n")

        judge(networks, trunk, images, judging, names=names, batch_size=16, device=DEVICE, done=done)


# ---- the table


def shown(found: dict[tuple[str, int], dict[str, float]], pairs: Sequence[tuple[str, int]]) -> tuple[str, bool]:
    """The table, and whether all that is asked was reached."""
    running = found.get(("running", 0), {})
    rows: list[tuple[Any, ...]] = []
    if running:
        rows.append(("running statistics", None, np.mean([*running.values()]), *[None] * 4, ""))
    reached = True
    for kind, number in pairs:
        few, many = found.get((kind, number), {}), found.get((kind, 4 * number), {})
        both = sorted(few.keys() & many.keys())
        if not both:
            continue
        apart = np.array([abs(few[one] - many[one]) for one in both])
        within = float(np.mean(apart <= HALF_A_POINT))
        also = [one for one in both if one in running]
        better = float(np.mean([few[one] >= running[one] for one in also])) if also else None
        means = [float(np.mean([some[one] for one in both])) for some in (few, many)]
        rows.append((kind, number, *means, float(apart.max()), better, within, f">= {ENOUGH:g}"))
        reached &= within >= ENOUGH and means[1] >= LEAST_AP
    header = ("statistics", "N", "AP at N", "AP at 4N", "farthest apart", "N beats running", "within .005", "asked")
    return table(rows, header), reached


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="last.pt of a search; default: a supernet trained here")
    parser.add_argument("--cfg", type=Path, default=ROOT / "cfg" / "models" / "tiny-seed-search.yaml")
    parser.add_argument("--supernet", default="shared", choices=("shared", "independent"))
    parser.add_argument("--norms", default="act", choices=("act", "shared", "k_act"))
    parser.add_argument("--train", type=int, default=2600, help="images to draw; four of five train the weights")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--imgsz", type=int, default=160)
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "bench" / "calibration", help="folder to train in")
    parser.add_argument("--subnets", type=int, default=60)
    parser.add_argument("--judging", type=int, default=200, help="images, at most")
    parser.add_argument("--also", nargs="*", default=[], help="splits whose images judge too, where train has few")
    parser.add_argument("--counts", type=int, nargs="+", default=[32, 128], help="N, multiples of 32")
    parser.add_argument("--kinds", nargs="+", default=["plain", "augmented"], choices=("plain", "augmented"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch; default: all cores")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pairs = [(kind, number) for kind in options.kinds for number in options.counts]
    cells = [("running", 0), *sorted({(kind, number * times) for kind, number in pairs for times in (1, 4)})]
    options.out.mkdir(parents=True, exist_ok=True)
    files = {(kind, number): options.out / f"calibration-{kind}-{number}.json" for kind, number in cells}
    if not options.show:
        weights = options.weights or train(options)
        parts = made(weights, options.judging, options.also)
        supernet, seen, judging, _ = parts
        about = {"subnets_of": supernet.spec.name, "imgsz": judging.imgsz, "judging": len(judging)}
        about |= {"weights": hashlib.sha256(weights.read_bytes()).hexdigest()[:12]}
        about |= {"cores": os.cpu_count(), "torch": torch.__version__}
        size = SearchSpace.of(supernet.spec).size
        numbers = random.Random(0).sample(range(size), min(options.subnets, size))
        for (kind, number), file in files.items():
            if kind == "plain" and number > len(seen):
                print(f"plain {number}: there are only {len(seen)} images; left out")
                continue
            measure(file, about, kind, number, parts, numbers)
    found = {cell: json.loads(file.read_text())["ap"] for cell, file in files.items() if file.exists()}
    text, reached = shown(found, pairs)
    print(text)
    return int(not reached)


if __name__ == "__main__":
    raise SystemExit(main())
