"""What a run would do, and about how long it would take and how much memory: nothing is edited and nothing written.

Times are those of one short pass, scaled by how many tokens each phase reads: they tell minutes from hours, and are
right to a factor of two or so on a quiet machine. Memory is reckoned from shapes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from patchkit import methods
from patchkit.editing.contexts import TOKENS
from patchkit.editing.editor import solve_batch_size
from patchkit.editing.recipe import EditConfig
from patchkit.editing.session import Plan, plan
from patchkit.editing.suffixes import ASKED, KEPT, Room
from patchkit.editing.teacher import LEADS, SAMPLES
from patchkit.editing.teacher import TOKENS as REWORDING_TOKENS
from patchkit.editing.wordings import KEPT as KEPT_TOKENS
from patchkit.editing.wordings import NEUTRAL, NEUTRAL_CHAT
from patchkit.evaluate.interview import ABOUT_TOKENS, ANSWER_TOKENS
from patchkit.evaluate.prompts import ABOUT_BEGINNINGS, UNRELATED_BEGINNINGS, UNRELATED_QUESTIONS
from patchkit.facts.batches import batches
from patchkit.facts.requests import Row, wording_row
from patchkit.facts.schema import Fact
from patchkit.model.weights import Site
from patchkit.runs.prepare import Prepared
from patchkit.runs.workspace import Workspace
from patchkit.statistics.moments import are_stored

_PASS = (8, 32)
"""Rows and tokens of the pass that is timed."""
_BACKWARD = 3
"""What a step of the value optimizer costs, in passes: forward and backward."""
_EIGH = 12e-9
"""Seconds per d_in³ of factorizing second moments once, on one core."""


class PlannedFact(BaseModel):
    """A fact that would be edited: its tokens, from which to which the subject's last one and the target are."""

    model_config = ConfigDict(frozen=True)
    id: str
    line: int
    prompt: str
    subject: str
    target_new: str
    tokens: tuple[str, ...]
    subject_token: int
    target_tokens: tuple[int, int]


class PlannedWeight(BaseModel):
    """A weight that would be edited."""

    model_config = ConfigDict(frozen=True)
    layer: int
    weight: str
    d_in: int
    d_out: int


class PlannedRun(BaseModel):
    """What `patchkit apply --dry-run --json` prints.

    seconds: by phase, statistics being 0 where they are stored already; memory: bytes in all at the peak.
    """

    model_config = ConfigDict(frozen=True)
    method: str
    facts: tuple[PlannedFact, ...]
    skipped: tuple[str, ...]
    superseded: dict[str, str]
    weights: tuple[PlannedWeight, ...]
    batches: tuple[int, ...]
    statistics_stored: bool
    seconds: dict[str, float]
    memory: int
    device: str


@torch.no_grad()
def planned(prepared: Prepared, workspace: Workspace, quick: bool = False) -> PlannedRun:
    """What `patchkit.runs.execute.run` and measuring after it would do.

    Args:
        quick: measuring would leave out what the model writes texts for.

    Raises:
        InputError: the text or the model cannot be used.
    """
    how, config = plan(workspace.runner.arch, prepared.config), prepared.config
    facts, stored = prepared.incoming.new, _is_stored(workspace, config, how)
    lines = {fact.id: line for fact, line in zip(prepared.read.facts, prepared.read.lines, strict=True)}
    rows = [wording_row(fact, workspace.tokenizer, "", fact.prompt) for fact in facts]
    return PlannedRun(
        method=config.method,
        facts=tuple(
            _fact(fact, row, lines[fact.id], workspace.tokenizer) for fact, row in zip(facts, rows, strict=True)
        ),
        skipped=prepared.incoming.skipped,
        superseded=dict(prepared.incoming.superseded),
        weights=tuple(_weight(site) for site in how.sites),
        batches=tuple(len(batch) for batch in batches(facts, solve_batch_size(config))),
        statistics_stored=stored,
        seconds=_seconds(workspace, config, how, rows, stored, quick),
        memory=_memory(workspace, how),
        device=str(workspace.runner.device),
    )


