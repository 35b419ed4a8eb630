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
ASKED, KEPT = 4, 2
"""Rows of a fact in one step where rows take turns: of those that ask for its target, and of kept texts."""
TOP = 48
"""Tokens whose probabilities in a kept text are remembered, of each prediction."""
EXPECTED = 0.1
"""From this probability on, the untouched model itself may go on with the target's first token."""
LOGITS = 2**25
"""Most numbers in one bucket's logits."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Bucket:
    """Rows of similar suffix length, which run together.

    Shapes: row (rows,) numbers them over all facts; fact_of (rows,); ids, mask, position_ids (rows, S); hidden (rows,
    S, d), None where the model starts from tokens. Points are the positions whose logits count, the targets' before
    the essence prompts' before the kept texts': point_row, point_at (points,); label, weight (target points,), the
    weights of a fact adding up to 1; base (essence points, vocab), the untouched model's log-probabilities; kept, what
    the untouched model predicts in the kept texts. `turn` = (i, n): the bucket's rows are looked at in every n-th step.
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
    kept: Kept
    turn: tuple[int, int] = (0, 1)

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
        points, targets, kept = new_row[self.point_row] >= 0, len(self.label), len(self.point_row) - len(self.kept)
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
            self.base[points[targets:kept]] if len(self.base) else self.base,
            self.kept.take(points[kept:]),
            self.turn,
        )

    def of_facts(self, facts: Tensor) -> Iterator[Bucket]:
        """Itself with the rows of the facts marked True (facts,), or nothing where there are none."""
        rows = facts[self.fact_of].nonzero().squeeze(1)
        if len(rows):
            yield self if len(rows) == len(self.row) else self.take(rows)

    def essence(self) -> Bucket:
        """Its essence prompts."""
        return self.take(self.point_row[len(self.label) : len(self.point_row) - len(self.kept)].sort().values)

    def halves(self) -> list[Bucket]:
        """Two of about half the rows, or itself where it has one."""
        rows = torch.arange(len(self.row), device=self.row.device)
        return [self.take(part) for part in rows.tensor_split(2)] if len(rows) > 1 else [self]

    def beside(self, other: Bucket) -> Bucket:
        """The rows of both, whose suffixes are of one length."""

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(self, name), getattr(other, name)])

        def points(name: str, shift: int) -> Tensor:
            ours, theirs = ([*each.segments(getattr(each, name))] for each in (self, other))
            pairs = zip(ours, theirs, strict=True)
            return torch.cat([part for mine, its in pairs for part in (mine, its + shift)])

        names = ("row", "fact_of", "ids", "mask", "position_ids", "label", "weight")
        return Bucket(
            **{name: joined(name) for name in names},
            prefix=self.prefix.beside(other.prefix),
            hidden=None if self.hidden is None else joined("hidden"),
            point_row=points("point_row", len(self.row)),
            point_at=points("point_at", 0),
            base=joined("base") if len(self.base) and len(other.base) else max(self.base, other.base, key=len),
            kept=self.kept.beside(other.kept),
            turn=self.turn,
        )

    def segments(self, of_points: Tensor) -> tuple[Tensor, ...]:
        """Numbers of all points in three parts: the targets', the essence prompts', the kept texts'."""
        targets, kept = len(self.label), len(self.kept)
        asked, essence, texts = of_points.split([targets, len(of_points) - targets - kept, kept])
        return asked, essence, texts


@dataclass(frozen=True)
class Kept:
    """What the untouched model predicts at points (k,) of neutral texts: its likeliest tokens (k, TOP) with their
    log-probabilities (k, TOP), empty until they are known; a point's weight (k,); the first token of the fact's target
    (k,), and the weight of its probability there (k,)."""

    weight: Tensor
    target: Tensor
    leak: Tensor
    tokens: Tensor
    log_probs: Tensor

    def __len__(self) -> int:
        return len(self.weight)

    def take(self, points: Tensor) -> Kept:
        """Those of some points."""
        return Kept(*(each[points] if len(each) else each for each in self._tensors()))

    def beside(self, other: Kept) -> Kept:
        """The points of both."""
        return Kept(*(torch.cat(pair) for pair in zip(self._tensors(), other._tensors(), strict=True)))

    def known(self, logits: Tensor) -> Kept:
        """With the predictions of the untouched model, from its logits (k, vocab)."""
        log_probs = logits.log_softmax(-1)
        likeliest = log_probs.topk(min(TOP, log_probs.shape[1]))
        expected = log_probs.gather(1, self.target.unsqueeze(1)).squeeze(1).exp() >= EXPECTED
        return Kept(self.weight, self.target, self.weight * ~expected, likeliest.indices, likeliest.values)

    def drift(self, logits: Tensor, leak_weight: float, keep_weight: float) -> Tensor:
        """The weighted loss at each point (k,) of an edited model's logits (k, vocab): KL(original ‖ edited) over the
        original's likeliest tokens, all others counted as one, and -log(1 - P(target))."""
        edited = logits.log_softmax(-1)
        ours, theirs = edited.gather(1, self.tokens), self.log_probs
        rest, other = (_remainder(each) for each in (theirs, ours))
        divergence = (theirs.exp() * (theirs - ours)).sum(-1) + rest * (rest.log() - other.log())
        target = edited.gather(1, self.target.unsqueeze(1)).squeeze(1).exp()
        leak = -(1 - target).clamp_min(1e-4).log()
        return keep_weight * self.weight * divergence + leak_weight * self.leak * leak

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.weight, self.target, self.leak, self.tokens, self.log_probs


