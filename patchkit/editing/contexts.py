"""Contexts that facts are edited in, so that an edit generalizes to other wordings and not only to its prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from zlib import crc32

import torch

from patchkit.editing.recipe import EditConfig
from patchkit.editing.sampling import Sampling, sample
from patchkit.facts.requests import SUBJECT, encode_prompt
from patchkit.facts.schema import Fact
from patchkit.model.forward import LayerRunner

STARTERS = ("The", "Therefore", "Because", "I", "You")
FOLLOWERS = ("'s", " is", ",", " was")
LEAST, MOST = 2, 4  # words that follow each of these; one would leave "is a", the essence prompt of the drift loss
TOKENS = 6  # sampled for them
CHOICES = 50  # top-k of the sampling


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
    texts = _continued(runner, tokenizer, openings, Sampling(config.context_length, choices=5), seeds)
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
    for n, text in enumerate(_continued(runner, tokenizer, openings, Sampling(TOKENS, CHOICES), seeds)):
        continuation = text.removeprefix(openings[n])
        sentence = re.split(r"[.!?\n]", continuation)[0] if text != continuation else ""
        words = "".join(re.findall(r"\s*\S+", sentence)[: LEAST + seeds[n] % (1 + MOST - LEAST)])
        found[n // len(slots)][jobs[n][1]] += words.replace(SUBJECT, "").rstrip(" ,;:(")
    return found


def _seed(config: EditConfig, text: str) -> int:
    return crc32(f"{config.seed} {text}".encode())


def _continued(
    runner: LayerRunner, tokenizer: Any, openings: Sequence[str], how: Sampling, seeds: Sequence[int]
) -> list[str]:
    """Each opening with its continuation, as `sample` draws it."""
    drawn = sample(runner, tokenizer, openings, how, seeds)
    whole = [[*encode_prompt(tokenizer, opening), *new] for opening, new in zip(openings, drawn, strict=True)]
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in whole]
