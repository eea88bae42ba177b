"""Subnets to judge as a queue on which any number of processes work: an Optuna study, in a journal file or PostgreSQL.

One process, the parent, says which subnets are wanted and waits for them (`gather`); it judges as well, and so do the
workers, wherever they run (`work`). A subnet is a trial: waiting, running in one process, and then finished for good.
The parent alone adds trials, so recovery is a single sentence: what is wanted and neither waiting, running nor finished
is added again. A trial whose process is gone has failed, and thus is neither.

Whether a process is gone is told by its beats, a number in the study that each raises every few seconds. The parent
looks whether it moves, by its own clock: no two clocks are compared. (Optuna's heartbeats know databases only.)
"""

from __future__ import annotations

import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from data.structures import Fault
from engine.doors import import_optuna
from search.space import Architecture, SearchSpace

JOURNAL = "study.journal"  # in the folder of a search
POSTGRES = "postgresql+psycopg"
BEAT, GRACE = 5.0, 60.0  # seconds between two beats; without one, after which a process counts as gone
PAUSE = (0.05, 1.0)  # seconds between two looks at the queue, while nothing is to do: at first and at most
PARENT_AWAY = 10  # graces without a beat of the parent, after which a worker leaves
HANDFUL = 8  # trials that one process takes at once, at most: they share a trunk
RECENT = 40  # trials by which a process tells how many others there are


