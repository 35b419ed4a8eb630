"""How a model is asked, and its greedy answers: in its chat template where it has one, as plain text where not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from transformers import GenerationConfig

from patchkit.facts.requests import encode_prompt, pad
from patchkit.model.forward import LayerRunner

ROWS = 32
Turn = tuple[str, str]
"""What a user said, and what the assistant answered."""


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
    """An answer: as text, and all tokens of it, with the one that ends it if it came to its end."""

    text: str
    ids: tuple[int, ...]


def is_chat(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def encode_ask(tokenizer: Any, ask: Ask) -> list[int]:
    """Token ids of what the model is given: a message in the chat template where there is one, else as plain text."""
    if ask.message and is_chat(tokenizer):
        return _in_template(tokenizer, ask)
    return encode_prompt(tokenizer, as_text(ask))


def as_text(ask: Ask) -> str:
    """A message for a model without a chat template: questions and answers, the last answer to be filled in."""
    if not ask.message:
        return ask.text
    before = [ask.system] if ask.system else []
    before += [f"Question: {user}\nAnswer: {assistant}" for user, assistant in ask.turns]
    return "\n\n".join([*before, f"Question: {ask.text}\nAnswer:"])


def _in_template(tokenizer: Any, ask: Ask) -> list[int]:
    turns = [(role, text) for pair in ask.turns for role, text in zip(("user", "assistant"), pair, strict=True)]
    turns.append(("user", ask.text))
    try:
        return _templated(tokenizer, [("system", ask.system), *turns] if ask.system else turns)
    except TemplateError:  # some templates have no system prompt: there the user's first words begin with it
        if not ask.system:
            raise
        role, first = turns[0]
        return _templated(tokenizer, [(role, f"{ask.system}\n\n{first}"), *turns[1:]])


def _templated(tokenizer: Any, turns: Sequence[tuple[str, str]]) -> list[int]:
    found = tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in turns],
        add_generation_prompt=True,
        return_dict=True,
        enable_thinking=False,  # answers are wanted, not the thoughts before them; templates without them ignore it
    )
    return list(found["input_ids"])


def fits(runner: LayerRunner, tokenizer: Any, ask: Ask, tokens: int) -> bool:
    """Whether the model has positions for what it is given and for so many new tokens."""
    config: Any = runner.arch.model.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit is None or len(encode_ask(tokenizer, ask)) + tokens <= limit


def endings(runner: LayerRunner, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: those that end a text, and a turn of talk where the model says which does."""
    known = runner.arch.model.generation_config.eos_token_id  # type: ignore[union-attr]
    known = known if isinstance(known, list) else [known]
    return sorted({token for token in (*known, tokenizer.eos_token_id) if token is not None})


@torch.no_grad()
def answer(runner: LayerRunner, tokenizer: Any, asks: Sequence[Ask], tokens: int) -> dict[Ask, Said]:
    """Greedy answers to all of `asks`, each up to its natural end or `tokens` tokens.

    Those of like length share a batch, padded on the left. The same asks make the same batches: a model that is not
    changed answers alike, bit for bit.
    """
    encoded = {ask: encode_ask(tokenizer, ask) for ask in asks}
    order = sorted(encoded, key=lambda ask: len(encoded[ask]))
    said: dict[Ask, Said] = {}
    for first in range(0, len(order), ROWS):
        said |= _answer_batch(runner, tokenizer, {ask: encoded[ask] for ask in order[first : first + ROWS]}, tokens)
    return said


def _answer_batch(
    runner: LayerRunner, tokenizer: Any, encoded: Mapping[Ask, list[int]], tokens: int
) -> dict[Ask, Said]:
    ends = endings(runner, tokenizer)
    ids, mask = pad(list(encoded.values()), runner.device, left=True)
    config = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        repetition_penalty=1.0,  # a model's own settings must not hide that an edit makes it repeat itself
        no_repeat_ngram_size=0,
        pad_token_id=_padding(tokenizer, ends),
        eos_token_id=list(ends) or None,
    )
    out = runner.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    said = {}
    for ask, row in zip(encoded, out[:, ids.shape[1] :].tolist(), strict=True):
        end = next((place for place, token in enumerate(row, 1) if token in ends), len(row))
        said[ask] = Said(_shown(tokenizer, ask, row[:end]), tuple(row[:end]))
    return said


def _padding(tokenizer: Any, ends: Sequence[int]) -> int:
    """What fills up answers that have ended."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)


def _shown(tokenizer: Any, ask: Ask, ids: Sequence[int]) -> str:
    """An answer's text; of one in plain text the first line, since nothing tells such a model to stop there."""
    text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
    return text.partition("\n")[0].strip() if ask.message and not is_chat(tokenizer) else text
