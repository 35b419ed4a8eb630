"""Contexts that facts are edited in, so that an edit generalizes to other wordings and not only to its prompt."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from patchkit.editing.recipe import EditConfig
from patchkit.facts.requests import SUBJECT, encode_prompt, pad
from patchkit.facts.schema import Fact
from patchkit.model.forward import LayerRunner, Prefix

STARTERS = ("The", "Therefore", "Because", "I", "You")
FOLLOWERS = ("'s", " is", ",", " was")
LEAST, MOST = 2, 4  # words that follow each of these; one would leave "is a", the essence prompt of the drift loss
TOKENS = 6  # sampled for them
CHOICES = 50  # top-k of the sampling
ROWS = 256  # texts in one generation batch


@torch.no_grad()
def make_contexts(runner: LayerRunner, tokenizer: Any, config: EditConfig) -> list[str]:
    """Texts that the model generates itself, the same for the same seed and model.

    A value optimized on the prompt alone predicts the target after the prompt's own words and no others. So all
    contexts but the first two leave the prompt out and begin another sentence about the subject
    (docs/generalization.md), which `about` continues.

    Returns:
        1 + `config.contexts` texts: the empty one; one that ends in ". " to put before the prompt (ROME section 3.1);
        and `SUBJECT` with the beginning of a sentence about it, every other one after such a text.
    """
    before = texts_before(runner, tokenizer, config)
    if config.in_use(tokenizer):  # what else a fact is edited in is its own (`wordings`)
        return ["", *before[:2]]
    slots = [f"{SUBJECT}{FOLLOWERS[i % len(FOLLOWERS)]}" for i in range(config.contexts - 1)]
    return ["", *before[:1], *(before[i + 1] * (i % 2) + slot for i, slot in enumerate(slots))]


@torch.no_grad()
def texts_before(runner: LayerRunner, tokenizer: Any, config: EditConfig) -> list[str]:
    """`config.contexts` texts that end in ". ", to put before prompts as published methods do (ROME section 3.1)."""
    openings = [STARTERS[i % len(STARTERS)] for i in range(config.contexts)]
    seeds = [_seed(config, str(i)) for i in range(len(openings))]
    texts = _continued(runner, tokenizer, openings, seeds, config.context_length, choices=5)
    return [f"{' '.join(text.split()).replace(SUBJECT, '').rstrip('.')}. " for text in texts]


@torch.no_grad()
def about(
    runner: LayerRunner, tokenizer: Any, facts: Sequence[Fact], contexts: Sequence[str], config: EditConfig
) -> list[list[str]]:
    """Per fact, the contexts, those with `SUBJECT` continued by a few words that the model generates about the subject.

    A fact's words depend on the fact, the model and the seed, and not on the other facts.
    """
    slots = [i for i, context in enumerate(contexts) if SUBJECT in context]
    jobs = [(fact, i) for fact in facts for i in slots]
    openings = [fact.subject + contexts[i].partition(SUBJECT)[2] for fact, i in jobs]
    seeds = [_seed(config, f"{fact.prompt} {i}") for fact, i in jobs]
    found = [list(contexts) for _ in facts]
    for n, text in enumerate(_continued(runner, tokenizer, openings, seeds, TOKENS, CHOICES)):
        continuation = text.removeprefix(openings[n])
        sentence = re.split(r"[.!?\n]", continuation)[0] if text != continuation else ""
        words = "".join(re.findall(r"\s*\S+", sentence)[: LEAST + seeds[n] % (1 + MOST - LEAST)])
        found[n // len(slots)][jobs[n][1]] += words.replace(SUBJECT, "").rstrip(" ,;:(")
    return found


def _seed(config: EditConfig, text: str) -> int:
    return crc32(f"{config.seed} {text}".encode())


def _continued(
    runner: LayerRunner, tokenizer: Any, openings: Sequence[str], seeds: Sequence[int], tokens: int, choices: int
) -> list[str]:
    """Each opening with its continuation, as `sample` draws it."""
    drawn = sample(runner, tokenizer, openings, seeds, tokens, choices)
    whole = [[*encode_prompt(tokenizer, opening), *new] for opening, new in zip(openings, drawn, strict=True)]
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in whole]


@torch.no_grad()
def sample(
    runner: LayerRunner,
    tokenizer: Any,
    openings: Sequence[str],
    seeds: Sequence[int],
    tokens: int,
    choices: int,
    to_end: bool = False,
) -> list[list[int]]:
    """The tokens that the model continues each opening by, drawn from the `choices` likeliest with random numbers of
    its own; with one choice, the greedy continuation.

    None of them ends the text; with `to_end` one may, and is the last.
    """
    drawn = draw(runner, tokenizer, openings, seeds, tokens, choices, to_end)
    return [_up_to(each.tokens, {*_ends(runner), tokenizer.eos_token_id}) if to_end else each.tokens for each in drawn]


@dataclass(frozen=True)
class Drawn:
    """Tokens that a model went on with, and which it held for the likeliest at the place of each."""

    tokens: list[int]
    likeliest: list[int]


@torch.no_grad()
def draw(
    runner: LayerRunner,
    tokenizer: Any,
    openings: Sequence[str],
    seeds: Sequence[int],
    tokens: int,
    choices: int,
    to_end: bool = False,
) -> list[Drawn]:
    """As many tokens for each opening as `sample` draws, those after the end of a text included."""
    encoded = [encode_prompt(tokenizer, opening) for opening in openings]
    found = dict[int, Drawn]()
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))  # similar lengths: little padding
    for some in (order[first : first + ROWS] for first in range(0, len(order), ROWS)):
        draws = [torch.rand(tokens, choices, generator=torch.Generator().manual_seed(seeds[i])) for i in some]
        gumbel = -(-torch.stack(draws).clamp_min(1e-9).log()).log()  # (texts, tokens, choices)
        drawn, best = _drawn(runner, [encoded[i] for i in some], gumbel, () if to_end else _ends(runner))
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
