"""Texts that prompts stand in while editing, so that an edit holds in other words too and not only in its prompt's."""

from __future__ import annotations

import re
from collections.abc import Sequence
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
LEAST, MOST = 2, 4  # words said of the subject after each of these; fewer leave "is a", whose drift is held down
TOKENS = 6  # sampled for them
CHOICES = 50  # the likeliest next tokens, among which each is drawn
ROWS = 256  # texts that are continued together


@torch.no_grad()
def make_contexts(runner: LayerRunner, tokenizer: Any, config: EditConfig) -> list[str]:
    """Texts the model writes itself, the same for the same seed and model.

    A value optimized on the prompt alone says the target after the prompt's words and no others. So all contexts but
    the first two leave the prompt out and begin some other sentence about the subject (docs/generalization.md), which
    `about` goes on with.

    Returns:
        1 + `config.contexts` texts: the empty one; one that ends in ". " to put before the prompt (ROME section 3.1);
        and `SUBJECT` with the beginning of what is said of it, every other one behind such a text.
    """
    before = texts_before(runner, tokenizer, config)
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
    """Per fact, the contexts with a few more words of the model's about its subject in each that has `SUBJECT`.

    A fact's words depend on the fact, the model and the seed, and not on the facts beside it.
    """
    slots = [i for i, context in enumerate(contexts) if SUBJECT in context]
    jobs = [(fact, i) for fact in facts for i in slots]
    openings = [fact.subject + contexts[i].partition(SUBJECT)[2] for fact, i in jobs]
    seeds = [_seed(config, f"{fact.prompt} {i}") for fact, i in jobs]
    found = [list(contexts) for _ in facts]
    for n, text in enumerate(_continued(runner, tokenizer, openings, seeds, TOKENS, CHOICES)):
        said = text.removeprefix(openings[n])
        sentence = re.split(r"[.!?\n]", said)[0] if text != said else ""
        words = "".join(re.findall(r"\s*\S+", sentence)[: LEAST + seeds[n] % (1 + MOST - LEAST)])
        found[n // len(slots)][jobs[n][1]] += words.replace(SUBJECT, "").rstrip(" ,;:(")
    return found


def _seed(config: EditConfig, text: str) -> int:
    return crc32(f"{config.seed} {text}".encode())


def _continued(
    runner: LayerRunner, tokenizer: Any, openings: Sequence[str], seeds: Sequence[int], tokens: int, choices: int
) -> list[str]:
    """Each opening with a continuation of that many tokens, drawn with its own random numbers."""
    encoded = [encode_prompt(tokenizer, opening) for opening in openings]
    texts = [""] * len(openings)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))  # alike in length: little padding
    for some in (order[first : first + ROWS] for first in range(0, len(order), ROWS)):
        draws = [torch.rand(tokens, choices, generator=torch.Generator().manual_seed(seeds[i])) for i in some]
        gumbel = -(-torch.stack(draws).clamp_min(1e-9).log()).log()  # (texts, tokens, choices)
        for i, new in zip(some, _drawn(runner, [encoded[i] for i in some], gumbel).tolist(), strict=True):
            texts[i] = tokenizer.decode([*encoded[i], *new], skip_special_tokens=True)
    return texts


def _drawn(runner: LayerRunner, openings: Sequence[Sequence[int]], gumbel: Tensor) -> Tensor:
    """What follows the openings, (texts, tokens): each time one of the likeliest tokens, chosen by the Gumbel-max trick
    with the noise (texts, tokens, choices), but none that ends a text."""
    rows, device = torch.arange(len(openings), device=runner.device), runner.device
    before = Prefix.read(runner, *pad([opening[:-1] for opening in openings], device, width=1))
    cache, mask = before.growing_cache(), before.mask
    position = mask.sum(1, keepdim=True)  # (texts, 1)
    last = torch.tensor([opening[-1:] for opening in openings], device=device)  # (texts, 1)
    ends = _ends(runner)
    drawn = []
    for noise in gumbel.to(device).unbind(1):
        mask = torch.cat([mask, torch.ones_like(last)], 1)
        inputs = {"input_ids": last, "attention_mask": mask, "position_ids": position, "past_key_values": cache}
        logits = runner.run({**inputs, "use_cache": True}, logits_at=(rows, torch.zeros_like(rows))).logits
        assert logits is not None
        logits[:, ends] = -torch.inf
        likeliest = logits.float().topk(min(noise.shape[1], logits.shape[1]))
        best = (likeliest.values + noise[:, : likeliest.values.shape[1]]).argmax(1, keepdim=True)
        last, position = likeliest.indices.gather(1, best), position + 1
        drawn.append(last)
    return torch.cat(drawn, 1)


def _ends(runner: LayerRunner) -> list[int]:
    """The tokens that end a text."""
    found = getattr(runner.arch.model.generation_config, "eos_token_id", None)
    return found if isinstance(found, list) else [] if found is None else [found]
