"""Does a detector lose accuracy, and win time, where a mask says how finely its last stage is computed? docs/masked.md.

python bench/tiny_masked.py --folder ~/BCCD                  # trains what is missing, times it, and prints the table
python bench/tiny_masked.py --folder ~/BCCD --cells mask-0   # one training
python bench/tiny_masked.py --folder ~/fruit --data fruit --epochs 30
python bench/tiny_masked.py --show                           # what was measured

Three networks: `plain` is cfg/models/tiny.yaml, `mask` is tiny-mds.yaml, `high` is that with a last stage that is fine
everywhere. A cell is one training with one seed from random weights, kept as a JSON in bench/results; one that was
stopped goes on where it was. All cells have the same images, epochs, size, batch and options, and one evaluation after
the last epoch, so nothing is chosen by the judged images: those of blood cells are its test split, those of fruit its
validation split. The price of resolution of `mask` is 0 for a third of the steps and rises over the next third. Of its
trained network the accuracy is measured as well where every patch is low or high: the same weights without the mask.

The 95 % intervals are of a jackknife over ten groups of judged images. They do not hold how seeds differ, so both seeds
are shown. Milliseconds are of one judged image at a time, forward and decode, norms folded, channels_last, mask
predictor and packing included, by the networks of the first seed, in turns; `high`, `as low` and `as high` run without
a predictor, which they have no use for. They are measured at the size of the training, with the masks that are
predicted; and at --large, where masks are blobs that have the share of low patches which was found, for a network that
saw only small images has nothing to say about large ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bench.cells import RESULTS, SEEDS, data_yaml, fill, guarded, named, read, runs_of, train  # noqa: E402
from bench.learn import BATCH, JUDGED, JUDGED_BY, interval, judged  # noqa: E402
from bench.masked import blobs, raced  # noqa: E402
from data.config import read_data_spec  # noqa: E402
from data.dataset import ImageSet  # noqa: E402
from data.loader import collate  # noqa: E402
from data.readers import read_split  # noqa: E402
from data.structures import Sample  # noqa: E402
from engine.evaluate import detections_of, pixels  # noqa: E402
from engine.runs import table, write_text  # noqa: E402
from models.checkpoint import Checkpoint, load_checkpoint, restore  # noqa: E402
from models.cost import network_costs, totals  # noqa: E402
from models.fuse import fuse  # noqa: E402
from models.graph import resolve  # noqa: E402
from models.network import Network  # noqa: E402
from models.parse import dump, parse  # noqa: E402
from models.spec import ModelSpec  # noqa: E402

MODELS = ROOT / "cfg" / "models"
FILES = {"plain": "tiny.yaml", "high": "tiny-mds.yaml", "mask": "tiny-mds.yaml"}
CELLS = [f"{name}-{seed}" for name in FILES for seed in SEEDS]
MASK, STAGE, LOSS = "mask", "deep", "priced"  # names of rows
OPTIONS = {"--amp": "off", "--batch-size": BATCH, "--device": "cpu", "--workers": 0}
TIMED_IMAGES = 8


@dataclass(frozen=True)
class Place:
    """Where things are, and what holds for every cell."""

    work: Path
    name: str  # of the data set
    folder: Path | None
    imgsz: int
    epochs: int
    threads: int

    def data(self) -> Path:
        """The YAML of the data set."""
        return data_yaml(self.name, self.folder, self.work)

    def samples(self, split: str) -> list[Sample]:
        return list(read_split(read_data_spec(self.data()), split).samples)

    def judged(self) -> ImageSet:
        return ImageSet(self.samples(JUDGED[self.name]), self.imgsz, None, seed=0, cache=False)


def with_arguments(spec: ModelSpec, changes: Mapping[str, Mapping[str, Any]]) -> ModelSpec:
    """The model with arguments of the rows of these names."""
    layers = [replace(one, kwargs={**one.kwargs, **changes.get(one.name or "", {})}) for one in spec.layers]
    return replace(spec, layers=tuple(layers))


def model(name: str, steps: int) -> ModelSpec:
    """The model file of a network that is trained for so many steps."""
    spec = parse(MODELS / FILES[name])
    if name == "high":
        return with_arguments(spec, {STAGE: {"resolution": "high"}, LOSS: {"start": steps}})  # never a price
    return with_arguments(spec, {LOSS: {"start": steps // 3, "ramp": steps // 3}})


def without_mask(checkpoint: Checkpoint, resolution: str) -> Network:
    """Its network with all patches of one resolution: the same weights."""
    return restore(replace(checkpoint, spec=with_arguments(checkpoint.spec, {STAGE: {"resolution": resolution}})))


# ---- accuracy


def train_cell(place: Place, cell: str) -> tuple[Path, float]:
    """The checkpoint of a cell's training, which goes on where it was stopped, and the minutes that it took."""
    name, seed = named(cell)
    folder = place.work / "runs" / cell
    folder.mkdir(parents=True, exist_ok=True)
    steps = place.epochs * -(-len(place.samples("train")) // BATCH)
    write_text(folder.with_suffix(".yaml"), dump(model(name, steps)))
    options = {"--cfg": folder.with_suffix(".yaml"), "--data": place.data(), **OPTIONS}
    return train(folder, {**options, "--seed": seed, "--imgsz": place.imgsz}, place.epochs, place.threads)


def measure(place: Place, cell: str) -> dict[str, Any]:
    """Train a cell and judge it on images that nothing was trained on."""
    best, minutes = train_cell(place, cell)
    checkpoint = load_checkpoint(best)
    images, names = place.judged(), read_data_spec(place.data()).names

    def found_by(network: Network) -> dict[str, Any]:
        found, _ = detections_of(network.eval(), images, batch_size=BATCH, progress=False, **JUDGED_BY)
        return judged(images.samples, found, names)

    network = restore(checkpoint)
    result: dict[str, Any] = {"cell": cell, "data": place.name, "epochs": place.epochs, "imgsz": place.imgsz}
    result |= {"threads": place.threads, "torch": torch.__version__, "minutes": minutes, **found_by(network)}
    low = None
    if cell.startswith("mask"):
        shares = low_shares(network, images)
        low = float(np.mean(shares))
        result["low"] = {"mean": low, "least": min(shares), "most": max(shares)}
        result |= {f"as {one}": found_by(without_mask(checkpoint, one)) for one in ("low", "high")}
    params, macs = totals(network_costs(resolve(checkpoint.spec), place.imgsz, low=low))
    return {**result, "params": params, "macs": macs}


@torch.inference_mode()
def low_shares(network: Network, images: ImageSet) -> list[float]:
    """The share of low patches of every image."""
    shares = []
    for index in range(len(images)):
        held, _ = network.run(range(row_of(network, MASK) + 1), {-1: pixels(collate([images[index]]), "cpu")})
        shares.append(float(held[row_of(network, MASK)].mean()))
    return shares


def row_of(network: Network, name: str) -> int:
    return next(index for index, layer in enumerate(network.spec.layers) if layer.name == name)


# ---- time


def answer(network: Network, x: Tensor, mask: Tensor | None, predicts: bool) -> Any:
    """Boxes and scores; with `mask` in place of the one that is predicted, and without its predictor."""
    rows, held = range(len(network.layers)), {-1: x}
    if mask is not None:
        at = row_of(network, MASK)
        held, _ = network.run(range(at + 1 if predicts else at), held)
        rows, held = range(at + 1, len(network.layers)), {**held, at: mask}
    held, _ = network.run(rows, held)
    return network.decode(held[len(network.layers) - 1])


def speed(place: Place, large: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of an image by the size and what runs it: medians over rounds, wall and CPU time, and S."""
    seed = SEEDS[0]
    trained = {name: load_checkpoint(place.work / "runs" / f"{name}-{seed}" / "best.pt") for name in FILES}
    last = torch.channels_last
    networks = {name: restore(checkpoint) for name, checkpoint in trained.items()}
    networks |= {f"as {one}": without_mask(trained["mask"], one) for one in ("low", "high")}
    networks = {name: fuse(one).to(memory_format=last) for name, one in networks.items()}  # type: ignore[call-overload]
    images = place.judged()
    step = max(1, len(images) // TIMED_IMAGES)
    some = [pixels(collate([images[at]]), "cpu") for at in range(0, len(images), step)][:TIMED_IMAGES]
    patch = 2 * trained_stride(networks["mask"])
    low = float(np.mean(low_shares(networks["mask"], images)))
    wide = torch.rand(1, 3, large, large).contiguous(memory_format=last)
    drawn = blobs(low, large // patch, seed=0)
    found: dict[str, Any] = {"low": low, "threads": torch.get_num_threads(), "torch": torch.__version__}
    for size, inputs in ((place.imgsz, [x.contiguous(memory_format=last) for x in some]), (large, [wide])):
        forms: dict[str, Callable[[], Any]] = {}
        for name, network in networks.items():
            given = torch.zeros(1, 1, size // patch, size // patch) if name not in ("plain", "mask") else None
            if name == "mask" and size == large:
                given = drawn
            forms[name] = partial(of_all, network, inputs, given, name == "mask")
        with torch.inference_mode():
            times = raced(forms, rounds, f"{size} px")
        ms = {name: (np.median(values, axis=0) / len(inputs)).tolist() for name, values in times.items()}
        found[str(size)] = {"wall": {n: v[0] for n, v in ms.items()}, "cpu": {n: v[1] for n, v in ms.items()}}
    return found


def of_all(network: Network, inputs: Sequence[Tensor], mask: Tensor | None, predicts: bool) -> None:
    for x in inputs:
        answer(network, x, mask, predicts)


def trained_stride(network: Network) -> int:
    """Pixels of a cell of the map that the mask is for."""
    return network.graph.nodes[row_of(network, STAGE)].output.stride


# ---- the table


def shown(results: Mapping[str, Mapping[str, Any]], times: Mapping[str, Any] | None) -> str:
    sizes = [key for key in (times or {}) if key.isdecimal()]
    rows = []
    for name in (*FILES, "as low", "as high"):
        source = "mask" if name.startswith("as ") else name
        runs = list(runs_of(results, source).values())
        if not runs:
            continue
        scores = [one[name] if name.startswith("as ") else one for one in runs]
        row: list[Any] = [f"mask, {name}" if name.startswith("as ") else name]
        for key in ("ap50", "ap"):
            width = interval(np.mean([one["without"][key] for one in scores], axis=0).tolist())
            each = " ".join(f"{one[key]:.3f}" for one in scores)
            row.append(f"{np.mean([one[key] for one in scores]):.3f} +- {width:.3f} ({each})")
        low = [one["low"]["mean"] for one in runs] if name == "mask" else []
        row.append(" ".join(f"{share:.0%}" for share in low) if low else None)
        row.append(f"{runs[0]['macs'] / 1e6:.0f} M" if name in FILES else None)
        row += [f"{times[size]['wall'][name]:.1f} ({times[size]['cpu'][name]:.1f})" for size in sizes] if times else []
        rows.append(row)
    if not rows:
        return ""
    one = next(iter(results.values()))
    head = f"judged on {one['data']}, {JUDGED[one['data']]}; {one['imgsz']} px, {one['epochs']} epochs from scratch"
    header = ("network", "AP50 (each seed)", "AP", "low patches", "MACs", *(f"ms at {size} px (CPU)" for size in sizes))
    return f"{head}\n\n{table(rows, header)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=sorted(JUDGED), default="bccd")
    parser.add_argument("--folder", type=Path, help="of the data set; default as its file in cfg/data says")
    parser.add_argument("--cells", nargs="+", default=CELLS, choices=CELLS, metavar="CELL")
    parser.add_argument("--imgsz", type=int, default=160, help="of training and judging; a multiple of 32")
    parser.add_argument("--large", type=int, default=640, help="pixels of the second measurement of time")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=15, help="of time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench" / "tiny-masked", help="folder of all runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--show", action="store_true", help="train and measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    files = {cell: options.out / f"tiny-masked-{options.data}-{cell}.json" for cell in CELLS}
    timed = options.out / f"tiny-masked-{options.data}-speed.json"
    if not options.show:
        work = options.work.resolve() / options.data
        for folder in (work, options.out):
            folder.mkdir(parents=True, exist_ok=True)
        folder = options.folder and options.folder.resolve()
        place = Place(work, options.data, folder, options.imgsz, options.epochs, options.threads)
        fill(files, options.cells, lambda cell: measure(place, cell))
        trained = [work / "runs" / f"{name}-{SEEDS[0]}" / "best.pt" for name in FILES]
        if not timed.exists() and all(path.exists() for path in trained):
            write_text(timed, json.dumps(speed(place, options.large, options.rounds), indent=1) + "\n")
    results = read(files)
    print(shown(results, json.loads(timed.read_text()) if timed.exists() else None))
    return 0


if __name__ == "__main__":
    raise SystemExit(guarded(main))
