"""Does selective down-sampling save time? Stages 4 and 5 of DeepLabV3 on ResNet-50 under masks, against dense ones.

python bench/masked.py                                   # about 15 minutes on 2 idle cores
python bench/masked.py --low 0.75 --rounds 5             # a quick look
python bench/masked.py --threshold                       # from which share of low patches on packing is faster
python bench/masked.py --ways                            # other ways to do the 3x3 convolutions of high patches
python bench/masked.py --profile                         # where the time goes
python bench/masked.py --show                            # the table of what was measured

One image of --imgsz pixels, what row 3 gives for it, and from there on: mask predictor, packing, both stages,
unpacking. Masks are not the (untrained) predictor's, but in blobs as a trained one makes them, with just the share that
is asked for. Dense are the same stages without a mask and without a predictor: dilated convolutions, plain and
channels_last, and their polyphase form, in which the cells of each phase are an image of their own. All have folded
norms and activations in place. A round runs every form once, in an order that is drawn; the number is the fastest dense
form / ours by the median of the rounds' ratios, with the 95 % interval of a bootstrap over rounds. Cells are kept as
JSON in bench/results.

--threshold sets the packed form against what else there is to do with such a mask, the dense form of the same stages,
for small shares, and says from which on packing is faster: where the line through the logarithms of the ratios
crosses 1. `models.ops.masked.PACKED_FROM` is to be that.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data.structures import Fault  # noqa: E402
from engine.runs import table, write_text  # noqa: E402
from models.cost import masked_macs, network_costs  # noqa: E402
from models.fuse import fuse  # noqa: E402
from models.network import Network, build  # noqa: E402
from models.ops.masked import PACKED_FROM  # noqa: E402
from models.ops.packed import as_rows, packing, taps_inside  # noqa: E402
from models.parse import parse  # noqa: E402

RESULTS = ROOT / "bench" / "results"
SMALL = (0.05, 0.1, 0.2, 0.3, 0.4)  # shares of low patches around which packing begins to pay
LOW = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.5, 0.75, 0.9, 1.0)
USUAL = 0.75  # for --ways and --profile
BLOBS = 6  # a side, of a mask: about so many high places would find room
WARMUP = 2
RESAMPLES = 2_000
FINE, MASK, STAGES = 3, 4, (5, 6)  # rows of r50-mds-seg.yaml; those of resnet50-deeplab.yaml lack the mask's
DENSE_STAGES = (4, 5)


def networks(pool: str) -> tuple[Network, Network]:
    """The selective network and the dense one with the same weights, folded."""
    torch.manual_seed(0)
    ours = build(parse(ROOT / "cfg" / "models" / "r50-mds-seg.yaml"))
    theirs = build(parse(ROOT / "cfg" / "models" / "resnet50-deeplab.yaml"))
    for norm in ours.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.2, 0.4)  # so that no residual branch is nothing
    first = ours.layers[STAGES[0]]
    if pool == "pick":  # the transition of a residual network; other pools are dilated from the first block on
        first.pool.pool, first.transition = "pick", True
        first.blocks[0].conv2.dilation = first.blocks[0].conv2.padding = (1, 1)
    for mine, dense in zip(STAGES, DENSE_STAGES, strict=True):
        theirs.layers[dense].load_state_dict(ours.layers[mine].state_dict())
    theirs.layers[DENSE_STAGES[0]].blocks[0].conv2.dilation = first.blocks[0].conv2.dilation
    theirs.layers[DENSE_STAGES[0]].blocks[0].conv2.padding = first.blocks[0].conv2.padding
    for network in (ours, theirs):
        for module in network.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = True
    return fuse(ours), fuse(theirs)


def blobs(low: float, size: int, seed: int) -> Tensor:
    """A mask ``[1, 1, size, size]`` of just this share of low patches: smooth noise over a threshold."""
    noise = torch.rand(1, 1, BLOBS, BLOBS, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(noise, size=(size, size), mode="bicubic").flatten()
    mask = torch.zeros(size * size)
    mask[smooth.argsort()[: round(low * size * size)]] = 1
    return mask.view(1, 1, size, size)


def selective(network: Network, x: Tensor, mask: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        held, _ = network.run([MASK], {FINE: x})
        held, _ = network.run(STAGES, {**held, FINE: x, MASK: mask})
        return held[STAGES[-1]]

    return run


def dilated(network: Network, x: Tensor) -> Callable[[], Tensor]:
    one, two = (network.layers[row] for row in DENSE_STAGES)
    return lambda: two(one(x))


def polyphase(network: Network, x: Tensor) -> Callable[[], Tensor]:
    """The same, with a batch of four phases in place of a dilation of two."""
    first, *others = deepcopy([*network.layers[DENSE_STAGES[0]].blocks, *network.layers[DENSE_STAGES[1]].blocks])
    whole = [first] if first.conv2.dilation[0] % 2 else []
    split = others if whole else [first, *others]
    for block in split:
        block.conv2.dilation = block.conv2.padding = (block.conv2.dilation[0] // 2,) * 2

    def run() -> Tensor:
        y = x
        for block in whole:
            y = block(y)
        y = torch.cat([y[:, :, a::2, b::2] for a in range(2) for b in range(2)])
        for block in split:
            y = block(y)
        out = y.new_empty(1, y.shape[1], 2 * y.shape[2], 2 * y.shape[3]).contiguous(memory_format=layout(y))
        for number, phase in enumerate(y):
            out[0, :, number // 2 :: 2, number % 2 :: 2] = phase
        return out

    return run


def layout(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def raced(forms: Mapping[str, Callable[[], Any]], rounds: int, label: str) -> dict[str, np.ndarray]:
    """Milliseconds of each form, ``[rounds, 2]``: wall and CPU time."""
    rng, times = np.random.default_rng(0), {name: np.empty((rounds, 2)) for name in forms}
    for turn in tqdm(range(-WARMUP, rounds), label, unit="round", leave=False):
        for name in rng.permutation(list(forms)):
            wall, cpu = time.perf_counter(), time.process_time()
            forms[str(name)]()
            if turn >= 0:
                times[str(name)][turn] = time.perf_counter() - wall, time.process_time() - cpu
    return {name: 1000 * values for name, values in times.items()}


def measured(low: float, options: argparse.Namespace) -> dict[str, Any]:
    ours, theirs = networks(options.pool)
    x = torch.rand(1, 512, options.imgsz // 8, options.imgsz // 8)
    mask = blobs(low, options.imgsz // 16, options.seed)
    last = torch.channels_last
    packed, plain, lined = ours.to(memory_format=last), theirs, deepcopy(theirs).to(memory_format=last)  # type: ignore[call-overload]
    y = x.contiguous(memory_format=last)
    forms = {
        "ours": selective(packed, y, mask),
        "dilated": dilated(plain, x),
        "dilated channels_last": dilated(lined, y),
        "polyphase": polyphase(plain, x),
        "polyphase channels_last": polyphase(lined, y),
    }
    outputs = [form() for form in forms.values()]
    assert all(torch.allclose(other, outputs[1], rtol=1e-3, atol=1e-3) for other in outputs[2 if low else 0 :])
    times = raced(forms, options.rounds, f"{low:.0%} low")
    found: dict[str, Any] = {"low": low, "imgsz": options.imgsz, "pool": options.pool, "rounds": options.rounds}
    found |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    for clock, name in enumerate(("wall", "cpu")):
        best = min((form for form in forms if form != "ours"), key=lambda form: np.median(times[form][:, clock]))
        ratios = times[best][:, clock] / times["ours"][:, clock]
        found[name] = {
            "ms": {form: float(np.median(values[:, clock])) for form, values in times.items()},
            "fastest": best,
            "ratio": float(np.median(ratios)),
            "interval": bootstrapped(ratios),
        }
    return {**found, "limit": limit(ours, low, options.imgsz)}


def packed_or_dense(options: argparse.Namespace) -> dict[str, Any]:
    """Dense milliseconds to packed ones for some shares of low patches, wall and CPU time, and where they are equal."""
    ours, _ = networks(options.pool)
    last = torch.channels_last
    both = {"packed": ours.to(memory_format=last), "dense": deepcopy(ours).to(memory_format=last)}  # type: ignore[call-overload]
    for name, network in both.items():
        for row in STAGES:
            network.layers[row].backend = name
    x = torch.rand(1, 512, options.imgsz // 8, options.imgsz // 8).contiguous(memory_format=last)
    forms = {}
    for low in options.low or SMALL:
        mask = blobs(low, options.imgsz // 16, options.seed)
        forms |= {f"{name} {low:g}": selective(network, x, mask) for name, network in both.items()}
    times = raced(forms, options.rounds, "threshold")
    found: dict[str, Any] = {"imgsz": options.imgsz, "pool": options.pool, "rounds": options.rounds}
    found |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    for clock, name in enumerate(("wall", "cpu")):
        rows, ratios = [], []
        for low in options.low or SMALL:
            packed, dense = (times[f"{form} {low:g}"][:, clock] for form in ("packed", "dense"))
            ratios.append(float(np.median(dense / packed)))
            rows.append({"low": low, "packed": float(np.median(packed)), "dense": float(np.median(dense))})
            rows[-1] |= {"ratio": ratios[-1], "interval": bootstrapped(dense / packed)}
        found[name] = {"rows": rows, "equal": crossing([row["low"] for row in rows], ratios)}
    return found


def crossing(shares: Sequence[float], ratios: Sequence[float]) -> float | None:
    """The share where the line through the logarithms of the ratios is 0, not under 0; None where it does not rise."""
    if len(shares) < 2:
        return None
    slope, start = np.polyfit(shares, np.log(ratios), 1)
    return max(0.0, float(-start / slope)) if slope > 0 else None


def shown_threshold(found: Mapping[str, Any]) -> str:
    rows = []
    for clock in ("wall", "cpu"):
        for row in found[clock]["rows"]:
            low, high = row["interval"]
            about = f"{row['low']:.0%}", clock, f"{row['packed']:.0f}", f"{row['dense']:.0f}"
            rows.append((*about, f"{row['ratio']:.2f}", f"{low:.2f} to {high:.2f}"))
    equal = {clock: found[clock]["equal"] for clock in ("wall", "cpu")}
    told = ", ".join(f"{clock} {'-' if share is None else f'{share:.2f}'}" for clock, share in equal.items())
    names = ("low", "clock", "ms packed", "ms dense", "times as fast", "95 %")
    return f"{table(rows, names)}\n\nequal at a share of: {told}; PACKED_FROM is {PACKED_FROM}"


def bootstrapped(ratios: np.ndarray) -> list[float]:
    """The 95 % interval of their median."""
    drawn = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios)))
    return [float(bound) for bound in np.percentile(np.median(drawn, axis=1), (2.5, 97.5))]


def limit(network: Network, low: float, imgsz: int) -> float:
    """How many times fewer multiply-adds there are, the predictor's among them."""
    costs, graph = network_costs(network.graph, imgsz), network.graph
    dense = sum(costs[row].macs for row in STAGES)
    under = sum(masked_macs(costs[row].macs, network.layers[row], graph.nodes[row], imgsz, low) for row in STAGES)
    return dense / (under + costs[MASK].macs)


