"""How fast this machine runs a model, from a few short passes of each kind that runs are made of."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import nn

from patchkit.model.devices import solve_device
from patchkit.model.forward import LayerRunner
from patchkit.model.prefix import Prefix
from patchkit.model.weights import Site

_TIMES = 3
"""Of each pass, the one in the middle of which counts, after a first one that is slower than all others."""
_FEW, _MANY = (2, 8), (16, 16)
"""Rows and tokens of the passes that are timed."""
_WRITTEN = (1, 8, 128)
"""Rows of passes that write."""
_KNOWN = 16
"""Tokens of what comes before, where something does."""
_CHOICES = 40
_PRODUCT = 512
"""Size of the product that tells how fast the solve device multiplies in float64."""


@dataclass(frozen=True)
class Cost:
    """Seconds of a kind of pass: of any, and more for each token and for each prediction."""

    a_pass: float
    a_token: float
    a_point: float = 0.0

    def of(self, tokens: float, passes: float = 1, points: float = 0) -> float:
        """Those of some passes with so many tokens and predictions in all."""
        return passes * self.a_pass + tokens * self.a_token + points * self.a_point


@dataclass(frozen=True)
class Writing:
    """Seconds of a pass that writes a token a row, after others, at some numbers of rows, ascending. They are no line:
    few rows are multiplied otherwise than many."""

    known: tuple[tuple[int, float], ...]

    def of(self, rows: float) -> float:
        """Of a pass over so many rows: on the line through the two nearest."""
        above = next((place for place, (at, _) in enumerate(self.known) if at >= rows), len(self.known) - 1)
        (few, less), (many, more) = self.known[max(0, above - 1)], self.known[max(1, above)]
        return max(0.0, less + (rows - few) * (more - less) / (many - few))


@dataclass(frozen=True)
class Speed:
    """Seconds of what runs do.

    Attributes:
        read: passes through all layers; predictions are the head's.
        write: passes that draw what comes next.
        step: forward and backward passes through the layers above a site.
        operation: a multiplication and addition in a product of matrices in float64, where solves are made.
    """

    read: Cost
    write: Writing
    step: Cost
    operation: float

    @classmethod
    def of(cls, runner: LayerRunner, site: Site, in_16_bits: bool = False) -> Speed:
        """On the machine as it is now, steps in 16 bits where that is asked; the model is frozen."""
        return cls(_read(runner), _write(runner), _step(runner, site.layer + 1, in_16_bits), _operation(site))


def _typical(work: Callable[[int], object], device: torch.device) -> float:
    """Seconds of the clock; on a CPU those of the processor where they are fewer, as where it does other work.

    `work` is told by how many tokens to differ: a shape that was not met before costs more, and runs meet many.
    """
    found = []
    for more in range(-1, _TIMES):
        began, used = time.perf_counter(), time.process_time()
        work(more)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent = time.perf_counter() - began
        found.append(min(spent, time.process_time() - used) if device.type == "cpu" else spent)
    return median(found[1:])


def _line(few: tuple[float, float], many: tuple[float, float]) -> Cost:
    """From the tokens and seconds of two passes."""
    slope = max(0.0, (many[1] - few[1]) / (many[0] - few[0]))
    return Cost(max(0.0, few[1] - slope * few[0]), slope)


def _ids(runner: LayerRunner, rows: int, tokens: int) -> torch.Tensor:
    draws = torch.Generator().manual_seed(rows)
    return torch.randint(0, runner.vocabulary, (rows, tokens), generator=draws).to(runner.device)


@torch.no_grad()
def _read(runner: LayerRunner) -> Cost:
    def seconds(shape: tuple[int, int], stop: int | None) -> float:
        def read(more: int) -> None:
            runner.run({"input_ids": _ids(runner, shape[0], shape[1] + more), "use_cache": False}, stop=stop)

        return _typical(read, runner.device)

    few, many = (seconds(shape, runner.depth) for shape in (_FEW, _MANY))
    points = _MANY[0] * _MANY[1]
    line = _line((_FEW[0] * _FEW[1], few), (points, many))
    return Cost(line.a_pass, line.a_token, max(0.0, seconds(_MANY, None) - many) / points)


@torch.no_grad()
def _write(runner: LayerRunner) -> Writing:
    def seconds(rows: int) -> float:
        ids = _ids(runner, rows, _KNOWN)
        before = Prefix.read(runner, ids, torch.ones_like(ids))
        mask = torch.ones(rows, _KNOWN + 1, dtype=ids.dtype, device=ids.device)
        at = (torch.arange(rows, device=ids.device), torch.zeros(rows, dtype=torch.long, device=ids.device))

        def draw(more: int) -> None:
            inputs = {"input_ids": ids[:, :1], "attention_mask": mask, "past_key_values": before.growing_cache()}
            logits = runner.run({**inputs, "use_cache": True}, logits_at=at).logits
            assert logits is not None
            logits.float().topk(min(_CHOICES, logits.shape[1]))

        return _typical(draw, runner.device)

    return Writing(tuple((rows, seconds(rows)) for rows in _WRITTEN))


def _step(runner: LayerRunner, start: int, in_16_bits: bool) -> Cost:
    seconds = partial(step_seconds, runner, start, weights={} if in_16_bits else None)
    few, many, more = seconds(2, 8, 2), seconds(*_MANY, 2), seconds(*_MANY, 130)
    line, point = _line((16, few), (_MANY[0] * _MANY[1], many)), max(0.0, more - many) / 128
    return Cost(max(0.0, line.a_pass - 2 * point), line.a_token, point)


def step_seconds(
    runner: LayerRunner,
    start: int,
    rows: int,
    tokens: int,
    points: int,
    weights: dict[nn.Module, torch.Tensor] | None = None,
) -> float:
    """Seconds of a pass of so many rows and tokens in each, forward and backward, through the layers from `start` on
    (the last one at the least), after a prefix, with predictions at so many points; in 16 bits where there is a place
    for `weights` of that kind."""
    start, size = min(start, runner.depth - 1), runner.arch.hidden_size
    known = _ids(runner, rows, _KNOWN)
    before = Prefix.read(runner, known, torch.ones_like(known)).from_layer(start)
    at = tuple(torch.arange(points, device=known.device) % most for most in (rows, tokens - 1))

    def step(more: int) -> None:
        ids = _ids(runner, rows, tokens + more)
        leaf = torch.randn(*ids.shape, size, dtype=runner.dtype, device=ids.device, requires_grad=True)
        position = (_KNOWN + torch.arange(ids.shape[1], device=ids.device)).expand(rows, -1)
        mask = torch.ones(rows, _KNOWN + ids.shape[1], dtype=ids.dtype, device=ids.device)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position, "use_cache": True}
        inputs |= {"past_key_values": before.cache()}
        with torch.enable_grad(), nullcontext() if weights is None else runner.in_16_bits(weights):
            logits = runner.run(inputs, start=start, hidden=leaf, logits_at=at).logits  # type: ignore[arg-type]
            assert logits is not None
            torch.autograd.grad(logits.float().log_softmax(-1)[:, 0].sum(), leaf)

    return _typical(step, runner.device)


def _operation(site: Site) -> float:
    device = solve_device(site.module)
    matrix = torch.ones(_PRODUCT, _PRODUCT, dtype=torch.float64, device=device)
    return _typical(lambda _: float((matrix @ matrix)[0, 0]), device) / _PRODUCT**3
