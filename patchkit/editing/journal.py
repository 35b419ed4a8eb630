"""What a run has finished, on disk, so that the same run goes on from there after a kill, to the same numbers.

texts.safetensors          contexts, and the rows of tokens that facts are edited in
batch-<n>.safetensors      the solves of a batch, by their keys and residuals, and the values of its facts
flight-<n>-<i>.safetensors the values of the batch in flight, as far as they are (`ValueLog`)
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchkit.editing.value_log import ValueLog, warn_of_loss
from patchkit.editing.values import Values
from patchkit.facts.requests import EditRequest, Row
from patchkit.facts.schema import Fact
from patchkit.io.checked import Damaged, read_checked, write_checked
from patchkit.maths.updates import KINDS, Update, kind_of, mapped, tensors_of


@dataclass(frozen=True)
class Solved:
    """A solve: its keys (d_in, n) and residual (d_out, n) in float64, and its update if that was fitted to a loss."""

    layer: int
    keys: Tensor
    residual: Tensor
    fitted: Update | None


@dataclass(frozen=True)
class Part:
    """Facts that were solved for together: their solves, and what `EditRun.add_batch` was told of them."""

    solves: Sequence[Solved]
    facts: Sequence[str]
    values: Values
    layers: Sequence[int]
    columns: Sequence[int] | None


@dataclass(frozen=True)
class Finished:
    """A batch that was finished, and the seconds that the run had spent by then, by phase."""

    parts: Sequence[Part]
    seconds: Mapping[str, float]


@dataclass
class Journal:
    """The journal of one run in a folder of its own; without a folder, one that keeps nothing.

    Whoever opens it sees to it that a folder belongs to one run, by everything that decides its numbers. Of processes
    that edit together the first one keeps texts and batches, and each the values that it is at.

    part: which of them this is, 0 for the first or only one.
    """

    folder: Path | None = None
    part: int = 0
    _number: int = 0
    _calls: int = 0
    _solves: list[Solved] = field(default_factory=list)
    _parts: list[Part] = field(default_factory=list)

    @property
    def _keeps(self) -> bool:
        """Whether this process writes what all of them have finished."""
        return self.folder is not None and not self.part

    # --- the texts ----------------------------------------------------------------------------------------------------

    def requests(self, facts: Sequence[Fact]) -> tuple[list[EditRequest], list[str]]:
        """The requests of `facts`, and the contexts; none where they are not there."""
        found = self._read("texts")
        if found is None:
            return [], []
        noted = found[0]
        requests = [
            EditRequest(fact, tuple(map(_row, rows)), _row(essence), tuple(map(_row, kept)))
            for fact, (rows, essence, kept) in zip(facts, noted["rows"], strict=True)
        ]
        return requests, noted["contexts"]

    def keep_requests(self, requests: Sequence[EditRequest], contexts: Sequence[str]) -> None:
        """Keep what `requests` gives back."""
        rows = [([*map(asdict, r.rows)], asdict(r.essence), [*map(asdict, r.kept)]) for r in requests]
        self._write("texts", {}, {"contexts": list(contexts), "rows": rows})

    # --- batches ------------------------------------------------------------------------------------------------------

    def values_in_flight(self) -> ValueLog:
        """The log of the next call of the value optimizer in this batch."""
        self._calls += 1
        part = f"-{self.part}" if self.part else ""
        return ValueLog(self.folder and self.folder / f"flight-{self._number:05}-{self._calls}{part}.safetensors")

    def solved(self, layer: int, keys: Tensor, residual: Tensor, fitted: Update | None) -> None:
        """A solve of the batch in flight."""
        if self._keeps:
            self._solves.append(Solved(layer, keys, residual, fitted))

    def added(self, facts: Sequence[str], values: Values, layers: Sequence[int], columns: Sequence[int] | None) -> None:
        """What the solves since the last call were of, as `EditRun.add_batch` is told it."""
        if self._keeps:
            self._parts.append(Part(self._solves, facts, values, layers, columns))
            self._solves = []

    def keep_batch(self, number: int, seconds: Mapping[str, float]) -> None:
        """Keep the batch that is finished now."""
        if self._keeps and self.folder:
            tensors, notes = dict[str, Tensor](), []
            for place, part in enumerate(self._parts):
                notes.append(_packed(part, f"{place}", tensors))
            self._write(f"batch-{number:05}", tensors, {"parts": notes, "seconds": dict(seconds)})
            for file in self.folder.glob(f"flight-{number:05}-*"):
                file.unlink(missing_ok=True)
        self.forget_batch()

    def forget_batch(self) -> None:
        """Begin the next batch."""
        self._number, self._calls, self._solves, self._parts = self._number + 1, 0, [], []

    def batch(self, number: int) -> Finished | None:
        """A batch that was finished before, or None."""
        found = self._read(f"batch-{number:05}")
        if found is None:
            return None
        notes, tensors = found
        parts = [_unpacked(each, f"{place}", tensors) for place, each in enumerate(notes["parts"])]
        return Finished(parts, notes["seconds"])

    # --- files --------------------------------------------------------------------------------------------------------

    def _write(self, name: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        if not self._keeps or self.folder is None:
            return
        try:
            write_checked(self.folder / f"{name}.safetensors", tensors, {"notes": json.dumps(notes)})
        except OSError as error:
            warn_of_loss(error)
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None

    def _read(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        file = self.folder and self.folder / f"{name}.safetensors"
        if file is None or not file.is_file():
            return None
        try:
            notes, stored = read_checked(file)
        except Damaged as error:
            warnings.warn(f"{error}; made again", stacklevel=2)
            return None
        return json.loads(notes["notes"]), {name: tensor.read() for name, tensor in stored.items()}


def _row(noted: Mapping[str, Any]) -> Row:
    return Row(tuple(noted["ids"]), noted["subject"], noted["target"], noted["kept"])


def _packed(part: Part, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The notes of a part, whose tensors are put into `tensors` under names that begin with `prefix`.

    Solves hold numbers that float32 holds too (`storable`); values stay in the dtype that they were found in.
    """
    for name in ("targets", "start", "loss"):
        tensors[f"{prefix}.{name}"] = getattr(part.values, name).clone()  # methods without values give one for two
    solves = list[dict[str, Any]]()
    for place, solve in enumerate(part.solves):
        tensors[f"{prefix}.{place}.keys"], tensors[f"{prefix}.{place}.residual"] = (
            solve.keys.float(),
            solve.residual.float(),
        )
        noted: dict[str, Any] = {"layer": solve.layer}
        if solve.fitted is not None:
            noted |= {"kind": kind_of(solve.fitted), "side": getattr(solve.fitted, "side", None)}
            for name, tensor in tensors_of(mapped(solve.fitted, Tensor.float)).items():
                tensors[f"{prefix}.{place}.fitted.{name}"] = tensor
        solves.append(noted)
    return {
        "solves": solves,
        "facts": list(part.facts),
        "steps": part.values.steps.tolist(),
        "layers": list(part.layers),
        "columns": part.columns and list(part.columns),
    }


def _unpacked(noted: Mapping[str, Any], prefix: str, tensors: Mapping[str, Tensor]) -> Part:
    targets, start, loss = (tensors[f"{prefix}.{name}"] for name in ("targets", "start", "loss"))
    values = Values(targets, start, loss, torch.tensor(noted["steps"], dtype=torch.long))
    solves = [_solve(each, f"{prefix}.{place}", tensors) for place, each in enumerate(noted["solves"])]
    return Part(solves, noted["facts"], values, noted["layers"], noted["columns"])


def _solve(noted: Mapping[str, Any], prefix: str, tensors: Mapping[str, Tensor]) -> Solved:
    fitted: Update | None = None
    if "kind" in noted:
        begins = f"{prefix}.fitted."
        parts: dict[str, Any] = {n.removeprefix(begins): t for n, t in tensors.items() if n.startswith(begins)}
        parts |= {} if noted["side"] is None else {"side": noted["side"]}
        fitted = mapped(KINDS[noted["kind"]](**parts), Tensor.double)
    keys, residual = tensors[f"{prefix}.keys"].double(), tensors[f"{prefix}.residual"].double()
    return Solved(noted["layer"], keys, residual, fitted)
