"""General abilities beside the facts: tasks of lm-eval (EleutherAI's harness), asked of the live patched model.

The task `factworld` comes with patchkit and needs no network; others are lm-eval's own, which reads their data from the
Hub. What is not given here is as lm-eval has it by itself: the task's own number of examples, and no chat template.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from patchkit.bench.records import SHARES, Ability, Result
from patchkit.editing.editor import Progress
from patchkit.errors import InputError

SHIPPED = Path(__file__).parent / "tasks"
SEED = 1234
"""Of the choice of examples, as in lm-eval."""
BATCH = 16
_CHUNK = 16 * BATCH
"""Requests from one note of progress to the next."""
_RESAMPLED = 1000
"""Samples behind the standard errors of what has no formula for them."""


@dataclass(frozen=True)
class Abilities:
    """Tasks to ask: their names, and how many of each one's questions, the first ones; None for all.

    Attributes:
        loaded: what lm-eval knows of each task, by its name.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    loaded: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, tasks: Sequence[str], limit: int | None = None) -> Abilities:
        """Tasks, ready to be asked.

        Raises:
            InputError: lm-eval is missing, it has no task of that name, or the task's data cannot be read.
        """
        if find_spec("lm_eval") is None:
            raise InputError('--abilities: the package lm-eval is missing; pip install "patchkit-lm[abilities]"')
        from lm_eval.tasks import TaskManager

        with _quiet():
            own = all((SHIPPED / f"{task}.yaml").is_file() for task in tasks)  # lm-eval's own are thousands of files
            manager = TaskManager(include_path=str(SHIPPED), include_defaults=not own)
            return cls(tuple(tasks), limit, {task: known_task(manager, task) for task in dict.fromkeys(tasks)})

    def lacking(self, row: Result) -> list[str]:
        """Tasks that a row has nothing of, or something on another number of questions."""
        there = {(each.asked, each.limit) for each in row.abilities.values()}
        return [task for task in self.loaded if (task, self.limit) not in there]

    def ask(self, task: str, model: PreTrainedModel, tokenizer: Any, progress: Progress) -> dict[str, Ability]:
        """What the model makes of a task as it is now, hooks and all: by the names of those of lm-eval's results that
        stand for it, more than one where the name stands for several tasks.

        Raises:
            InputError: lm-eval cannot ask this model.
        """
        from lm_eval.evaluator import evaluate

        loaded = self.loaded[task]
        with _quiet(), _own_numbers():
            for each in loaded["tasks"].values():  # as lm-eval's simple_evaluate does
                if each.get_config("num_fewshot") is None:
                    each.set_config(key="num_fewshot", value=0)
                each.set_fewshot_seed(seed=SEED)
            asked = _asked_model(model, tokenizer, lambda done, total: progress(task, done, total))
            try:
                found = evaluate(asked, loaded, limit=self.limit, bootstrap_iters=_RESAMPLED, log_samples=False)
            except (ValueError, NotImplementedError, OSError) as error:
                raise InputError(f"--abilities {task}: {_line(error)}") from error
        assert found is not None  # None in processes other than the first
        return _abilities(task, found, self.limit)


def known_task(manager: Any, task: str) -> Any:
    """What lm-eval's manager of tasks knows of one, its questions read; raises InputError where it cannot be asked."""
    if task not in manager.all_tasks:
        raise InputError(f"--abilities {task}: lm-eval has no such task; `lm-eval ls tasks` lists them")
    try:
        return manager.load([task])
    except Exception as error:  # what reading a task's data from the Hub raises is no closed list
        raise InputError(f"--abilities {task}: its questions cannot be read: {_line(error)}") from error


def _line(error: Exception) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _abilities(task: str, found: Mapping[str, Any], limit: int | None) -> dict[str, Ability]:
    results = found["results"]
    alone = any(map(_is_number, results.get(task, {}).items()))  # not where the name stands for several tasks
    names = [task] if alone else [name for name in results if name != task]
    known = {}
    for name in names:
        numbers = {key: float(value) for key, value in results[name].items() if _is_number((key, value))}
        metrics = {key: value for key, value in numbers.items() if "_stderr," not in key}
        if not metrics:
            continue
        metric = next((key for first in SHARES for key in metrics if key.split(",")[0] == first), next(iter(metrics)))
        known[name] = Ability(
            asked=task,
            limit=limit,
            metric=metric,
            value=metrics[metric],
            stderr=numbers.get(metric.replace(",", "_stderr,", 1)),
            questions=_questions(name, found),
            numbers=numbers,
            version=str(found["versions"].get(name, "")),
        )
    return known


def _is_number(item: tuple[str, Any]) -> bool:
    """Whether an entry of lm-eval's results is a metric's, such as "acc,none" (its filter after the comma)."""
    key, value = item
    return "," in key and isinstance(value, int | float)


def _questions(name: str, found: Mapping[str, Any]) -> int:
    """On how many a result stands; of a group, on those of its tasks."""
    counts, below = found["n-samples"], found.get("group_subtasks", {}).get(name, ())
    return counts[name]["effective"] if name in counts else sum(_questions(each, found) for each in below)


def _asked_model(model: PreTrainedModel, tokenizer: Any, progress: Any) -> Any:
    """lm-eval's own wrapper around a model in memory, which reports how far it is and draws no bars."""
    from lm_eval.models.huggingface import HFLM

    class Asked(HFLM):  # type: ignore[misc]
        """In pieces; requests of one length still go together within each."""

        def _in_pieces(self, ask: Any, requests: Sequence[Any]) -> Iterator[Any]:
            for first in range(0, len(requests), _CHUNK):
                yield from ask(requests[first : first + _CHUNK], disable_tqdm=True)
                progress(min(first + _CHUNK, len(requests)), len(requests))

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return list(self._in_pieces(super().loglikelihood, requests))

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return list(self._in_pieces(super().loglikelihood_rolling, requests))

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return list(self._in_pieces(super().generate_until, requests))

    # A copy, since lm-eval gives a tokenizer without a padding token one.
    return Asked(pretrained=model, tokenizer=deepcopy(tokenizer), batch_size=BATCH)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what lm-eval and the reading of data note and draw on the way."""
    from lm_eval.api import task as tasks

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels, bar = [logger.level for logger in loggers], tasks.tqdm
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    tasks.tqdm = partial(bar, disable=True)  # it has no option for this
    try:
        yield
    finally:
        tasks.tqdm = bar
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _own_numbers() -> Iterator[None]:
    """Random numbers from lm-eval's seeds inside, since some tasks shuffle by them, and as they were afterward."""
    state, array_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(array_state)
