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
) -> Batches:
    """One epoch of `dataset` in batches; the last may be smaller unless `drop_last`.

    Shuffled by (seed, epoch); augmented by (the dataset's seed, epoch). The number of workers changes nothing but
    the speed, and no global random state is read or moved. An unreadable image raises a `Fault` while iterating.
    """
    indices = np.arange(len(dataset))
    if shuffle:
        indices = np.random.default_rng((seed, epoch, ORDER)).permutation(indices)
    lists = [chunk.tolist() for chunk in np.split(indices, range(batch_size, len(indices), batch_size)) if len(chunk)]
    if drop_last and lists and len(lists[-1]) < batch_size:
        lists.pop()
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
