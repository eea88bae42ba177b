"""Many subnets calibrated and measured at once. What lies before the first choice runs once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.dataset import DetectionSet
from data.loader import batches
from data.structures import Detections
from engine.calibrate import calibrate_by
from engine.evaluate import Metrics, coco_metrics, pixels, to_original
from engine.nms import nms
from models.network import Network

CONFIDENCE, IOU, MOST = 0.001, 0.6, 300  # as in `engine.evaluate.evaluate`


def first_choice(network: Network, choices: Sequence[str]) -> int:
    """The first row that any of the named choices stands in: rows before it are the same in every subnet."""
    labels = {name.rpartition(".")[0] for name in choices}
    return next(node.index for node in network.graph.nodes if (node.layer.name or str(node.index)) in labels)


def share_trunk(networks: Sequence[Network], rows: int) -> None:
    """Gives all networks the first one's modules for the first `rows` rows, whose weights are equal anyway."""
    for network in networks[1:]:
        for index in range(rows):
            network.layers[index] = networks[0].layers[index]


@torch.no_grad()
def judge(
    networks: Sequence[Network],
    trunk_rows: int,
    calibration: Sequence[Tensor],
    images: DetectionSet,
    *,
    names: Sequence[str],
    batch_size: int,
    device: torch.device,
    progress: bool = True,
) -> list[Metrics]:
    """Calibrates every network on the `calibration` batches and measures it on `images`.

    Equal to `engine.calibrate.calibrate` and `engine.evaluate.evaluate` of one after the other; the networks are left
    calibrated, in eval mode, with one trunk in common.
    """
    share_trunk(networks, trunk_rows)
    subnets = nn.ModuleList(networks).eval()
    rows = range(trunk_rows, len(networks[0].layers))

    def tails(batch: Tensor) -> list[Any]:
        trunk, _ = networks[0].run(range(trunk_rows), {-1: batch})
        return [network.run(rows, trunk)[0][rows[-1]] for network in networks]

    bar = tqdm(calibration, f"calibrating {len(networks)} subnets", unit="batch", disable=not progress, leave=False)
    calibrate_by(subnets, tails, bar)
    found: list[dict[int, Detections]] = [{} for _ in networks]
    loader = batches(images, batch_size)
    for batch in tqdm(loader, f"judging {len(networks)} subnets", unit="batch", disable=not progress, leave=False):
        for network, outputs, kept in zip(networks, tails(pixels(batch, device)), found, strict=True):
            boxes, scores = network.decode(outputs)
            for index, letterbox, *predicted in zip(batch.indices, batch.letterboxes, boxes, scores, strict=True):
                best = nms(*predicted, conf=CONFIDENCE, iou=IOU, max_det=MOST, multi_label=True)
                kept[index] = to_original(best, letterbox)
    measured = tqdm(found, "measuring", unit="subnet", disable=not progress, leave=False)
    return [coco_metrics([images.samples[index] for index in kept], list(kept.values()), names) for kept in measured]
