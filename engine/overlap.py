"""Work that overlaps, in order: items made ahead by a thread, and items worked off behind by another.

Both are blocks. However a block ends (at its end, by an exception, by Ctrl-C, which Python gives to the main thread
alone), its thread has ended with it. Queues are short, so that memory stays small and the faster side waits.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any, TypeVar

T = TypeVar("T")

END = object()
GLANCE = 0.05  # seconds between two looks whether a thread that waits for room should leave
GRACE = 3.0  # seconds for a thread that hangs in a read (of a camera, of a network) before it is left to itself


@contextmanager
def ahead(items: Generator[T, None, None], depth: int, *, newest: bool = False) -> Iterator[Iterator[T]]:
    """The items of a generator, the same in the same order, made by a thread at most ``depth`` ahead.

    What the generator raises is raised where its next item would have been. Its ``finally`` runs in the thread. With
    ``newest`` an item that nobody has taken gives way to the next one, as is right for a camera: nothing waits long.
    """
    waiting: Queue[tuple[Any, BaseException | None]] = Queue(depth)
    leave = Event()

    def put(item: Any, problem: BaseException | None = None) -> bool:
        """False where the block has ended."""
        takes_over = newest and item is not END
        while not leave.is_set():
            try:
                waiting.put((item, problem), block=not takes_over, timeout=GLANCE)
                return True
            except Full:
                if takes_over:
                    with suppress(Empty):
                        waiting.get_nowait()
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item):
                    break
        except BaseException as problem:  # whatever it is, it belongs to the one who waits for items
            put(END, problem)
        else:
            put(END)
        finally:
            items.close()

    def taken() -> Iterator[T]:
        while True:
            item, problem = waiting.get()
            if problem is not None:
                raise problem
            if item is END:
                return
            yield item

    thread = Thread(target=work, name="ahead", daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        leave.set()
        thread.join(GRACE)


@contextmanager
def behind(work: Callable[[T], None], depth: int) -> Iterator[Callable[[T], None]]:
    """``put(item)``: a thread does ``work(item)``, in the order of the puts, while at most ``depth`` items wait.

    All that was put is worked off when the block ends, however it ends. What ``work`` raises is raised by the next put
    or by the end of the block; nothing is worked off after it.
    """
    waiting: Queue[Any] = Queue(depth)
    problems: list[BaseException] = []

    def worker() -> None:
        while (item := waiting.get()) is not END:
            if not problems:  # afterwards it only takes, so that no put waits for ever
                try:
                    work(item)
                except BaseException as problem:
                    problems.append(problem)

    def put(item: T) -> None:
        if problems:
            raise problems[0]
        waiting.put(item)

    thread = Thread(target=worker, name="behind", daemon=True)
    thread.start()
    try:
        yield put
    finally:
        waiting.put(END)
        thread.join()
    if problems:
        raise problems[0]
