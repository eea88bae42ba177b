"""What is measured on this machine before a training begins: whether mixed precision pays, and which batch fits."""

from __future__ import annotations

import math
import os
import time
from copy import deepcopy
from pathlib import Path

import torch

from data.dataset import ImageSet
from data.loader import batches
from data.structures import Batch, Fault, Targets
from engine.evaluate import pixels
from engine.step import autocast
from models.network import Network

MEASURED_RUN = 200  # steps; under that, measuring costs more than bf16 could save
WORTH_IT = 1.2  # how much faster bf16 must be on a CPU
MEASURED_IMAGES = 8  # from which batches of every size are made, to measure them
MOST_IMAGES = 512  # a batch; more brings no speed and fewer steps
FEWEST_STEPS = 8  # of an epoch, for which a batch that is found leaves room
SMALL_BATCH = 16  # that is never too large for that
FREE_PART = {"cuda": 0.8, "cpu": 0.6}  # of the memory that is free, for a step
GOOD_ENOUGH = 0.95  # of the best images per second: the smallest batch that gives them is taken
SLOW_STEP = 15.0  # seconds; no larger batch is measured behind one


def choose_amp(wanted: str, network: Network, batch: Batch, device: torch.device, total_steps: int) -> tuple[str, str]:
    """``off``, ``bf16`` or ``fp16``, and the reason in one line.

    ``auto`` takes bf16 on a GPU that has it, fp16 on another. On a CPU it measures three steps of each on a copy and
    takes bf16 where that is 1.2 times faster; a run under 200 steps is not measured.
    """
    if wanted != "auto":
        return wanted, f"amp {wanted}, as asked"
    if device.type == "cuda":
        chosen = amp_of(device)
        return chosen, f"amp {chosen}, the best of this GPU"
    if total_steps < MEASURED_RUN:
        return "off", "amp off: the run is too short to measure whether bf16 pays"
    plain = seconds_a_step(network, batch, device, "off", math.inf)
    mixed = seconds_a_step(network, batch, device, "bf16", plain)
    chosen = "bf16" if plain >= WORTH_IT * mixed else "off"
    return chosen, f"amp {chosen}: a step takes {plain:.3f} s in float32, {mixed:.3f} s in bf16"


def amp_of(device: torch.device) -> str:
    """The numbers of the forward pass before anything is measured."""
    if device.type != "cuda":
        return "off"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def seconds_a_step(network: Network, batch: Batch, device: torch.device, amp: str, rival: float) -> float:
    """The fastest of three steps on a copy of the network; of one, where it takes three times the rival's."""
    copy, fastest = deepcopy(network).train(), math.inf
    for _ in range(3):
        began = time.perf_counter()
        one_step(copy, batch, device, amp)
        fastest = min(fastest, time.perf_counter() - began)
        if fastest > 3 * rival:
            break
    return fastest


def one_step(network: Network, batch: Batch, device: torch.device, amp: str) -> None:
    """Forward, loss and backward; the weights stay."""
    with autocast(device, amp):
        outputs, aux = network(pixels(batch, device))
    network.loss_from(outputs, batch.targets.to(device), aux)[0].backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- the batch that fits


def find_batch_size(network: Network, images: ImageSet, device: torch.device, amp: str) -> tuple[int, str]:
    """A power of two for ``--batch-size -1``, and the reason in one line.

    On a GPU it is the largest batch whose step needs at most 80 % of the free memory. On a CPU larger batches are
    hardly faster: it is the smallest one with 95 % of the best images per second, within 60 % of the free memory. It
    is at most 512, and leaves 8 steps an epoch unless it is 16 or less.
    """
    if device.type != "cuda" and not hasattr(os, "sysconf"):
        raise Fault("--batch-size -1: this system does not say how much memory there is; give a number")
    largest = min(max(len(images) // FEWEST_STEPS, min(len(images), SMALL_BATCH)), MOST_IMAGES)
    first = next(iter(batches(images, min(MEASURED_IMAGES, largest), shuffle=True, seed=images.seed)))
    copy = deepcopy(network).train()
    free, before = free_memory(device), used_memory(device)
    speeds: dict[int, float] = {}
    single = any(node.output.stride >= images.imgsz for node in network.graph.nodes)  # a norm there learns from no one
    size, why = 1 + single, f"larger ones leave fewer than {FEWEST_STEPS} steps an epoch"
    while size <= largest:
        try:
            seconds = min(timed_step(copy, repeated(first, size), device, amp) for _ in range(2))
        except torch.OutOfMemoryError:
            why = f"{size} do not fit into the memory"
            break
        speeds[size] = size / seconds
        needed, part = used_memory(device) - before, FREE_PART["cuda" if device.type == "cuda" else "cpu"]
        if 2 * needed > part * free:
            why = f"{2 * size} would take over {part:.0%} of {free / 2**30:.1f} GiB free memory"
            break
        if device.type == "cpu" and seconds > SLOW_STEP:
            why = f"a step of {size} takes {seconds:.0f} s"
            break
        size *= 2
    del copy
    if device.type == "cuda":
        torch.cuda.empty_cache()
    shown = ", ".join(f"{size}: {speed:.3g}" for size, speed in speeds.items())
    if not speeds:
        return 1, f"batch size 1: {why}"
    chosen = max(speeds)
    if device.type == "cpu":
        chosen = min(size for size, speed in speeds.items() if speed >= GOOD_ENOUGH * max(speeds.values()))
        why = why if chosen == max(speeds) else "larger ones are hardly faster"
    return chosen, f"batch size {chosen}: {why} (images a second by batch: {shown})"


def timed_step(network: Network, batch: Batch, device: torch.device, amp: str) -> float:
    began = time.perf_counter()
    one_step(network, batch, device, amp)
    return time.perf_counter() - began


def repeated(batch: Batch, size: int) -> Batch:
    """A batch of `size` images: those of `batch` again and again."""
    picked = [number % len(batch.images) for number in range(size)]
    boxes, labels, index = [], [], []
    for number, source in enumerate(picked):
        here = batch.targets.image_index == source
        boxes.append(batch.targets.boxes[here])
        labels.append(batch.targets.labels[here])
        index.append(torch.full((int(here.sum()),), number))
    masks = None if batch.targets.masks is None else batch.targets.masks[picked]
    targets = Targets(torch.cat(boxes), torch.cat(labels), torch.cat(index), masks)
    return Batch(
        batch.images[picked],
        targets,
        tuple(batch.letterboxes[source] for source in picked),
        tuple(batch.indices[source] for source in picked),
    )


def free_memory(device: torch.device) -> int:
    """Bytes that a step may take: of the GPU, or of this machine (all it has, where it does not say)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def used_memory(device: torch.device) -> int:
    """The most bytes that this process has held until now, on the device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)