@dataclass(frozen=True)
class Ticket:
    """A subnet that one process has taken to judge; `known` is what the parent says of it."""

    id: int  # of the trial in its storage
    architecture: Architecture
    known: Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What was found of a subnet: a value for each direction of the study, and `facts` that JSON can hold."""

    values: tuple[float, ...]
    facts: Mapping[str, Any]
    pruned: bool = False


@dataclass(frozen=True)
class Queue:
    """A study, as one process sees it."""

    storage: Any
    study: int  # its number in the storage
    space: SearchSpace
    owner: str  # this process
    beat: float = BEAT
    grace: float = GRACE


@dataclass(frozen=True)
class Limits:
    """What a process does at most: so many trials, and none begun after so many seconds of it."""

    trials: int | None = None
    seconds: float | None = None
    began: float = field(default_factory=time.monotonic)

    def left(self, done: int) -> int:
        """How many trials may still be begun after `done`. Raises TimeoutError where it is none."""
        if self.trials is not None and done >= self.trials:
            raise TimeoutError(f"--trials {self.trials} are done")
        if self.seconds is not None and time.monotonic() - self.began >= self.seconds:
            raise TimeoutError(f"--timeout {self.seconds:g} s are over")
        return HANDFUL if self.trials is None else self.trials - done


Tell = Callable[[Ticket, Outcome], None]
Evaluate = Callable[[Sequence[Ticket], Tell], None]
"""Judges some subnets and tells of each as soon as it is done."""


# ---- where studies lie


@dataclass(frozen=True)
class FileLock:
    """The lock of a journal that the system frees when its process dies, however it dies. Optuna's own locks stay
    behind then, and hold up all others for half a minute.

    A process that died while it wrote may leave half a line, which is cut off before the next one is written.
    """

    journal: Path
    file: IO[bytes]

    def acquire(self) -> bool:
        import fcntl  # not on Windows

        fcntl.flock(self.file, fcntl.LOCK_EX)
        with open(self.journal, "rb+") as journal:
            end = journal.seek(0, os.SEEK_END)
            start = max(0, end - 1)
            journal.seek(start)
            if end and journal.read(1) != b"\n":
                journal.seek(0)
                journal.truncate(journal.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        import fcntl

        fcntl.flock(self.file, fcntl.LOCK_UN)


def open_storage(where: str) -> Any:
    """The storage at the path of a journal file, or at ``postgresql+psycopg://user@host:port/database``.

    Raises a Fault for any other address, one with a password in it, which would lie about in files and reports, a
    database that cannot be reached, and where Optuna or psycopg is not installed.
    """
    optuna = import_optuna("--storage needs Optuna, not installed here:")
    if "://" not in where:
        return _open_journal(Path(where))
    check_address(where)
    try:
        import psycopg  # noqa: F401
    except ImportError:
        raise Fault(f"--storage {where}: needs psycopg, not installed here: pip install -e '.[postgres]'") from None
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return optuna.storages.get_storage(optuna.storages.RDBStorage(where, engine_kwargs={"pool_pre_ping": True}))
    except SQLAlchemyError as problem:
        reason = str(problem.__cause__ or problem).splitlines()[0]
        raise Fault(f"--storage {where}: cannot be reached: {reason}") from None


def check_address(where: str) -> None:
    """Raises a Fault for an address of another kind, or with a password in it. A path is right."""
    if "://" not in where:
        return
    parts = urlsplit(where)
    if parts.scheme != POSTGRES:
        raise Fault(f"--storage {parts.scheme}://...: a path of a journal file, or {POSTGRES}://user@host/database")
    if parts.password is not None:
        raise Fault("--storage: has a password in it, which would lie in config.yaml; PGPASSWORD or ~/.pgpass holds it")


def _open_journal(path: Path) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    if not path.parent.is_dir():
        raise Fault(f"--storage {path}: there is no folder {path.parent}")
    path.touch()
    try:
        import fcntl  # noqa: F401
    except ImportError:
        return JournalStorage(JournalFileBackend(str(path)))
    lock: Any = FileLock(path, open(f"{path}.lock", "ab"))  # noqa: SIM115  held as long as the storage
    return JournalStorage(JournalFileBackend(str(path), lock))


def create(storage: Any, name: str, space: SearchSpace, objectives: int = 2, **rhythm: float) -> Queue:
    """The study of that name, made where there is none: the first value to be large, the others small.

    For the parent alone: two processes that both make the tables of a fresh database would fail.
    """
    import optuna

    up, down = optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE
    directions = [up] + [down] * (objectives - 1)
    optuna.create_study(study_name=name, storage=storage, directions=directions, load_if_exists=True)
    queue = join(storage, name, space, "", **rhythm)
    storage.set_study_user_attr(queue.study, "parent", queue.owner)
    storage.set_study_user_attr(queue.study, "closed", False)
    return queue


def join(storage: Any, name: str, space: SearchSpace, owner: str = "", **rhythm: float) -> Queue:
    """The study of that name that the parent has made. Raises a Fault where there is none."""
    try:
        study = storage.get_study_id_from_name(name)
    except KeyError:
        raise Fault(f"--storage: has no study {name!r}; the search creates it when it begins to judge") from None
    here = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(3)}"
    return Queue(storage, study, space, owner or here, **rhythm)


def close(queue: Queue) -> None:
    """Tells the workers that no more will be wanted."""
    queue.storage.set_study_user_attr(queue.study, "closed", True)


# ---- trials


def trials_of(queue: Queue) -> list[Any]:
    """All trials as Optuna has them, in their order."""
    found: list[Any] = queue.storage.get_all_trials(queue.study, deepcopy=False)
    return found


def subnet_of(queue: Queue, trial: Any) -> Architecture:
    return queue.space.at(int(trial.user_attrs["subnet"]))


def outcome_of(trial: Any) -> Outcome | None:
    """What is known of a finished trial; None of another."""
    from optuna.trial import TrialState

    if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
        return None
    return Outcome(tuple(trial.values or ()), trial.user_attrs["found"], trial.state == TrialState.PRUNED)


def finished(queue: Queue) -> dict[Architecture, tuple[Mapping[str, Any], Outcome]]:
    """What the parent said of every finished subnet, and what was found of it."""
    told = {}
    for trial in trials_of(queue):
        outcome = outcome_of(trial)
        if outcome is not None:
            told[subnet_of(queue, trial)] = (trial.user_attrs["known"], outcome)
    return told


def post(queue: Queue, one: Architecture, known: Mapping[str, Any]) -> None:
    """Adds a waiting trial."""
    import optuna

    options = {choice.name: [repr(option) for option in choice.options] for choice in queue.space.choices}
    queue.storage.create_new_trial(
        queue.study,
        template_trial=optuna.trial.create_trial(
            state=optuna.trial.TrialState.WAITING,
            params={choice.name: repr(one.picks[choice.name]) for choice in queue.space.choices},
            distributions={n: optuna.distributions.CategoricalDistribution(o) for n, o in options.items()},
            user_attrs={"subnet": str(queue.space.index(one)), "known": dict(known)},
        ),
    )


def take(queue: Queue, trials: Sequence[Any], most: int) -> list[Ticket]:
    """Some of the waiting trials, now running here and nowhere else: at most `most`, and few where others want some."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
    others = {trial.user_attrs["by"] for trial in trials[-RECENT:] if "by" in trial.user_attrs} - {queue.owner}
    # Half of its share: who takes all of it at once lets others wait at the end. Alone there is nobody to wait.
    share = math.ceil(len(waiting) / (2 * len(others) + 2)) if others else len(waiting)
    taken: list[Ticket] = []
    for trial in waiting:
        if len(taken) >= min(share, most, HANDFUL):
            break
        number = queue.storage.get_trial_id_from_study_id_trial_number(queue.study, trial.number)
        with suppress(UpdateFinishedTrialError):
            if queue.storage.set_trial_state_values(number, TrialState.RUNNING):
                queue.storage.set_trial_user_attr(number, "by", queue.owner)
                taken.append(Ticket(number, subnet_of(queue, trial), trial.user_attrs["known"]))
    return taken


