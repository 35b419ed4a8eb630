"""How a model is asked, and its greedy answers: in its chat template where it has one, as plain text where not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from patchkit.editing.stems import read
from patchkit.errors import InputError
from patchkit.facts.chat import Turn, chat_template
from patchkit.facts.limits import Limits
from patchkit.facts.requests import encode_prompt
from patchkit.model.forward import LayerRunner, watching_output
from patchkit.words import visible

ROWS = 64


@dataclass(frozen=True)
class Ask:
    """Something said to a model, or with `message` false the beginning of a text that it is to go on with.

    Attributes:
        system: the system prompt; empty leaves it to the chat template, which may have one of its own.
        turns: what was said before.
    """

    text: str
    message: bool = True
    system: str = ""
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class Said:
    """An answer.

    Attributes:
        text: the answer as text.
        given: the tokens that the model was given.
        ids: all tokens of the answer, with the one that ends it if it came to its end.
        states: (tokens of the answer, d), the last layer's output where each was predicted.
    """

    text: str
    given: tuple[int, ...]
    ids: tuple[int, ...]
    states: Tensor = field(compare=False)


def is_chat(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template."""
    return chat_template(tokenizer) is not None


def encode_ask(tokenizer: Any, ask: Ask) -> list[int]:
    """Token ids of what the model is given: a message in the chat template where there is one, else as plain text.

    Raises:
        InputError: it is no text, or the template does not take it.
    """
    refuse_halves(ask)
    template = chat_template(tokenizer)
    if ask.message and template:
        return encode_prompt(tokenizer, template.ask(ask.text, ask.system, ask.turns))
    return encode_prompt(tokenizer, as_text(ask))


def refuse_halves(ask: Ask) -> None:
    """Raises InputError for bytes that are no UTF-8, which Python hands on as halves of surrogate pairs, and for such
    halves in JSON: no tokenizer takes them."""
    try:
        "".join((ask.text, ask.system or "", *chain(*ask.turns))).encode()
    except UnicodeEncodeError as error:
        found = visible(error.object[max(0, error.start - 20) : error.end])
        raise InputError(f'what the model is asked: it is not UTF-8 text, after "{found}"; write it in UTF-8') from None


def as_text(ask: Ask) -> str:
    """A message for a model without a chat template: questions and answers, the last answer to be filled in."""
    if not ask.message:
        return ask.text
    before = [ask.system] if ask.system else []
    before += [f"Question: {user}\nAnswer: {assistant}" for user, assistant in ask.turns]
    return "\n\n".join([*before, f"Question: {ask.text}\nAnswer:"])


def fits(runner: LayerRunner, tokenizer: Any, ask: Ask, tokens: int) -> bool:
    """Whether the model has positions for what it is given and for so many new tokens."""
    return Limits.of(runner.arch.model.config).fault(encode_ask(tokenizer, ask), tokens) is None


def endings(runner: LayerRunner, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: those that end a text, and a turn of talk where the model says which does."""
    known = runner.arch.model.generation_config.eos_token_id  # type: ignore[union-attr]
    known = known if isinstance(known, list) else [known]
    return sorted({token for token in (*known, tokenizer.eos_token_id) if token is not None})


@torch.no_grad()
def answer(runner: LayerRunner, tokenizer: Any, asks: Mapping[Ask, int]) -> dict[Ask, Said]:
    """Greedy answers, each up to its natural end or as many tokens as `asks` has for it.

    Those of like length share a batch, and what they begin with alike is read once. The same asks make the same
    batches: a model that is not changed answers alike, bit for bit.
    """
    encoded = {ask: encode_ask(tokenizer, ask) for ask in asks}
    ends, said = endings(runner, tokenizer), dict[Ask, Said]()
    for batch in batches({ask: len(ids) for ask, ids in encoded.items()}, ROWS):
        most = max(asks[ask] for ask in batch)
        found, states = _continued(runner, [encoded[ask] for ask in batch], most, ends)
        for ask, row, own in zip(batch, found.tolist(), states, strict=True):
            row = row[: asks[ask]]
            end = next((place for place, token in enumerate(row, 1) if token in ends), len(row))
            text = _shown(tokenizer, ask, row[:end])
            said[ask] = Said(text, tuple(encoded[ask]), tuple(row[:end]), own[:end].clone())
    return said


def batches(lengths: Mapping[Ask, int], rows: int) -> Iterator[list[Ask]]:
    """Asks of like length, at most `rows` at a time."""
    order = sorted(lengths, key=lambda ask: lengths[ask])
    yield from (order[first : first + rows] for first in range(0, len(order), rows))


def _continued(
    runner: LayerRunner, texts: Sequence[Sequence[int]], tokens: int, ends: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The likeliest continuations (texts, tokens), and the last layer's output (texts, tokens, d) before each token;
    as many tokens as it takes until all have ended."""
    before = read(runner, [text[:-1] for text in texts])
    cache, mask, position = before.growing_cache(), before.mask, before.mask.sum(1, keepdim=True)
    last = torch.tensor([text[-1:] for text in texts], device=runner.device)  # (texts, 1)
    ended, stops = torch.zeros_like(last, dtype=torch.bool), torch.tensor(ends, device=runner.device)
    found, states = list[Tensor](), list[Tensor]()
    while len(found) < tokens and not ended.all():
        mask = torch.cat([mask, torch.ones_like(last)], 1)
        inputs = {"input_ids": last, "attention_mask": mask, "position_ids": position, "past_key_values": cache}
        with watching_output(runner.arch.layers[-1], len(texts), states.append):
            logits = runner.run({**inputs, "use_cache": True}).logits
        assert logits is not None
        last, position = logits[:, -1].argmax(-1, keepdim=True), position + 1
        ended |= torch.isin(last, stops)
        found.append(last)
    return torch.cat(found, 1), torch.cat(states, 1)


def _shown(tokenizer: Any, ask: Ask, ids: Sequence[int]) -> str:
    """An answer's text; of one in plain text the first line, since nothing tells such a model to stop there."""
    text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
    return text.partition("\n")[0].strip() if ask.message and not is_chat(tokenizer) else text
