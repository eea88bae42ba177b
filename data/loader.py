"""Items become batches, in an order that depends on (seed, epoch) only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader

from data.dataset import ORDER, DetectionSet, Item
from data.structures import Batch, Fault, Targets


@dataclass(frozen=True)
class Batches:
    """The batches of one epoch. Each iteration starts anew and gives the same."""

    loader: DataLoader[Item]

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        try:
            yield from self.loader
        except Fault as fault:  # a worker's comes with its traceback in front
            raise Fault(fault.lines[-1].strip().split("Fault: ")[-1]) from None


def batches(
    dataset: DetectionSet,
    batch_size: int,
    *,
    epoch: int = 0,
    seed: int = 0,
    shuffle: bool = False,
    workers: int = 0,
    drop_last: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Batches:
    """One epoch of `dataset` in batches; the last may be smaller unless `drop_last`.

    Shuffled by (seed, epoch); augmented by (the dataset's seed, epoch). The number of workers changes nothing but
    the speed, and no global random state is read or moved. An unreadable image raises a `Fault` while iterating.

    Of several processes, `rank` gets its share of every batch: every `world_size`-th image of it. Shares differ by one
    image at most and none is empty: what is left at the end is a batch of its own only where it holds an image for
    each process, else it joins the batch before it. `batch_size` and the number of images must be `world_size` or more.
    """
    indices = order(len(dataset), epoch, seed) if shuffle else np.arange(len(dataset))
    starts = range(batch_size, len(indices) - world_size + 1, batch_size)  # of the batches behind the first
    whole = [chunk for chunk in np.split(indices, starts) if len(chunk)]
    if drop_last and whole and len(whole[-1]) < batch_size:
        whole.pop()
    lists = [chunk[rank::world_size].tolist() for chunk in whole]
    assert all(lists), f"{len(indices)} images in batches of {batch_size} leave one of {world_size} processes idle"
    if workers > 0:
        dataset.fill_cache()
    loader: DataLoader[Item] = DataLoader(
        dataset.at_epoch(epoch),
        batch_sampler=lists,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=one_thread,
        generator=torch.Generator(),  # or torch would draw from the global one
        pin_memory=False,
    )
    return Batches(loader)


def batch_at(
    dataset: DetectionSet, batch_size: int, number: int, *, seed: int = 0, rank: int = 0, world_size: int = 1
) -> Batch:
    """Batch `number` (from 0) of an endless shuffled sequence, or the share of it that `rank` gets.

    It follows from (seed, number): whoever goes on with the sequence needs to remember only where he was. The batches
    are whole: each time round, the images that are left over wait for the next, in another order.
    """
    epoch, place = divmod(number, len(dataset) // batch_size)
    chunk = order(len(dataset), epoch + 1, seed)[place * batch_size : (place + 1) * batch_size]
    items = dataset.at_epoch(epoch + 1)
    return collate([items[int(index)] for index in chunk[rank::world_size]])


def order(count: int, epoch: int, seed: int) -> np.ndarray:
    """The shuffled indices ``[count]`` of an epoch."""
    return np.random.default_rng((seed, epoch, ORDER)).permutation(count)


def collate(items: Sequence[Item]) -> Batch:
    """Joins items into a `Batch`; also for the founder of batches by hand, as in tests."""
    images = torch.stack([item.image for item in items])
    counts = torch.tensor([len(item.labels) for item in items])
    targets = Targets(
        torch.cat([item.boxes for item in items]),
        torch.cat([item.labels for item in items]),
        torch.repeat_interleave(torch.arange(len(items)), counts),
    )
    letterboxes = tuple(item.letterbox for item in items)
    return Batch(images, targets, letterboxes, tuple(item.index for item in items))


def one_thread(worker: int) -> None:
    cv2.setNumThreads(0)
