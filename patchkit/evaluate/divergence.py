"""How far a model's next-token distributions have moved on texts that the base wrote itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from patchkit.editing.stems import read
from patchkit.evaluate.answers import ROWS, Ask, Said, batches
from patchkit.facts.requests import pad
from patchkit.model.forward import LayerRunner, watching_output

LOGITS = 1 << 25
"""Logits held at a time."""


@torch.no_grad()
def divergences(runner: LayerRunner, said: Mapping[Ask, Said]) -> dict[Ask, float]:
    """KL(base ‖ model as it now is) in nats per token of the base's answers `said`, for each of them.

    The head makes the base's distributions again of the last layer's output, which is a thousandth of their size.
    """
    longest = max((len(own.ids) for own in said.values()), default=1)
    rows = min(ROWS, max(1, LOGITS // (runner.vocabulary * longest)))
    found: dict[Ask, float] = {}
    for batch in batches({ask: len(own.given) for ask, own in said.items()}, rows):
        answers = [said[ask] for ask in batch]
        new = _logits(runner, answers).float().log_softmax(-1)
        old = _of_states(runner, torch.cat([own.states for own in answers])).float().log_softmax(-1)
        kl = F.kl_div(new, old, reduction="none", log_target=True).sum(-1).clamp_min(0)  # (tokens of all answers,)
        parts = kl.split([len(own.ids) for own in answers])
        found |= {ask: float(part.mean()) for ask, part in zip(batch, parts, strict=True)}
    return found


@torch.no_grad()
def as_said(runner: LayerRunner, windows: Sequence[Sequence[int]]) -> dict[Ask, Said]:
    """Windows of plain text as if the model as it now is had said them, for `divergences`: the first token of each is
    given, the others are the answer."""
    found: dict[Ask, Said] = {}
    for number, window in enumerate(windows):
        states, ids = list[Tensor](), torch.tensor([list(window)], device=runner.device)
        with watching_output(runner.arch.layers[-1], 1, states.append):
            runner.run({"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False})
        said = Said("", tuple(window[:1]), tuple(window[1:]), states[0][0, :-1].clone())
        found[Ask(f"window {number}", message=False)] = said
    return found


def _logits(runner: LayerRunner, said: Sequence[Said]) -> Tensor:
    """The model's logits (tokens of all answers, vocab) where it would predict the answers' tokens."""
    before = read(runner, [own.given[:-1] for own in said])
    ids, mask = pad([(*own.given[-1:], *own.ids[:-1]) for own in said], runner.device)
    points = [(row, at) for row, own in enumerate(said) for at in range(len(own.ids))]
    rows, positions = torch.tensor(points, device=ids.device).T
    logits = runner.run(before.inputs(ids, mask), logits_at=(rows, positions)).logits
    assert logits is not None
    return logits


def _of_states(runner: LayerRunner, states: Tensor) -> Tensor:
    """The logits (points, vocab) that the last layer's output (points, d) gives."""
    ids = torch.zeros(len(states), 1, dtype=torch.long, device=runner.device)  # any token: no layer runs
    logits = runner.run({"input_ids": ids, "use_cache": False}, start=runner.depth, hidden=states[:, None]).logits
    assert logits is not None
    return logits[:, 0]
