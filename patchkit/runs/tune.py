"""How many tokens a pass of value steps takes on this device, measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from patchkit.editing.editor import Progress
from patchkit.editing.suffixes import free_memory, graph_bytes
from patchkit.errors import InputError, out_of_memory
from patchkit.model.forward import LayerRunner
from patchkit.model.tuning import Tuned, check_kept, named, remember
from patchkit.runs.speed import step_seconds

MOST = 11
"""Passes that are timed, at most."""
WIDTH = 16
"""Tokens of a row: about what a step runs of one."""
FIRST = 32
"""Tokens of the first one; each has twice as many as the one before."""
ENOUGH = 0.93
"""The share of the most tokens a second that a pass is to have: a larger one takes more memory for little."""
LONGEST = 3.0
"""Seconds: after such a pass no larger one is tried. A device that is as slow has long had enough to do in one."""


@dataclass(frozen=True)
class Trial:
    """A pass of so many tokens, and its seconds."""

    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


def tried(runner: LayerRunner, start: int, progress: Progress = lambda phase, done, total: None) -> list[Trial]:
    """Passes of value steps through the layers from `start` on, larger and larger, as long as there is memory and what
    is larger is faster. The model is frozen.

    Raises:
        InputError: there is not enough memory for two of them.
    """
    found, tokens = list[Trial](), FIRST
    most = free_memory(runner.device) / 2 / graph_bytes(runner, start)
    while len(found) < MOST and tokens <= most and not is_over(found):
        rows = tokens // WIDTH
        try:
            found.append(Trial(tokens, step_seconds(runner, start, rows, WIDTH, rows)))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            break
        progress("passes", len(found), MOST)
        tokens *= 2
    progress("passes", MOST, MOST)
    if len(found) < 2:
        raise InputError("not enough memory to time passes beside the model; free some, or choose another --device")
    return found


def is_over(found: Sequence[Trial]) -> bool:
    """Whether two larger passes in a row were not faster by a twentieth than all before, or the last took long."""
    if found and found[-1].seconds > LONGEST:
        return True
    best = max((trial.rate for trial in found[:-2]), default=None)
    return best is not None and max(trial.rate for trial in found[-2:]) < 1.05 * best


def chosen(found: Sequence[Trial]) -> Tuned:
    """The smallest pass that is about as fast as any; and how many tokens take as long as what every pass begins with,
    by the line through that one and the smallest of all."""
    fastest = max(trial.rate for trial in found)
    enough = next(trial for trial in found[1:] if trial is found[-1] or trial.rate >= ENOUGH * fastest)
    first = found[0]
    a_token = (enough.seconds - first.seconds) / (enough.tokens - first.tokens)
    begun = enough.tokens if a_token <= 0 else max(0.0, first.seconds / a_token - first.tokens)
    return Tuned(enough.tokens, round(min(begun, enough.tokens)))


class Found(BaseModel):
    """What was measured, of which device and shape of models, and the file that later runs read it from."""

    model_config = ConfigDict(frozen=True)

    device: str
    models: str
    trials: list[Trial]
    tokens: int
    a_pass: int
    file: str


def tune(runner: LayerRunner, start: int, progress: Progress = lambda phase, done, total: None) -> Found:
    """Measure passes of value steps through the layers from `start` on, and let later runs of models of this shape on
    this device use what was found. The model is frozen.

    Raises:
        InputError: there is not enough memory for two passes, or the user's cache cannot be written.
    """
    check_kept()
    trials = tried(runner, start, progress)
    best = chosen(trials)
    file = remember(runner.device, runner.arch.shape, best)
    return Found(
        device=named(runner.device),
        models=runner.arch.shape,
        trials=trials,
        tokens=best.tokens,
        a_pass=best.a_pass,
        file=str(file),
    )
