"""What every command shares: how faults are told, and how devices and options are read."""

from __future__ import annotations

import ctypes
import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch

from data.structures import PROGRAM, Fault, nearest, version
from models.user_ops import load_ops

DEAD_WORKER = "DataLoader worker"  # how torch's error about one begins
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST_BLOCK = 32 * 2**20  # bytes that glibc takes from what it holds at most
LESS_MEMORY = "was memory short? fewer --workers would be right; --resume goes on after the last finished epoch"


def door(main: Callable[[Sequence[str] | None], int | None]) -> Callable[..., int]:
    """Wrap the ``main(argv)`` of a command: what the user did wrong becomes lines on stderr and exit code 2.

    A `Fault` prints its lines, an OSError one line, Ctrl-C one line (code 130). ``argparse`` asking to leave gives
    its code. Anything else is our own mistake and keeps its traceback. Of several processes the first prints, and any
    that fails alone in the middle of a run.
    """

    @wraps(main)
    def safe(argv: Sequence[str] | None = None) -> int:
        try:
            with _half_started_threads_silent():
                return main(argv) or 0
        except BrokenPipeError:  # the reader of our output left, as in `... | head`: nobody is there to be told
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  the interpreter flushes it once more at its end
            return 141
        except (Fault, OSError) as problem:
            if _is_first() or torch.distributed.is_initialized():
                print(*told(problem), sep="\n", file=sys.stderr)
            return 2
        except torch.OutOfMemoryError:
            print("the GPU's memory is full; a smaller --batch-size or --imgsz takes less", file=sys.stderr)
            return 2
        except RuntimeError as problem:
            if not str(problem).startswith(DEAD_WORKER):  # or torch's own error, which may come at any moment
                raise
            print(f"{problem}".splitlines()[0], LESS_MEMORY, sep="; ", file=sys.stderr)
            return 2
        except KeyboardInterrupt as stop:
            if _is_first():
                print(str(stop) or "interrupted", file=sys.stderr)
            return 130
        except SystemExit as leaving:
            return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)

    return safe


@contextmanager
def _half_started_threads_silent() -> Iterator[None]:
    """The death of a worker is raised wherever the main thread is just then. Where that is the start of a thread, the
    thread finds itself on no list and dies with a traceback of its own, beside the one line that is told.
    """
    before = sys.unraisablehook

    def hook(problem: Any) -> None:
        frames = [frame.f_code.co_name for frame, _ in walk_tb(problem.exc_traceback)]
        if problem.exc_type is not KeyError or frames[-1:] != ["_bootstrap_inner"]:
            before(problem)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def told(problem: Fault | OSError) -> list[str]:
    """The lines in which a Fault or an OSError is shown.

    Names of files and classes are strangers' text, see `printable`.
    """
    named = isinstance(problem, OSError) and problem.filename is not None and problem.strerror
    line = f"{problem.filename}: {problem.strerror}" if named else str(problem)  # type: ignore[union-attr]
    lines = problem.lines if isinstance(problem, Fault) else (line,)
    return [printable(line) for line in lines]


def printable(line: str) -> str:
    """Strangers' text as one line of letters: what would move a terminal's cursor, or is in no encoding, is a ?."""
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def import_optuna(told: str) -> Any:
    """Optuna, which says nothing but errors. Where it is not installed, a Fault of `told` and how to install it."""
    try:
        import optuna
    except ImportError:
        raise Fault(f"{told} pip install -e '.[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # otherwise a line a trial
    return optuna


def _is_first() -> bool:
    """Of the processes that torchrun started on this machine, where it is read; without torchrun there is one."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def option_parser(description: str | None) -> ArgumentParser:
    """An argument parser that shows ``description`` as written and takes no abbreviated options; it has ``--version``,
    ``--threads`` and ``--ops``.
    """
    parser = ArgumentParser(description=description, allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {version()}")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="that compute on the CPU; default: OMP_NUM_THREADS, or one a core"
    )
    parser.add_argument(
        "--ops", action="append", default=[], metavar="PATH", help="Python file with ops of your own; may be repeated"
    )
    return parser


def parse_options(parser: ArgumentParser, argv: Sequence[str] | None) -> Namespace:
    """Read the options; one that does not exist raises a Fault with the nearest name that does.

    The files of ``--ops`` are run here, before any model is read; the options that return are without it.
    """
    options, surplus = parser.parse_known_args(argv)
    known = [name for action in parser._actions for name in action.option_strings]
    problems = []
    for given in surplus:
        name = given.split("=")[0]
        if name.startswith("-"):
            problems.append(f"{name}: there is no such option{nearest(name, known)}")
        elif not problems:  # otherwise it is the value of an unknown option
            problems.append(f"{given}: an argument without an option in front of it")
    if problems:
        raise Fault(*problems)
    if options.threads is not None and options.threads < 1:
        raise Fault(f"--threads {options.threads}: 1 or more would be right")
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    del options.threads
    for file in options.ops:
        load_ops(Path(file))
    del options.ops
    return options


def keep_freed_memory() -> None:
    """From now on this process keeps what a step frees for the next one, where its C library is glibc.

    By itself glibc hands large blocks back at once and asks for them again, and the system clears each of their pages
    anew: on a CPU a twentieth of a training step, and more where a step holds more at once (`bench/step_cost.py`).
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # another C library has none
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)


def parse_device(name: str) -> torch.device:
    """``""`` (the first GPU if there is one), ``cpu``, ``0`` or ``cuda:0``, on a Mac ``mps``.

    Raises a Fault for one that is absent.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name = name.strip().lower()
    mps = torch.backends.mps.is_available()
    if name == "":
        return torch.device("cuda:0" if gpus else "cpu")
    if name == "cpu" or (name == "mps" and mps):
        return torch.device(name)
    number = "0" if name == "cuda" else name.removeprefix("cuda:")
    here = "cpu" if gpus == 0 else f"cpu or 0 to {gpus - 1}" if gpus > 1 else "cpu or 0"
    here = f"{here} or mps" if mps else here
    if not number.isdecimal():
        raise Fault(f"--device {name!r}: not a device; {here} would be right on this machine")
    if int(number) >= gpus:
        raise Fault(f"--device {name!r}: this machine has {gpus} usable GPUs; {here} would be right")
    return torch.device(f"cuda:{int(number)}")


def check_imgsz(imgsz: int, stride: int) -> int:
    """``imgsz`` itself; a Fault where the network cannot take it."""
    if imgsz < stride or imgsz % stride:
        below = max(imgsz // stride, 1) * stride
        raise Fault(f"--imgsz {imgsz}: this network needs a multiple of {stride}; {below} or {below + stride} would do")
    return imgsz


def check_names(weights: str | Path, trained: Sequence[str], data: str | Path, asked: Sequence[str]) -> None:
    """Raise a Fault unless the classes a network was trained on are those of the data set, in the same order."""
    if tuple(trained) == tuple(asked):
        return
    raise Fault(
        f"{weights}: trained on {len(trained)} classes: {', '.join(trained)}",
        f"{data}: has {len(asked)} classes: {', '.join(asked)}",
        "They must agree in number, names and order; give the data set that these weights were trained on.",
    )


def check_thresholds(conf: float, iou: float, max_det: int) -> None:
    if not 0 <= conf < 1:
        raise Fault(f"--conf-thres {conf}: must be at least 0 and under 1")
    if not 0 <= iou <= 1:
        raise Fault(f"--iou-thres {iou}: must be between 0 and 1")
    if max_det < 1:
        raise Fault(f"--max-det {max_det}: must be at least 1")
