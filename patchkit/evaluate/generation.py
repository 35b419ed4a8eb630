"""What a model answers to a prompt, with patches and without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from patchkit.errors import InputError
from patchkit.evaluate.answers import Ask, encode_ask, is_chat
from patchkit.facts.chat import Turn
from patchkit.facts.limits import Limits
from patchkit.model.devices import home_of


@dataclass(frozen=True)
class Sampling:
    """How text is generated. Temperature 0 is greedy.

    Attributes:
        chat: put the prompt into the tokenizer's chat template, as a user's message.
        system: the system prompt there; empty leaves it to the template.
        turns: what was said there before.
    """

    max_new_tokens: int = 40
    temperature: float = 0.0
    seed: int = 0
    chat: bool = False
    system: str = ""
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What the patched model answers to one prompt, and what the base does; None where that was not asked for."""

    prompt: str
    patched: str | None
    base: str | None

    @property
    def text(self) -> str:
        """What the patched model answers; where there was no patch, the base."""
        return (self.base if self.patched is None else self.patched) or ""


def answers(
    model: PreTrainedModel,
    tokenizer: Any,
    attached: Callable[[], AbstractContextManager[Any]] | None,
    prompts: Sequence[str],
    sampling: Sampling,
    compare: bool = False,
) -> list[Answer]:
    """Answer every prompt inside `attached()`, which puts patches on the model and takes them off again.

    Args:
        attached: None where there are no patches, and the base answers alone.
        compare: answer without the patches as well.

    Raises:
        InputError: a prompt has no tokens or too many, or there is no chat template.
    """
    encoded = [_encode(tokenizer, prompt, sampling) for prompt in prompts]
    limits = Limits.of(model.config)
    for prompt, ids in zip(prompts, encoded, strict=True):
        if fault := limits.fault(ids, sampling.max_new_tokens):
            hint = "" if limits.fault(ids) else ", or lower --max-new-tokens"
            raise InputError(f'prompt "{prompt[:40]}": {fault}{hint}')

    def said() -> list[str]:
        return [_continue(model, tokenizer, ids, sampling) for ids in encoded]

    nothing = [None] * len(encoded)
    with attached() if attached else nullcontext():
        patched = said() if attached else nothing
    base = said() if compare or not attached else nothing
    return [Answer(*row) for row in zip(prompts, patched, base, strict=True)]


def _encode(tokenizer: Any, prompt: str, sampling: Sampling) -> list[int]:
    """The same tokens as when facts are asked for."""
    if sampling.chat and not is_chat(tokenizer):
        raise InputError(
            "--chat: the tokenizer has no chat template; leave --chat out, or use an instruction-tuned model"
        )
    ids = encode_ask(tokenizer, Ask(prompt, sampling.chat, sampling.system, sampling.turns))
    if not prompt.strip() or not ids:
        raise InputError("an empty prompt: there is nothing to answer")
    return ids


@torch.no_grad()
def _continue(model: Any, tokenizer: Any, ids: list[int], sampling: Sampling) -> str:
    """The text that follows, without special tokens; the same for the same seed."""
    tokens = torch.tensor([ids], device=home_of(model.get_input_embeddings()))  # (1, n)
    sampled = sampling.temperature > 0
    with torch.random.fork_rng(devices=[tokens.device] if tokens.device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        out = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=sampling.max_new_tokens,
            do_sample=sampled,
            temperature=sampling.temperature if sampled else None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        )
    return str(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))
