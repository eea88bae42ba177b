"""What does it cost to judge every subnet of a space, each with batch norms of its own, and is it exact?

python bench/prefix_tree.py                                        # about half an hour on 2 idle cores
python bench/prefix_tree.py --calibration 16 --judging 8 --imgsz 64 --subnets 5 --out /tmp    # a quick look
python bench/prefix_tree.py --show                                 # the table of what was measured

`search.tree.losses` walks all subnets of a search file; some, drawn at random, are derived, calibrated and judged one
by one on the same images. Multiply-adds are those that torch's FlopCounterMode sees during the whole walk, for one
image, over those of a forward of the mean subnet; making small kernels of large ones is among them and counts the more
the fewer and smaller the images are. Weights are fresh unless --weights names a supernet's checkpoint; what is claimed
does not depend on them. The walk is one cell and the subnets are another, kept as JSON. Exits with 1 where the walk
costs more than 150 forwards or a loss differs by more than 1e-5 of its size.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data.config import read_data_spec  # noqa: E402
from data.dataset import ImageSet  # noqa: E402
from data.loader import batches  # noqa: E402
from data.readers import read_split  # noqa: E402
from data.shapes import draw_shapes  # noqa: E402
from data.structures import Batch  # noqa: E402
from engine.calibrate import calibrate  # noqa: E402
from engine.evaluate import calibration_images, pixels  # noqa: E402
from engine.runs import table, write_text  # noqa: E402
from models.checkpoint import load_checkpoint  # noqa: E402
from models.graph import resolve  # noqa: E402
from models.parse import parse  # noqa: E402
from models.supernet import Supernet  # noqa: E402
from search.costs import cost_tables  # noqa: E402
from search.space import SearchSpace  # noqa: E402
from search.tree import losses  # noqa: E402

RESULTS = ROOT / "bench" / "results"
ANCHORS = tuple(tuple(float(v) for v in range(8 + 40 * k, 8 + 40 * k + 8)) for k in range(3))  # any will do
ALLOWED_COST = 150
ALLOWED_DIFFERENCE = 1e-5
DEVICE = torch.device("cpu")


def made(options: argparse.Namespace) -> tuple[Supernet, list[Tensor], ImageSet]:
    """The supernet, the calibration batches and the judging images: the first ones of train, and the next."""
    data = read_data_spec(options.data or draw_shapes(ROOT / "datasets" / "shapes"))
    samples = read_split(data, "train").samples
    torch.manual_seed(0)
    if options.weights:
        checkpoint = load_checkpoint(options.weights)
        supernet = Supernet(checkpoint.spec, options.supernet, options.norms)
        supernet.network.load_state_dict(checkpoint.state)
    else:
        spec = replace(parse(options.cfg), num_classes=len(data.names), anchors=ANCHORS)
        supernet = Supernet(spec, options.supernet, options.norms)
    supernet.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    first = ImageSet(samples[: options.calibration], options.imgsz)
    judging = ImageSet(samples[options.calibration :][: options.judging], options.imgsz)
    return supernet, list(calibration_images(first, options.calibration, 0, DEVICE)), judging


def walk(options: argparse.Namespace) -> dict[str, Any]:
    supernet, calibration, judging = made(options)
    space = SearchSpace.of(supernet.spec)
    macs = cost_tables(resolve(supernet.spec), options.imgsz)["macs"]
    mean = float(np.mean([macs.of(space.at(number)) for number in range(space.size)]))
    began, cpu = time.perf_counter(), time.process_time()
    with FlopCounterMode(display=False) as counter:
        found = losses(supernet, space, calibration, judging, batch_size=options.batch_size, device=DEVICE)
    images = sum(map(len, calibration)) + len(judging)
    walked = counter.get_total_flops() / 2 / images
    return {
        "subnets": space.size,
        "macs_an_image": walked,
        "macs_of_the_mean_subnet": mean,
        "forwards": walked / mean,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes_of_the_process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "losses": found.tolist(),
    }


@torch.no_grad()
def one_by_one(supernet: Supernet, calibration: list[Tensor], judging: list[Batch], number: int) -> dict[str, float]:
    began, cpu = time.perf_counter(), time.process_time()
    network = supernet.derive(SearchSpace.of(supernet.spec).at(number).picks).eval()
    calibrate(network, calibration)
    total = sum(len(one.images) * float(network.loss(pixels(one, DEVICE), one.targets)[0]) for one in judging)
    seconds = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    return {"loss": total / sum(len(one.images) for one in judging), **seconds}


def shown(walked: dict[str, Any], alone: dict[str, dict[str, float]]) -> str:
    differences = relative(walked, alone)
    seconds = float(np.mean([one["seconds"] for one in alone.values()])) if alone else float("nan")
    worst = f"{max(differences):.1e}" if differences else "-"
    rows = [
        ("subnets", f"{walked['subnets']:,}", ""),
        ("MACs an image, whole walk", f"{walked['macs_an_image'] / 1e9:.3f} G", ""),
        ("MACs an image, mean subnet", f"{walked['macs_of_the_mean_subnet'] / 1e9:.3f} G", ""),
        ("walk in forwards of the mean subnet", f"{walked['forwards']:.1f}", f"<= {ALLOWED_COST}"),
        ("seconds of the walk", f"{walked['seconds']:.0f}", ""),
        ("seconds one by one, estimated", f"{seconds * walked['subnets']:.0f}", ""),
        ("peak memory of the process", f"{walked['peak_bytes_of_the_process'] / 2**20:.0f} MiB", ""),
        ("losses of all subnets", f"{min(walked['losses']):.4f} to {max(walked['losses']):.4f}", ""),
        (f"worst difference of {len(differences)} losses", worst, f"<= {ALLOWED_DIFFERENCE:.0e}"),
    ]
    return table(rows, ("", "measured", "asked"))


def relative(walked: dict[str, Any], alone: dict[str, dict[str, float]]) -> list[float]:
    return [abs(walked["losses"][int(number)] / one["loss"] - 1) for number, one in alone.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", type=Path, default=ROOT / "cfg" / "models" / "tiny-seed-search.yaml")
    parser.add_argument("--data", type=Path, help="a data set's YAML; default: the drawn shapes")
    parser.add_argument("--weights", type=Path, help="last.pt of a search; default: fresh weights")
    parser.add_argument("--supernet", default="shared", choices=("shared", "independent"))
    parser.add_argument("--norms", default="act", choices=("act", "shared", "k_act"))
    parser.add_argument("--imgsz", type=int, default=160)
    parser.add_argument("--calibration", type=int, default=128, help="images")
    parser.add_argument("--judging", type=int, default=64, help="images")
    parser.add_argument("--batch-size", type=int, default=16, help="of the judging images")
    parser.add_argument("--subnets", type=int, default=30, help="to be judged one by one as well")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch; default: all cores")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measured = {"cfg": options.cfg.stem, "weights": str(options.weights.name) if options.weights else None}
    measured |= {name: getattr(options, name) for name in ("supernet", "norms", "imgsz", "calibration", "judging")}
    measured |= {"batch_size": options.batch_size}
    about = measured | {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "torch": torch.__version__}
    walked_file, alone_file = (
        options.out / f"prefix-tree-{options.supernet}-{cell}.json" for cell in ("walk", "alone")
    )
    options.out.mkdir(parents=True, exist_ok=True)

    def kept(file: Path) -> dict[str, Any]:
        """What `file` holds, if it was measured with these options."""
        content = json.loads(file.read_text()) if file.exists() else {}
        return content if options.show or measured.items() <= content.items() else {}

    walked, alone = kept(walked_file), kept(alone_file).get("subnets", {})
    if not options.show:
        if not walked:
            walked = about | walk(options)
            write_text(walked_file, json.dumps(walked) + "\n")
        drawn = random.Random(0).sample(range(walked["subnets"]), options.subnets)
        supernet, calibration, images = made(options)
        judging = list(batches(images, options.batch_size))
        for number in tqdm([number for number in drawn if str(number) not in alone], "one by one", unit="subnet"):
            alone[str(number)] = one_by_one(supernet, calibration, judging, number)
            write_text(alone_file, json.dumps(about | {"subnets": alone}) + "\n")
    if not walked:
        print("nothing was measured yet")
        return 0
    print(shown(walked, alone))
    return int(walked["forwards"] > ALLOWED_COST or any(one > ALLOWED_DIFFERENCE for one in relative(walked, alone)))


if __name__ == "__main__":
    raise SystemExit(main())
