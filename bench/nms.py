"""Is our suppression faster than OpenCV's, and does it keep the same boxes? Both in one process, in pairs.

python bench/nms.py                                        # all cells: about 3 minutes on 2 idle cores
python bench/nms.py --cells objects-10000 eval --pairs 5   # a quick look
python bench/nms.py --show                                 # the table of what was measured

A pair is one run of each, which first is drawn; the ratio is theirs / ours, so many times are we faster: the median of
all pairs with the 95 % interval of a bootstrap over pairs. Before anything is timed both have to keep the same boxes
in the same order. OpenCV's is `cv2.dnn.NMSBoxesBatched`, cut at 300 boxes; it gets its arrays ready made.

objects-N   N boxes around 60 objects of 80 classes, each box of the class of its object: few stay
mixed-N     the same with a class drawn for every box: many stay
one-N       the same with a single class
eval        what a measurement of AP asks: 25,200 x 80 scores, all above .001, several classes a box, and of them the
            best 30,000; for OpenCV numpy picks these

One thread each. Cells are kept as JSON in bench/results, and one that is there is not measured again. Exits with 1
where a result differs or mixed-10000 is under 5 times faster.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from forward import paired, summarized  # noqa: E402
from torch import Tensor  # noqa: E402

from data.structures import Fault  # noqa: E402
from engine.nms import TOP_K, nms, suppress  # noqa: E402
from engine.runs import table, write_text  # noqa: E402

RESULTS = ROOT / "bench" / "results"
SIZES = (1000, 10_000, 30_000)
CELLS = (*(f"{scene}-{size}" for scene in ("objects", "mixed", "one") for size in SIZES), "eval")
DEMANDED = {"mixed-10000": 5.0}
CLASSES, OBJECTS, MAX_DET = 80, 60, 300
CONF, IOU = 0.001, 0.6
PREDICTIONS = 25_200  # of yolov5 at 640 pixels


def scene(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes ``[count, 4]`` around objects, their scores, and which object each belongs to."""
    centre = torch.rand(OBJECTS, 2, generator=generator) * 640
    side = 20 + 200 * torch.rand(OBJECTS, 2, generator=generator)
    which = torch.randint(OBJECTS, (count,), generator=generator)
    middle = centre[which] + side[which] * 0.08 * torch.randn(count, 2, generator=generator)
    sides = side[which] * (1 + 0.15 * torch.randn(count, 2, generator=generator)).clamp(0.3, 2)
    boxes = torch.cat([middle - sides / 2, middle + sides / 2], dim=1)
    return boxes, CONF + (1 - CONF) * torch.rand(count, generator=generator), which


def candidates(name: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, scores and labels of a scene."""
    generator = torch.Generator().manual_seed(count)
    boxes, scores, which = scene(count, generator)
    classes = torch.randint(CLASSES, (OBJECTS,), generator=generator)[which]
    if name == "mixed":
        classes = torch.randint(CLASSES, (count,), generator=generator)
    return boxes, scores, torch.zeros_like(classes) if name == "one" else classes


def opencv(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Indices of the boxes that OpenCV keeps; boxes are x, y, width, height."""
    return np.asarray(cv2.dnn.NMSBoxesBatched(boxes, scores, labels, CONF, IOU))[:MAX_DET]


def xywh(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1, dtype=np.float64)


def of_candidates(name: str, count: int) -> tuple[Callable[[], Any], Callable[[], Any], bool]:
    """Ours, theirs, and whether they agree."""
    boxes, scores, labels = candidates(name, count)
    theirs = xywh(boxes.double().numpy()), scores.numpy(), labels.int().numpy()
    mine = boxes.numpy(), scores.numpy(), labels.numpy()

    def ours() -> np.ndarray:
        return suppress(*mine, iou=IOU, max_det=MAX_DET)

    return ours, lambda: opencv(*theirs), ours().tolist() == opencv(*theirs).tolist()


def of_predictions() -> tuple[Callable[[], Any], Callable[[], Any], bool]:
    """The same from a whole image's predictions."""
    generator = torch.Generator().manual_seed(0)
    boxes, best, which = scene(PREDICTIONS, generator)
    scores = torch.rand(PREDICTIONS, CLASSES, generator=generator) ** 12 * 0.05
    scores[torch.arange(PREDICTIONS), which] = best**4

    def ours() -> Any:
        return nms(boxes, scores, conf=CONF, iou=IOU, max_det=MAX_DET, multi_label=True)

    def theirs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        flat = scores.numpy().ravel()
        index = np.flatnonzero(flat > CONF)
        if len(index) > TOP_K:
            index = index[np.argsort(-flat[index], kind="stable")[:TOP_K]]
        box, label, score = boxes.numpy()[index // CLASSES], index % CLASSES, flat[index]
        kept = opencv(xywh(box.astype(np.float64)), score, label.astype(np.int32))
        return box[kept], score[kept], label[kept]

    mine, other = ours(), theirs()
    same = zip((mine.boxes, mine.scores, mine.labels), other, strict=True)
    return ours, theirs, all(np.array_equal(one.numpy(), two) for one, two in same)


def measured(cell: str, pairs: int) -> dict[str, Any]:
    name, _, count = cell.partition("-")
    ours, theirs, same = of_candidates(name, int(count)) if count else of_predictions()
    return {
        "cell": cell,
        "same": same,
        "threads": 1,
        "max_det": MAX_DET,
        "conf": CONF,
        "iou": IOU,
        "torch": torch.__version__,
        "opencv": cv2.__version__,
        "numpy": np.__version__,
        **summarized(paired(ours, theirs, pairs, cell)),
    }


def faster(clock: dict[str, Any]) -> tuple[float, float, float]:
    """How many times faster we are, and the 95 % interval."""
    low, high = clock["interval"]
    return 1 / clock["ratio"], 1 / high, 1 / low


def shown(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        for clock in ("wall", "cpu"):
            times, (ratio, low, high) = result[clock], faster(result[clock])
            ours, theirs = f"{times['ours_ms']:.2f}", f"{times['theirs_ms']:.2f}"
            same = "yes" if result["same"] else "NO"
            span = f"{low:.1f} to {high:.1f}"
            rows.append((result["cell"], same, result["pairs"], clock, ours, theirs, f"{ratio:.1f}", span))
    return table(rows, ("cell", "same boxes", "pairs", "clock", "ours ms", "OpenCV ms", "times faster", "95 %"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS), metavar="CELL")
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    files = {cell: options.out / f"nms-{cell}.json" for cell in options.cells}
    try:
        for cell, file in files.items():
            if not options.show and not file.exists():
                result = measured(cell, options.pairs)
                options.out.mkdir(parents=True, exist_ok=True)
                write_text(file, json.dumps(result, indent=1) + "\n")
    except Fault as fault:
        print(fault, file=sys.stderr)
        return 2
    results = [json.loads(file.read_text()) for file in files.values() if file.exists()]
    print(shown(results))
    slow = any(faster(r["wall"])[0] < DEMANDED.get(r["cell"], 0.0) for r in results)
    return int(slow or not all(result["same"] for result in results))


if __name__ == "__main__":
    raise SystemExit(main())