def tell(queue: Queue, ticket: Ticket, outcome: Outcome) -> bool:
    """Finishes a trial; False where this process was thought gone, and the trial is another one's now."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    try:
        queue.storage.set_trial_user_attr(ticket.id, "found", dict(outcome.facts))
        state = TrialState.PRUNED if outcome.pruned else TrialState.COMPLETE
        queue.storage.set_trial_state_values(ticket.id, state, outcome.values)
    except UpdateFinishedTrialError:
        return False
    return True


def give_back(queue: Queue, trial_id: int) -> None:
    """Fails a running trial, so that the parent adds its subnet again."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    with suppress(UpdateFinishedTrialError):
        queue.storage.set_trial_state_values(trial_id, TrialState.FAIL)


# ---- processes


@contextmanager
def beating(queue: Queue) -> Iterator[None]:
    """Raises this process's number as long as it lasts. It is the parent's to hold it around all that it does from
    `create` to `close`, not around `gather` alone: workers leave a parent without beats.
    """
    stop = threading.Event()

    def beat() -> None:
        while True:
            now = time.monotonic_ns()  # not a count, which a second `beating` would begin anew: it seems to stand still
            with suppress(Exception):  # a storage that is away for a moment: the next beat tells as much
                queue.storage.set_study_user_attr(queue.study, f"beat {queue.owner}", now)
            if stop.wait(queue.beat):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def gone(owner: str, beats: Mapping[str, Any], seen: dict[str, tuple[Any, float]], grace: float) -> bool:
    """Whether a process lives no more: it was of this machine and is not there, or its beats stand still for `grace`
    seconds. `seen` is when each beat was first found at its present value, by the clock of this process.
    """
    host, number, *_ = [*owner.split(), "", ""]
    if os.name == "posix" and host == socket.gethostname() and number.isdecimal():
        try:
            os.kill(int(number), 0)  # sends nothing
        except ProcessLookupError:
            return True
        except OSError:
            pass
    beat, now = beats.get(f"beat {owner}"), time.monotonic()
    if owner not in seen or seen[owner][0] != beat:
        seen[owner] = (beat, now)
    return now - seen[owner][1] > grace


