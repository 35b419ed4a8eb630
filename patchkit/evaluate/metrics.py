"""The table of metrics: every number that patchkit measures, once. Commands, cards, gates and benchmarks read it.

To add a metric that can be read off what models answer to the facts themselves, add a row to a group and its number to
`patchkit.evaluate.verify`. To add one that asks its own questions, `register` a group with an instrument; nothing else
knows the names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from patchkit.words import counted

if TYPE_CHECKING:
    from patchkit.evaluate.report import Summary
    from patchkit.facts.schema import Fact
    from patchkit.model.forward import LayerRunner
    from patchkit.statistics.corpus import Corpus


@dataclass(frozen=True)
class Gate:
    """A bound that a user may set: `--min-efficacy` where more is better, `--max-perplexity-ratio` where less is.

    published: the bound for publishing a patch, unless the user says otherwise; None asks for nothing.
    """

    name: str
    help: str
    published: float | None = None


@dataclass(frozen=True)
class Metric:
    """One number, and how to show it.

    Attributes:
        group, name: where it stands in a report, as in report.efficacy.exact.
        what: what it counts, short enough to stand beside the number.
        definition: the same as one sentence, with its source.
        item: what it is counted on, in the singular.
        form: the number for people; decimals: the same in tables of many numbers, where units are known.
        headline: its name where a few numbers stand for all, None for the others.
        column: its heading in a benchmark's tables, None to keep it out of them (CSV files have all).
        sides: names of the base's value and the patched model's, where it is their ratio.
    """

    group: str
    name: str
    what: str
    definition: str
    item: str
    better: Literal["up", "down"] = "up"
    form: str = ".1%"
    decimals: str = ".3f"
    prefix: str = ""
    headline: str | None = None
    column: str | None = None
    gate: Gate | None = None
    sides: tuple[str, str] | None = None

    @property
    def label(self) -> str:
        """Its full name: "efficacy exact"."""
        return f"{self.group} {self.name}".replace("_", " ")

    @property
    def share(self) -> bool:
        """Whether it is a share, in 0..1."""
        return self.form.endswith("%")

    @property
    def key(self) -> str:
        """Its name for machines: efficacy_exact."""
        return f"{self.group}_{self.name}"

    def of(self, found: Summary) -> float | None:
        """Its value in a report."""
        return found.value(self.group, self.name)

    def shown(self, found: Summary) -> str:
        """Its value for people; "-" where it was not measured."""
        value = self.of(found)
        return "-" if value is None else f"{self.prefix}{value:{self.form}}"

    def explained(self, found: Summary) -> str:
        """What it counts, and both sides where it is a ratio."""
        before, after = (found.value(self.group, side) for side in self.sides or ("", ""))
        return self.what + ("" if before is None or after is None else f": {before:.3f} -> {after:.3f}")

    def items(self, found: Summary) -> str:
        """On how much it stands, "24 facts"; empty where a report of an earlier version did not note it."""
        count = found.count(self.group, self.name)
        return "" if count is None else counted(count, self.item)

    def in_words(self, found: Summary) -> str:
        """Its value where a few numbers stand for all: "efficacy 95.8% on 24 facts"."""
        value, items = self.shown(found), self.items(found)
        return f"{self.headline or self.label} {value}{f' on {items}' if items and value != '-' else ''}"


@dataclass(frozen=True)
class Trial:
    """What an instrument measures: a model as it is at the moment, and the facts to ask it for."""

    runner: LayerRunner
    tokenizer: Any
    facts: Sequence[Fact]
    corpus: Corpus | None


@dataclass(frozen=True)
class Found:
    """What an instrument found.

    Attributes:
        values: by the metric's name.
        counts: on how many items each value stands.
        per_fact: by the fact's id, whatever it found for a single fact.
    """

    values: Mapping[str, float | None]
    counts: Mapping[str, int] = field(default_factory=dict)
    per_fact: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class Instrument(Protocol):
    """Measures a group of metrics in two steps: first the base, then the patched model beside it."""

    def base(self, trial: Trial) -> Any:
        """What the patched model will be compared with, taken once; perhaps for more facts than are asked for later."""

    def patched(self, trial: Trial, base: Any) -> Found:
        """The metrics of the model as it now is, for the facts of `trial`."""


@dataclass(frozen=True)
class Group:
    """Metrics that are taken together, under one name in the report.

    instrument: makes what measures them, and imports for it only then; None for what `patchkit.evaluate.verify` reads
    off the answers to the facts themselves.
    """

    name: str
    metrics: tuple[Metric, ...]
    instrument: Callable[[], Instrument] | None = None


_ROME = "Meng et al. 2022, arXiv 2202.05262"
_MEND = "Mitchell et al. 2022, arXiv 2110.11309"
_MIRAGE = "Yang et al. 2025, arXiv 2502.11177"
_EASYEDIT = "Yao et al. 2023, arXiv 2305.13172"

GROUPS: list[Group] = [
    Group(
        "efficacy",
        (
            Metric(
                "efficacy",
                "exact",
                "every token of the target is the likeliest",
                "Share of facts after whose prompt every token of target_new is the argmax, given the target's tokens "
                f"before it, as accuracy on ZsRE is counted ({_MEND}).",
                "fact",
                headline="efficacy",
                column="efficacy exact",
                gate=Gate("efficacy", "Least share of facts whose every target token is the argmax.", 0.9),
            ),
            Metric(
                "efficacy",
                "generated",
                "greedy generation begins with the target",
                f"Share of facts whose prompt is continued with target_new when generating greedily ({_MIRAGE}).",
                "fact",
            ),
            Metric(
                "efficacy",
                "success",
                "the target is likelier than target_true, if not the likeliest",
                "Share of facts with a target_true after whose prompt target_new has the higher mean token "
                f"log-probability of the two; another text may be likelier than both ({_ROME}).",
                "fact",
                column="efficacy success",
            ),
        ),
    ),
    Group(
        "generalization",
        (
            Metric(
                "generalization",
                "exact",
                "after a paraphrase, every token of the target is the likeliest",
                "As efficacy exact, after the paraphrases, which the edit has not seen: mean over facts of the share "
                f"of a fact's paraphrases ({_MEND}).",
                "paraphrase",
                headline="generalization",
                column="general. exact",
                gate=Gate("generalization", "Least share of paraphrases whose every target token is the argmax."),
            ),
            Metric(
                "generalization",
                "generated",
                "after a paraphrase, greedy generation begins with the target",
                f"As efficacy generated, after the paraphrases: mean over facts ({_MIRAGE}).",
                "paraphrase",
            ),
            Metric(
                "generalization",
                "success",
                "after a paraphrase, likelier than target_true, if not the likeliest",
                f"As efficacy success, after the paraphrases: mean over facts ({_ROME}).",
                "paraphrase",
                column="general. success",
            ),
        ),
    ),
    Group(
        "locality",
        (
            Metric(
                "locality",
                "unchanged",
                "the likeliest tokens are the base's, right or wrong",
                "Share of neighbors' prompts after which the argmax at every position of the neighbor's own target is "
                f"the base's, whether or not the base is right: mean over facts ({_EASYEDIT}).",
                "neighbor",
                headline="locality",
                column="locality unchanged",
                gate=Gate("locality", "Least share of neighbors that stay as the base has them."),
            ),
            Metric(
                "locality",
                "success",
                "its own target is likelier than the fact's; base errors count, too",
                "Share of neighbors with a known target of their own after whose prompt that is likelier than the "
                f"fact's target_new; what the base already has wrong counts against it: mean over facts ({_ROME}).",
                "neighbor",
                column="locality success",
            ),
        ),
    ),
    Group(
        "perplexity",
        (
            Metric(
                "perplexity",
                "ratio",
                "perplexity of plain text over the base's",
                "exp of the mean next-token loss over plain text with the patch, divided by the base's; "
                f"drawdown in MEND is their difference ({_MEND}).",
                "token",
                better="down",
                form=".4f",
                decimals=".4f",
                prefix="x",
                headline="perplexity",
                column="perplexity ratio",
                gate=Gate("perplexity_ratio", "Most that plain text's perplexity may grow by.", 1.1),
                sides=("before", "after"),
            ),
        ),
    ),
]


def register(group: Group) -> None:
    """Add a group of metrics: from then on every command measures and shows them.

    Raises:
        ValueError: there is a group of that name, or a metric that does not belong to it.
    """
    if group.name in {known.name for known in GROUPS}:
        raise ValueError(f"there is a group of metrics named {group.name} already")
    if any(metric.group != group.name for metric in group.metrics):
        raise ValueError(f"every metric of the group {group.name} has to name it as its group")
    GROUPS.append(group)


def metrics() -> tuple[Metric, ...]:
    """All metrics, in the order in which tables show them."""
    return tuple(metric for group in GROUPS for metric in group.metrics)


def headlines() -> tuple[Metric, ...]:
    """The few that stand for all."""
    return tuple(metric for metric in metrics() if metric.headline)


def gated() -> dict[str, tuple[Metric, Gate]]:
    """Those that a bound can be set for, by the gate's name."""
    return {metric.gate.name: (metric, metric.gate) for metric in metrics() if metric.gate}


def summary_line(found: Summary) -> str:
    """The few numbers that stand for all, as one line."""
    return ", ".join(metric.in_words(found) for metric in headlines())
