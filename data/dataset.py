"""Samples on disk become items of the network's input size."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from data.augment import Augment, Picture, augmented, fit, paste
from data.images import read_image
from data.structures import Letterbox, Sample

CACHE_BYTES = 2**30  # of resized images kept in memory
AUGMENT, ORDER = 1, 2  # purposes of a random stream: (seed, epoch, index, purpose)


@dataclass(frozen=True)
class Item:
    """One input: image ``[3, S, S]`` uint8 RGB, boxes ``[M, 4]`` float32 xyxy in its pixels, labels ``[M]`` int64.

    The letterbox is that of the image `index`; a box of an augmented item cannot be led back through it.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    letterbox: Letterbox
    index: int


class DetectionSet(Dataset[Item]):
    """Samples at one input size, augmented when `augment` is given.

    Item `i` depends on (seed, epoch, i) and the samples alone, in whichever process and order it is asked for.
    Images are kept in memory, scaled to fit `imgsz`, up to 1 GiB: as many of the first samples as fit.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        imgsz: int,
        augment: Augment | None = None,
        seed: int = 0,
        cache: bool = True,
    ) -> None:
        self.samples = tuple(samples)
        self.imgsz = imgsz
        self.augment = augment
        self.seed = seed
        self.epoch = 0
        self._cacheable = min(len(self.samples), CACHE_BYTES // (3 * imgsz**2)) if cache else 0
        self._cache: dict[int, tuple[np.ndarray, Letterbox]] = {}

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose augmentations the items from now on show."""
        self.epoch = epoch

    def set_augment(self, augment: Augment | None) -> None:
        """Chooses another augmentation, as a run does that closes its mosaic before the last epochs."""
        self.augment = augment

    def at_epoch(self, epoch: int) -> DetectionSet:
        """The same set in another epoch. It shares the images in memory and leaves this one as it is."""
        view = copy.copy(self)
        view.set_epoch(epoch)
        return view

    def fill_cache(self) -> None:
        """Reads what the cache has room for, so that worker processes find it there."""
        missing = [index for index in range(self._cacheable) if index not in self._cache]
        for index in tqdm(missing, desc="reading images", unit="image", delay=2, leave=False):
            self._fitted(index)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        """Item `index`.

        Raises:
            Fault: when its image cannot be read.
        """
        if not 0 <= index < len(self.samples):
            raise IndexError(index)
        _, letterbox = self._fitted(index)
        if self.augment is None:
            picture = self._letterboxed(index)
        else:
            rng = np.random.default_rng((self.seed, self.epoch, index, AUGMENT))
            if rng.random() < self.augment.mosaic:
                others = rng.integers(len(self.samples), size=3)
                pictures = [self._unpadded(i) for i in (index, *map(int, others))]
                pictures = [pictures[i] for i in rng.permutation(4)]
            else:
                pictures = [self._letterboxed(index)]
            picture = augmented(pictures, self.imgsz, self.augment, rng)
        image = torch.from_numpy(np.ascontiguousarray(picture.image.transpose(2, 0, 1)))
        boxes = torch.from_numpy(picture.boxes.astype(np.float32))
        return Item(image, boxes, torch.from_numpy(picture.labels), letterbox, index)

    def _fitted(self, index: int) -> tuple[np.ndarray, Letterbox]:
        """The image scaled to fit, not padded, with the letterbox that pads it."""
        if index in self._cache:
            return self._cache[index]
        fitted = fit(read_image(self.samples[index].path), self.imgsz)
        if index < self._cacheable:
            self._cache[index] = fitted
        return fitted

    def _letterboxed(self, index: int) -> Picture:
        image, letterbox = self._fitted(index)
        sample = self.samples[index]
        return Picture(paste(image, self.imgsz, letterbox), letterbox.to_network(sample.boxes), sample.labels.copy())

    def _unpadded(self, index: int) -> Picture:
        image, letterbox = self._fitted(index)
        sample = self.samples[index]
        return Picture(image, sample.boxes * np.float32(letterbox.scale), sample.labels)
