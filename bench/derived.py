"""Is a derived network the subnet that was active in its supernet, and is its ONNX file as small as it is?

python bench/derived.py                        # every supernet, every subnet through ONNX
python bench/derived.py --onnx 2               # two subnets of each supernet through ONNX, the others in torch only
python bench/derived.py --models tiny-seed-search --kinds independent
python bench/derived.py --show                 # the table of what was measured

Looked at are the homogeneous subnets (one kernel, one activation and one depth everywhere) and 20 random ones of each
supernet: `shared` by each policy of batch norms, and `independent` where a row has at most 12 candidates. Weights,
norms and kernel matrices are drawn, so that nothing is as it starts; a subnet is calibrated on eight drawn images, as
before it is judged. Compared are the head's logits on two others: the supernet with this subnet active, the plain
network built from its own YAML, and the ONNX file of that network in onnxruntime, as largest difference by the largest
logit. Exits with 1 where one is over 1e-5, or where a file holds other kernels than its subnet.

Norms scale by .3 to .7. With scales of 1 these 60 random layers amplify the rounding of float32 until torch itself is
1e-5 to 3e-5 away from the same network in float64, and no two programs agree better than that. How far torch is away
stands in the column `float64`.

A subnet that was measured is not measured again; --again begins anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import onnx  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data.structures import Fault  # noqa: E402
from engine.calibrate import calibrate  # noqa: E402
from engine.export import write_file  # noqa: E402
from engine.exported import read_file  # noqa: E402
from engine.runs import table, write_text  # noqa: E402
from models.anchors import with_anchors  # noqa: E402
from models.cost import count_params  # noqa: E402
from models.elastic import ElasticConv2d, elastic_leaves  # noqa: E402
from models.network import SUPERNETS, Network  # noqa: E402
from models.ops.primitives import NORMS  # noqa: E402
from models.parse import parse  # noqa: E402
from models.supernet import Supernet  # noqa: E402
from search.space import Architecture, SearchSpace  # noqa: E402

RESULTS = ROOT / "bench" / "results"
ALLOWED = 1e-5  # of the largest logit
MODELS = {"tiny-search": ("shared",), "tiny-seed-search": SUPERNETS}  # a row of tiny-search has 18 combinations
RANDOM = 20
ANCHORS = tuple((4.0 * s, 5.0 * s, 8.0 * s, 7.0 * s, 6.0 * s, 12.0 * s, 14.0 * s, 13.0 * s) for s in (1, 2, 4))


class Logits(nn.Module):
    """A head's logits ``[N, numbers]`` and the scores, in the form in which `engine.export` writes a network."""

    max_det = 0

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        outputs, _ = self.network(images)
        return torch.cat([y.flatten(1) for y in outputs], dim=1), self.network.decode(outputs)[1]


def trained_looking(name: str, kind: str, norms: str) -> Supernet:
    torch.manual_seed(0)
    net = Supernet(with_anchors(parse(ROOT / "cfg" / "models" / f"{name}.yaml"), ANCHORS), kind, norms)
    with torch.no_grad():
        for module in net.network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.3, 0.7)
                module.bias.normal_(0.3, 0.3)
            if isinstance(module, ElasticConv2d):
                for transform in module.transforms.values():
                    transform += 0.1 * torch.randn_like(transform)
    return net.eval()


def chosen(space: SearchSpace) -> list[int]:
    """The numbers of the homogeneous subnets, then of random ones."""
    options = {choice.name.partition(".")[2]: choice.options for choice in space.choices}
    found: dict[int, None] = {}
    for picks in itertools.product(*options.values()):
        alike = dict(zip(options, picks, strict=True))
        architecture = {choice.name: alike[choice.name.partition(".")[2]] for choice in space.choices}
        found[space.index(Architecture(architecture))] = None
    rng, wanted = random.Random(0), min(space.size, len(found) + RANDOM)
    while len(found) < wanted:
        found[rng.randrange(space.size)] = None
    return list(found)


