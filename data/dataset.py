"""Samples on disk become items of the network's input size."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from tqdm import tqdm

from data.augment import (
    CENTRE,
    NO_BOXES,
    Augment,
    Picture,
    Shape,
    Source,
    augmented,
    centre_crop,
    compose,
    cropped,
    finished,
    fit,
    fit_mask,
    fitted_size,
    letterbox_of,
    longest_side,
    mixup,
    paste,
    paste_mask,
    place_of,
    shrink,
)
from data.files import atomically, cache_folder
from data.images import image_size, read_image
from data.masks import read_mask
from data.structures import Fault, Letterbox, Sample, nearest

CACHES = ("ram", "disk", "off")
CACHE_BYTES = 2**30  # of images kept in memory
CACHE_VERSION = 1  # of what an image on disk holds
NEAR = 64  # images whose mosaics are made of each other
RECENT = 2 * NEAR - 1  # decoded images that a process holds on to: the largest such group
STRIDE = 32  # pixels; sides of a rectangle are multiples of it
AUGMENT, ORDER = 1, 2  # purposes of a random stream: (seed, epoch, index, purpose)


@dataclass(frozen=True)
class Item:
    """One input: image ``[3, H, W]`` uint8 RGB, boxes ``[M, 4]`` float32 xyxy in its pixels, labels ``[M]`` int64.

    The letterbox is that of the image `index`; a box of an augmented item cannot be led back through it. Where the
    sample has a mask, so has the item: ``[H, W]`` uint8, and there are no boxes.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    letterbox: Letterbox
    index: int
    mask: Tensor | None = None


