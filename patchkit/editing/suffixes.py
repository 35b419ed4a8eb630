"""Prompts cut before the subject's last token: the KV cache of the prefix is computed once, suffixes go into buckets.

Texts with the same beginning, as all facts' prompts after one context have, share it. Rows of similar suffix length run
together, as many as memory allows and as long as that is faster.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from patchkit.errors import InputError
from patchkit.facts.requests import EditRequest, Row, pad
from patchkit.model.forward import LayerRunner, Prefix

PADDING = 0.15
"""The share of a bucket that may be padding."""
ALONE = 12
"""Padding tokens that cost less than a bucket of its own, which reads all weights once more."""
TOKENS = {"cpu": 256, "cuda": 1024}
"""Tokens in a bucket; beyond these, more are no faster and only take more memory."""
LOGITS = 2**25
"""Most numbers in one bucket's logits."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Bucket:
    """Rows of similar suffix length, which run together.

    Shapes: row (rows,) numbers them over all facts; fact_of (rows,); ids, mask, position_ids (rows, S); hidden (rows,
    S, d), None where the model starts from tokens. Points are the positions whose logits count, the targets' before
    the essence prompts': point_row, point_at (points,); label, weight (target points,), the weights of a fact adding
    up to 1; base (essence points, vocab), the untouched model's log-probabilities.
    """

    row: Tensor
    fact_of: Tensor
    ids: Tensor
    mask: Tensor
    position_ids: Tensor
    prefix: Prefix
    hidden: Tensor | None
    point_row: Tensor
    point_at: Tensor
    label: Tensor
    weight: Tensor
    base: Tensor

    def inputs(self) -> dict[str, Any]:
        """Arguments of the model's forward over the suffixes."""
        return {
            "input_ids": self.ids,
            "attention_mask": torch.cat([self.prefix.mask, self.mask], 1),
            "position_ids": self.position_ids,
            "past_key_values": self.prefix.cache(),
            "use_cache": True,
        }

    def take(self, rows: Tensor) -> Bucket:
        """The rows with these indices, in ascending order."""
        new_row = torch.full_like(self.row, -1)
        new_row[rows] = torch.arange(len(rows), device=rows.device)
        points, targets = new_row[self.point_row] >= 0, len(self.label)
        return Bucket(
            self.row[rows],
            self.fact_of[rows],
            self.ids[rows],
            self.mask[rows],
            self.position_ids[rows],
            self.prefix.rows(rows),
            None if self.hidden is None else self.hidden[rows],
            new_row[self.point_row[points]],
            self.point_at[points],
            self.label[points[:targets]],
            self.weight[points[:targets]],
            self.base[points[targets:]] if len(self.base) else self.base,
        )

    def of_facts(self, facts: Tensor) -> Iterator[Bucket]:
        """Itself with the rows of the facts marked True (facts,), or nothing where there are none."""
        rows = facts[self.fact_of].nonzero().squeeze(1)
        if len(rows):
            yield self if len(rows) == len(self.row) else self.take(rows)

    def essence(self) -> Bucket:
        """Its essence prompts."""
        return self.take(self.point_row[len(self.label) :].sort().values)

    def halves(self) -> list[Bucket]:
        """Two of about half the rows, or itself where it has one."""
        rows = torch.arange(len(self.row), device=self.row.device)
        return [self.take(part) for part in rows.tensor_split(2)] if len(rows) > 1 else [self]

    def beside(self, other: Bucket) -> Bucket:
        """The rows of both, whose suffixes are of one length."""

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(self, name), getattr(other, name)])

        def points(name: str, shift: int) -> Tensor:
            ours, theirs = getattr(self, name), getattr(other, name) + shift
            i, j = len(self.label), len(other.label)
            return torch.cat([ours[:i], theirs[:j], ours[i:], theirs[j:]])

        names = ("row", "fact_of", "ids", "mask", "position_ids", "label", "weight")
        return Bucket(
            **{name: joined(name) for name in names},
            prefix=self.prefix.beside(other.prefix),
            hidden=None if self.hidden is None else joined("hidden"),
            point_row=points("point_row", len(self.row)),
            point_at=points("point_at", 0),
            base=joined("base") if len(self.base) and len(other.base) else max(self.base, other.base, key=len),
        )


