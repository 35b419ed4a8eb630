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
from patchkit.editing.sentences import DRAWN
from patchkit.editing.sentences import TOKENS as SENTENCE_TOKENS
from patchkit.editing.session import Plan, plan
from patchkit.editing.suffixes import ASKED, KEPT, Room, free_memory
from patchkit.editing.teacher import LEADS, SAMPLES
from patchkit.editing.teacher import TOKENS as REWORDING_TOKENS
from patchkit.editing.wordings import KEPT as KEPT_TOKENS
from patchkit.editing.wordings import NEUTRAL, NEUTRAL_CHAT
from patchkit.evaluate.interview import ABOUT_TOKENS, ANSWER_TOKENS
from patchkit.evaluate.prompts import ABOUT_BEGINNINGS, UNRELATED_BEGINNINGS, UNRELATED_QUESTIONS
from patchkit.facts.batches import batches
from patchkit.facts.requests import Row, wording_row
from patchkit.facts.schema import Fact
from patchkit.model.devices import home_of, solve_device
from patchkit.model.weights import Site
from patchkit.runs.prepare import Prepared
from patchkit.runs.settle import settle
from patchkit.runs.workspace import Workspace
from patchkit.statistics.moments import are_stored

_PASS = (8, 32)
"""Rows and tokens of the pass that is timed."""
_BACKWARD = 3
"""What a step of the value optimizer costs, in passes: forward and backward."""
_EIGENVECTORS, _CHOLESKY = 10.0, 1.0
"""What all eigenvectors of second moments and a Cholesky factor of them cost, in multiplications and additions per
d_in³, at the speed of a product of matrices."""
_PRODUCT = 512
"""Size of the product that tells how fast the solve device multiplies in float64."""
_DIRECTIONS = 0.25
"""Leading eigenvectors that a null space leaves out, as a share of d_in: between 0.02 and 0.35 in models measured."""


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

    seconds: by phase, statistics being 0 where they are stored already; memory: bytes in all at the peak; parts: what
    they are for; weights_on: by device, the bytes of the model's weights that lie there; free: bytes that the run's
    device has for all else.
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
    parts: dict[str, int]
    weights_on: dict[str, int]
    free: int
    device: str

    @property
    def fits(self) -> bool:
        """Whether the device has room for what is not loaded yet."""
        return self.memory - self.parts["weights"] <= self.free


@torch.no_grad()
def planned(prepared: Prepared, workspace: Workspace, quick: bool = False) -> PlannedRun:
    """What `patchkit.runs.execute.run` and measuring after it would do.

    Args:
        quick: measuring would leave out what the model writes texts for.

    Raises:
        InputError: the text or the model cannot be used.
    """
    config = settle(prepared, workspace)
    how = plan(workspace.runner.arch, config)
    facts, stored = prepared.incoming.new, _is_stored(workspace, config, how)
    lines = {fact.id: line for fact, line in zip(prepared.read.facts, prepared.read.lines, strict=True)}
    rows = [wording_row(fact, workspace.tokenizer, "", fact.prompt) for fact in facts]
    parts = _memory(workspace, config, how)
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
        memory=sum(parts.values()),
        parts=parts,
        weights_on=_weights_on(workspace),
        free=free_memory(workspace.runner.device),
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
        factor = (_EIGENVECTORS if _projects(config) else _CHOLESKY) * _seconds_per_operation(workspace, how)
        found["statistics"] = corpus.tokens * token * below + sum(
            factor * site.blocks * site.width**3 for site in how.sites
        )
    if method.targets == "values":
        written = len(LEADS) * SAMPLES * (length + REWORDING_TOKENS) + (len(NEUTRAL) + len(NEUTRAL_CHAT)) * KEPT_TOKENS
        written += DRAWN * (length + SENTENCE_TOKENS) * bool(config.sentences)
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


def _seconds_per_operation(workspace: Workspace, how: Plan) -> float:
    """Of a product of matrices in float64 where solves are made, the second of two."""
    device = solve_device(how.sites[0].module)
    matrix, spent = torch.ones(_PRODUCT, _PRODUCT, dtype=torch.float64, device=device), 0.0
    for _ in range(2):
        began = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # waits for the device
        spent = time.perf_counter() - began
    return spent / (2 * _PRODUCT**3)


def _projects(config: EditConfig) -> bool:
    """Whether the method's solves take a null space, by its settings; the others' take C itself."""
    return bool({"null_energy", "nullspace"} & set(methods.get(config.method).config.model_fields))


def _memory(workspace: Workspace, config: EditConfig, how: Plan) -> dict[str, int]:
    """What a run holds at its peak, in bytes: the model; second moments of all sites in float32; what is factored of
    them, in float64, with what factoring one of them takes; and the logits of a bucket with the gradient's."""
    found = {"weights": sum(_weights_on(workspace).values()), "second moments": 0, "factors": 0}
    if methods.get(config.method).needs_statistics or config.neurons == "on":
        found["second moments"] = second_moments_bytes(how.sites)
        found["factors"] = factors_bytes(how.sites, _projects(config))
    return {**found, "logits": 3 * 4 * Room.on(workspace.runner.device).logits}


def second_moments_bytes(sites: Sequence[Site]) -> int:
    """Of the second moments of sites as they lie in memory: float32; of experts in float64, with all eigenvectors."""
    return sum((4 if site.blocks == 1 else 16) * site.blocks * site.width**2 for site in sites)


def factors_bytes(sites: Sequence[Site], projects: bool) -> int:
    """Of what methods factor of them: a Cholesky factor of each, or the leading eigenvectors; and, while all
    eigenvectors of the widest are computed, three matrices of its size."""
    widths = [site.width for site in sites if site.blocks == 1]
    if not widths:
        return 0
    kept = sum(8 * int((_DIRECTIONS if projects else 1) * width * width) for width in widths)
    return kept + (3 if projects else 1) * 8 * max(widths) ** 2


def _weights_on(workspace: Workspace) -> dict[str, int]:
    """By device, the bytes of the weights that compute there; those that are offloaded count where they are needed."""
    found: dict[str, int] = {}
    seen = set[int]()
    for module in workspace.model.modules():
        for weight in module.parameters(recurse=False):
            if id(weight) not in seen:  # tied weights lie there once
                seen.add(id(weight))
                where = str(home_of(module))
                found[where] = found.get(where, 0) + weight.numel() * weight.element_size()
    return found
