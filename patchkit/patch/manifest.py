"""The manifest of a patch: its base, its facts and updates, and the history of runs that made it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_serializer,
    model_validator,
)

from patchkit.errors import InputError
from patchkit.evaluate.report import Outcome, Summary
from patchkit.facts.schema import Fact
from patchkit.io.records import FrozenRecord
from patchkit.patch.bases import known_here, public_name
from patchkit.patch.consistency import check
from patchkit.statistics.corpus import TextRecord

FORMAT_VERSION = 2
"""Format 1 had one digest, that of the tensors in patch.safetensors."""
NESTED = 20
"""How deep a recipe, metrics or settings may be nested."""

Count = Annotated[int, Field(ge=0, le=2**48)]
Place = Annotated[int, Field(ge=0, lt=1_000_000)]
"""A run in the history, a batch in a run, an update in a chain."""
Layer = Annotated[int, Field(ge=0, lt=100_000)]
Width = Annotated[int, Field(ge=1, lt=2**31)]
"""A side of a weight."""
Size = Annotated[float, Field(ge=0)]


def _plain(value: Any) -> Any:
    """What JSON holds and a person may have written: no more than so deep, and no number that is none."""
    level = [value]
    for _ in range(NESTED):
        inner = [each for each in level if isinstance(each, (dict, list, tuple))]
        level = [part for each in inner for part in (each.values() if isinstance(each, dict) else each)]
        if any(isinstance(part, float) and not abs(part) < float("inf") for part in level):
            raise ValueError("holds a number that is not finite")
        if any(isinstance(part, int) and abs(part) > 2**63 for part in level):
            raise ValueError("holds a number that is too large")
        if not level:
            return value
    raise ValueError("is nested too deeply")


def _moment(text: str) -> str:
    if datetime.fromisoformat(text.replace("Z", "+00:00")).tzinfo is None:
        raise ValueError("names no time zone")
    return text


def _summary(metrics: Any) -> Any:
    if metrics is not None:
        Summary.model_validate(metrics)
    return metrics


Plain = Annotated[dict[str, Any], AfterValidator(_plain)]
Moment = Annotated[str, AfterValidator(_moment)]
"""ISO 8601 with a time zone."""


class BaseInfo(FrozenRecord):
    """The model a patch belongs to; `weights` maps the on-disk name of each edited weight to its digest.

    A folder's name is its whole path here, and in JSON the last part of it (`patchkit.patch.bases`). `stacks` maps the
    name that the weights of a layer's experts have together in the state to how many there are. `quantized` names what
    the model was quantized with: the numbers are those that its packed weights multiply with.
    """

    name: Annotated[str, Field(max_length=4096, pattern=r"^[^\x00-\x1f\x7f]*$")]
    commit: Annotated[str, Field(pattern=r"^[\w./-]{1,200}$")] | None
    architecture: str
    weights: dict[str, str]
    stacks: dict[str, Annotated[int, Field(ge=2, le=1_000_000)]] = Field(default_factory=dict)
    quantized: Annotated[str, Field(pattern=r"^[\w.-]{1,50}$")] | None = None

    @field_serializer("name", when_used="json")
    def _without_path(self, name: str) -> str:
        return public_name(name)

    @model_validator(mode="after")
    def _where_it_is(self, info: ValidationInfo) -> BaseInfo:
        here = known_here(self.name, self.weights) if info.mode == "json" else self.name
        return self if here == self.name else self.model_copy(update={"name": here})

    @property
    def same_everywhere(self) -> bool:
        """Whether whoever loads the base gets its very numbers: kernels of packed weights differ in their last bits,
        while what a GGUF file multiplies with is defined."""
        return self.quantized in (None, "gguf")

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

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    run: Place
    batch: Place
    layers: tuple[Layer, ...] = ()
    columns: Annotated[int, Field(ge=0, le=1_000_000)] = 1
    neuron: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    target_loss: float
    steps: Count


class SupersededFact(EditedFact):
    """A fact whose place another one has taken, `by` being the id of that one. Its columns wait in the state."""

    by: str


class UpdateInfo(FrozenRecord):
    """One stored update of a weight of shape (d_out, d_in).

    place: its position in the weight's chain; it acts on the result of those before it. numbers: how many real numbers
    it is stored in. norm: Frobenius norm of the chain's delta up to and including it. side: of a rotation, the one it
    acts on. angles: of a rotation, the largest, median and smallest angle of its planes, in radians.
    """

    weight: str
    place: Place = 0
    kind: Literal["delta", "sparse", "full", "rotation"] = "delta"
    side: Literal["left", "right"] | None = None
    angles: tuple[float, float, float] | None = None
    rank: Count
    shape: tuple[Width, Width]
    numbers: Count
    norm: Size
    weight_norm: Size

    @property
    def share(self) -> float | None:
        """The change's norm relative to the weight's; None of a weight that was zero."""
        return self.norm / self.weight_norm if self.weight_norm else None


class Source(FrozenRecord):
    """Where an imported change came from.

    name: the adapter's folder, or the edited checkpoint. digests: sha256 of the adapter's file, or the digest of every
    edited tensor by its name. settings: what the import went by. error: the largest ‖kept - change‖/‖change‖ of a
    weight. unknown: what nobody told patchkit about the change.
    """

    kind: Literal["lora", "difference"]
    name: str
    digests: dict[str, str]
    settings: Plain
    error: Size
    unknown: tuple[str, ...] = ("facts", "method", "text that it was trained on")


class Origin(FrozenRecord):
    """What a run was started from.

    command: the arguments of the command line, of paths only the last parts. facts: the name of the file of facts,
    facts_sha256 the digest of its bytes. report: sha256 of what was measured after it, every fact included, as JSON.
    """

    command: tuple[str, ...] = ()
    facts: str | None = None
    facts_sha256: str | None = None
    report: str | None = None


class Run(FrozenRecord):
    """One entry of the history: `facts` are the ids written by an apply, or taken out by a revert.

    `superseded` maps the id of a fact that an apply replaced to that of the fact with the new target, `skipped` are the
    ids of facts that were there already, and `removed` holds what left the patch, superseded or reverted, in full. A
    fact's `run` counts from 0 in the history, which only ever grows.
    """

    action: Literal["apply", "revert", "import"]
    when: Moment
    method: Annotated[str, Field(max_length=200)]
    paper: str
    recipe: Plain
    recipe_digest: str
    facts: tuple[str, ...]
    batches: tuple[Count, ...]
    layers: tuple[Layer, ...]
    value_at: str
    contexts: tuple[str, ...]
    text: TextRecord
    seconds: dict[str, Size]
    versions: dict[str, str]
    metrics: Annotated[Plain, AfterValidator(_summary)] | None = None
    """patchkit.evaluate.report.Summary, as the version that measured it wrote it."""
    superseded: dict[str, str] = Field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    removed: tuple[EditedFact, ...] = ()
    restored: tuple[str, ...] = ()
    """Of a revert, the ids of facts that came back, whose place a reverted one had taken."""
    source: Source | None = None
    """Of an import, which has no recipe, no text and no facts."""
    origin: Origin | None = None
    """Of a run of the command line."""

    def measured(self) -> Summary | None:
        """What was measured after it, if anything."""
        return Summary.model_validate(self.metrics) if self.metrics else None


class Manifest(FrozenRecord):
    """manifest.json but for its digests (`patchkit.patch.stored`); its parts agree with one another."""

    format_version: Annotated[int, Field(ge=1, le=FORMAT_VERSION)] = FORMAT_VERSION
    base: BaseInfo
    facts: tuple[EditedFact, ...]
    updates: tuple[UpdateInfo, ...]
    history: tuple[Run, ...]
    superseded: tuple[SupersededFact, ...] = ()
    """Facts that come back when the one in their place is reverted, in the order in which they were superseded."""
    parents: tuple[str, ...] = ()
    """The digest of the patch that the last run started from, if any."""
    outcomes: dict[str, Outcome] = Field(default_factory=dict)
    """By a fact's id what became of it, as measured after the last run; empty where that was not measured."""
    digest: str
    """sha256 over the digests of all tensors in patch.safetensors: the identity of the patch."""

    @model_validator(mode="after")
    def _agrees(self, info: ValidationInfo) -> Manifest:
        if info.mode == "json":  # while a patch is made anew, its history lacks the run that makes it
            check(self)
        return self

    def measured(self) -> Summary | None:
        """What was measured after the last run, if anything."""
        return self.history[-1].measured()

    @property
    def imported(self) -> Source | None:
        """Where its updates came from, if they were imported and are still there."""
        return next((run.source for run in reversed(self.history) if run.source), None) if self.updates else None

    def lost(self) -> tuple[str, ...]:
        """Ids of the facts that did not hold when they were last measured."""
        return tuple(fact.id for fact in self.facts if fact.id in self.outcomes and not self.outcomes[fact.id].holds)
