"""Images with a class for every pixel: their masks on disk, and the same changes of both in training."""

from __future__ import annotations

import re
import struct
import time
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.__main__ import main
from data.augment import Augment, Picture, Source, augmented, finished, fit_mask, flip
from data.check import check
from data.config import DataSpec, read_data_spec
from data.dataset import ImageSet
from data.loader import batches
from data.masks import read_ids, read_mask, table
from data.readers import cache, read_split
from data.split import split_data
from data.structures import VOID, Fault, MaskFile

YAML = "train: images/train\nval: images/val\nformat: masks\nvoid: 3\nnames: [sky, road, car]\n"
TONES = {0: (90, 160, 250), 1: (60, 60, 60), 2: (220, 40, 30), 3: (255, 255, 255), VOID: (255, 255, 255)}


def draw(mask: np.ndarray) -> np.ndarray:
    """A picture that shows its classes: RGB."""
    tones = np.zeros((256, 3), np.uint8)
    tones[list(TONES)] = list(TONES.values())
    return tones[mask]


def scene(seed: int, width: int = 40, height: int = 30) -> np.ndarray:
    """Sky over road, a car on it, and a strip of void at the bottom."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    mask[int(rng.integers(8, 14)) :] = 1
    x, y = int(rng.integers(2, 20)), int(rng.integers(14, 20))
    mask[y : y + 7, x : x + 12] = 2
    mask[-2:] = 3
    return mask


def draw_data(folder: Path, train: int = 4, val: int = 2, size: tuple[int, int] = (40, 30)) -> Path:
    for split, first, count in (("train", 0, train), ("val", 50, val)):
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True)
        for index in range(count):
            mask = scene(first + index, *size)
            assert cv2.imwrite(str(folder / f"masks/{split}/{index}.png"), mask)
            assert cv2.imwrite(str(folder / f"images/{split}/{index}.png"), draw(mask)[..., ::-1])
    (folder / "data.yaml").write_text(YAML)
    return folder / "data.yaml"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    draw_data(tmp_path)
    return tmp_path


def read(place: Path, text: str = YAML) -> DataSpec:
    (place / "data.yaml").write_text(text)
    return read_data_spec(place / "data.yaml")


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(ids: np.ndarray, depth: int, colour: int, palette: bytes = b"") -> bytes:
    """By the standard and without OpenCV: rows without a filter, ids packed from the left."""
    height, width = ids.shape
    rows = b""
    for row in ids:
        bits = "".join(f"{value:0{depth}b}" for value in row)
        bits += "0" * (-len(bits) % 8)
        rows += b"\0" + bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    parts = [head, *([chunk(b"PLTE", palette)] if palette else []), chunk(b"tRNS", b"\0") if palette else b""]
    return b"\x89PNG\r\n\x1a\n" + b"".join([*parts, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")])


# ---- reading


@settings(max_examples=25)
@given(st.integers(0, 3), st.booleans(), st.integers(1, 20), st.integers(0, 2**31))
def test_ids_are_read_whatever_the_depth_and_the_palette(
    tmp_path_factory: pytest.TempPathFactory, power: int, with_palette: bool, width: int, seed: int
) -> None:
    """Of a palette it is the places that count, though two of them have one colour."""
    depth, rng = 2**power, np.random.default_rng(seed)
    ids = rng.integers(0, 2**depth, (4, width)).astype(np.uint8)
    palette = bytes([7, 7, 7] * 2**depth) if with_palette else b""
    path = tmp_path_factory.mktemp("ids") / "a.png"
    path.write_bytes(png(ids, depth, 3 if with_palette else 0, palette))
    np.testing.assert_array_equal(read_ids(path), ids)


def test_ids_that_are_not_void_are_the_classes_in_their_order(tmp_path: Path) -> None:
    assert table(3, (1,))[[0, 1, 2, 3, 4, 255]].tolist() == [0, VOID, 1, 2, VOID, VOID]
    assert table(2, (0,))[:4].tolist() == [VOID, 0, 1, VOID]
    assert table(254, (7,))[[6, 7, 8, 254, 255]].tolist() == [6, VOID, 7, 253, VOID]
    cv2.imwrite(str(tmp_path / "a.png"), np.array([[0, 1, 2, 9, 255]], np.uint8))
    assert read_mask(MaskFile(tmp_path / "a.png", 2, (0,))).tolist() == [[VOID, 0, 1, VOID, VOID]]


def test_a_mask_is_found_beside_its_image_and_says_what_the_image_shows(place: Path) -> None:
    data = read(place)
    assert (data.names, data.format, data.void) == (("sky", "road", "car"), "masks", (3,))
    first = read_split(data, "train").samples[0]
    assert first.mask == MaskFile(place / "masks/train/0.png", 3, (3,)) and first.labels.tolist() == [0, 1, 2]
    assert first.boxes.tolist() == [[0, 0, 40, 30]] * 3 and first.areas is not None
    mask = scene(0)
    assert first.areas.tolist() == [(mask == label).sum() for label in range(3)]
    assert first.areas.sum() == 40 * 28  # two rows are void


@pytest.mark.parametrize(
    "text",
    [
        "train: pictures\ntrain_masks: ids\n",
        "train: [images/train, pictures]\ntrain_masks: [masks/train, ids]\n",
        "train: few.txt\ntrain_masks: ids/deep\n",
    ],
)
def test_the_yaml_names_other_folders_of_masks(place: Path, text: str) -> None:
    for kind, folder in (("images", "pictures"), ("masks", "ids")):
        (place / folder / "deep").mkdir(parents=True)
        (place / kind / "val/1.png").rename(place / folder / "deep/1.png")
    (place / "few.txt").write_text("pictures/deep/1.png\n")
    split = read_split(read(place, f"{text}format: masks\nvoid: 3\nnames: [sky, road, car]\n"), "train")
    mask = split.samples[-1].mask
    assert mask is not None and mask.path == place / "ids/deep/1.png" and split.notes == ()


def test_lists_with_masks_of_their_own_are_told_apart(place: Path) -> None:
    """Both splits number their images alike: each has its own mask."""
    for split in ("train", "val"):
        (place / f"{split}.txt").write_text(f"images/{split}/1.png\n")
    (place / "masks/train/1.png").write_bytes((place / "masks/val/1.png").read_bytes())
    text = "train: train.txt\nval: val.txt\ntrain_masks: masks/train\nval_masks: masks/val\n"
    data = read(place, f"{text}format: masks\nvoid: 3\nnames: [sky, road, car]\n")
    for split in ("train", "val"):
        for sample in read_split(data, split).samples:
            assert sample.mask is not None and sample.mask.path == place / "masks" / split / "1.png"


def test_what_is_wrong_with_a_mask_is_told_and_costs_its_image(place: Path) -> None:
    folder = place / "masks/train"
    ids = scene(0)
    (place / "masks/val/1.png").unlink()
    for name in "456":
        cv2.imwrite(str(place / f"images/train/{name}.png"), draw(ids))
    (folder / "0.png").write_bytes(b"no picture of any kind, and long enough")
    cv2.imwrite(str(folder / "1.png"), draw(ids))
    cv2.imwrite(str(folder / "2.png"), ids[:20])
    cv2.imwrite(str(folder / "4.png"), ids.astype(np.uint16))
    ids[:2, :5] = 77
    cv2.imwrite(str(folder / "5.png"), ids)
    cv2.imwrite(str(folder / "6.png"), np.full((30, 40), 3, np.uint8))
    split = read_split(read(place), "train")
    assert [sample.path.stem for sample in split.samples] == ["3", "5", "6"]
    assert split.notes == (
        f"{folder}/0.png: is no PNG; save masks as PNG, which keeps every id (image left out)",
        f"{folder}/1.png: holds colours; a grey PNG, or one with a palette, has an id a pixel (image left out)",
        f"{folder}/4.png: has 16 bits a pixel; save it with 8, for ids from 0 to 255 (image left out)",
        f"{folder}/2.png: is of 40x20 pixels, its image of 40x30; masks of the image's size are right (image left out)",
        f"{folder}/5.png: 10 pixels have the id 77; the classes have 0 to 2, and 3, 255 are void (pixels left out)",
        f"{folder}/6.png: not one pixel is of a class (nothing to learn from)",
    )
    assert read_split(read(place), "val").notes == (
        f"{place}/images/val/1.png: there is no mask {place}/masks/val/1.png (image left out)",
    )


HEAD = "train: images/train\nformat: masks\nnames: [sky, road]\n"  # what is given besides stands in line 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{HEAD}void: x\n", ":4: void holds 'x'; ids from 0 to 255 are right, as void: 11 or [0, 11]"),
        (f"{HEAD}void: [0, 256]\n", ":4: void holds '256'; ids"),
        (f"{HEAD}void: [0, [1]]\n", ":4: void holds 'list'; ids"),
        (f"{HEAD}train_masks: [a, b]\n", ":4: train_masks has 2 folders and train 1; one for each, or one is right"),
        (f"{HEAD}annotations: a\n", ":4: annotations is given, but the folders of masks are train_masks, val_masks"),
        (f"{HEAD}void: 3\n".replace("masks", "yolo"), ":4: void is given, but format is yolo; only masks have ids of"),
        ("train: a\nnames: [b]\ntrain_masks: c\n", ":3: train_masks is given, but format is yolo; format: masks is"),
        (HEAD.replace(", road", ""), ":3: one class, 'sky'; two or more can be told apart"),
        (f"train: a\nformat: masks\nvoid: 1\nnames: {list(map(str, range(255)))}\n", ":4: 255 classes; 254 at most"),
    ],
)
def test_what_is_no_set_of_masks_is_told(place: Path, text: str, said: str) -> None:
    with pytest.raises(Fault, match=re.escape(f"{place}/data.yaml{said}")):
        read(place, text)


def test_a_folder_of_masks_that_is_not_there_is_told(place: Path) -> None:
    with pytest.raises(Fault, match=re.escape(f"{place}/nowhere does not exist; train_masks names a folder of masks")):
        read_split(read(place, YAML + "train_masks: nowhere\n"), "train")


def test_what_was_read_is_kept_and_forgotten_when_a_mask_or_its_void_changes(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "FEWEST", 1)
    monkeypatch.setattr(cache, "SETTLED", -3600.0)
    data = read(place)
    first = read_split(data, "train")
    with monkeypatch.context() as patch:
        patch.setattr("data.readers._of_masks", None)  # it is not asked again
        again = read_split(data, "train")
    assert [s.mask for s in again.samples] == [s.mask for s in first.samples]
    for one, other in zip(first.samples, again.samples, strict=True):
        np.testing.assert_array_equal(one.areas, other.areas)
    time.sleep(0.01)
    cv2.imwrite(str(place / "masks/train/0.png"), np.ones((30, 40), np.uint8))
    assert read_split(data, "train").samples[0].labels.tolist() == [1]
    other = read_split(read(place, YAML.replace("void: 3", "void: 0").replace(", car", "")), "train")
    assert other.samples[0].mask == MaskFile(place / "masks/train/0.png", 2, (0,))


# ---- what `python -m data` makes of it


def test_a_set_is_checked_and_drawn(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(place / "data.yaml"), "--html", str(place / "sheet.html")]) == 0
    told = capsys.readouterr().out
    assert re.search(r"images +4 +2\n", told) and re.search(r"pixels that are void +6.7 % +6.7 %\n", told)
    report = check(place / "data.yaml")
    share = 100 * sum(float(s.areas[2]) for s in report.splits["train"].samples if s.areas is not None) / (4 * 40 * 28)
    assert re.search(rf"  2 car +4 +{share:.1f} % +2 ", told) and "box" not in told
    page = (place / "sheet.html").read_text()
    assert page.count("<figure>") == 6 and "■</span> car" in page and "<rect" not in page
    cv2.imwrite(str(place / "masks/train/99.png"), scene(0))  # a mask without an image
    (place / "masks/val/1.png").unlink()
    assert main(["check", str(place / "data.yaml")]) == 1
    told = capsys.readouterr().out
    assert "images without a mask: 1 (image left out)" in told and "masks/train/99.png: there is no image of" in told


def test_a_set_of_masks_has_no_boxes_to_convert(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(place / "data.yaml"), "--to", "yolo", "-o", str(place / "out")]) == 2
    assert "is of format masks, which has no boxes" in capsys.readouterr().err


def test_a_set_is_divided_anew_with_its_masks(place: Path) -> None:
    assert main(["split", str(place / "data.yaml"), "train=0.5", "val=0.5", "-o", str(place / "anew")]) == 0
    data = read_data_spec(place / "anew/data.yaml")
    samples = [sample for name in ("train", "val") for sample in read_split(data, name).samples]
    assert len(samples) == 6 and data.void == (3,)
    for sample in samples:
        assert sample.mask and sample.mask.path.parts[-2:] == sample.path.parts[-2:]
    read(place, YAML + "train_masks: masks/train\n")
    with pytest.raises(Fault, match="names folders of masks, which are unknown to a list of images"):
        split_data(place / "data.yaml", place / "more", {"train": 1, "val": 1})


# ---- the same changes of image and mask


def picture_of(mask: np.ndarray) -> Source:
    """A source whose image is its mask's colours."""
    image = draw(mask)
    boxes = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    return Source(mask.shape[1], mask.shape[0], *boxes, lambda: image, lambda: mask)


