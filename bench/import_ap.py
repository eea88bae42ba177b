"""Are imported weights as good here as where they come from? Measured on the 128 val2017 images of coco256.

python bench/import_ap.py --weights yolov5n_state_dict_fp16.pth --data cfg/data/coco256.yaml
python bench/import_ap.py --weights yolox_nano.onnx --data cfg/data/coco256.yaml

Measured elsewhere with these weights and images (confidence .001, NMS IoU .6):

    yolov5n, 640 pixels      AP .345, AP50 .542, AP75 .379
    YOLOX-Nano, 416 pixels   AP .340, AP50 .502, AP75 .369

Ours are measured with images in the corner of their squares, where those were, and in the middle, as here. Exits with 1
where a number in the corner is further off than .005.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from data.config import read_data_spec  # noqa: E402
from data.dataset import ImageSet  # noqa: E402
from data.readers import read_split  # noqa: E402
from engine.doors import door  # noqa: E402
from engine.evaluate import evaluate  # noqa: E402
from engine.runs import table, write_text  # noqa: E402
from models.foreign import import_weights  # noqa: E402
from models.onnx_weights import import_onnx  # noqa: E402
from models.parse import parse  # noqa: E402

ALLOWED = 0.005
NUMBERS = ("ap", "ap50", "ap75")


@dataclass(frozen=True)
class Published:
    """What was measured elsewhere: the model file, the size of its input, AP, AP50 and AP75, where ours go."""

    cfg: str
    imgsz: int
    numbers: tuple[float, float, float]
    result: str


KINDS = {  # by what the file of weights ends with
    ".pth": Published("yolov5n.yaml", 640, (0.345, 0.542, 0.379), "import-ap.json"),
    ".onnx": Published("yolox-nano.yaml", 416, (0.340, 0.502, 0.369), "import-ap-yolox.json"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="the state dict, or the ONNX file")
    parser.add_argument("--cfg", type=Path, help="default: the file that belongs to the weights")
    parser.add_argument("--data", type=Path, default=ROOT / "cfg" / "data" / "coco256.yaml")
    parser.add_argument("--limit", type=int, help="measure only so many images, to try the script")
    options = parser.parse_args(argv)
    if options.weights.suffix not in KINDS:
        parser.error(f"--weights {options.weights}: should end with {' or '.join(KINDS)}")
    kind = KINDS[options.weights.suffix]
    data = read_data_spec(options.data)
    images = ImageSet(read_split(data, "val").samples[: options.limit], kind.imgsz)
    load = import_onnx if options.weights.suffix == ".onnx" else import_weights
    network, notes = load(options.weights, parse(options.cfg or ROOT / "cfg" / "models" / kind.cfg), data.names)
    for note in notes:
        print(f"note: {note}")
    published = dict(zip(NUMBERS, kind.numbers, strict=True))
    rows, found = [("published", *kind.numbers)], {"published": published}
    for place in ("corner", "centre"):
        metrics = evaluate(network, images, names=data.names, corner=place == "corner")
        found[place] = {name: getattr(metrics, name) for name in NUMBERS}
        rows.append((place, *found[place].values()))
    print(table(rows, ("images lie", "AP", "AP50", "AP75")))
    if options.limit is None:
        result = {**found, "notes": notes, "torch": torch.__version__}
        write_text(ROOT / "bench" / "results" / kind.result, json.dumps(result, indent=1) + "\n")
    return int(any(abs(found["corner"][name] - published[name]) > ALLOWED for name in NUMBERS))


if __name__ == "__main__":
    raise SystemExit(door(main)())
