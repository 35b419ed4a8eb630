"""What passes hold while they run, in bytes: logits, keys and values of texts, and what neurons are weighed by.

Phases follow one another, so that the largest of them counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from patchkit import methods
from patchkit.editing import room, sampling, teacher
from patchkit.editing.recipe import EditConfig
from patchkit.editing.session import Plan
from patchkit.evaluate.divergence import LOGITS
from patchkit.evaluate.readings import EVAL_WINDOW
from patchkit.facts.requests import EditRequest
from patchkit.maths.onednn import fast_in_16_bits
from patchkit.model.forward import LayerRunner
from patchkit.model.prefix import Prefix

_TOLD = 70
"""Tokens of what a model is told and goes on with, about."""
_COPIES = 2
"""Of keys and values, where a text's beginning is read once and goes on in many ways."""
_LOGITS, _COMPARED, _TRACED = 3, 5, 5
"""Tensors of the size of all logits of a pass that are there at once: of one with a loss, of two models' side by side,
and where a token is drawn and differentiated."""
_ERRORS = 5
"""Tensors of a site's width for each token that neurons are weighed by, in float64."""


def passes_bytes(
    runner: LayerRunner, config: EditConfig, how: Plan, requests: Sequence[EditRequest], in_use: bool, rooms: bool
) -> int:
    """The most that passes of a run hold.

    Args:
        requests: the facts of a step, or all if they are fewer.
        rooms: whether it is to be found out yet which neurons may be rewritten.
    """
    token, logit = _token_bytes(runner), 4 * runner.vocabulary
    step = runner.room
    found = [_LOGITS * logit * EVAL_WINDOW, _COMPARED * min(4 * LOGITS, logit * EVAL_WINDOW)]
    if methods.get(config.method).targets == "values" and requests:
        rows = [row for each in requests for row in (*each.rows, each.essence, *each.kept)]
        before = token * sum(row.subject for row in rows)
        logits = _LOGITS * min(4 * step.logits, step.tokens * logit)
        found.append(before + logits + _rounded_bytes(runner, config, how))
        if in_use:
            texts = min(sampling.ROWS, len(requests) * len(teacher.LEADS) * teacher.SAMPLES)
            found.append(_COPIES * token * texts * (_TOLD + teacher.TOKENS))
    if rooms:
        length = room.QUESTION + room.ANSWER + 20
        felt = room.FELT * length + room.WINDOWS * 32
        found.append(_COPIES * token * min(sampling.ROWS, room.TALKS) * length)
        found.append(_TRACED * logit * room.ROWS * length)
        found.append(_ERRORS * 8 * felt * max(site.d_in for site in how.sites))
    return max(found)


def _rounded_bytes(runner: LayerRunner, config: EditConfig, how: Plan) -> int:
    """Of the weights in bfloat16 that values are sought with, of the layers above the first site."""
    rounds = runner.dtype == torch.float32 and runner.device.type == "cpu" and fast_in_16_bits()
    if config.value.products != "bfloat16" or not rounds:
        return 0
    above = runner.arch.layers[how.sites[0].layer :]
    return sum(parameter.numel() * torch.bfloat16.itemsize for layer in above for parameter in layer.parameters())


@torch.no_grad()
def _token_bytes(runner: LayerRunner) -> int:
    """Of the keys and values of a token."""
    one = torch.ones(1, 1, dtype=torch.long, device=runner.device)
    return Prefix.read(runner, one, one).token_bytes
