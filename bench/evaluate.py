"""Is COCO's metric faster here than by pycocotools, and is it the same? Both in one process, in pairs.

python bench/evaluate.py                        # 1,000 images: about 3 minutes on 2 idle cores
python bench/evaluate.py --images 100 --pairs 2   # a quick look
python bench/evaluate.py --show                 # the table of what was measured

Ours is `engine.metrics.coco_metrics` of `Sample`s and `Detections`, as val.py has them: building the inputs of
faster-coco-eval (the extra `fast`) is part of it, and shown by itself too. Theirs is pycocotools of annotations and
results as one would read them from JSON files, from the index on. A pair is one run of each, which first is drawn; the
ratio is theirs / ours, so many times are we faster: the median of all pairs with the 95 % interval of a bootstrap over
pairs. All twelve numbers have to agree to 1e-6. Cells are kept as JSON in bench/results, and one that is there is not
measured again. Exits with 1 where a number differs or 1,000 images are under 5 times faster.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import astuple
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from forward import paired, summarized  # noqa: E402
from nms import faster  # noqa: E402
from pycocotools.coco import COCO  # noqa: E402
from pycocotools.cocoeval import COCOeval  # noqa: E402

from data.structures import Detections, Fault, Sample  # noqa: E402
from engine import metrics  # noqa: E402
from engine.evaluate import coco_results  # noqa: E402
from engine.runs import table, write_text  # noqa: E402

RESULTS = ROOT / "bench" / "results"
CLASSES, DETECTIONS = 80, 100
DEMANDED_IMAGES, DEMANDED = 1000, 5.0
LARGEST_DIFFERENCE = 1e-6


def drawn(images: int) -> tuple[list[Sample], list[Detections]]:
    """Images with 7 objects on average, a tenth of them crowds, and 100 detections, most of them near an object."""
    rng = np.random.default_rng(0)
    truths, detections = [], []
    for number in range(images):
        count = int(rng.poisson(7)) + 1
        corner, sides = rng.uniform(0, 500, (count, 2)), np.exp(rng.uniform(np.log(8), np.log(300), (count, 2)))
        boxes = np.concatenate([corner, corner + sides], axis=1).astype(np.float32)
        labels = rng.integers(0, CLASSES, count)
        crowd = rng.random(count) < 0.1
        path = Path(f"{number}.jpg")
        truths.append(Sample(path, boxes[~crowd], labels[~crowd], None, boxes[crowd], labels[crowd], crowd[crowd]))
        near = rng.integers(0, count, DETECTIONS)
        moved = boxes[near] + rng.normal(0, 0.08, (DETECTIONS, 4)) * np.tile(sides[near], 2)
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
        guessed = np.where(rng.random(DETECTIONS) < 0.6, labels[near], rng.integers(0, CLASSES, DETECTIONS))
        scores = np.sort(rng.random(DETECTIONS))[::-1].copy()
        seen = torch.from_numpy(moved).float(), torch.from_numpy(scores).float(), torch.from_numpy(guessed)
        detections.append(Detections(*seen))
    return truths, detections


def as_json(truths: Sequence[Sample], detections: Sequence[Detections]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The annotations and the results as one would read them from COCO's files."""
    annotations = []
    for image, truth in enumerate(truths):
        for boxes, labels, crowd in (
            (truth.boxes, truth.labels, 0),
            (truth.ignored_boxes, truth.ignored_labels, 1),
        ):
            for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist(), strict=True):
                row = {"image_id": image, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": crowd}
                annotations.append({**row, "area": (x2 - x1) * (y2 - y1), "id": len(annotations) + 1})
    frame = {
        "images": [{"id": image} for image in range(len(truths))],
        "categories": [{"id": label} for label in range(CLASSES)],
        "annotations": annotations,
    }
    return frame, coco_results(
        [Sample(truth.path, truth.boxes, truth.labels, image_id=image) for image, truth in enumerate(truths)],
        detections,
        range(CLASSES),
    )


def pycocotools_stats(frame: dict[str, Any], rows: list[dict[str, Any]]) -> np.ndarray:
    """COCO's twelve numbers; -1 where there is none."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = frame
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.asarray(evaluation.stats)


def measured(images: int, pairs: int) -> dict[str, Any]:
    if find_spec("faster_coco_eval") is None:
        raise Fault("faster-coco-eval is not installed; pip install -e '.[fast]'")
    truths, detections = drawn(images)
    names = [f"class {label}" for label in range(CLASSES)]
    frame, rows = as_json(truths, detections)

    def ours() -> metrics.Metrics:
        return metrics.coco_metrics(truths, detections, names)

    def theirs() -> np.ndarray:
        return pycocotools_stats(frame, rows)

    mine = np.nan_to_num(np.array(astuple(ours())[: len(metrics.NUMBERS)], dtype=float), nan=-1)
    difference = float(np.abs(mine - theirs()).max())
    began = time.process_time()
    metrics._coco({}, metrics._true_rows(truths))
    metrics._coco({}, metrics.found_rows(detections))
    inputs_ms = 1000 * (time.process_time() - began)
    return {
        "images": images,
        "detections": DETECTIONS,
        "classes": CLASSES,
        "difference": difference,
        "ap": float(mine[0]),
        "inputs_cpu_ms": inputs_ms,
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in ("pycocotools", "faster-coco-eval", "numpy")},
        **summarized(paired(ours, theirs, pairs, f"{images} images", warmup=0)),
    }


def shown(results: Sequence[dict[str, Any]]) -> str:
    table_rows = []
    for result in results:
        for clock in ("wall", "cpu"):
            times, (ratio, low, high) = result[clock], faster(result[clock])
            seconds = [f"{times[name] / 1000:.2f}" for name in ("ours_ms", "theirs_ms")]
            inputs = f"{result['inputs_cpu_ms'] / 1000:.2f}"
            row = (result["images"], f"{result['difference']:.0e}", result["pairs"], clock, *seconds, inputs)
            table_rows.append((*row, f"{ratio:.1f}", f"{low:.1f} to {high:.1f}"))
    header = ("images", "difference", "pairs", "clock", "ours s", "pycocotools s", "of ours: inputs s")
    return table(table_rows, (*header, "times faster", "95 %"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[DEMANDED_IMAGES])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    files = {images: options.out / f"evaluate-{images}.json" for images in options.images}
    try:
        for images, file in files.items():
            if not options.show and not file.exists():
                result = measured(images, options.pairs)
                options.out.mkdir(parents=True, exist_ok=True)
                write_text(file, json.dumps(result, indent=1) + "\n")
    except Fault as fault:
        print(fault, file=sys.stderr)
        return 2
    results = [json.loads(file.read_text()) for file in files.values() if file.exists()]
    print(shown(results))
    slow = any(r["images"] == DEMANDED_IMAGES and faster(r["wall"])[0] < DEMANDED for r in results)
    return int(slow or any(r["difference"] > LARGEST_DIFFERENCE for r in results))


if __name__ == "__main__":
    raise SystemExit(main())
