"""A process that helps a search with its judging, from any machine that has the search's folder and its images."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from data.config import read_data_spec
from data.dataset import ImageSet
from data.structures import Fault
from engine.config import MOVABLE, checked, option_name, read_options
from engine.doors import parse_device
from engine.evaluate import calibration_images
from engine.prepare import augmentation, images_hash, read_labelled
from engine.tasks import task_of
from models.checkpoint import load_checkpoint
from models.supernet import Supernet
from search.config import SearchConfig
from search.costs import parse_budget
from search.find import Trial, evaluate_tickets, study_name
from search.parts import split_train
from search.space import SearchSpace
from search.storage import JOURNAL, Limits, join, open_storage, work

ABOUT = "study.json"  # in a search's folder, as soon as it judges: the study's name, and where it lies
OWN = MOVABLE - {"resume"} | {"worker", "storage", "trials", "timeout", "cache"}  # options that a worker may have
WAIT = 2.0  # seconds between two looks whether a search judges already


def help_judging(config: SearchConfig, progress: bool = True) -> int:
    """Judges subnets for the search whose folder is ``config.worker`` until it wants no more, or `config` says so.

    A worker that comes early waits until the supernet is trained. Returns how many subnets it judged. Raises a Fault
    where folder, images or options are not those of the search.
    """
    folder = config.worker
    assert folder is not None
    say: Callable[[str], None] = print if progress else lambda line: None
    if not (folder / "config.yaml").is_file():
        raise Fault(f"--worker {folder}: no folder of a search, it has no config.yaml; runs/search/exp is one")
    fixed = sorted(config.model_fields_set - OWN)
    if fixed:
        raise Fault(f"{', '.join(map(option_name, fixed))}: a worker does as its search was told; leave it out")
    here = {name: getattr(config, name) for name in config.model_fields_set}
    about = described(folder, Limits(seconds=config.timeout), say)
    began_with = read_options(folder / "config.yaml", SearchConfig)
    for name in ("storage", "trials", "timeout"):  # the parent's own
        began_with.pop(name, None)
    trial = reopened(folder, checked(SearchConfig, {**began_with, **here}, str(folder / "config.yaml")), progress)
    name = study_name(trial, folder)
    if name.split()[-1] != about["study"].split()[-1]:
        raise Fault(
            f"--worker {folder}: with last.pt, options and images as they are here, subnets would not be judged as the "
            f"search judges them ({name.split()[-1]}, not {about['study'].split()[-1]}); the same are needed"
        )
    where = config.storage or about["storage"] or str(folder / JOURNAL)
    queue = join(open_storage(where), about["study"], trial.space)
    say(f"helps {folder}, {len(trial.images)} judging images on {trial.device}")
    count = work(queue, partial(evaluate_tickets, trial), Limits(config.trials, config.timeout))
    say(f"{count} subnets judged")
    return count


def described(folder: Path, limits: Limits, say: Callable[[str], None]) -> dict[str, str]:
    """What ``study.json`` says, once it is there."""
    path, told = folder / ABOUT, False
    while not path.is_file():
        if not told:
            say(f"{folder}: does not judge yet; waits for it")
            told = True
        try:
            limits.left(0)
        except TimeoutError as stop:
            raise Fault(f"--worker {folder}: {stop}, and the search does not judge yet") from None
        time.sleep(WAIT)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: str(content[name]) for name in ("study", "storage")}
    except (ValueError, KeyError, TypeError):
        raise Fault(f"{path}: is none of a search; delete it, and go on with --resume {folder}") from None


def reopened(folder: Path, config: SearchConfig, progress: bool) -> Trial:
    """A search whose supernet is trained, as far as judging goes: without cost tables."""
    assert config.data is not None
    device = parse_device(config.device)
    checkpoint = load_checkpoint(folder / "last.pt")
    data = read_data_spec(config.data)
    samples = read_labelled(data, "train").samples
    weight_samples, judge_samples = split_train(samples, by_class=data.format == "folders")
    how = (config.seed, config.cache, False, task_of(checkpoint.spec).crops)
    weight_images = ImageSet(weight_samples, config.imgsz, augmentation(config), *how)
    judge_images = ImageSet(judge_samples, config.imgsz, None, *how)
    supernet = Supernet(checkpoint.spec, config.supernet, config.norms)
    supernet.network.load_state_dict(checkpoint.state)
    supernet.to(device)
    supernet.network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Trial(
        supernet,
        SearchSpace.of(supernet.spec),
        {},
        [parse_budget(text) for text in config.budget],
        config,
        list(calibration_images(weight_images, config.calibration, config.seed, device)),
        judge_images,
        data.names,
        device,
        progress,
        weight_images=images_hash(weight_samples),
    )
