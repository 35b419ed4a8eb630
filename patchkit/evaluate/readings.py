"""Readings of a model as it is now: targets teacher-forced, prompts continued greedily, plain text's perplexity."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from transformers import GenerationConfig

from patchkit.facts.requests import encode_target, pad
from patchkit.facts.schema import Pair
from patchkit.model.forward import LayerRunner
from patchkit.statistics.corpus import Corpus

ROWS = 32
EVAL_TOKENS, EVAL_WINDOW = 4096, 512
"""Of the plain text that perplexity is taken on: tokens in all, and in a window."""


@dataclass(frozen=True)
class Reading:
    """One target after one prompt: mean token log-probability, whether every token is the argmax, those argmaxes, and
    these as text."""

    log_probability: float
    exact: bool
    argmax: tuple[int, ...]
    said: str = ""


@torch.no_grad()
def read_targets(runner: LayerRunner, tokenizer: Any, pairs: Sequence[Pair]) -> dict[Pair, Reading]:
    """Teacher-forced readings of every pair; the head runs at target positions only."""
    encoded = {pair: encode_target(tokenizer, *pair) for pair in pairs}
    order = sorted(encoded, key=lambda pair: len(encoded[pair][0]))  # like lengths together: little padding
    readings: dict[Pair, Reading] = {}
    for i in range(0, len(order), ROWS):
        chunk = order[i : i + ROWS]
        readings |= _read_chunk(runner, chunk, [encoded[pair] for pair in chunk])
    texts = {pair: str(tokenizer.decode(each.argmax, skip_special_tokens=True)) for pair, each in readings.items()}
    return {pair: replace(each, said=texts[pair]) for pair, each in readings.items()}


def _read_chunk(
    runner: LayerRunner, pairs: Sequence[Pair], encoded: Sequence[tuple[list[int], int]]
) -> dict[Pair, Reading]:
    ids, mask = pad([row for row, _ in encoded], runner.device)
    points = [(i, t) for i, (row, first) in enumerate(encoded) for t in range(first, len(row))]
    rows, at = torch.tensor(points, device=ids.device).T
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    logits = runner.run(inputs, logits_at=(rows, at - 1)).logits
    assert logits is not None
    log_probs = logits.float().log_softmax(-1)  # (points, vocab)
    wanted = ids[rows, at]
    token = log_probs.gather(1, wanted.unsqueeze(1)).squeeze(1).tolist()
    argmax = log_probs.argmax(-1).tolist()
    found: dict[Pair, Reading] = {}
    start = 0
    for pair, (row, first) in zip(pairs, encoded, strict=True):
        stop = start + len(row) - first
        best = tuple(argmax[start:stop])
        found[pair] = Reading(sum(token[start:stop]) / (stop - start), best == tuple(row[first:]), best)
        start = stop
    return found


@torch.no_grad()
def generate(runner: LayerRunner, tokenizer: Any, pairs: Sequence[Pair], extra: int = 3) -> dict[Pair, str]:
    """Greedy continuation of each prompt, as many tokens as its target has and `extra` more.

    Only prompts of equal length share a batch: without padding, a continuation does not depend on what else is in it.
    """
    groups: dict[int, list[tuple[Pair, list[int], int]]] = defaultdict(list)
    for pair in dict.fromkeys(pairs):
        ids, first = encode_target(tokenizer, *pair)
        groups[first].append((pair, ids[:first], len(ids) - first + extra))
    said: dict[Pair, str] = {}
    for group in groups.values():
        for i in range(0, len(group), ROWS):
            chunk = group[i : i + ROWS]
            prompts = torch.tensor([ids for _, ids, _ in chunk], device=runner.device)
            wanted = max(count for _, _, count in chunk)
            out = runner.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                generation_config=GenerationConfig(
                    max_new_tokens=wanted,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
                    eos_token_id=tokenizer.eos_token_id,
                ),
            )
            for (pair, ids, count), row in zip(chunk, out.tolist(), strict=True):
                said[pair] = tokenizer.decode(row[len(ids) : len(ids) + count], skip_special_tokens=True)
    return said


WORST = 1e300
"""A perplexity that is no better than none, and still a number, which a manifest can hold."""


@torch.no_grad()
def perplexity(runner: LayerRunner, corpus: Corpus) -> float:
    """exp of the mean next-token loss over the corpus's windows; `WORST` at most, also where logits are no numbers."""
    total, count = 0.0, 0
    for window in corpus.windows:
        if len(window) < 2:
            continue
        ids = torch.tensor([window], device=runner.device)
        logits = runner.run({"input_ids": ids, "use_cache": False}).logits
        assert logits is not None
        total += float(F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum"))
        count += len(window) - 1
    found = float(torch.tensor(total / count, dtype=torch.float64).exp())
    return found if found < WORST else WORST
