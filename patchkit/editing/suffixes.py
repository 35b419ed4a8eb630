"""Prompts cut before the subject's last token: the KV cache of the prefix is computed once, suffixes go into buckets.

Texts with the same beginning share it (`patchkit.editing.stems`). Rows of similar suffix length run together, as many
as memory allows and as long as that is faster.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from patchkit.editing.buckets import Bucket, Index, Kept
from patchkit.editing.stems import alike, read
from patchkit.errors import InputError, out_of_memory
from patchkit.facts.requests import EditRequest, Row, pad
from patchkit.model.devices import at, sent
from patchkit.model.forward import LayerRunner
from patchkit.model.prefix import Prefix

ASKED, KEPT = 3, 1
"""Rows of a fact in one step where rows take turns: of those that ask for its target, and of kept texts. With 4 and 2,
values say the same in texts that nobody optimized and cost a third more (tests/benchmarks/results)."""


READ = 2048
"""Tokens of prefixes that are read together."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Suffixes:
    """Makes the buckets of `requests`, with hidden states at the input of layer `start`."""

    def __init__(self, runner: LayerRunner, requests: Sequence[EditRequest], start: int) -> None:
        self.runner, self.start = runner, start
        self.rows = [[*request.rows, request.essence, *request.kept] for request in requests]
        self._asked, kept = len(requests[0].rows), len(requests[0].kept)
        # Rows take turns where there are kept texts: a step looks at some of each kind, and the next one at others.
        self.turns = -(-self._asked // ASKED) if kept else 1
        self._kept_turns = max(1, -(-kept // KEPT))
        self._targets = [request.target_ids[0] for request in requests]
        memory = free_memory(runner.device)
        longest = max(len(row.prefix) for rows in self.rows for row in rows)
        one = torch.zeros(1, 1, dtype=torch.long, device=runner.device)
        token = Prefix.read(runner, one, one + 1).from_layer(start)
        kept = len(self.rows[0]) * ((longest + 1) * token.token_bytes + token.row_bytes)
        self.facts = max(1, int(memory / 4 / kept))  # that may be active at a time
        self.tokens = max(1, min(runner.room.tokens, int(memory / 2 / graph_bytes(runner, start))))
        self._points = max(1, runner.room.logits // runner.vocabulary)

    @torch.no_grad()
    def buckets(self, facts: Iterable[int]) -> list[Bucket]:
        """The buckets of the facts with these numbers."""
        groups = [group for some in self.groups(facts).values() for group in some]
        passes = list[list[list[int]]]()
        for group in groups:
            if passes and sum(len(self._row(n).prefix) for g in (*passes[-1], group) for n in g) <= READ:
                passes[-1].append(group)
            else:
                passes.append([group])
        return [bucket for some in passes for _, made in in_parts(self._buckets, some, _halved) for bucket in made]

    def groups(self, facts: Iterable[int]) -> dict[tuple[int, int], list[list[int]]]:
        """By turn, the numbers of the rows of these facts that run together."""
        per_fact = len(self.rows[0])
        numbers = [fact * per_fact + i for fact in facts for i in range(per_fact)]
        by_turn: dict[tuple[int, int], list[int]] = {}
        for number in numbers:
            by_turn.setdefault(self._turn(number % per_fact), []).append(number)
        return {turn: self._alike(some) for turn, some in by_turn.items()}

    def padded(self, group: Sequence[int]) -> int:
        """Tokens that a pass over the rows with these numbers runs."""
        return len(group) * max(self._width(self._row(number)) for number in group)

    def points(self, group: Iterable[int]) -> int:
        """Predictions that count in the rows with these numbers."""
        rows = map(self._row, group)
        return sum(max(1, len(row.ids) - row.target + row.kept) for row in rows)

    def _turn(self, column: int) -> tuple[int, int]:
        """Which of the turns the rows of a column have: the asked rows and the essence prompt share some, the kept ones
        others."""
        if column <= self._asked:
            return column % self._asked % self.turns, self.turns
        return (column - self._asked - 1) % self._kept_turns, self._kept_turns

    def merged(self, buckets: Sequence[Bucket]) -> list[Bucket]:
        """The same rows in fewer buckets, where small ones of the same length can be joined."""
        found: list[Bucket] = []
        for bucket in sorted(buckets, key=lambda bucket: (bucket.turn, bucket.ids.shape[1], bucket.ids.shape[0])):
            last = found[-1] if found else None
            alike = last and last.turn == bucket.turn and last.ids.shape[1] == bucket.ids.shape[1]
            if last and alike and self._fits(last, bucket):
                found[-1] = last.beside(bucket)
            else:
                found.append(bucket)
        return found

    def _fits(self, *buckets: Bucket) -> bool:
        tokens = sum(bucket.ids.numel() for bucket in buckets)
        return tokens <= self.tokens and sum(len(bucket.point_row) for bucket in buckets) <= self._points

    def _width(self, row: Row) -> int:
        """Tokens of a row's suffix, padding that it cannot do without included: over one token, states that run are
        written into in place, and kernels for that have no gradient."""
        return max(len(suffix(row)), 2 if self.runner.runs_on else 1)

    def _row(self, number: int) -> Row:
        return self.rows[number // len(self.rows[0])][number % len(self.rows[0])]

    def _alike(self, numbers: Sequence[int]) -> list[list[int]]:
        """Numbers of rows in groups of similar suffix length, with little padding."""
        rows = [self._row(number) for number in numbers]
        widths = [self._width(row) for row in rows]

        def fits(some: list[int]) -> bool:
            return widths[some[-1]] * len(some) <= self.tokens and self.points(numbers[i] for i in some) <= self._points

        return [[numbers[i] for i in some] for some in alike(widths, self.runner.room.a_pass, fits)]

    def _buckets(self, groups: Sequence[Sequence[int]]) -> list[Bucket]:
        """A bucket for each group of row numbers; what they read is read for all of them together."""
        rows = [self._row(number) for group in groups for number in group]
        known, first, found = read(self.runner, [row.prefix for row in rows]), 0, list[Bucket]()
        hidden = self._hidden(rows, known) if self.start > 0 else None
        for group in groups:
            places = sent(torch.arange(first, first + len(group)), self.runner.device)
            longest = max(len(self._row(number).prefix) for number in group)
            bucket = self._bucket(group, known.rows(places).last(max(1, longest)).from_layer(self.start))
            if hidden is not None:
                bucket = replace(bucket, hidden=at(hidden, places)[:, : bucket.ids.shape[1]])
            found.append(bucket)
            first += len(group)
        return found

    def _hidden(self, rows: Sequence[Row], known: Prefix) -> Tensor:
        """What the first layer of a step reads of the rows' suffixes, (rows, the longest, d)."""
        texts, found, order = [suffix(row) for row in rows], list[Tensor](), list[int]()
        widths, spare = [self._width(row) for row in rows], self.runner.room.a_pass
        for places in alike(widths, spare, lambda some: widths[some[-1]] * len(some) <= READ):
            ids, mask = pad([texts[i] for i in places], self.runner.device, max(widths[i] for i in places))
            before = known.rows(sent(places, self.runner.device))
            hidden = self.runner.run(before.inputs(ids, mask), stop=self.start).hidden
            assert hidden is not None
            found.append(F.pad(hidden, (0, 0, 0, max(widths) - hidden.shape[1])))
            order += places
        return torch.cat(found)[sent(torch.tensor(order).argsort(), found[0].device)]

    def _bucket(self, numbers: Sequence[int], prefix: Prefix) -> Bucket:
        device, rows = self.runner.device, [self._row(number) for number in numbers]
        row, per_fact = torch.tensor(numbers), len(self.rows[0])
        fact_of = row // per_fact
        ids, mask = pad([suffix(row) for row in rows], device, max(map(self._width, rows)))
        offsets = sent([row.subject for row in rows], device).unsqueeze(1)  # (rows, 1)
        positions = offsets + torch.arange(ids.shape[1], device=device)
        none, firsts = torch.empty(0, device=device), [self._targets[fact] for fact in fact_of.tolist()]
        points = _points(rows, self._asked, torch.promote_types(self.runner.dtype, torch.float32), device)
        kept = _kept(rows, firsts, per_fact - self._asked - 1, device)
        return Bucket(
            Index(row, device),
            Index(fact_of, device),
            *(ids, mask, positions, prefix, None),
            *points,
            none,
            kept,
            self._turn(numbers[0] % per_fact),
        )


def suffix(row: Row) -> tuple[int, ...]:
    """What a step runs of a row: from the subject's last token on, without the target's last one, after which no logits
    are needed."""
    unread = row.target < len(row.ids) and not row.kept
    return row.ids[row.subject : max(row.subject + 1, len(row.ids) - unread)]


def _points(
    rows: Sequence[Row], contexts: int, dtype: torch.dtype, device: torch.device
) -> tuple[Index, Tensor, Tensor, Tensor]:
    """Row and position of every point, label and weight of the targets'; a target's tokens weigh 1 / contexts."""
    asked = [(i, row) for i, row in enumerate(rows) if not row.kept]
    targets = [
        (i, t - 1 - row.subject, row.ids[t], 1 / ((len(row.ids) - row.target) * contexts))
        for i, row in asked
        for t in range(row.target, len(row.ids))
    ]
    essence = [(i, len(row.ids) - 1 - row.subject) for i, row in asked if row.target == len(row.ids)]
    kept = [(i, t - 1 - row.subject) for i, row in enumerate(rows) for t in _kept_at(row)]
    where = torch.tensor([point[:2] for point in targets] + essence + kept)  # (points, 2)
    label = sent([point[2] for point in targets], device, torch.long)
    weight = sent([point[3] for point in targets], device, dtype)
    return Index(where[:, 0], device), sent(where[:, 1], device), label, weight


def _kept_at(row: Row) -> range:
    """Tokens of a kept row whose prediction is kept, the one after its end included."""
    return range(row.target, len(row.ids) + 1) if row.kept else range(0)


def _kept(rows: Sequence[Row], targets: Sequence[int], texts: int, device: torch.device) -> Kept:
    """The points of the kept rows among `rows`, before anything is predicted there; a fact's weights add up to 1."""
    points = [
        (1 / (len(_kept_at(row)) * texts), target)
        for row, target in zip(rows, targets, strict=True)
        for _ in _kept_at(row)
    ]
    weight = sent([weight for weight, _ in points], device, torch.float32)
    target = sent([target for _, target in points], device, torch.long)
    none = torch.empty(0, device=device)
    return Kept(weight, target, none, none.long(), none)


# --- memory -----------------------------------------------------------------------------------------------------------


def graph_bytes(runner: LayerRunner, start: int) -> int:
    """Rough estimate of what a backward pass through the layers from `start` on keeps per position: in every layer 16
    vectors as wide as the residual stream and 6 as wide as the feed-forward; above the last one as much as in it."""
    wide = 16 * runner.arch.hidden_size + 6 * max(site.active for site in runner.arch.sites)
    return int(max(1, runner.depth - start) * wide * runner.dtype.itemsize)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`, torch's unused reserve included."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + held)
    counts = Path("/proc/meminfo")
    if counts.is_file():
        line = next(line for line in counts.read_text().splitlines() if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def in_parts(
    work: Callable[[Item], Result], item: Item, halves: Callable[[Item], Sequence[Item]]
) -> list[tuple[Item, Result]]:
    """[(item, work(item))], or the same of its halves, and of theirs, as often as memory runs out.

    Raises:
        InputError: memory runs out even for what cannot be halved.
    """
    try:
        return [(item, work(item))]
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    # Outside of the handler, whose error keeps everything that the attempt had computed.
    parts = halves(item)
    if len(parts) < 2:
        raise InputError(
            "not enough memory for one prompt of one fact beside the model; use a machine with more, or a smaller dtype"
        )
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [done for part in parts for done in in_parts(work, part, halves)]


def _halved(groups: list[list[int]]) -> list[list[list[int]]]:
    """The groups in two parts, or the halves of the one that there is."""
    if len(groups) > 1:
        middle = len(groups) // 2
        return [groups[:middle], groups[middle:]]
    middle = len(groups[0]) // 2
    return [[groups[0][:middle]], [groups[0][middle:]]] if middle else [groups]