def agree(image: np.ndarray, mask: np.ndarray, most: float) -> None:
    """Inside its classes, an image has their colours; at most a share of all pixels lies at a border."""
    shown = draw(mask)
    shown[mask == VOID] = image[mask == VOID]
    apart = (np.abs(shown.astype(int) - image).max(axis=2) > 8).mean()
    assert apart <= most, apart


@settings(max_examples=40)
@given(
    st.integers(0, 2**31),
    st.sampled_from([0.0, 20.0]),
    st.sampled_from([1, 4]),
    st.tuples(st.integers(20, 90), st.integers(20, 90)),
)
def test_a_mask_goes_where_its_image_goes(seed: int, degrees: float, count: int, size: tuple[int, int]) -> None:
    """Four blocks of colour, scaled, moved, turned and mirrored: grey is void, and all else has its own colour."""
    mask = np.kron(np.array([[0, 1], [2, 0]], np.uint8), np.ones((size[1] // 2, size[0] // 2), np.uint8))
    augment = Augment(scale=0.5, translate=0.3, degrees=degrees, flip_ud=0.5, hsv=(0, 0, 0))
    rng = np.random.default_rng(seed)
    picture = finished(augmented([picture_of(mask)] * count, 64, (64, 64), augment, rng), augment, rng)
    assert picture.mask is not None and picture.mask.shape == (64, 64)
    assert set(np.unique(picture.mask).tolist()) <= {0, 1, 2, VOID}
    agree(picture.image, picture.mask, 0.25)
    grey = (picture.image == 114).all(axis=2)
    assert (grey != (picture.mask == VOID)).mean() < 0.05


def test_a_resized_mask_has_the_class_under_the_middle_of_each_pixel() -> None:
    """As of the image: 0.5, 1.5 and 2.5 of 3 pixels lie at 1, 3 and 5 of 6."""
    row = np.array([[10, 11, 12, 13, 14, 15]], np.uint8)
    assert fit_mask(row, (3, 1)).tolist() == [[11, 13, 15]]
    assert fit_mask(row, (12, 1)).tolist() == [np.repeat(row[0], 2).tolist()]
    assert fit_mask(row, (2, 1)).tolist() == [[11, 14]]
    assert fit_mask(row, (6, 1)) is row


def test_two_flips_are_none() -> None:
    mask = scene(1)
    none = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    picture = Picture(draw(mask), *none, mask)
    for side in (True, False):
        once = flip(picture, left_right=side)
        assert once.mask is not None
        np.testing.assert_array_equal(once.mask, mask[:, ::-1] if side else mask[::-1])
        np.testing.assert_array_equal(flip(once, left_right=side).mask, mask)


@pytest.mark.parametrize("rect", [False, True])
def test_batches_hold_masks_with_void_around(place: Path, rect: bool) -> None:
    """40x30 at 64 pixels: 64x48, in the middle of a square or of a rectangle of 64x64."""
    samples = read_split(read(place), "train").samples
    batch = next(iter(batches(ImageSet(samples, 64, cache=False, rect=rect), 3)))
    masks = batch.targets.masks
    assert masks is not None and (masks.shape, masks.dtype) == ((3, 64, 64), torch.uint8)
    assert batch.targets.boxes.shape == (0, 4) and batch.targets.to("cpu").masks is not None
    assert (masks[:, :8] == VOID).all() and (masks[:, 56:] == VOID).all()
    wanted = cv2.resize(read_mask(samples[1].mask), (64, 48), interpolation=cv2.INTER_NEAREST_EXACT)  # type: ignore[arg-type]
    np.testing.assert_array_equal(masks[1, 8:56].numpy(), wanted)


@pytest.mark.parametrize("cache_kind", ["ram", "disk", "off"])
def test_an_item_is_the_same_whatever_the_cache(place: Path, cache_kind: str) -> None:
    samples, augment = read_split(read(place), "train").samples, Augment(mosaic=0.5, degrees=5)
    plain, other = (ImageSet(samples, 32, augment, cache=kind) for kind in ("off", cache_kind))
    for _ in range(2):
        for index in range(4):
            one, two = plain[index], other[index]
            assert one.mask is not None and two.mask is not None
            assert torch.equal(one.mask, two.mask) and torch.equal(one.image, two.image)


def test_sets_of_boxes_have_no_masks(place: Path) -> None:
    samples = [replace(sample, mask=None) for sample in read_split(read(place), "train").samples]
    assert next(iter(batches(ImageSet(samples, 32), 2))).targets.masks is None


# ---- real data


def test_camvid_is_read(shared_data: Path, tmp_path: Path) -> None:
    """A few images of each split; 11 is void."""
    for split in ("train", "val"):
        for kind in (split, f"{split}annot"):
            (tmp_path / kind).mkdir()
            for file in sorted((shared_data / "camvid" / kind).iterdir())[:4]:
                (tmp_path / kind / file.name).symlink_to(file)
    text = (Path(__file__).resolve().parents[1] / "cfg/data/camvid.yaml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith(("test", "path"))]
    split = read_split(read(tmp_path, "\n".join(lines)), "train")
    assert len(split.samples) == 4 and split.notes == ()
    mask = read_mask(split.samples[0].mask)  # type: ignore[arg-type]
    assert mask.shape == (360, 480) and set(np.unique(mask).tolist()) == {*split.samples[0].labels.tolist(), VOID}
