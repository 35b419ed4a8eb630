"""The manifest of a patch: its base, its facts and updates, and the history of runs that made it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from patchkit.errors import InputError
from patchkit.evaluate.report import Outcome, Summary
from patchkit.facts.schema import Fact
from patchkit.statistics.corpus import TextRecord

FORMAT_VERSION = 1


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseInfo(_Record):
    """The model a patch belongs to; `weights` maps the on-disk name of each edited weight to its digest."""

    name: str
    commit: str | None
    architecture: str
    weights: dict[str, str]

    @property
    def advice(self) -> str:
        """What to do where another model than this one was given."""
        return f"load {self.name}{f' at commit {self.commit}' if self.commit else ''}"

    def wrong_shape(self, weight: str, found: str) -> InputError:
        """The error where a weight of another shape was given, `found` saying which."""
        return InputError(f"{weight}: {found} here, another shape in the patch; {self.advice}")

    def wrong_numbers(self, weight: str) -> InputError:
        """The error where a weight of the right shape has another digest."""
        return InputError(
            f"{weight}: other numbers than in the model the patch was made for; {self.advice}, "
            "in the dtype of its files or a wider one"
        )


class EditedFact(Fact):
    """A fact in the patch, with the run and batch that wrote it, and the final loss and steps of its value.

    layers: those it was written to, where the method selects layers per fact; empty means the run's. columns: how many
    keys it has in each solve. neuron: the number of its subject's own neuron in the last of its layers, if it has one.
    """

    run: int
    batch: int
    layers: tuple[int, ...] = ()
    columns: int = 1
    neuron: int | None = None
    target_loss: float
    steps: int


class SupersededFact(EditedFact):
    """A fact whose place another one has taken, `by` being the id of that one. Its columns wait in the state."""

    by: str


class UpdateInfo(_Record):
    """One stored update of a weight of shape (d_out, d_in).

    place: its position in the weight's chain; it acts on the result of those before it. numbers: how many real numbers
    it is stored in. norm: Frobenius norm of the chain's delta up to and including it. side: of a rotation, the one it
    acts on. angles: of a rotation, the largest, median and smallest angle of its planes, in radians.
    """

    weight: str
    place: int = 0
    kind: Literal["delta", "sparse", "full", "rotation"] = "delta"
    side: Literal["left", "right"] | None = None
    angles: tuple[float, float, float] | None = None
    rank: int
    shape: tuple[int, int]
    numbers: int
    norm: float
    weight_norm: float


class Source(_Record):
    """Where an imported change came from.

    name: the adapter's folder, or the edited checkpoint. digests: sha256 of the adapter's file, or the digest of every
    edited tensor by its name. settings: what the import went by. error: the largest ‖kept - change‖/‖change‖ of a
    weight. unknown: what nobody told patchkit about the change.
    """

    kind: Literal["lora", "difference"]
    name: str
    digests: dict[str, str]
    settings: dict[str, Any]
    error: float
    unknown: tuple[str, ...] = ("facts", "method", "text that it was trained on")


class Run(_Record):
    """One entry of the history: `facts` are the ids written by an apply, or taken out by a revert.

    `superseded` maps the id of a fact that an apply replaced to that of the fact with the new target, `skipped` are the
    ids of facts that were there already, and `removed` holds what left the patch, superseded or reverted, in full. A
    fact's `run` counts from 0 in the history, which only ever grows.
    """

    action: Literal["apply", "revert", "import"]
    when: str
    method: str
    paper: str
    recipe: dict[str, Any]
    recipe_digest: str
    facts: tuple[str, ...]
    batches: tuple[int, ...]
    layers: tuple[int, ...]
    value_at: str
    contexts: tuple[str, ...]
    text: TextRecord
    seconds: dict[str, float]
    versions: dict[str, str]
    metrics: dict[str, Any] | None = None
    """patchkit.evaluate.report.Summary, as the version that measured it wrote it."""
    superseded: dict[str, str] = {}
    skipped: tuple[str, ...] = ()
    removed: tuple[EditedFact, ...] = ()
    restored: tuple[str, ...] = ()
    """Of a revert, the ids of facts that came back, whose place a reverted one had taken."""
    source: Source | None = None
    """Of an import, which has no recipe, no text and no facts."""

    def measured(self) -> Summary | None:
        """What was measured after it, if anything."""
        return Summary.model_validate(self.metrics) if self.metrics else None


class Manifest(_Record):
    """manifest.json."""

    format_version: int = FORMAT_VERSION
    base: BaseInfo
    facts: tuple[EditedFact, ...]
    updates: tuple[UpdateInfo, ...]
    history: tuple[Run, ...]
    superseded: tuple[SupersededFact, ...] = ()
    """Facts that come back when the one in their place is reverted, in the order in which they were superseded."""
    parents: tuple[str, ...] = ()
    """The digest of the patch that the last run started from, if any."""
    outcomes: dict[str, Outcome] = {}
    """By a fact's id what became of it, as measured after the last run; empty where that was not measured."""
    digest: str
    """sha256 over the digests of all tensors in patch.safetensors: the identity of the patch."""

    def measured(self) -> Summary | None:
        """What was measured after the last run, if anything."""
        return self.history[-1].measured() if self.history else None

    @property
    def imported(self) -> Source | None:
        """Where its updates came from, if they were imported and are still there."""
        return next((run.source for run in reversed(self.history) if run.source), None) if self.updates else None

    def lost(self) -> tuple[str, ...]:
        """Ids of the facts that did not hold when they were last measured."""
        return tuple(fact.id for fact in self.facts if fact.id in self.outcomes and not self.outcomes[fact.id].holds)
