"""What a model can take: texts that are too long for it, and tokens that it has no embedding for, are refused here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from patchkit.facts.checks import Check
from patchkit.facts.record import Refused, quote
from patchkit.facts.requests import encode, encode_prompt, encode_target, subject_end
from patchkit.facts.schema import Fact, Pair

GENERATED = 4
"""Tokens that measuring generates beside a target's own, with one to spare."""


@dataclass(frozen=True)
class Limits:
    """Rows of a model's embedding, and positions it was made for; None where the model names no bound."""

    vocabulary: int | None = None
    positions: int | None = None

    @classmethod
    def of(cls, config: Any) -> Limits:
        """Those of a model's transformers configuration."""
        text = config.get_text_config()
        return cls(getattr(text, "vocab_size", None), getattr(text, "max_position_embeddings", None))

    def fault(self, ids: Sequence[int], more: int = 0) -> str | None:
        """What is wrong with a text of these tokens, to which `more` will be added; None where nothing is."""
        if self.vocabulary is not None and max(ids, default=0) >= self.vocabulary:
            return (
                f"token {max(ids)} is beyond the {self.vocabulary:,} rows of the model's embedding: the tokenizer is "
                "another model's, or has tokens that were added and never trained; use the model's own"
            )
        if self.positions is not None and len(ids) + more > self.positions:
            added = f" and {more} more" if more else ""
            return f"{len(ids):,} tokens{added} are more than the {self.positions:,} positions of the model; shorten it"
        return None


def fitting(tokenizer: Any, limits: Limits, more: int = 0) -> Check:
    """Refuses a fact that the tokenizer or the model cannot take, by the name of the field that shows it.

    Args:
        more: tokens that will be added to the fact's texts, by contexts before them or by generating after them.
    """

    def check(fact: Fact) -> None:
        if not encode_target(tokenizer, *fact.pair(fact.prompt))[0][len(encode_prompt(tokenizer, fact.prompt)) :]:
            raise Refused("target_new", f"{quote(fact.target_new)} becomes no token; put visible text in it")
        end = subject_end(fact, fact.prompt, bool(fact.messages))
        if encode(tokenizer, fact.prompt).last_token(end) is None:
            raise Refused("subject", f"the tokenizer gives {quote(fact.subject)} no token; choose another subject")
        for name, text in _texts(fact):
            ids = encode_target(tokenizer, *text)[0] if isinstance(text, tuple) else encode_prompt(tokenizer, text)
            if fault := limits.fault(ids, more):
                raise Refused(name, f"{quote(text[0] if isinstance(text, tuple) else text)}: {fault}")

    return check


def _texts(fact: Fact) -> Iterator[tuple[str, Pair | str]]:
    """Everything about a fact that a model will read, with the field it stands in."""
    yield "prompt", fact.pair(fact.prompt)
    if fact.target_true is not None:
        yield "target_true", fact.pair(fact.prompt, fact.target_true)
    for name, prompts in (("rewordings", fact.rewordings), ("paraphrases", fact.paraphrases)):
        yield from ((f"{name}[{i}]", fact.pair(prompt)) for i, prompt in enumerate(prompts))
    for name, texts in (("questions", fact.questions), ("about", fact.about)):
        yield from ((f"{name}[{i}]", text) for i, text in enumerate(texts))
    for i, near in enumerate(fact.locality):
        yield f"locality[{i}]", fact.pair(near.prompt, near.target)
    for group, probes in fact.portability.items():
        for i, probe in enumerate(probes):
            texts = (probe.prompt, *probe.alternatives, *(condition.prompt for condition in probe.conditions))
            yield from ((f"portability.{group}[{i}]", text) for text in texts)