def gather(
    queue: Queue,
    wanted: Mapping[Architecture, Mapping[str, Any]],
    evaluate: Evaluate,
    done: Callable[[Architecture, Outcome], None],
    limits: Limits,
) -> None:
    """The parent's part: until each of the `wanted` subnets is finished, here or in any worker. What it maps to goes
    along with it. ``done(subnet, outcome)`` hears of each once, in no certain order; of those finished before at once.
    Where workers may help, it runs inside `beating`.

    Raises TimeoutError where a limit leaves this process none of those that are open.
    """
    from optuna.trial import TrialState

    heard: set[Architecture] = set()

    def hear(trials: Sequence[Any]) -> bool:
        """Tells of what is new among them; whether anything is."""
        before = len(heard)
        for trial in trials:
            one, outcome = subnet_of(queue, trial), outcome_of(trial)
            if outcome is not None and one in wanted and one not in heard:
                done(one, outcome)
                heard.add(one)
        return len(heard) > before

    seen: dict[str, tuple[Any, float]] = {}
    pause = PAUSE[0]
    while True:
        trials = trials_of(queue)
        if hear(trials):
            pause = PAUSE[0]
        beats = queue.storage.get_study_user_attrs(queue.study)
        living = set()
        for trial in trials:
            if trial.state == TrialState.RUNNING:
                by = trial.user_attrs.get("by", f"trial {trial.number}")  # taken just now, or by who died at once
                if gone(by, beats, seen, queue.grace):
                    number = queue.storage.get_trial_id_from_study_id_trial_number(queue.study, trial.number)
                    give_back(queue, number)
                    continue
            if trial.state != TrialState.FAIL:
                living.add(subnet_of(queue, trial))
        if len(heard) == len(wanted):
            return
        left = limits.left(own(queue, trials))
        missing = [one for one in wanted if one not in living]
        for one in missing:
            post(queue, one, wanted[one])
        tickets = take(queue, trials_of(queue) if missing else trials, left)
        if tickets:
            try:
                _evaluated(queue, tickets, evaluate)
            finally:  # Ctrl-C in the middle of a handful: some of it is finished
                hear(trials_of(queue))
        elif not missing:
            time.sleep(pause)
            pause = min(2 * pause, PAUSE[1])


def work(queue: Queue, evaluate: Evaluate, limits: Limits) -> int:
    """A worker's part: takes what waits, until the parent closes the study or is gone, or a limit is reached. Returns
    how many trials it finished.
    """
    pause = PAUSE[0]
    seen: dict[str, tuple[Any, float]] = {}
    with beating(queue):
        while True:
            about = queue.storage.get_study_user_attrs(queue.study)
            trials = trials_of(queue)
            count = own(queue, trials)
            if about.get("closed") or gone(about.get("parent", ""), about, seen, PARENT_AWAY * queue.grace):
                return count
            try:
                tickets = take(queue, trials, limits.left(count))
            except TimeoutError:
                return count
            if tickets:
                _evaluated(queue, tickets, evaluate)
                pause = PAUSE[0]
            else:
                time.sleep(pause)
                pause = min(2 * pause, PAUSE[1])


def own(queue: Queue, trials: Sequence[Any]) -> int:
    """How many of the finished trials this process has judged."""
    return sum(trial.user_attrs.get("by") == queue.owner and outcome_of(trial) is not None for trial in trials)


def _evaluated(queue: Queue, tickets: Sequence[Ticket], evaluate: Evaluate) -> None:
    """Judges tickets; those that an error or Ctrl-C leaves are given back."""
    left = {ticket.id for ticket in tickets}

    def told(ticket: Ticket, outcome: Outcome) -> None:
        tell(queue, ticket, outcome)
        left.discard(ticket.id)

    try:
        evaluate(tickets, told)
    finally:
        for number in left:
            give_back(queue, number)
