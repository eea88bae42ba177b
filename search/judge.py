"""Many subnets calibrated and measured at once. What lies before the first choice runs once for many of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.dataset import ImageSet
from data.loader import Batches, batches
from data.structures import Detections
from engine.calibrate import calibrate_by
from engine.evaluate import Metrics, jackknife_ap, pixels, to_original
from engine.nms import nms
from models.network import Network

CONFIDENCE, IOU, MOST = 0.001, 0.6, 300  # as in `engine.evaluate.evaluate`
TOGETHER = 8  # subnets behind one pass of the trunk; after so many, Ctrl-C finds some finished


@dataclass(frozen=True)
class Verdict:
    """What was measured of a subnet; `ap_without` is its AP with each group of the images left out in turn.

    The groups are those of `engine.evaluate.jackknife_ap`: the same for all subnets, so that they compare in pairs.
    """

    metrics: Metrics
    ap_without: tuple[float, ...]


def first_choice(network: Network, choices: Sequence[str]) -> int:
    """The first row of a supernet that holds any of the named choices: rows before it are the same in every subnet."""
    return next(node.index for node in network.graph.nodes if any(choice.name in choices for choice in node.choices))


def share_trunk(networks: Sequence[Network], rows: int) -> None:
    """Gives all networks the first one's modules for the first `rows` rows, whose weights are equal anyway."""
    for network in networks[1:]:
        for index in range(rows):
            network.layers[index] = networks[0].layers[index]


def judge(
    networks: Sequence[Network],
    trunk_rows: int,
    calibration: Sequence[Tensor],
    images: ImageSet,
    *,
    names: Sequence[str],
    batch_size: int,
    device: torch.device,
    progress: bool = True,
    done: Callable[[int, Verdict], None] | None = None,
) -> list[Verdict]:
    """Calibrates every network on the `calibration` batches and measures it on `images`.

    Equal to `engine.calibrate.calibrate` and `engine.evaluate.evaluate` of one after the other; the networks are left
    calibrated, in eval mode, with one trunk in common. ``done(place, verdict)`` hears of each network as soon as it is
    measured, so that a Ctrl-C costs no more than what was under way.
    """
    share_trunk(networks, trunk_rows)
    loader = batches(images, batch_size)
    parts = [networks[start : start + TOGETHER] for start in range(0, len(networks), TOGETHER)]
    passes = len(parts) * (len(calibration) + len(loader))
    verdicts: list[Verdict] = []
    with tqdm(
        total=passes, desc=f"judging {len(networks)} subnets", unit="batch", disable=not progress, leave=False
    ) as bar:
        for part in parts:
            for found in _measured(part, trunk_rows, calibration, loader, device, bar.update):
                samples = [images.samples[index] for index in found]
                verdict = Verdict(*jackknife_ap(samples, list(found.values()), names))
                if done is not None:
                    done(len(verdicts), verdict)
                verdicts.append(verdict)
    return verdicts


@torch.no_grad()
def _measured(
    networks: Sequence[Network],
    trunk_rows: int,
    calibration: Sequence[Tensor],
    loader: Batches,
    device: torch.device,
    passed: Callable[[], Any],
) -> list[dict[int, Detections]]:
    """Detections of every network, calibrated, by the images' place in their set and in its order."""
    subnets = nn.ModuleList(networks).eval()
    rows = range(trunk_rows, len(networks[0].layers))

    def tails(batch: Tensor) -> Iterator[Any]:
        trunk, _ = networks[0].run(range(trunk_rows), {-1: batch})
        for network in networks:
            yield network.run(rows, trunk)[0][rows[-1]]

    def run_all(batch: Tensor) -> None:
        for _ in tails(batch):
            pass
        passed()

    calibrate_by(subnets, run_all, calibration)
    found: list[dict[int, Detections]] = [{} for _ in networks]
    for batch in loader:
        for network, outputs, kept in zip(networks, tails(pixels(batch, device)), found, strict=True):
            boxes, scores = network.decode(outputs)
            for index, letterbox, *predicted in zip(batch.indices, batch.letterboxes, boxes, scores, strict=True):
                best = nms(*predicted, conf=CONFIDENCE, iou=IOU, max_det=MOST, multi_label=True)
                kept[index] = to_original(best, letterbox)
        passed()
    return found