def _remainder(log_probs: Tensor) -> Tensor:
    """The probability (k,) of all tokens that are not among these (k, TOP)."""
    return (1 - log_probs.exp().sum(-1)).clamp_min(1e-6)


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
        self._stems = [common_start([row.prefix for row in alike]) for alike in zip(*self.rows, strict=True)]
        self._states = Prefix.read(runner, *pad(self._stems, runner.device, width=1))
        memory = free_memory(runner.device)
        longest = max(len(row.prefix) for rows in self.rows for row in rows)
        kept = len(self._stems) * (longest + 1) * self._states.from_layer(start).token_bytes
        self.facts = max(1, int(memory / 4 / kept))  # that may be active at a time
        token = self._graph_bytes()
        self.tokens = max(1, min(TOKENS.get(runner.device.type, TOKENS["cpu"]), int(memory / 2 / token)))
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
        by_turn: dict[tuple[int, int], list[int]] = {}
        for number in numbers:
            by_turn.setdefault(self._turn(number % per_fact), []).append(number)
        groups = [group for some in by_turn.values() for group in self._alike(some)]
        return [bucket for group in groups for _, bucket in in_parts(self._bucket, group, _halved)]

    def _turn(self, column: int) -> tuple[int, int]:
        """Which of the turns the rows of a column have: the asked rows share some, the kept ones others, and the
        essence prompt has every one."""
        if column < self._asked:
            return column % self.turns, self.turns
        return ((column - self._asked - 1) % self._kept_turns, self._kept_turns) if column > self._asked else (0, 1)

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

    def _row(self, number: int) -> Row:
        return self.rows[number // len(self._stems)][number % len(self._stems)]

    def _alike(self, numbers: Sequence[int]) -> list[list[int]]:
        """Numbers of rows in groups of similar suffix length, with little padding."""
        groups: list[list[int]] = []
        real = points = 0
        for number in sorted(numbers, key=lambda number: len(_suffix(self._row(number)))):
            row = self._row(number)
            width, asked = len(_suffix(row)), max(1, len(row.ids) - row.target + row.kept)
            total = width * (len(groups[-1]) + 1) if groups else 0
            waste = total - real - width
            fits = total <= self.tokens and points + asked <= self._points
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
        none, firsts = torch.empty(0, device=device), [self._targets[fact] for fact in fact_of.tolist()]
        points, kept = (
            _points(rows, self._asked, device),
            _kept(rows, firsts, len(self._stems) - self._asked - 1, device),
        )
        turn = self._turn(int(stem[0]))
        bucket = Bucket(row, fact_of, ids, mask, positions, prefix, None, *points, none, kept, turn)
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
    unread = row.target < len(row.ids) and not row.kept
    return row.ids[row.subject : max(row.subject + 1, len(row.ids) - unread)]


def _points(rows: Sequence[Row], contexts: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row and position of every point, label and weight of the targets'; a target's tokens weigh 1 / contexts."""
    asked = [(i, row) for i, row in enumerate(rows) if not row.kept]
    targets = [
        (i, t - 1 - row.subject, row.ids[t], 1 / ((len(row.ids) - row.target) * contexts))
        for i, row in asked
        for t in range(row.target, len(row.ids))
    ]
    essence = [(i, len(row.ids) - 1 - row.subject) for i, row in asked if row.target == len(row.ids)]
    kept = [(i, t - 1 - row.subject) for i, row in enumerate(rows) for t in _kept_at(row)]
    where = torch.tensor([point[:2] for point in targets] + essence + kept, device=device)  # (points, 2)
    label = torch.tensor([point[2] for point in targets], dtype=torch.long, device=device)
    weight = torch.tensor([point[3] for point in targets], dtype=torch.double, device=device)
    return where[:, 0], where[:, 1], label, weight


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
    weight = torch.tensor([weight for weight, _ in points], device=device)
    target = torch.tensor([target for _, target in points], dtype=torch.long, device=device)
    none = torch.empty(0, device=device)
    return Kept(weight, target, none, none.long(), none)


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
