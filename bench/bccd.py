"""Blood cells, from a search to a detector: search.py, then train.py from the inherited weights, timed together.

python bench/bccd.py                     # search, retrain, AP on the test split; half an hour on 2 cores
python bench/bccd.py --name long --retrain-epochs 300      # a longer training, resumed where it was stopped

Needs the data set as cfg/data/bccd.yaml says. The result is kept in bench/results/bccd-NAME.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from data.config import read_data_spec  # noqa: E402
from data.dataset import ImageSet  # noqa: E402
from data.readers import read_split  # noqa: E402
from engine.config import train_config  # noqa: E402
from engine.evaluate import evaluate  # noqa: E402
from engine.runs import table, write_text  # noqa: E402
from engine.train import train  # noqa: E402
from models.checkpoint import load_checkpoint, restore  # noqa: E402
from search.config import SearchConfig  # noqa: E402
from search.run import search  # noqa: E402

RESULTS = ROOT / "bench" / "results"
DATA = ROOT / "cfg" / "data" / "bccd.yaml"
RECIPE = {"batch_size": 4, "optimizer": "AdamW", "lr0": 0.004, "cls": 2.5, "mosaic": 0.3, "scale": 0.3, "flipud": 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="hour")
    parser.add_argument("--cfg", type=Path, default=ROOT / "cfg" / "models" / "tiny-search.yaml")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--search-epochs", type=int, default=18)
    parser.add_argument("--retrain-epochs", type=int, default=30)
    parser.add_argument("--budget", default="macs=1G")
    options = parser.parse_args()
    project = ROOT / "runs" / "bench"
    searched, trained = project / f"bccd-{options.name}-search", project / f"bccd-{options.name}-train"
    times = project / f"bccd-{options.name}-minutes.json"  # of the parts that earlier sittings finished
    minutes = json.loads(times.read_text()) if times.exists() else {}

    if not (searched / "best.pt").exists():
        began = time.perf_counter()
        search(
            SearchConfig(
                cfg=options.cfg,
                data=DATA,
                epochs=options.search_epochs,
                imgsz=options.imgsz,
                budget=(options.budget,),
                project=project,
                name=searched.name,
                exist_ok=True,
                **RECIPE,
            )
        )
        minutes["search"] = (time.perf_counter() - began) / 60
        write_text(times, json.dumps(minutes))
    began = time.perf_counter()
    if (trained / "last.pt").exists():
        config = {"resume": trained}
    else:
        config = {
            "cfg": searched / "best.yaml",
            "weights": searched / "best.pt",
            "data": DATA,
            "epochs": options.retrain_epochs,
            "imgsz": options.imgsz,
            **RECIPE,
            "project": project,
            "name": trained.name,
            "exist_ok": True,
        }
    result = train(train_config(config))
    minutes["retrain"] = minutes.get("retrain", 0) + (time.perf_counter() - began) / 60
    write_text(times, json.dumps(minutes))

    data = read_data_spec(DATA)
    network = restore(load_checkpoint(result.best))
    test = ImageSet(read_split(data, "test").samples, options.imgsz)
    metrics = evaluate(network, test, names=data.names)
    print(metrics.table())
    print(table([(k, f"{v:.1f}") for k, v in minutes.items()], ("part", "minutes")))
    content = {
        "test_ap": metrics.ap,
        "test_ap50": metrics.ap50,
        "test_ap50_by_class": {name: ap50 for name, _, ap50 in metrics.per_class},
        "val_ap50": result.metrics.ap50,
        "minutes": minutes,
        "options": {key: str(value) for key, value in vars(options).items() if key != "cfg"},
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    write_text(RESULTS / f"bccd-{options.name}.json", json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
