"""Are imported weights as good here as where they come from? yolov5n on the 128 val2017 images of coco256.

python bench/import_ap.py --weights yolov5n_state_dict_fp16.pth --data cfg/data/coco256.yaml

Published for these weights and images (640 pixels, confidence .001, NMS IoU .6): AP .345, AP50 .542, AP75 .379.
Measured with images in the corner of their squares, where the published numbers were, and in the middle, as here.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from data.config import read_data_spec  # noqa: E402
from data.dataset import ImageSet  # noqa: E402
from data.readers import read_split  # noqa: E402
from engine.evaluate import evaluate  # noqa: E402
from engine.runs import table, write_text  # noqa: E402
from models.foreign import import_weights  # noqa: E402
from models.parse import parse  # noqa: E402

RESULT = ROOT / "bench" / "results" / "import-ap.json"
PUBLISHED = {"ap": 0.345, "ap50": 0.542, "ap75": 0.379}
ALLOWED = 0.005


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="the state dict")
    parser.add_argument("--cfg", type=Path, default=ROOT / "cfg" / "models" / "yolov5n.yaml")
    parser.add_argument("--data", type=Path, default=ROOT / "cfg" / "data" / "coco256.yaml")
    options = parser.parse_args()
    data = read_data_spec(options.data)
    network, notes = import_weights(options.weights, parse(options.cfg), data.names)
    for note in notes:
        print(f"note: {note}")
    images = ImageSet(read_split(data, "val").samples, 640)
    rows, result = [("published", *PUBLISHED.values())], {"published": PUBLISHED}
    for place in ("corner", "centre"):
        found = evaluate(network, images, names=data.names, corner=place == "corner")
        result[place] = {name: getattr(found, name) for name in PUBLISHED}
        rows.append((place, *result[place].values()))
    print(table(rows, ("images lie", "AP", "AP50", "AP75")))
    write_text(RESULT, json.dumps(result | {"notes": notes, "torch": torch.__version__}, indent=1) + "\n")
    return int(any(abs(result["corner"][name] - PUBLISHED[name]) > ALLOWED for name in PUBLISHED))


if __name__ == "__main__":
    raise SystemExit(main())
