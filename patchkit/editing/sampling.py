"""What a model goes on with after the beginning of a text: greedily, or drawn at random, the same for the same seed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchkit.editing.stems import read
from patchkit.facts.requests import encode_prompt
from patchkit.model.forward import LayerRunner

ROWS = 256
"""Texts in one generation batch."""
LEFT = 0.75
"""Of a batch, what is left when those texts are taken out that are over; what is taken along is copied."""
IsOver = Callable[[int, Sequence[int]], bool]
"""Whether a text, known by its place, needs no more tokens than these."""


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
    runner: LayerRunner,
    tokenizer: Any,
    openings: Sequence[str],
    how: Sampling,
    seeds: Sequence[int] | None = None,
    is_over: IsOver | None = None,
) -> list[list[int]]:
    """The tokens that the model continues each opening by, with the random numbers of a seed of its own (0)."""
    drawn = draw(runner, tokenizer, openings, how, seeds, is_over)
    if not how.to_end:
        return [each.tokens for each in drawn]
    ends = {*_ends(runner), tokenizer.eos_token_id}
    return [_up_to(each.tokens, ends) for each in drawn]


@torch.no_grad()
def draw(
    runner: LayerRunner,
    tokenizer: Any,
    openings: Sequence[str],
    how: Sampling,
    seeds: Sequence[int] | None = None,
    is_over: IsOver | None = None,
) -> list[Drawn]:
    """As many tokens for each opening as `sample` draws, those after the end of a text included; none after those with
    which it `is_over`, told the opening's place."""
    seeds = seeds or [0] * len(openings)
    encoded = [encode_prompt(tokenizer, opening) for opening in openings]
    found = dict[int, Drawn]()
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))  # similar lengths: little padding
    for some in (order[first : first + ROWS] for first in range(0, len(order), ROWS)):
        draws = [torch.rand(how.tokens, how.choices, generator=torch.Generator().manual_seed(seeds[i])) for i in some]
        gumbel = -(-torch.stack(draws).clamp_min(1e-9).log()).log()  # (texts, tokens, choices)
        never = () if how.to_end else _ends(runner)
        writing = _Writing(runner, [encoded[i] for i in some], some)
        found |= writing.drawn(gumbel.to(runner.device), never, is_over)
    return [found[i] for i in range(len(openings))]


def _up_to(tokens: list[int], ends: Collection[int]) -> list[int]:
    """The tokens up to the first of `ends`, it included."""
    return tokens[: next((place for place, token in enumerate(tokens, 1) if token in ends), len(tokens))]


class _Writing:
    """Texts in the middle of being continued; of those that go on, `rows` says which, by their order, and the cache,
    mask, position and last token are theirs."""

    def __init__(self, runner: LayerRunner, openings: Sequence[Sequence[int]], places: Sequence[int]) -> None:
        self.runner, self.places, device = runner, places, runner.device
        unique = list(dict.fromkeys(tuple(opening) for opening in openings))  # many draws from one opening read it once
        before = read(runner, [opening[:-1] for opening in unique])
        if len(unique) < len(openings):
            before = before.rows(torch.tensor([unique.index(tuple(each)) for each in openings], device=device))
        self.rows = torch.arange(len(openings), device=device)
        self.cache, self.mask = before.growing_cache(), before.mask
        self.position = self.mask.sum(1, keepdim=True)  # (rows, 1)
        self.last = torch.tensor([opening[-1:] for opening in openings], device=device)  # (rows, 1)

    def drawn(self, noise: Tensor, never: Sequence[int], is_over: IsOver | None) -> dict[int, Drawn]:
        """By place, what comes next: top-k sampling by the Gumbel-max trick with the noise (texts, tokens, choices),
        without the tokens `never`."""
        texts, tokens, choices = noise.shape
        drawn, best = self.last.new_zeros(2, texts, tokens)
        lengths = [tokens] * texts
        for step in range(tokens):
            likeliest = self._likeliest(choices, never)
            noisy = likeliest.values + noise[self.rows, step, : likeliest.values.shape[1]]
            self.last = likeliest.indices.gather(1, noisy.argmax(1, keepdim=True))
            drawn[self.rows, step], best[self.rows, step] = self.last.squeeze(1), likeliest.indices[:, 0]
            if is_over is None:
                continue
            for row, ids in zip(self.rows.tolist(), drawn[self.rows, : step + 1].tolist(), strict=True):
                if lengths[row] == tokens and is_over(self.places[row], ids):
                    lengths[row] = step + 1
            going = [i for i, row in enumerate(self.rows.tolist()) if lengths[row] == tokens]
            if not going:
                break
            if len(going) <= LEFT * len(self.rows):
                self._keep(torch.tensor(going))
        found = zip(self.places, drawn.tolist(), best.tolist(), lengths, strict=True)
        return {place: Drawn(ids[:length], likeliest[:length]) for place, ids, likeliest, length in found}

    def _likeliest(self, choices: int, never: Sequence[int]) -> Any:
        """The likeliest tokens after the last one, (rows, choices), in float32."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.last)], 1)
        here = torch.arange(len(self.rows), device=self.rows.device)
        inputs: dict[str, Any] = {"input_ids": self.last, "attention_mask": self.mask, "position_ids": self.position}
        inputs |= {"past_key_values": self.cache, "use_cache": True}
        logits = self.runner.run(inputs, logits_at=(here, torch.zeros_like(here))).logits
        assert logits is not None
        self.position = self.position + 1
        logits[:, list(never)] = -torch.inf
        return logits.float().topk(min(choices, logits.shape[1]))

    def _keep(self, going: Tensor) -> None:
        """Go on with some of the rows alone; their numbers are on the CPU, as layers' caches are on devices of their
        own."""
        self.rows, self.last = self.rows[going], self.last[going]
        self.mask, self.position = self.mask[going], self.position[going]
        self.cache.reorder_cache(going)  # type: ignore[arg-type]  # indices of any kind


def _ends(runner: LayerRunner) -> list[int]:
    """The tokens that end a text, of those that the model can write."""
    found = getattr(runner.arch.model.generation_config, "eos_token_id", None)
    listed = found if isinstance(found, list) else [] if found is None else [found]
    return [token for token in listed if token < runner.vocabulary]
