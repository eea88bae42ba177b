"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from data.structures import Fault

LARGEST_YAML = 400_000  # bytes of a data set's YAML, and of one with options; 20,000 classes fit
DEEPEST_YAML = 40  # levels of lists and mappings in such a file


@contextmanager
def atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` (same ending) to write to; it takes the place of ``path`` if nothing failed."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(temporary)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> None:
    with atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_bytes(path: str | Path, most: int) -> bytes:
    """A file that has at most so many bytes.

    Raises:
        Fault: for a larger one, and for what is no file: a pipe would be waited for, a device read, for ever.
        OSError: where it is missing or may not be read.
    """
    path = Path(path)
    found = path.stat() if "\0" not in str(path) else None
    if found is None or not stat.S_ISREG(found.st_mode):
        raise Fault(f"{path}: is no file")
    if found.st_size > most:
        raise Fault(f"{path}: has {found.st_size:,} bytes; {most:,} at most are right")
    return path.read_bytes()


def compose_yaml(text: str) -> yaml.Node | None:
    """The nodes of a YAML text, tags not followed. Raises `yaml.YAMLError` for what is none or is nested too deep."""
    level = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):  # before `compose`, which goes as deep as it finds
            level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if level > DEEPEST_YAML:
                raise yaml.YAMLError(f"nested deeper than {DEEPEST_YAML} levels")
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except (ValueError, OverflowError):  # of a letter's number, as "\U00110000", or a version's
        raise yaml.YAMLError("it holds a number that is out of range") from None


def cache_folder() -> Path:
    """The user's folder for what can be made again: ``$XDG_CACHE_HOME/oneshot-yolo`` or ``~/.cache/oneshot-yolo``."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path("~/.cache").expanduser()) / "oneshot-yolo"
