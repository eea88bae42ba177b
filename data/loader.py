"""Items become batches, in an order that depends on (seed, epoch) only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.dataset import NEAR, ImageSet, Item, order
from data.structures import Batch, Fault, Targets


@dataclass(frozen=True)
class Batches:
    """The batches of one epoch. Each iteration starts anew and gives the same."""

    loader: DataLoader[list[Batch]]
    lists: list[list[int]]  # the images of each

    def __len__(self) -> int:
        return len(self.lists)

    def __iter__(self) -> Iterator[Batch]:
        try:
            for run in self.loader:
                yield from run
        except Fault as fault:  # a worker's comes with its traceback in front
            raise Fault(fault.lines[-1].strip().split("Fault: ")[-1]) from None


class Runs(Dataset[list[Batch]]):
    """Batches that one process makes one after the other, from the lists of their images."""

    def __init__(self, items: ImageSet) -> None:
        self.items = items

    def __getitem__(self, lists: list[list[int]]) -> list[Batch]:
        return [collate([self.items[index] for index in indices]) for indices in lists]


def batches(
    dataset: ImageSet,
    batch_size: int,
    *,
    epoch: int = 0,
    seed: int = 0,
    shuffle: bool = False,
    workers: int = 0,
    drop_last: bool = False,
    rank: int = 0,
    world_size: int = 1,
    start_method: str | None = None,
) -> Batches:
    """One epoch of `dataset` in batches; the last may be smaller unless `drop_last`.

    Shuffled by (seed, epoch); augmented by (the dataset's seed, epoch). The number of workers changes nothing but
    the speed, and no global random state is read or moved. An unreadable image raises a `Fault` while iterating.
    Workers start as the system's habit is, or by `start_method` (fork, forkserver, spawn).

    Where the dataset has rectangles, images alike in shape share a batch, and all are padded to the smallest rectangle
    that holds them. The batches come from wide to tall, or shuffled, and so do images of one shape.

    Of several processes, `rank` gets its share of every batch: every `world_size`-th image of it. Shares differ by one
    image at most and none is empty: what is left at the end is a batch of its own only where it holds an image for
    each process, else it joins the batch before it. `batch_size` and the number of images must be `world_size` or more.
    """
    indices = order(len(dataset), epoch, seed) if shuffle else np.arange(len(dataset))
    if dataset.rect:
        if drop_last:  # else it would always be the tallest images that are left over
            indices = indices[: len(indices) // batch_size * batch_size]
        sizes = [dataset.size(int(index)) for index in tqdm(indices, "reading sizes", delay=2, leave=False)]
        indices = indices[np.argsort([height / width for width, height in sizes], kind="stable")]
    starts = range(batch_size, len(indices) - world_size + 1, batch_size)  # of the batches behind the first
    whole = [chunk for chunk in np.split(indices, starts) if len(chunk)]
    if drop_last and whole and len(whole[-1]) < batch_size:
        whole.pop()
    shapes = shared_shapes(dataset, whole) if dataset.rect else None
    if dataset.rect and shuffle:
        whole = [whole[number] for number in order(len(whole), epoch, seed)]
    lists = [chunk[rank::world_size].tolist() for chunk in whole]
    assert all(lists), f"{len(indices)} images in batches of {batch_size} leave one of {world_size} processes idle"
    if workers > 0:
        dataset.fill_cache()
    mosaics = dataset.augment is not None and dataset.augment.mosaic > 0
    # images that are in each other's mosaics go to one process, which decodes them once
    run = max(1, NEAR // batch_size) if workers > 0 and mosaics and not dataset.is_cached() else 1
    loader: DataLoader[list[Batch]] = DataLoader(
        Runs(dataset.at_epoch(epoch, shapes)),
        sampler=[lists[first : first + run] for first in range(0, len(lists), run)],
        batch_size=None,
        num_workers=workers,
        prefetch_factor=(2 if run == 1 else 1) if workers > 0 else None,
        multiprocessing_context=start_method,
        worker_init_fn=one_thread,
        generator=torch.Generator(),  # or torch would draw from the global one
        pin_memory=False,
    )
    return Batches(loader, lists)


def shared_shapes(dataset: ImageSet, whole: Sequence[np.ndarray]) -> np.ndarray:
    """Height and width ``[images, 2]`` of the smallest rectangle that holds all images of a batch, for each of them."""
    shapes = np.zeros((len(dataset), 2), dtype=np.int64)
    for chunk in whole:
        shapes[chunk] = np.max([dataset.shape(int(index)) for index in chunk], axis=0)
    return shapes


def batch_at(
    dataset: ImageSet, batch_size: int, number: int, *, seed: int = 0, rank: int = 0, world_size: int = 1
) -> Batch:
    """Batch `number` (from 0) of an endless shuffled sequence, or the share of it that `rank` gets.

    It follows from (seed, number): whoever goes on with the sequence needs to remember only where he was. The batches
    are whole: each time round, the images that are left over wait for the next, in another order.
    """
    epoch, place = divmod(number, len(dataset) // batch_size)
    chunk = order(len(dataset), epoch + 1, seed)[place * batch_size : (place + 1) * batch_size]
    items = dataset.at_epoch(epoch + 1)
    return collate([items[int(index)] for index in chunk[rank::world_size]])


def collate(items: Sequence[Item]) -> Batch:
    """Joins items into a `Batch`; also for who makes batches by hand, as tests do."""
    images = torch.stack([item.image for item in items])
    counts = torch.tensor([len(item.labels) for item in items])
    masks = [item.mask for item in items if item.mask is not None]
    targets = Targets(
        torch.cat([item.boxes for item in items]),
        torch.cat([item.labels for item in items]),
        torch.repeat_interleave(torch.arange(len(items)), counts),
        torch.stack(masks) if masks else None,
    )
    letterboxes = tuple(item.letterbox for item in items)
    return Batch(images, targets, letterboxes, tuple(item.index for item in items))


def one_thread(worker: int) -> None:
    cv2.setNumThreads(0)