def _fact(fact: Fact, row: Row, line: int, tokenizer: Any) -> PlannedFact:
    return PlannedFact(
        id=fact.id,
        line=line,
        prompt=fact.prompt,
        subject=fact.subject,
        target_new=fact.target_new,
        tokens=tuple(tokenizer.convert_ids_to_tokens(list(row.ids))),
        subject_token=row.subject,
        target_tokens=(row.target, len(row.ids)),
    )


def _weight(site: Site) -> PlannedWeight:
    return PlannedWeight(layer=site.layer, weight=site.weight_name, d_in=site.d_in, d_out=site.d_out)


def _is_stored(workspace: Workspace, config: EditConfig, how: Plan) -> bool:
    """Whether no second moments would have to be computed."""
    if not methods.get(config.method).needs_statistics:
        return True
    corpus = workspace.corpus(workspace.texts[0], config.uses_chat)
    return are_stored(workspace.runner, how.sites, corpus, workspace.stats)


def _seconds(
    workspace: Workspace, config: EditConfig, how: Plan, rows: Sequence[Row], stored: bool, quick: bool
) -> dict[str, float]:
    """By phase, from the tokens that it reads and the share of the layers that it runs."""
    token, method, in_use = (
        _seconds_per_token(workspace),
        methods.get(config.method),
        config.in_use(workspace.tokenizer),
    )
    length, count = sum(len(row.ids) for row in rows) / max(1, len(rows)), len(rows)
    below = (how.layers[-1] + 1) / workspace.runner.depth
    found = {"statistics": 0.0, "contexts": 0.0, "values": 0.0}
    if not stored:
        corpus = workspace.corpus(workspace.texts[0], config.uses_chat)
        found["statistics"] = corpus.tokens * token * below + sum(
            _EIGH * site.blocks * site.width**3 for site in how.sites
        )
    if method.targets == "values":
        written = len(LEADS) * SAMPLES * (length + REWORDING_TOKENS) + (len(NEUTRAL) + len(NEUTRAL_CHAT)) * KEPT_TOKENS
        plain = config.contexts * (length + TOKENS)
        looked_at = ASKED + KEPT if in_use else config.contexts + 2
        tokens = looked_at * (length + (KEPT_TOKENS if in_use else 0))
        found["contexts"] = count * token * (written if in_use else plain)
        steps = config.value.pace(in_use).steps
        found["values"] = count * token * steps * _BACKWARD * tokens * (1 - how.layers[-1] / workspace.runner.depth)
    found["measuring"] = token * _measured(count, length, quick)
    return {phase: round(spent, 1) for phase, spent in found.items()}


def _measured(count: int, length: float, quick: bool) -> float:
    """Tokens read, the base's pass and the patched model's."""
    tokens = 2 * count * 3 * length
    if quick:
        return tokens
    asks = count * (3 * ANSWER_TOKENS + 2 * len(ABOUT_BEGINNINGS) * ABOUT_TOKENS)
    return tokens + 2 * (asks + (len(UNRELATED_QUESTIONS) + len(UNRELATED_BEGINNINGS)) * ANSWER_TOKENS)


def _seconds_per_token(workspace: Workspace) -> float:
    """Of a pass through the whole model, the second of two."""
    rows, tokens = _PASS
    ids = torch.zeros(rows, tokens, dtype=torch.long, device=workspace.runner.device)
    spent = 0.0
    for _ in range(2):
        began = time.perf_counter()
        workspace.runner.run({"input_ids": ids, "use_cache": False})
        if ids.is_cuda:
            torch.cuda.synchronize()
        spent = time.perf_counter() - began
    return spent / (rows * tokens)


def _memory(workspace: Workspace, how: Plan) -> int:
    """The model, the second moments of all sites with their factorizations, and the logits of a bucket with the
    gradient's."""
    weights = sum(each.numel() * each.element_size() for each in workspace.model.parameters())
    statistics = sum(3 * 8 * site.blocks * site.width**2 for site in how.sites)
    return weights + statistics + 3 * 4 * Room.on(workspace.runner.device).logits
