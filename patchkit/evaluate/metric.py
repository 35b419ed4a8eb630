"""One metric: what it counts, how it is shown, and the bound that a user may set for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from patchkit.words import counted

if TYPE_CHECKING:
    from patchkit.evaluate.report import Summary


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
        called: its full name, None for that made of group and name.
        headline: its name where a few numbers stand for all, None for the others.
        lead: whether it stands above all others.
        column: its heading in a benchmark's tables, None to keep it out of them (CSV files have all).
        sides: names of the base's value and the patched model's, where both are to stand beside it.
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
    called: str | None = None
    headline: str | None = None
    lead: bool = False
    column: str | None = None
    gate: Gate | None = None
    sides: tuple[str, str] | None = None

    @property
    def label(self) -> str:
        """Its full name: "efficacy exact"."""
        return self.called or f"{self.group} {self.name}".replace("_", " ")

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
        """What it counts, and both sides where it has them."""
        before, after = (found.value(self.group, side) for side in self.sides or ("", ""))
        form = self.form if self.share else ".3f"
        return self.what + ("" if before is None or after is None else f": {before:{form}} -> {after:{form}}")

    def items(self, found: Summary) -> str:
        """On how much it stands, "24 facts"; empty where a report of an earlier version did not note it."""
        count = found.count(self.group, self.name)
        return "" if count is None else counted(count, self.item)

    def in_words(self, found: Summary) -> str:
        """Its value where a few numbers stand for all: "efficacy 95.8% on 24 facts"."""
        value, items = self.shown(found), self.items(found)
        return f"{self.headline or self.label} {value}{f' on {items}' if items and value != '-' else ''}"
