"""Is the drawn data set honest? A small detector must learn it, one that sees single pixels must not.

python bench/shapes.py                 # the table; trains what is missing, about 45 minutes a cell on 2 cores
python bench/shapes.py --show          # the table of what is there

Cells: tiny.yaml untrained, tiny.yaml trained, and tiny.yaml with every convolution kernel 1x1 (the max pools stay),
trained alike. Each is kept as a JSON in bench/results, so the table can be finished over several sittings.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from data.config import read_data_spec  # noqa: E402
from data.dataset import ImageSet  # noqa: E402
from data.readers import read_split  # noqa: E402
from data.shapes import draw_shapes  # noqa: E402
from engine.config import TrainConfig  # noqa: E402
from engine.evaluate import evaluate  # noqa: E402
from engine.runs import read_csv, table, write_text  # noqa: E402
from engine.train import train  # noqa: E402
from models.graph import normalize  # noqa: E402
from models.network import build  # noqa: E402
from models.parse import dump, parse  # noqa: E402
from models.spec import ModelSpec  # noqa: E402

RESULTS = ROOT / "bench" / "results"
TINY = ROOT / "cfg" / "models" / "tiny.yaml"
RECIPE: dict[str, Any] = {
    "batch_size": 8,
    "optimizer": "AdamW",
    "lr0": 0.003,
    "cls": 2.0,
    "mosaic": 0.3,
    "scale": 0.3,
    "val_interval": 10,
}
LIMITS = {"untrained": "<= .02", "trained": ">= .80", "1x1": "<= .50"}


def pointwise(spec: ModelSpec) -> ModelSpec:
    """The same model with every convolution kernel 1x1."""
    layers = []
    for layer in normalize(spec).layers:
        if layer.op == "Conv":
            layer = replace(layer, args=(layer.args[0], 1, *layer.args[2:]))
        elif layer.op in ("BottleneckCSP", "BottleneckCSP2", "SPPCSP"):
            layer = replace(layer, kwargs={**layer.kwargs, "kernel": 1})
        layers.append(layer)
    return replace(normalize(spec), name="tiny-1x1", layers=tuple(layers))


def measure(cell: str, data: Path, epochs: int, imgsz: int) -> dict[str, Any]:
    if cell == "untrained":
        torch.manual_seed(0)
        spec = read_data_spec(data)
        anchors = tuple(tuple(float(v) for v in range(8 + 40 * k, 8 + 40 * k + 8)) for k in range(3))
        network = build(replace(parse(TINY), num_classes=len(spec.names), anchors=anchors))
        began = time.perf_counter()
        metrics = evaluate(network, ImageSet(read_split(spec, "val").samples, imgsz))
        minutes = (time.perf_counter() - began) / 60
    else:
        cfg = TINY
        if cell == "1x1":
            cfg = ROOT / "runs" / "bench" / "tiny-1x1.yaml"
            cfg.parent.mkdir(parents=True, exist_ok=True)
            write_text(cfg, dump(pointwise(parse(TINY))))
        project, name = ROOT / "runs" / "bench", f"shapes-{cell}"
        config = TrainConfig(cfg=cfg, data=data, epochs=epochs, imgsz=imgsz, **RECIPE, project=project, name=name)
        if (project / name / "last.pt").exists():  # of a sitting that was cut short
            config = TrainConfig(resume=project / name)
        metrics = train(config).metrics
        minutes = sum(float(row["seconds"]) for row in read_csv(project / name / "results.csv")) / 60
    return {
        "ap": metrics.ap,
        "ap50": metrics.ap50,
        "minutes": minutes,
        "epochs": epochs if cell != "untrained" else 0,
        "imgsz": imgsz,
        "recipe": RECIPE,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--imgsz", type=int, default=224)
    parser.add_argument("--cells", nargs="+", default=list(LIMITS), choices=list(LIMITS))
    parser.add_argument("--show", action="store_true", help="train nothing")
    options = parser.parse_args()
    rows = []
    for cell, limit in LIMITS.items():
        file = RESULTS / f"shapes-{cell}.json"
        if not file.exists() and not options.show and cell in options.cells:
            data = draw_shapes(ROOT / "datasets" / "shapes")
            result = measure(cell, data, options.epochs, options.imgsz)
            write_text(file, json.dumps(result, indent=1) + "\n")
        if file.exists():
            result = json.loads(file.read_text())
            rows.append((cell, result["ap50"], limit, result["ap"], result["epochs"], f"{result['minutes']:.1f}"))
    print(table(rows, ("cell", "AP50", "asked", "AP", "epochs", "minutes")))


if __name__ == "__main__":
    main()