class Suffixes:
    """Makes the buckets of `requests`, with hidden states at the input of layer `start`."""

    def __init__(self, runner: LayerRunner, requests: Sequence[EditRequest], start: int) -> None:
        self.runner, self.start = runner, start
        self.rows = [[*request.rows, request.essence] for request in requests]
        self._stems = [common_start([row.prefix for row in alike]) for alike in zip(*self.rows, strict=True)]
        self._states = Prefix.read(runner, *pad(self._stems, runner.device, width=1))
        memory = free_memory(runner.device)
        longest = max(len(row.prefix) for rows in self.rows for row in rows)
        kept = len(self._stems) * (longest + 1) * self._states.from_layer(start).token_bytes
        self.facts = max(1, int(memory / 4 / kept))  # that may be active at a time
        token = self._graph_bytes()
        self._tokens = max(1, min(TOKENS.get(runner.device.type, TOKENS["cpu"]), int(memory / 2 / token)))
        self._points = max(1, LOGITS // runner.vocabulary)

    def _graph_bytes(self) -> int:
        """Rough estimate of what a backward pass keeps per position: in every layer 16 vectors as wide as the residual
        stream and 6 as wide as the feed-forward."""
        arch = self.runner.arch
        wide = 16 * arch.hidden_size + 6 * max(site.d_in for site in arch.sites)
        return int((self.runner.depth - self.start) * wide * self.runner.dtype.itemsize)

    @torch.no_grad()
    def buckets(self, facts: Iterable[int]) -> list[Bucket]:
        """The buckets of the facts with these numbers."""
        per_fact = len(self._stems)
        numbers = [fact * per_fact + i for fact in facts for i in range(per_fact)]
        groups = self._alike(numbers)
        return [bucket for group in groups for _, bucket in in_parts(self._bucket, group, _halved)]

    def merged(self, buckets: Sequence[Bucket]) -> list[Bucket]:
        """The same rows in fewer buckets, where small ones of the same length can be joined."""
        found: list[Bucket] = []
        for bucket in sorted(buckets, key=lambda bucket: (bucket.ids.shape[1], bucket.ids.shape[0])):
            last = found[-1] if found else None
            if last and last.ids.shape[1] == bucket.ids.shape[1] and self._fits(last, bucket):
                found[-1] = last.beside(bucket)
            else:
                found.append(bucket)
        return found

    def _fits(self, *buckets: Bucket) -> bool:
        tokens = sum(bucket.ids.numel() for bucket in buckets)
        return tokens <= self._tokens and sum(len(bucket.point_row) for bucket in buckets) <= self._points

    def _row(self, number: int) -> Row:
        return self.rows[number // len(self._stems)][number % len(self._stems)]

    def _alike(self, numbers: Sequence[int]) -> list[list[int]]:
        """Numbers of rows in groups of similar suffix length, with little padding."""
        groups: list[list[int]] = []
        real = points = 0
        for number in sorted(numbers, key=lambda number: len(_suffix(self._row(number)))):
            row = self._row(number)
            width, asked = len(_suffix(row)), max(1, len(row.ids) - row.target)
            total = width * (len(groups[-1]) + 1) if groups else 0
            waste = total - real - width
            fits = total <= self._tokens and points + asked <= self._points
            if groups and fits and waste <= max(PADDING * total, ALONE):
                groups[-1].append(number)
                real, points = real + width, points + asked
            else:
                groups.append([number])
                real, points = width, asked
        return groups

    def _bucket(self, numbers: Sequence[int]) -> Bucket:
        device, rows = self.runner.device, [self._row(number) for number in numbers]
        row = torch.tensor(numbers, device=device)
        ids, mask = pad([_suffix(row) for row in rows], device)
        offsets = torch.tensor([row.subject for row in rows], device=device).unsqueeze(1)  # (rows, 1)
        fact_of, stem = row // len(self._stems), row % len(self._stems)
        positions = offsets + torch.arange(ids.shape[1], device=device)
        prefix = self._prefix(rows, stem)
        none = torch.empty(0, device=device)
        bucket = Bucket(
            row, fact_of, ids, mask, positions, prefix, None, *_points(rows, len(self._stems) - 1, device), none
        )
        if self.start > 0:
            bucket = replace(bucket, hidden=self.runner.run(bucket.inputs(), stop=self.start).hidden)
        return replace(bucket, prefix=prefix.from_layer(self.start))

    def _prefix(self, rows: Sequence[Row], stem: Tensor) -> Prefix:
        known = self._states.rows(stem)
        rest = [row.prefix[len(self._stems[i]) :] for row, i in zip(rows, stem.tolist(), strict=True)]
        return Prefix.read(self.runner, *pad(rest, self.runner.device), before=known) if any(rest) else known


def common_start(texts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The longest common prefix of all texts, which is that of the first and the last in sorted order."""
    first, last = min(texts), max(texts)
    return next((first[:i] for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), first)


def _suffix(row: Row) -> tuple[int, ...]:
    """From the subject's last token on, without the target's last token, after which no logits are needed."""
    return row.ids[row.subject : max(row.subject + 1, len(row.ids) - (row.target < len(row.ids)))]


def _points(rows: Sequence[Row], contexts: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row and position of every point, label and weight of the targets'; a target's tokens weigh 1 / contexts."""
    targets = [
        (i, t - 1 - row.subject, row.ids[t], 1 / ((len(row.ids) - row.target) * contexts))
        for i, row in enumerate(rows)
        for t in range(row.target, len(row.ids))
    ]
    essence = [(i, len(row.ids) - 1 - row.subject) for i, row in enumerate(rows) if row.target == len(row.ids)]
    where = torch.tensor([point[:2] for point in targets] + essence, device=device)  # (points, 2)
    label = torch.tensor([point[2] for point in targets], dtype=torch.long, device=device)
    weight = torch.tensor([point[3] for point in targets], dtype=torch.double, device=device)
    return where[:, 0], where[:, 1], label, weight


# --- memory -----------------------------------------------------------------------------------------------------------


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
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "allocate" in str(error)):
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


def _halved(numbers: list[int]) -> list[list[int]]:
    middle = len(numbers) // 2
    return [numbers[:middle], numbers[middle:]] if middle else [numbers]
