"""Several processes as one run. ``torchrun`` starts them; without it there is one, and everything here does nothing.

There is no wrapper around a network. Weights are broadcast once, every process takes its share of each batch, and the
gradients are averaged before a step; from equal weights and equal gradients, equal steps follow bit for bit.
"""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from data.structures import Fault
from engine.doors import parse_device, told

SET_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
PATIENCE = timedelta(hours=12)  # the others wait while the first evaluates; a process that died is noticed by torchrun


@dataclass(frozen=True)
class World:
    """The processes of a run and this one among them: its rank (0 to size - 1), their number, its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints, evaluates, and makes folders and files."""
        return self.rank == 0

    def __str__(self) -> str:
        return str(self.device) if self.size == 1 else f"{self.device.type}, {self.size} processes"


def several() -> bool:
    """Whether torchrun started this process as one of several."""
    return all(name in os.environ for name in SET_BY_TORCHRUN) and os.environ["WORLD_SIZE"] != "1"


def start(device_text: str) -> World:
    """Joins the processes that torchrun started, or is alone without it. A second call finds the first one's group.

    ``device_text`` is that of `parse_device`. Of several processes each takes the GPU of its number on this machine,
    or all take the CPU. Raises a Fault for a device that is absent.
    """
    if not several():
        return World(0, 1, parse_device(device_text))
    rank, size, local_rank, here = (int(os.environ[name]) for name in SET_BY_TORCHRUN)
    device = parse_device(device_text)
    if device.type == "cuda":
        gpus = torch.cuda.device_count()
        if device_text.strip().lower() not in ("", "cuda"):
            raise Fault(f"--device {device_text}: of {size} processes each takes a GPU of its own; leave --device out")
        if here > gpus:
            raise Fault(f"{here} processes, but this machine has {gpus} usable GPUs; --nproc_per_node {gpus} is right")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # Its functions have for a default the group of the moment it is imported, and every optimizer imports it. A
        # group that they hold outlives `finish`: its threads end some runs by SIGABRT while Python shuts down.
        import_module("torch.distributed.nn")
        atexit.register(finish)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return World(rank, size, device)


def check_shares(batch_size: int, world: World) -> None:
    """Raises a Fault where a batch has no image for some process."""
    if batch_size < world.size:
        raise Fault(
            f"{world.size} processes cannot share batches of {batch_size} images; fewer, or a larger --batch-size"
        )


def finish() -> None:
    """Leaves the group, where there is one, when all is done that needs several. From here on this process is alone,
    as if torchrun had not started it: what the first one goes on to do calls `start` and finds nobody to wait for.
    A process that ends before, by a Fault for one, does this on its way out.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        for name in SET_BY_TORCHRUN:
            os.environ.pop(name, None)


def surroundings(world: World) -> dict[str, int]:
    """What a resumed run may have otherwise than before, but which its sums depend on: for its checkpoint."""
    return {"threads": torch.get_num_threads(), "processes": world.size}


def moved(state: Mapping[str, Any], world: World) -> list[str]:
    """A line for each of the `surroundings` that differs from those in a checkpoint."""
    return [
        f"{now} {name}, it began with {state[name]}: {effect}"
        for (name, now), effect in zip(
            surroundings(world).items(), ("sums round differently", "norms see other shares of a batch"), strict=True
        )
        if state[name] != now
    ]


@contextmanager
def together(world: World) -> Iterator[None]:
    """What fails inside in one process fails in all: rank 0 raises the Fault, the others leave silently with code 2.

    Nothing inside may wait for another process. At its end, each waits for all.
    """
    if world.size == 1:
        yield
        return
    problem: Fault | OSError | None = None
    try:
        yield
    except (Fault, OSError) as caught:
        problem = caught
    for lines in gather_objects(told(problem) if problem else None, world):
        if lines is not None:
            raise Fault(*lines) if world.is_first else SystemExit(2)


def average(tensors: Sequence[Tensor], world: World) -> None:
    """Replaces every tensor by its mean over the processes, in place and by one all-reduce.

    All processes give tensors of the same sizes in the same order, and end with the same bits.
    """
    if world.size == 1 or not tensors:
        return
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world.size
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.detach().copy_(mean.view(tensor.shape))


def average_gradients(network: nn.Module, world: World, check: bool) -> None:
    """`average` of the gradients that are not None.

    All processes run the same network, so these are the same everywhere; `check` asks them, as the first steps should.
    Raises RuntimeError where they are not.
    """
    if check:
        has = {name: p.grad is not None for name, p in network.named_parameters()}
        for rank, other in enumerate(gather_objects(has, world)):
            for name, present in other.items():
                if present != has.get(name):
                    raise RuntimeError(
                        f"{name} has a gradient in process {rank if present else world.rank}, but none in process"
                        f" {world.rank if present else rank}: they run different networks, or different subnets"
                    )
    average([p.grad for p in network.parameters() if p.grad is not None], world)


def average_numbers(numbers: Mapping[str, float], world: World) -> dict[str, float]:
    """The mean of every number over the processes, in float64. A nan anywhere becomes a nan everywhere."""
    if world.size == 1:
        return dict(numbers)
    values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=world.device)
    average([values], world)
    return dict(zip(numbers, values.tolist(), strict=True))


def broadcast(module: nn.Module, world: World) -> None:
    """Gives every process the parameters and buffers that rank 0 has."""
    if world.size == 1:
        return
    for tensor in [*module.parameters(), *module.buffers()]:
        dense = tensor.detach().contiguous()  # gloo takes no other, such as channels_last
        dist.broadcast(dense, src=0)
        tensor.detach().copy_(dense)


def gather_objects(value: Any, world: World) -> list[Any]:
    """The plain value (what JSON can hold) of every process, in the order of ranks. Tuples arrive as lists."""
    if world.size == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(world.device)
    length = torch.tensor([len(text)], device=world.device)
    lengths = [torch.empty_like(length) for _ in range(world.size)]
    dist.all_gather(lengths, length)
    longest = max(int(one) for one in lengths)
    padded = F.pad(text, (0, longest - len(text)))
    texts = [torch.empty_like(padded) for _ in range(world.size)]
    dist.all_gather(texts, padded)
    return [json.loads(bytes(one[: int(n)].tolist())) for one, n in zip(texts, lengths, strict=True)]
