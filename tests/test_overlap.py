"""Threads that read ahead and write behind: nothing is lost or reordered, and every thread ends with its block."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.overlap import ahead, behind


def running():
    return {thread.name for thread in threading.enumerate()} & {"ahead", "behind"}


@given(items=st.lists(st.integers(), max_size=30), depths=st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_what_goes_in_comes_out_in_order(items, depths):
    written = []
    with behind(written.append, depths[0]) as put, ahead((item for item in items), depths[1]) as coming:
        for item in coming:
            put(item)
    assert written == items and not running()


def test_both_sides_stay_within_their_queues():
    made = written = 0

    def items():
        nonlocal made
        while True:
            made += 1
            yield made

    gate = threading.Event()

    def work(item):
        nonlocal written
        gate.wait()
        written += 1

    with behind(work, 3) as put, ahead(items(), 2) as coming:
        for _ in range(4):  # one in work and three that wait
            put(next(coming))
        time.sleep(0.2)
        assert made <= 4 + 2 + 1 and written == 0
        gate.set()
    assert written == 4 and not running()


def test_what_the_items_raise_comes_in_its_place():
    closed = []

    def items():
        try:
            yield 1
            yield 2
            raise OSError("the disk sulks")
        finally:
            closed.append(True)

    seen = []
    with pytest.raises(OSError, match="the disk sulks"), ahead(items(), 1) as coming:
        for item in coming:
            seen.append(item)
    assert seen == [1, 2] and closed and not running()


def test_leaving_early_ends_the_thread_and_the_items():
    closed = []

    def endless():
        try:
            while True:
                yield 0
        finally:
            closed.append(threading.current_thread().name)

    for problem in (KeyboardInterrupt, ZeroDivisionError):
        with pytest.raises(problem), ahead(endless(), 2) as coming:
            next(coming)
            raise problem
        assert closed.pop() == "ahead" and not running()


def test_a_thread_that_hangs_is_left_to_itself(monkeypatch):
    monkeypatch.setattr("engine.overlap.GRACE", 0.1)
    gate = threading.Event()

    def hanging():
        yield 1
        gate.wait()

    start = time.monotonic()
    with ahead(hanging(), 1) as coming:
        assert next(coming) == 1
    assert time.monotonic() - start < 5
    gate.set()


def test_what_the_work_raises_stops_the_puts():
    done = []

    def work(item):
        if item == 2:
            raise OSError("full")
        done.append(item)

    with pytest.raises(OSError, match="full"), behind(work, 1) as put:
        for item in range(1000):
            put(item)
    assert done == [0, 1] and not running()
    with pytest.raises(OSError, match="full"), behind(work, 9) as put:  # told at the end where no put follows
        put(2)


def test_an_interrupt_loses_nothing_that_was_put():
    done = []

    def slow(item):
        time.sleep(0.01)
        done.append(item)

    with pytest.raises(KeyboardInterrupt), behind(slow, 50) as put:
        for item in range(20):
            put(item)
        raise KeyboardInterrupt
    assert done == list(range(20)) and not running()


def test_only_the_newest_waits():
    made = threading.Event()

    def items():
        yield from range(200)
        made.set()

    with ahead(items(), 1, newest=True) as coming:
        assert made.wait(60)
        seen = list(coming)
    assert seen == [199]
