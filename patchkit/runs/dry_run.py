"""What a run would do, and about how long it would take and how much memory: nothing is edited and nothing written.

Times are those of a few short passes, scaled by how many of them each phase makes (`patchkit.runs.forecast`); memory is
reckoned from shapes. `python -m tests.benchmarks.planned` compares them with what runs take (docs/scale.md).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from patchkit import methods
from patchkit.editing.editor import frozen, solve_batch_size
from patchkit.editing.recipe import EditConfig
from patchkit.editing.room import are_stored as rooms_are_stored
from patchkit.editing.session import Plan, plan
from patchkit.editing.suffixes import free_memory
from patchkit.editing.wordings import template_for
from patchkit.facts.batches import batches
from patchkit.facts.requests import Row, wording_row
from patchkit.facts.schema import Fact
from patchkit.model.devices import home_of
from patchkit.model.weights import Site
from patchkit.runs.footprint import passes_bytes
from patchkit.runs.forecast import Forecast, Stored, projects
from patchkit.runs.prepare import Prepared
from patchkit.runs.settle import settle
from patchkit.runs.speed import Speed
from patchkit.runs.workspace import Workspace
from patchkit.statistics.corpus import Corpus
from patchkit.statistics.moments import are_stored, leading_are_stored

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
    they are for; neurons: subjects get some of their own, so that what leads into the feed-forward of the same layers
    is written too; weights_on: by device, the bytes of the model's weights that lie there; free: bytes that the run's
    device has for all else.
    """

    model_config = ConfigDict(frozen=True)
    method: str
    facts: tuple[PlannedFact, ...]
    skipped: tuple[str, ...]
    superseded: dict[str, str]
    weights: tuple[PlannedWeight, ...]
    neurons: bool
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
        """Whether the device has room for what is not there yet."""
        return self.memory - self.parts["weights"] - self.parts["program"] <= self.free


@torch.no_grad()
def planned(prepared: Prepared, workspace: Workspace, quick: bool = False, start: float = 0.0) -> PlannedRun:
    """What `patchkit.runs.execute.run` and measuring after it would do.

    Args:
        quick: measuring would leave out what the model writes texts for.
        start: seconds that it took to come here, which the run takes as well.

    Raises:
        InputError: the text or the model cannot be used.
    """
    config = settle(prepared, workspace)
    how = plan(workspace.runner.arch, config)
    facts, corpus = prepared.incoming.new, workspace.corpus(workspace.texts[0], config.uses_chat)
    stored = _stored(workspace, config, how, corpus)
    forecast = _forecast(workspace, config, how, facts)
    lines = {fact.id: line for fact, line in zip(prepared.read.facts, prepared.read.lines, strict=True)}
    rows = [wording_row(fact, workspace.tokenizer, "", fact.prompt) for fact in facts]
    parts, seconds = _memory(workspace, forecast, stored), forecast.seconds(corpus, stored, quick)
    return PlannedRun(
        method=config.method,
        facts=tuple(
            _fact(fact, row, lines[fact.id], workspace.tokenizer) for fact, row in zip(facts, rows, strict=True)
        ),
        skipped=tuple(prepared.incoming.skipped.values()),
        superseded=dict(prepared.incoming.superseded),
        weights=tuple(_weight(site) for site in how.sites),
        neurons=config.neurons == "on",
        batches=tuple(len(batch) for batch in batches(facts, solve_batch_size(config))),
        statistics_stored=stored.moments,
        seconds={phase: round(spent, 1) for phase, spent in {"start": start, **seconds}.items()},
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


def _forecast(workspace: Workspace, config: EditConfig, how: Plan, facts: Sequence[Fact]) -> Forecast:
    with frozen(workspace.model):
        speed = Speed.of(workspace.runner, how.sites[0], config.value.products == "bfloat16")
        return Forecast(workspace, config, how, facts, speed)


def _stored(workspace: Workspace, config: EditConfig, how: Plan, corpus: Corpus) -> Stored:
    energy, runner = config.settings.get("null_energy"), workspace.runner
    chat = template_for(workspace.tokenizer, config)
    needed = methods.get(config.method).needs_statistics or config.neurons == "on"
    moments = not needed or are_stored(runner, how.sites, corpus, workspace.stats)
    return Stored(
        moments,
        moments and energy is not None and leading_are_stored(runner, how.sites, corpus, energy, workspace.stats),
        config.neurons != "on" or rooms_are_stored(runner, how.sites, corpus, chat, workspace.stats),
    )


def _memory(workspace: Workspace, forecast: Forecast, stored: Stored) -> dict[str, int]:
    """What a run holds at its peak, in bytes: the model; second moments of all sites in float32; what is factored of
    them, in float64, with what factoring one of them takes; what its passes hold; and the program itself."""
    config, how = forecast.config, forecast.plan
    found = {"weights": sum(_weights_on(workspace).values()), "second moments": 0, "factors": 0}
    if methods.get(config.method).needs_statistics or config.neurons == "on":
        found["second moments"] = second_moments_bytes(how.sites)
        found["factors"] = factors_bytes(how.sites, projects(config))
    found["passes"] = passes_bytes(
        workspace.runner, config, how, forecast.requests, forecast.in_use, not stored.neurons
    )
    found["program"] = _program(found["weights"]) if workspace.runner.device.type == "cpu" else 0
    return found


def _program(weights: int) -> int:
    """Bytes that this process holds beside a model's weights, as the run will; 0 where the system does not tell."""
    pages = Path("/proc/self/statm")
    held = int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.is_file() else 0
    return max(0, held - weights)


def second_moments_bytes(sites: Sequence[Site]) -> int:
    """Of the second moments of sites as they lie in memory: float32; of experts in float64, with all eigenvectors."""
    return sum((4 if site.blocks == 1 else 16) * site.blocks * site.width**2 for site in sites)


def factors_bytes(sites: Sequence[Site], null_space: bool) -> int:
    """Of what methods factor of them: a Cholesky factor of each, or the leading eigenvectors; and, while all
    eigenvectors of the widest are computed, three matrices of its size."""
    widths = [site.width for site in sites if site.blocks == 1]
    if not widths:
        return 0
    kept = sum(8 * int((_DIRECTIONS if null_space else 1) * width * width) for width in widths)
    return kept + (3 if null_space else 1) * 8 * max(widths) ** 2


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
