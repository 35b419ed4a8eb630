"""What a model goes on with after the beginning of a text: greedily, or drawn at random, the same for the same seed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchkit.facts.requests import encode_prompt, pad
from patchkit.model.forward import LayerRunner, Prefix

ROWS = 256
"""Texts in one generation batch."""


@dataclass(frozen=True)
class Sampling:
    """How a text is continued: by so many tokens, each drawn from the `choices` likeliest; with one choice, greedily.

    None of them ends the text; with `to_end` one may, and is the last.
    """

    tokens: int
    choices: int = 1
    to_end: bool = False


@dataclass(frozen=True)
class Drawn:
    """Tokens that a model went on with, and which it held for the likeliest at the place of each."""

    tokens: list[int]
    likeliest: list[int]


@torch.no_grad()
def sample(
    runner: LayerRunner, tokenizer: Any, openings: Sequence[str], how: Sampling, seeds: Sequence[int] | None = None
) -> list[list[int]]:
    """The tokens that the model continues each opening by, with the random numbers of a seed of its own (0)."""
    drawn = draw(runner, tokenizer, openings, how, seeds)
    if not how.to_end:
        return [each.tokens for each in drawn]
    ends = {*_ends(runner), tokenizer.eos_token_id}
    return [_up_to(each.tokens, ends) for each in drawn]


@torch.no_grad()
def draw(
    runner: LayerRunner, tokenizer: Any, openings: Sequence[str], how: Sampling, seeds: Sequence[int] | None = None
) -> list[Drawn]:
    """As many tokens for each opening as `sample` draws, those after the end of a text included."""
    seeds = seeds or [0] * len(openings)
    encoded = [encode_prompt(tokenizer, opening) for opening in openings]
    found = dict[int, Drawn]()
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))  # similar lengths: little padding
    for some in (order[first : first + ROWS] for first in range(0, len(order), ROWS)):
        draws = [torch.rand(how.tokens, how.choices, generator=torch.Generator().manual_seed(seeds[i])) for i in some]
        gumbel = -(-torch.stack(draws).clamp_min(1e-9).log()).log()  # (texts, tokens, choices)
        drawn, best = _drawn(runner, [encoded[i] for i in some], gumbel, () if how.to_end else _ends(runner))
        found |= {i: Drawn(*each) for i, *each in zip(some, drawn.tolist(), best.tolist(), strict=True)}
    return [found[i] for i in range(len(openings))]


def _up_to(tokens: list[int], ends: Collection[int]) -> list[int]:
    """The tokens up to the first of `ends`, it included."""
    return tokens[: next((place for place, token in enumerate(tokens, 1) if token in ends), len(tokens))]


def _drawn(
    runner: LayerRunner, openings: Sequence[Sequence[int]], gumbel: Tensor, never: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Sampled continuations of the openings, and the likeliest token at each place, (texts, tokens) both: top-k
    sampling by the Gumbel-max trick with the noise (texts, tokens, choices), without the tokens `never`."""
    rows, device = torch.arange(len(openings), device=runner.device), runner.device
    unique = list(dict.fromkeys(tuple(opening) for opening in openings))  # many draws from one opening read it once
    before = Prefix.read(runner, *pad([opening[:-1] for opening in unique], device, width=1))
    if len(unique) < len(openings):
        before = before.rows(torch.tensor([unique.index(tuple(each)) for each in openings], device=device))
    cache, mask = before.growing_cache(), before.mask
    position = mask.sum(1, keepdim=True)  # (texts, 1)
    last = torch.tensor([opening[-1:] for opening in openings], device=device)  # (texts, 1)
    drawn, first = [], []
    for noise in gumbel.to(device).unbind(1):
        mask = torch.cat([mask, torch.ones_like(last)], 1)
        inputs = {"input_ids": last, "attention_mask": mask, "position_ids": position, "past_key_values": cache}
        logits = runner.run({**inputs, "use_cache": True}, logits_at=(rows, torch.zeros_like(rows))).logits
        assert logits is not None
        logits[:, list(never)] = -torch.inf
        likeliest = logits.float().topk(min(noise.shape[1], logits.shape[1]))
        best = (likeliest.values + noise[:, : likeliest.values.shape[1]]).argmax(1, keepdim=True)
        last, position = likeliest.indices.gather(1, best), position + 1
        drawn.append(last)
        first.append(likeliest.indices[:, :1])
    return torch.cat(drawn, 1), torch.cat(first, 1)


def _ends(runner: LayerRunner) -> list[int]:
    """The tokens that end a text."""
    found = getattr(runner.arch.model.generation_config, "eos_token_id", None)
    return found if isinstance(found, list) else [] if found is None else [found]
