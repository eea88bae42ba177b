"""Is reading labels from the cache faster than reading them, and the same? A drawn data set of many images.

python bench/label_cache.py                    # 20,000 images, in a temporary folder
python bench/label_cache.py --images 2000      # a quick look
python bench/label_cache.py --show             # the table of what was measured

Times are CPU seconds of this process, so they mean something on a busy machine too; files are in the system's own cache
of files in both cases. Exits with 1 where the cache is not faster, or gives anything else than reading does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import cv2  # noqa: E402
import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data.config import read_data_spec  # noqa: E402
from data.files import cache_folder, write_text  # noqa: E402
from data.readers import read_split  # noqa: E402
from data.readers.cache import FEWEST, SETTLED  # noqa: E402
from data.readers.labels import Split  # noqa: E402
from data.structures import Fault  # noqa: E402
from engine.doors import door  # noqa: E402

RESULT = ROOT / "bench" / "results" / "label_cache.json"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--boxes", type=int, default=7, help="in each image")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT, help="where the result goes")
    parser.add_argument("--show", action="store_true", help="only the table of what was measured")
    options = parser.parse_args(argv)
    if options.images < FEWEST:
        raise Fault(f"--images {options.images}: labels of fewer than {FEWEST} images are not cached; 2000 is right")
    if options.repeats < 1:
        raise Fault(f"--repeats {options.repeats}: must be at least 1")
    if not options.show:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
            result = measure(Path(folder) / "set", options.images, options.boxes, options.repeats)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.out, json.dumps(result, indent=1) + "\n")
    result = json.loads(options.out.read_text())
    ratio = result["read_s"] / result["cached_s"]
    print(f"{result['images']:,} images, {result['boxes']} boxes each; a cache of {result['megabytes']:.1f} MB")
    print(f"read    {result['read_s']:8.2f} CPU s, the fastest of {result['repeats']}")
    print(f"cached  {result['cached_s']:8.2f} CPU s   {ratio:.1f} times faster, equal: {result['equal']}")
    return 0 if ratio > 1 and result["equal"] else 1


def measure(folder: Path, images: int, boxes: int, repeats: int) -> dict[str, object]:
    """Draws the set, then reads it with an empty and with a full cache in turn."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    _, jpeg = cv2.imencode(".jpg", rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    for number in tqdm(range(images), "drawing", unit="image", delay=2, leave=False):
        (folder / f"images/{number:06d}.jpg").write_bytes(jpeg.tobytes())
        rows = np.concatenate([rng.uniform(0.3, 0.7, (boxes, 2)), rng.uniform(0.05, 0.5, (boxes, 2))], axis=1)
        lines = [f"{rng.integers(80)} {' '.join(f'{value:.6f}' for value in row)}\n" for row in rows]
        (folder / f"labels/{number:06d}.txt").write_text("".join(lines))
    (folder / "data.yaml").write_text(f"train: images\nnames: [{', '.join(f'c{n}' for n in range(80))}]\n")
    data = read_data_spec(folder / "data.yaml")
    time.sleep(SETTLED + 1)

    read_s, cached_s, megabytes, equal = [], [], 0.0, True
    for _ in range(repeats):
        for file in (cache_folder() / "labels").glob("*"):
            file.unlink()
        start = time.process_time()
        read = read_split(data, "train")
        read_s.append(time.process_time() - start)
        (file,) = (cache_folder() / "labels").iterdir()
        megabytes = file.stat().st_size / 1e6
        start = time.process_time()
        found = read_split(data, "train")
        cached_s.append(time.process_time() - start)
        equal = equal and same(read, found)
    return {
        "images": images,
        "boxes": boxes,
        "repeats": repeats,
        "read_s": min(read_s),
        "cached_s": min(cached_s),
        "megabytes": megabytes,
        "equal": equal,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def same(one: Split, other: Split) -> bool:
    return one.notes == other.notes and all(
        a.path == b.path and np.array_equal(a.boxes, b.boxes) and np.array_equal(a.labels, b.labels)
        for a, b in zip(one.samples, other.samples, strict=True)
    )


if __name__ == "__main__":
    raise SystemExit(door(main)())