class ImageSet(Dataset[Item]):
    """Samples at one input size, augmented when `augment` is given.

    Item `i` depends on (seed, epoch, i) and the samples alone, in whichever process and order it is asked for, and
    whatever the cache. Its mosaic is made of the 64 images that stand around it in the shuffled order of the epoch: who
    goes through the epoch in this order decodes each image about once, and holds 127 decoded ones at most.

    Args:
        samples: what to learn from, or to be judged by.
        imgsz: the longer side of an image is scaled to this many pixels, and padded to a square.
        augment: None: every item is its image, letterboxed.
        seed: of the augmentation.
        cache: "ram" (or True) keeps decoded images in memory, scaled down to `imgsz` where they are larger, up to
            1 GiB; "disk" keeps all of them in the user's cache folder, from one run to the next; "off" (or False)
            neither. Processes that start afresh instead of being forked (Windows, macOS) do not see what is in memory.
        rect: images are padded to the smallest rectangle with sides that are multiples of 32, alone or, in
            `data.loader.batches`, for all images of a batch.
        crop: what a classifier sees: the middle of an image fills the square, and with `augment` any part of it; there
            is no grey around it, and the letterbox of an item reaches out of it.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        imgsz: int,
        augment: Augment | None = None,
        seed: int = 0,
        cache: str | bool = "ram",
        rect: bool = False,
        crop: bool = False,
    ) -> None:
        assert not (crop and rect), "a crop is a square"
        if isinstance(cache, bool):
            cache = "ram" if cache else "off"
        if cache not in CACHES:
            raise Fault(f"cache is {cache!r}; {', '.join(CACHES)} are right{nearest(cache, CACHES)}")
        self.samples = tuple(samples)
        self.imgsz = imgsz
        self.augment = augment
        self.seed = seed
        self.epoch = 0
        self.cache = cache
        self.rect = rect
        self.crop = crop
        # Of images that are cropped, the shorter side that is kept: nothing of a part of them has to be enlarged.
        self._side = math.ceil(imgsz / min(CENTRE, math.sqrt(1 - augment.scale) if augment else 1))
        self.shapes: np.ndarray | None = None  # [N, 2] height, width of each item, where a loader has chosen them
        bytes_a_pixel = 4 if self.samples and self.samples[0].mask else 3
        self._room = CACHE_BYTES // (bytes_a_pixel * (self._side if crop else imgsz) ** 2)  # images
        self._cache: dict[tuple[int, int], np.ndarray] = {}  # by index and reduction
        self._recent: dict[tuple[int, int], np.ndarray] = {}  # the same; the last one used stands last
        self._masks: dict[int, np.ndarray] = {}  # of images that the cache holds
        self._sizes: dict[int, tuple[int, int]] = {}
        self._order: tuple[int, np.ndarray, np.ndarray] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy for another process: without the images in memory, which would have to be sent through a pipe."""
        return {**self.__dict__, "_cache": {}, "_recent": {}, "_masks": {}, "_order": None}

    def set_augment(self, augment: Augment | None) -> None:
        """Chooses another augmentation, as a run does that closes its mosaic before the last epochs."""
        self.augment = augment

    def at_epoch(self, epoch: int, shapes: np.ndarray | None = None) -> ImageSet:
        """The same set in another epoch, its items of these shapes. It shares the images in memory."""
        view = object.__new__(ImageSet)  # copy.copy would leave out what __getstate__ does
        view.__dict__.update(self.__dict__, epoch=epoch, shapes=shapes)
        return view

    def fill_cache(self) -> None:
        """Reads what the cache has room for, so that worker processes find it there."""
        if self.cache != "ram":
            return
        for index in tqdm(range(len(self)), desc="reading images", unit="image", delay=2, leave=False):
            if len(self._cache) == self._room:
                return
            self._base(index)
            if self.samples[index].mask:
                self._mask(index)

    def is_cached(self) -> bool:
        """Whether no image has to be decoded again."""
        if self.cache != "ram" or len(self._cache) < len(self):
            return self.cache == "disk"
        return all((index, self._reduction(index)) in self._cache for index in range(len(self)))

    def size(self, index: int) -> tuple[int, int]:
        """Width and height of the image `index` on disk."""
        if index not in self._sizes:
            self._sizes[index] = image_size(self.samples[index].path)
        return self._sizes[index]

    def shape(self, index: int) -> Shape:
        """Height and width of item `index`."""
        if self.shapes is not None:
            return int(self.shapes[index, 0]), int(self.shapes[index, 1])
        if not self.rect:
            return self.imgsz, self.imgsz
        width, height = (-(-side // STRIDE) * STRIDE for side in fitted_size(*self.size(index), self.imgsz))
        return height, width

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        """Item `index`.

        Raises:
            Fault: when its image cannot be read.
        """
        if not 0 <= index < len(self.samples):
            raise IndexError(index)
        shape = self.shape(index)
        if self.augment is None:
            picture = self._plain(index, shape)
        else:
            rng = np.random.default_rng((self.seed, self.epoch, index, AUGMENT))
            picture = self._augmented(index, shape, self.augment, rng)
            if rng.random() < self.augment.mixup:
                other = int(rng.choice(self._near(index)))
                picture = mixup(picture, self._augmented(other, shape, self.augment, rng), rng)
            picture = finished(picture, self.augment, rng)
        planes = np.empty((3, *shape), dtype=np.uint8)
        cv2.split(picture.image, list(planes))
        boxes = torch.from_numpy(picture.boxes.astype(np.float32))
        letterbox = self._letterbox(index, shape)
        mask = None if picture.mask is None else torch.from_numpy(picture.mask)
        return Item(torch.from_numpy(planes), boxes, torch.from_numpy(picture.labels), letterbox, index, mask)

    def _letterbox(self, index: int, shape: Shape) -> Letterbox:
        size = self.size(index)
        return centre_crop(*size, self.imgsz) if self.crop else letterbox_of(*size, self.imgsz, shape)

    def _plain(self, index: int, shape: Shape) -> Picture:
        letterbox = self._letterbox(index, shape)
        if self.crop:
            image, _, visible, labels = compose([self._source(index)], [place_of(letterbox)], shape, shape)
            return Picture(image, visible, labels)
        fitted = fit(self._base(index), self.imgsz)
        sample = self.samples[index]
        if sample.mask:
            mask = fit_mask(self._mask(index), fitted.shape[1::-1])
            return Picture(paste(fitted, shape, letterbox), *NO_BOXES, paste_mask(mask, shape, letterbox))
        return Picture(paste(fitted, shape, letterbox), letterbox.to_network(sample.boxes), sample.labels.copy())

    def _augmented(self, index: int, shape: Shape, augment: Augment, rng: np.random.Generator) -> Picture:
        if self.crop:
            return cropped(self._source(index), shape, augment, rng)
        indices = np.array([index])
        if rng.random() < augment.mosaic:
            indices = rng.permutation(np.append(indices, rng.choice(self._near(index), size=3)))
        return augmented([self._source(int(i)) for i in indices], self.imgsz, shape, augment, rng)

    def _near(self, index: int) -> np.ndarray:
        """The images that stand around `index` in the order of the epoch: 64, or up to 127 at its end."""
        if self._order is None or self._order[0] != self.epoch:
            indices = order(len(self), self.epoch, self.seed)
            self._order = self.epoch, indices, np.argsort(indices)
        _, indices, places = self._order
        group = min(places[index] // NEAR, max(len(self) // NEAR - 1, 0))
        last = (group + 2) * NEAR > len(self)
        return indices[group * NEAR :] if last else indices[group * NEAR : (group + 1) * NEAR]

    def _source(self, index: int) -> Source:
        """The image in pixels of `_base`, which is read when it is seen."""
        size, sample, longest = self.size(index), self.samples[index], self._longest(index)
        width, height = fitted_size(*size, longest) if max(size) > longest else size
        stretch = np.array([width / size[0], height / size[1]] * 2, np.float32)
        read = partial(self._base, index, remember=True)
        if sample.mask:
            return Source(width, height, *NO_BOXES, read, partial(self._mask, index))
        return Source(width, height, sample.boxes * stretch, sample.labels, read)

    def _base(self, index: int, remember: bool = False) -> np.ndarray:
        """The image, scaled down to `_longest` where it is larger; `remember` it for the next items."""
        key = index, self._reduction(index)
        if key in self._cache:
            return self._cache[key]
        if key in self._recent:
            image = self._recent.pop(key)
        else:
            image = self._stored(*key) if self.cache == "disk" else self._decoded(*key)
            if self.cache == "ram" and get_worker_info() is None and len(self._cache) < self._room:
                self._cache[key] = image
                return image
        if remember:
            self._recent[key] = image
            if len(self._recent) > RECENT:
                del self._recent[next(iter(self._recent))]
        return image

    def _mask(self, index: int) -> np.ndarray:
        """The mask of the image `index`, at the size of `_base`. It is in memory where the image is."""
        if index in self._masks:
            return self._masks[index]
        file = self.samples[index].mask
        assert file is not None
        mask = read_mask(file)
        longest = self._longest(index)
        if max(mask.shape) > longest:
            mask = fit_mask(mask, fitted_size(mask.shape[1], mask.shape[0], longest))
        if self.cache == "ram" and get_worker_info() is None and len(self._masks) < self._room:
            self._masks[index] = mask
        return mask

    def _longest(self, index: int) -> int:
        """The longer side of the image `index`, in pixels, that it is scaled down to where it is larger."""
        if not self.crop:
            return self.imgsz
        return longest_side(*self.size(index), self._side)

    def _reduction(self, index: int) -> int:
        """By what a JPEG's sides can be divided while it is decoded: only for training, and of much larger images."""
        if self.augment is None or self.samples[index].path.suffix.lower() not in (".jpg", ".jpeg"):
            return 1
        size, longest = self.size(index), self._longest(index)
        fits = (n for n in (8, 4, 2) if max(size) >= n * longest and all(side % n == 0 for side in size))
        return next(fits, 1)

    def _decoded(self, index: int, reduction: int) -> np.ndarray:
        image = read_image(self.samples[index].path, reduction)
        self._sizes[index] = image.shape[1] * reduction, image.shape[0] * reduction
        return shrink(image, self._longest(index))

    def _stored(self, index: int, reduction: int) -> np.ndarray:
        """The image from the cache on disk, which is written where it is missing, cut off or of an older file."""
        path = cached_path(self.samples[index].path, self._longest(index), reduction)
        try:
            image = np.load(path, mmap_mode="r", allow_pickle=False)
            if image.dtype == np.uint8 and image.ndim == 3:
                return image
        except (OSError, ValueError, EOFError):
            pass
        image = self._decoded(index, reduction)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomically(path) as temporary:
            np.save(temporary, image, allow_pickle=False)
        return image


def order(count: int, epoch: int, seed: int) -> np.ndarray:
    """The shuffled indices ``[count]`` of an epoch."""
    return np.random.default_rng((seed, epoch, ORDER)).permutation(count)


def cached_path(path: Path, longest: int, reduction: int) -> Path:
    """Where the cache on disk keeps an image: under another name as soon as its file's size or time changes.

    Raises:
        Fault: when there is no such file.
    """
    try:
        found = path.stat()
    except OSError:
        raise Fault(f"{path}: there is no such image; correct the list, or put the image there") from None
    told = "\0".join(map(str, (CACHE_VERSION, path.resolve(), found.st_size, found.st_mtime_ns, longest, reduction)))
    name = hashlib.sha256(os.fsencode(told)).hexdigest()[:32]
    return cache_folder() / "images" / name[:2] / f"{name}.npy"
