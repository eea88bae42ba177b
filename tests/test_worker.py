"""Subnets as a queue: what one process finishes nobody does again, and a worker that dies loses only what it had."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("optuna", reason="the extra `search` is not installed")

from test_search import CLASSIFIER, draw_classes

from data.structures import Fault
from models.spec import Choice
from search.optimise import optimise
from search.run import main as search_main
from search.space import SearchSpace
from search.storage import (
    JOURNAL,
    Limits,
    Outcome,
    beating,
    close,
    create,
    finished,
    gather,
    give_back,
    gone,
    join,
    open_storage,
    take,
    tell,
    trials_of,
    work,
)
from search.tree import losses

SPACE = SearchSpace((Choice("0.kernel", (1, 3, (3, 5))), *(Choice(f"{row}.kernel", (1, 3, 5)) for row in (1, 2, 3))))
RHYTHM = {"beat": 0.05, "grace": 0.6}


def values(one) -> tuple[float, float]:
    number = SPACE.index(one)
    return float((number * 37) % 81), float(number % 7)


def looked_up(tickets, tell_of, seconds=0.0):
    for ticket in tickets:
        time.sleep(seconds)
        tell_of(ticket, Outcome(values(ticket.architecture), {"number": SPACE.index(ticket.architecture)}))


def state(queue) -> list[str]:
    return [trial.state.name for trial in trials_of(queue)]


@pytest.fixture
def queue(tmp_path: Path):
    return create(open_storage(str(tmp_path / JOURNAL)), "study", SPACE, **RHYTHM)


def worker(where: str, owner: str, started: Path, slow: bool) -> None:
    """In a process of its own: the slow one says what it took, and is killed with it."""

    def evaluate(tickets, tell_of):
        if slow:
            started.write_text(" ".join(str(SPACE.index(ticket.architecture)) for ticket in tickets))
            time.sleep(60)
        looked_up(tickets, tell_of, 0.02)

    work(join(open_storage(where), "study", SPACE, owner, **RHYTHM), evaluate, Limits())


@pytest.mark.parametrize("owner", ["", "elsewhere 1 x"], ids=["its process is gone", "its beats stand still"])
def test_a_killed_worker_loses_only_what_it_had(tmp_path: Path, owner: str) -> None:
    where, started = str(tmp_path / JOURNAL), tmp_path / "started"
    fork = multiprocessing.get_context("fork")  # the other ways import torch anew
    doomed = fork.Process(target=worker, args=(where, owner, started, True))
    helper = fork.Process(target=worker, args=(where, "elsewhere 2 x", started, False))
    queue = create(open_storage(where), "study", SPACE, **RHYTHM)
    done = []

    def evaluate(new):
        if not doomed.pid:
            doomed.start()
            helper.start()
        found = {}

        def looked(tickets, tell_of):
            while not started.exists():  # others may have it all until then
                time.sleep(0.01)
            if doomed.is_alive():
                os.kill(doomed.pid, signal.SIGKILL)
                doomed.join()
            looked_up(tickets, tell_of, 0.02)

        gather(queue, {one: {} for one in new}, looked, lambda one, o: found.setdefault(one, o.values), Limits())
        done.extend(new)
        return [found[one] for one in new]

    def search(asked):
        return optimise(SPACE, asked, count=30, seeds=[SPACE.at(0)], violation=lambda one: 0.0, seed=3, progress=False)

    with beating(queue):
        together = search(evaluate)
    close(queue)
    helper.join(20)
    assert helper.exitcode == 0 and doomed.exitcode == -signal.SIGKILL
    assert list(together.items()) == list(search(lambda new: [values(one) for one in new]).items())
    lost = started.read_text().split()
    trials = trials_of(queue)
    assert [t.user_attrs["subnet"] for t in trials if t.state.name == "FAIL"] == lost and lost
    assert state(queue).count("COMPLETE") == len(done) == len(set(done)) == 30
    assert "elsewhere 2 x" in {trial.user_attrs["by"] for trial in trials}


def test_what_is_finished_is_told_again_and_not_judged_again(tmp_path: Path, queue) -> None:
    some = [SPACE.at(number) for number in (3, 70, 11)]
    heard = {}
    gather(queue, {one: {"cost": 1} for one in some}, looked_up, heard.__setitem__, Limits())
    again = create(open_storage(str(tmp_path / JOURNAL)), "study", SPACE)
    told = {}

    def never(tickets, tell_of):
        raise AssertionError

    gather(again, dict.fromkeys(some, {}), never, told.__setitem__, Limits())
    assert told == heard == {one: Outcome(values(one), {"number": SPACE.index(one)}) for one in some}
    assert finished(again)[some[1]][0] == {"cost": 1} and some[1].picks["0.kernel"] == (3, 5)


def test_nobody_takes_what_another_has(tmp_path: Path, queue) -> None:
    other = join(open_storage(str(tmp_path / JOURNAL)), "study", SPACE)
    for number in range(20):
        queue_post(queue, number)
    old = trials_of(queue)
    mine = take(queue, old, 99)
    assert len(mine) == 8  # alone: as many as share a trunk
    theirs = take(other, trials_of(other), 99)
    assert len(theirs) == 3 and not {t.id for t in theirs} & {t.id for t in mine}  # a quarter of the 12 that wait
    assert take(other, old, 1)[0].id not in {t.id for t in mine + theirs}  # its view of the queue is an old one


def queue_post(queue, number: int) -> None:
    from search.storage import post

    post(queue, SPACE.at(number), {})


def test_who_was_thought_gone_tells_in_vain(queue) -> None:
    queue_post(queue, 5)
    (ticket,) = take(queue, trials_of(queue), 1)
    give_back(queue, ticket.id)
    assert not tell(queue, ticket, Outcome((1.0, 2.0), {})) and state(queue) == ["FAIL"]
    give_back(queue, ticket.id)


def test_an_error_gives_back_what_was_under_way(queue) -> None:
    def breaks(tickets, tell_of):
        looked_up(tickets[:1], tell_of)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gather(queue, {SPACE.at(n): {} for n in range(3)}, breaks, lambda one, outcome: None, Limits())
    assert state(queue) == ["COMPLETE", "FAIL", "FAIL"]


def test_a_pruned_trial_says_so(queue) -> None:
    queue_post(queue, 5)
    (ticket,) = take(queue, trials_of(queue), 1)
    assert tell(queue, ticket, Outcome((1.0, 2.0), {"score": 1.0}, pruned=True))
    assert state(queue) == ["PRUNED"] and finished(queue)[SPACE.at(5)][1].pruned


def test_limits_end_a_process(queue) -> None:
    wanted = {SPACE.at(number): {} for number in range(5)}
    heard = {}
    with pytest.raises(TimeoutError, match="--trials 3 are done"):
        gather(queue, wanted, looked_up, heard.__setitem__, Limits(trials=3))
    with pytest.raises(TimeoutError, match="--timeout 0 s are over"):
        gather(queue, wanted, looked_up, heard.__setitem__, Limits(seconds=0))
    other = join(queue.storage, "study", SPACE)
    assert work(other, looked_up, Limits(trials=1)) == 1 and state(queue).count("COMPLETE") == 4
    close(queue)
    assert work(join(queue.storage, "study", SPACE), looked_up, Limits()) == 0


def test_half_a_line_of_a_killed_process_is_cut_off(tmp_path: Path, queue) -> None:
    queue_post(queue, 5)
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"op_code":4,"wor')
    queue_post(queue, 6)
    assert len(trials_of(create(open_storage(str(tmp_path / JOURNAL)), "study", SPACE))) == 2


def test_a_beat_that_moves_is_life_whatever_the_clock() -> None:
    seen: dict = {}
    assert not gone("elsewhere 1 x", {"beat elsewhere 1 x": 1}, seen, 0.0)
    time.sleep(0.01)
    assert gone("elsewhere 1 x", {"beat elsewhere 1 x": 1}, seen, 0.0)
    assert not gone("elsewhere 1 x", {"beat elsewhere 1 x": 2}, seen, 0.0)


def beat_of(queue) -> int | None:
    return queue.storage.get_study_user_attrs(queue.study).get(f"beat {queue.owner}")


def test_beats_that_stop_and_begin_again_never_repeat(queue) -> None:
    told = []
    for _ in range(4):
        with beating(queue):
            gather(queue, {}, looked_up, lambda one, outcome: None, Limits())
        told.append(beat_of(queue))
    assert told == sorted(set(told)) and len(told) == 4


def test_the_parent_beats_from_its_first_look_at_losses_to_the_last_subnet(tmp_path: Path, monkeypatch) -> None:
    """A worker may be there as soon as there is a study: it must not leave while the losses of all are measured."""
    data = draw_classes(tmp_path)
    (tmp_path / "search.yaml").write_text(CLASSIFIER)
    queues, beats = [], []

    def created(*arguments):
        queues.append(create(*arguments, **RHYTHM))
        return queues[0]

    def measured(*arguments, **named):
        for _ in range(2):
            time.sleep(6 * RHYTHM["beat"])
            beats.append(beat_of(queues[0]))
        return losses(*arguments, **named)

    monkeypatch.setattr("search.run.create", created)
    monkeypatch.setattr("search.find.losses", measured)
    words = ["--cfg", tmp_path / "search.yaml", "--data", data, "--imgsz", 32, "--epochs", 1, "--batch-size", 2]
    words += ["--arch-every", 1, "--candidates", 1, "--calibration", 6, "--amp", "off", "--device", "cpu"]
    assert search_main(list(map(str, [*words, "--project", tmp_path / "runs"]))) == 0
    assert None not in beats and beats[0] < beats[1] < beat_of(queues[0])


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("mysql://me@here/db", "--storage mysql://...: a path of a journal file, or postgresql+psycopg://user@host/database"),
        (
            "postgresql+psycopg://me:secret@here/db",
            "--storage: has a password in it, which would lie in config.yaml; PGPASSWORD or ~/.pgpass holds it",
        ),
    ],
)  # fmt: skip
def test_an_address_is_refused_before_anything_runs(where: str, said: str) -> None:
    with pytest.raises(Fault) as problem:
        open_storage(where)
    assert problem.value.lines == (said,)


def test_a_folder_or_study_that_is_not_there(tmp_path: Path, queue) -> None:
    with pytest.raises(Fault, match="there is no folder"):
        open_storage(str(tmp_path / "none" / JOURNAL))
    with pytest.raises(Fault, match="has no study 'other'"):
        join(queue.storage, "other", SPACE)