def shown(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        for clock in ("wall", "cpu"):
            found = result[clock]
            dense, (low, high) = found["ms"][found["fastest"]], found["interval"]
            about = (
                f"{result['low']:.0%}",
                result["pool"],
                result["imgsz"],
                result["threads"],
                result["rounds"],
                clock,
            )
            ours = f"{found['ms']['ours']:.0f}", f"{dense:.0f}", found["fastest"]
            rows.append((*about, *ours, f"{found['ratio']:.2f}", f"{low:.2f} to {high:.2f}", f"{result['limit']:.2f}"))
    names = ("low", "pool", "imgsz", "threads", "rounds", "clock", "ms", "dense ms", "fastest dense form")
    return table(rows, (*names, "times as fast", "95 %", "MACs say"))


# ---- other ways


def ways(channels: int, size: int, low: float, rounds: int) -> str:
    """A 3x3 convolution of all high patches but for their first cells, in several ways; the first is ours."""
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, channels, 3, padding=2, dilation=2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(1, channels, size, size).contiguous(memory_format=torch.channels_last)
    packed = packing(blobs(low, size // 2, 0), 2)
    taps, rows = taps_inside(packed, 3, 1), as_rows(x).index_select(0, packed.cells_R)
    weight = conv.weight.permute(0, 2, 3, 1)
    index, count = taps.index_MK, len(taps.index_MK)

    def gathered() -> Tensor:
        columns = rows.index_select(0, index.flatten()).index_fill_(0, taps.outside, 0)
        return F.linear(columns.view(count, -1), weight.reshape(channels, -1), conv.bias)

    def as_convolution() -> Tensor:
        columns = rows.index_select(0, index.flatten()).index_fill_(0, taps.outside, 0)
        image = columns.view(1, 1, count, -1).permute(0, 3, 1, 2)
        return F.conv2d(image, weight.reshape(channels, -1)[:, :, None, None], conv.bias)

    def tap_by_tap() -> Tensor:
        zeroed = torch.ones(count * 9).index_fill_(0, taps.outside, 0).view(count, 9, 1)
        y = conv.bias.expand(count, -1).clone()
        for tap in range(9):
            y.addmm_(rows.index_select(0, index[:, tap]) * zeroed[:, tap], weight[:, tap // 3, tap % 3].t())
        return y

    tile = 8  # patches: SBNet's way (Ren et al., arXiv 1801.02108), tiles with a border, of every phase
    high = packed.rank_Nhw[0] >= 0
    busy = high.view(size // 2 // tile, tile, size // 2 // tile, tile).any(3).any(1).nonzero()
    phases = torch.stack([x[0, :, a::2, b::2] for a in range(2) for b in range(2)][1:])

    def tiled() -> Tensor:
        padded = F.pad(phases, (1, 1, 1, 1))
        tiles = padded.unfold(2, tile + 2, tile).unfold(3, tile + 2, tile)[:, :, busy[:, 0], busy[:, 1]]
        tiles = tiles.permute(0, 2, 1, 3, 4).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return F.conv2d(tiles, conv.weight, conv.bias)

    def dense() -> Tensor:
        return F.conv2d(phases.contiguous(memory_format=torch.channels_last), conv.weight, conv.bias, padding=1)

    forms = {
        "gathered rows, one product": gathered,
        "the same as a 1x1 convolution": as_convolution,
        "tap by tap": tap_by_tap,
        f"tiles of {tile} x {tile} patches": tiled,
        "all cells": dense,
    }
    torch.testing.assert_close(tap_by_tap(), gathered(), rtol=1e-4, atol=1e-4)
    times = raced(forms, rounds, f"{channels} channels")
    medians = {name: np.median(values, axis=0) for name, values in times.items()}
    lines = [(channels, size, f"{low:.0%}", name, f"{wall:.1f}", f"{cpu:.1f}") for name, (wall, cpu) in medians.items()]
    return table(lines, ("channels", "cells a side", "low", "way", "wall ms", "CPU ms"))


def profiled(options: argparse.Namespace) -> str:
    ours, _ = networks(options.pool)
    x = torch.rand(1, 512, options.imgsz // 8, options.imgsz // 8).contiguous(memory_format=torch.channels_last)
    mask = blobs((options.low or [USUAL])[0], options.imgsz // 16, 0)
    run = selective(ours.to(memory_format=torch.channels_last), x, mask)  # type: ignore[call-overload]
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(options.rounds):
            run()
    return profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=32)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--low", type=float, nargs="+", help="shares of low patches")
    parser.add_argument("--imgsz", type=int, default=512)
    parser.add_argument("--pool", choices=("max", "pick"), default="max")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0, help="of the masks")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--threshold", action="store_true")
    parser.add_argument("--ways", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    try:
        with torch.inference_mode():
            if options.ways:
                size = options.imgsz // 8
                low = options.low[0] if options.low else USUAL
                print("\n\n".join(ways(channels, size, low, options.rounds) for channels in (256, 512)))
                return 0
            if options.profile:
                print(profiled(options))
                return 0
            if options.threshold:
                file = options.out / f"masked-threshold-{options.pool}-{options.imgsz}.json"
                if not options.show and not file.exists():
                    options.out.mkdir(parents=True, exist_ok=True)
                    write_text(file, json.dumps(packed_or_dense(options), indent=1) + "\n")
                if file.exists():
                    print(shown_threshold(json.loads(file.read_text())))
                return 0
            for low in options.low or LOW:
                file = options.out / f"masked-{options.pool}-{options.imgsz}-{low:g}.json"
                if not options.show and not file.exists():
                    options.out.mkdir(parents=True, exist_ok=True)
                    write_text(file, json.dumps(measured(low, options), indent=1) + "\n")
                results += [json.loads(file.read_text())] if file.exists() else []
    except Fault as fault:
        print(fault, file=sys.stderr)
        return 2
    print(shown(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