def measured(net: Supernet, picks: Mapping[str, Any], imgsz: int, with_onnx: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    calibration, images = (torch.rand(count, 3, imgsz, imgsz, generator=generator) for count in (8, 2))
    net.activate(picks)
    calibrate(net.network, [calibration])
    plain = net.derive(picks).eval()
    assert not list(elastic_leaves(plain))
    with torch.no_grad():
        expected, _ = Logits(net.network)(images)
        found, _ = Logits(plain)(images)
        exact, _ = Logits(deepcopy(plain).double())(images.double())
    largest = float(expected.abs().max())
    cell: dict[str, Any] = {
        "subnet": " ".join(f"{name}={option}" for name, option in picks.items()),
        "parameters": count_params(plain),
        "torch": float((found - expected).abs().max()) / largest,
        "float64": float((found - exact).abs().max()) / largest,
    }
    if with_onnx:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "subnet.onnx"
            write_file(file, "onnx", Logits(plain), images, {})
            run = read_file(file, "onnx")(images)[0]
            held = onnx.load(file).graph.initializer
        cell["onnx"] = float((run - expected).abs().max()) / largest
        # norms are folded into kernels and constants there; kernels are told by their four dimensions
        cell["onnx_kernels"] = sum(_numbers(tensor.dims) for tensor in held if len(tensor.dims) == 4)
        cell["kernels"] = sum(p.numel() for p in plain.parameters() if p.ndim == 4)
    return cell


def _numbers(dims: Sequence[int]) -> int:
    return int(torch.Size(dims).numel())


def shown(results: Sequence[Mapping[str, Any]]) -> str:
    header = (
        "supernet",
        "subnets",
        "torch",
        "float64",
        "through ONNX",
        "ONNX",
        "parameters",
        "supernet's",
        "kernels equal",
    )
    rows = []
    for result in results:
        cells = list(result["subnets"].values())
        files = [cell for cell in cells if "onnx" in cell]
        counts = [cell["parameters"] for cell in cells]
        rows.append(
            (
                f"{result['model']} {result['kind']} {result['norms']}",
                len(cells),
                f"{max(cell['torch'] for cell in cells):.1e}",
                f"{max(cell['float64'] for cell in cells):.1e}",
                len(files),
                f"{max(cell['onnx'] for cell in files):.1e}" if files else "-",
                f"{min(counts):,} to {max(counts):,}",
                f"{result['parameters']:,}",
                "equal" if all(cell["onnx_kernels"] == cell["kernels"] for cell in files) else "DIFFER",
            )
        )
    return table(rows, header)


def good(result: Mapping[str, Any]) -> bool:
    return all(
        max(cell["torch"], cell.get("onnx", 0.0)) <= ALLOWED
        and cell.get("onnx_kernels") == cell.get("kernels")
        and cell["parameters"] < result["parameters"]
        for cell in result["subnets"].values()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--kinds", nargs="+", default=list(SUPERNETS), choices=SUPERNETS)
    parser.add_argument("--norms", nargs="+", default=list(NORMS), choices=NORMS, help="of shared supernets")
    parser.add_argument("--imgsz", type=int, default=64)
    parser.add_argument("--onnx", type=int, default=1000, help="subnets of each supernet through ONNX; default: all")
    parser.add_argument("--subnets", type=int, default=1000, help="subnets of each supernet; default: all")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--again", action="store_true", help="measure anew what was measured")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    options = parser.parse_args()
    results = []
    for name in options.models:
        for kind in (kind for kind in MODELS[name] if kind in options.kinds):
            for norms in options.norms if kind == "shared" else ("act",):
                file = options.out / f"derived-{name}-{kind}-{norms}.json"
                result: dict[str, Any] = {"model": name, "kind": kind, "norms": norms, "imgsz": options.imgsz}
                if file.exists():
                    before = json.loads(file.read_text())
                    if options.show or (before["imgsz"] == options.imgsz and not options.again):
                        result = before
                if not options.show:
                    measure(result, file, options)
                if result.get("subnets"):
                    results.append(result)
    print(shown(results) if results else "nothing was measured yet")
    return int(not all(good(result) for result in results))


def measure(result: dict[str, Any], file: Path, options: argparse.Namespace) -> None:
    """Fills `result` with what it lacks, and writes it after each subnet."""
    net = trained_looking(result["model"], result["kind"], result["norms"])
    space = SearchSpace.of(net.spec)
    result |= {"space": space.hash, "torch": torch.__version__, "parameters": count_params(net.network)}
    done = result.setdefault("subnets", {})
    options.out.mkdir(parents=True, exist_ok=True)
    numbers = chosen(space)[: options.subnets]
    through_onnx = numbers[:: max(1, len(numbers) // options.onnx)] if options.onnx else []
    for number in tqdm(numbers, file.stem, unit="subnet", leave=False):
        with_onnx = number in through_onnx
        if str(number) in done and ("onnx" in done[str(number)] or not with_onnx):
            continue
        done[str(number)] = measured(net, space.at(number).picks, options.imgsz, with_onnx)
        write_text(file, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except Fault as fault:
        print(fault, file=sys.stderr)
        raise SystemExit(2) from None
