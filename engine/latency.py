"""How long a network takes on this device: medians of interleaved runs, so that a slow spell hits all alike."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from tqdm import tqdm


@torch.inference_mode()
def measure_ms(
    networks: Sequence[nn.Module],
    imgsz: int,
    *,
    device: torch.device,
    rounds: int = 15,
    warmup: int = 3,
    progress: bool = True,
) -> list[float]:
    """Median milliseconds of a forward of one image ``[1, 3, imgsz, imgsz]``, one number a network.

    Every round runs each network once, in a fresh order.
    """
    images = torch.zeros(1, 3, imgsz, imgsz, device=device).contiguous(memory_format=torch.channels_last)
    rng = np.random.default_rng(0)
    times: list[list[float]] = [[] for _ in networks]
    bar = tqdm(range(warmup + rounds), "latency", unit="round", leave=False, disable=not progress)
    for turn in bar:
        for index in rng.permutation(len(networks)):
            network = networks[index].eval()
            began = time.perf_counter()
            network(images)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= warmup:
                times[index].append((time.perf_counter() - began) * 1000)
    return [float(np.median(found)) for found in times]
