"""Do channels-last maps and bf16 pay? A training step and a forward pass in each, in pairs with plain float32 maps.

python bench/memory_format.py                                   # about 10 minutes on 2 idle cores
python bench/memory_format.py --models tiny --pairs 3           # a quick look
python bench/memory_format.py --show                            # the table of what was measured

A step is forward, loss and backward of --batch-size drawn images with five boxes each; a forward pass is that of the
fused network on one image, as in detect.py. In channels-last both images and weights lie so in memory, as everywhere in
this program. A pair is one run of each, which first is drawn; the number is plain / other, so many times as fast: the
median of all pairs with the 95 % interval of a bootstrap over pairs. Cells are kept as JSON in bench/results.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from forward import paired, summarized  # noqa: E402
from nms import faster  # noqa: E402

from data.structures import Fault, Targets  # noqa: E402
from engine.runs import table, write_text  # noqa: E402
from engine.step import autocast  # noqa: E402
from models.fuse import fuse  # noqa: E402
from models.graph import resolve  # noqa: E402
from models.network import Network, build  # noqa: E402
from models.parse import parse  # noqa: E402

RESULTS = ROOT / "bench" / "results"
MODELS = ("tiny", "yolov5n", "yolov8n")
OTHERS = {"channels-last": "off", "channels-last-bf16": "bf16"}  # and the numbers of each
BOXES = 5  # an image
CPU = torch.device("cpu")


def model(name: str) -> Network:
    spec = parse(ROOT / "cfg" / "models" / f"{name}.yaml")
    if isinstance(spec.anchors, int):  # any will do
        levels = len(resolve(spec).nodes[-1].sources)
        sizes = tuple(tuple(float(8 + 40 * k + i) for i in range(2 * spec.anchors)) for k in range(levels))
        spec = replace(spec, anchors=sizes)
    torch.manual_seed(0)
    return build(spec)


def laid_out(network: Network, images: torch.Tensor, layout: torch.memory_format) -> tuple[Network, torch.Tensor]:
    return deepcopy(network).to(memory_format=layout), images.contiguous(memory_format=layout)  # type: ignore[call-overload]


def step_of(network: Network, images: torch.Tensor, amp: str) -> Callable[[], None]:
    count = len(images) * BOXES
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(count, 2, generator=generator) * images.shape[-1] * 0.6
    boxes = torch.cat([corner, corner + 8 + torch.rand(count, 2, generator=generator) * images.shape[-1] * 0.3], dim=1)
    labels = torch.randint(network.num_classes, (count,), generator=generator)
    targets = Targets(boxes, labels, torch.arange(len(images)).repeat_interleave(BOXES))
    network.train()

    def step() -> None:
        network.zero_grad(set_to_none=True)
        with autocast(CPU, amp):
            outputs, _ = network(images)
        network.loss_from(outputs, targets)[0].backward()

    return step


def forward_of(network: Network, images: torch.Tensor, amp: str) -> Callable[[], None]:
    fused = fuse(network)

    def forward() -> None:
        with torch.inference_mode(), autocast(CPU, amp):
            fused(images[:1])

    return forward


def measured(name: str, what: str, other: str, options: argparse.Namespace) -> dict[str, Any]:
    network, images = model(name), torch.rand(options.batch_size, 3, options.imgsz, options.imgsz)
    make = {"step": step_of, "forward": forward_of}[what]
    plain = make(*laid_out(network, images, torch.contiguous_format), "off")
    ours = make(*laid_out(network, images, torch.channels_last), OTHERS[other])
    times = paired(ours, plain, options.pairs, f"{name} {what} {other}")
    about = {"model": name, "what": what, "other": other, "imgsz": options.imgsz, "batch": options.batch_size}
    return {**about, "threads": torch.get_num_threads(), "torch": torch.__version__, **summarized(times)}


def shown(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        wall, (ratio, low, high) = result["wall"], faster(result["wall"])
        times = f"{wall['theirs_ms']:.1f}", f"{wall['ours_ms']:.1f}"
        row = (result["model"], result["what"], result["other"], result["threads"], result["pairs"])
        rows.append((*row, *times, f"{ratio:.2f}", f"{low:.2f} to {high:.2f}"))
    return table(rows, ("model", "what", "layout", "threads", "pairs", "plain ms", "ms", "times as fast", "95 %"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=0, help="default: torch's own choice")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    results = []
    try:
        for name in options.models:
            for what in ("step", "forward"):
                for other in OTHERS:
                    file = options.out / f"memory-format-{name}-{what}-{other}.json"
                    if not options.show and not file.exists():
                        options.out.mkdir(parents=True, exist_ok=True)
                        write_text(file, json.dumps(measured(name, what, other, options), indent=1) + "\n")
                    results += [json.loads(file.read_text())] if file.exists() else []
    except Fault as fault:
        print(fault, file=sys.stderr)
        return 2
    print(shown(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
