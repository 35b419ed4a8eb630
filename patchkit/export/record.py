"""What a merged checkpoint says of itself: patchkit-manifest.json and the model card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from patchkit.io.records import FrozenRecord, write_atomic_text
from patchkit.patch.bases import is_path
from patchkit.patch.card import Card, not_held
from patchkit.patch.manifest import Manifest
from patchkit.words import agreeing, counted, in_markdown

Rounding = Literal["keys", "nearest"]
MANIFEST = "patchkit-manifest.json"
BASES_OWN = {"README.md": "README.base.md", MANIFEST: "patchkit-manifest.base.json"}  # what this writes itself


class MergedTensor(FrozenRecord):
    """What rounding left of the change of one weight.

    unchanged: share of its entries that are the base's. key_error: ‖EK‖/‖ΔK‖ with E the rounding error, Δ the change
    and K the edited facts' keys. text_error: (tr ECE' / tr WCW')^½ with C the statistics. Both from the first 128 rows,
    and also for rounding to nearest; None where keys or statistics were not at hand.
    """

    weight: str
    file: str
    dtype: str
    rounding: Rounding
    statistics: str | None
    unchanged: float
    key_error: float | None
    key_error_nearest: float | None
    text_error: float | None
    text_error_nearest: float | None


class HeldFacts(FrozenRecord):
    """How many facts the merged checkpoint was asked for, teacher-forced, how many hold, and the ids of the others."""

    asked: int
    hold: int
    lost: tuple[str, ...]


class Merged(FrozenRecord):
    """patchkit-manifest.json of a merged checkpoint: what went in, and what of it survived the rounding."""

    format_version: int = 1
    action: Literal["merge"] = "merge"
    when: str
    base: str
    commit: str | None
    forced: bool
    parents: tuple[Manifest, ...]
    tensors: tuple[MergedTensor, ...]
    facts: HeldFacts | None = None
    patchkit: str

    def save(self, folder: Path, title: str) -> None:
        """Write it into the checkpoint's folder, and the model card beside it."""
        kept = " The base's card is `README.base.md`." if (folder / BASES_OWN["README.md"]).is_file() else ""
        for name, text in (("README.md", self.card(title, kept)), (MANIFEST, self.model_dump_json(indent=1) + "\n")):
            write_atomic_text(folder / name, text)

    def card(self, title: str, more: str = "", **published: Any) -> str:
        """The README.md; `more` is said of the tensors, `published` is what else `patchkit.patch.card.Card` takes."""
        base = None if is_path(self.base) else self.base
        card = Card(self.parents, title, "merged", details=self._tensors() + more, base=base, held=self._held())
        return replace(card, **{key: value for key, value in published.items() if value}).markdown()

    def _tensors(self) -> str:
        rows = [
            "All tensors but these are the base's, byte for byte; errors are relative, along the facts' keys:\n",
            "| weight | dtype | rounding | entries unchanged | error | by rounding to nearest |",
            "|---|---|---|---|---|---|",
        ]
        for t in self.tensors:
            errors = ("-" if error is None else f"{error:.2g}" for error in (t.key_error, t.key_error_nearest))
            weight, dtype = in_markdown(t.weight), in_markdown(t.dtype)
            rows.append(f"| {weight} | {dtype} | {t.rounding} | {t.unchanged:.1%} | {' | '.join(errors)} |")
        return "\n".join(rows) + "\n\n"

    def _held(self) -> str | None:
        if self.facts is None:
            return None
        asked, hold = counted(self.facts.asked, "fact"), self.facts.hold
        lost = not_held(self.facts.lost)
        return f"Of {asked}, asked after rounding, {hold} {agreeing(hold, 'hold')}.{lost}"
