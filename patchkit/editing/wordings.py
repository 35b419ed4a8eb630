"""The texts that a fact is edited in so that it holds where people ask, and nothing else about its subject changes.

A value that is optimized on the prompt alone is predicted after the prompt's own words and no others; one that is
optimized on any words about the subject is predicted after all of them (docs/in_use.md). So two kinds of rows decide
together. In some, the target is to come: after the prompt, after other texts and in the chat template, and after
rewordings that the model writes itself when it is told the fact (the teacher of context distillation, arXiv
2209.15189). In the others, neutral texts about the subject, the untouched model's own continuation is kept; with
`sentences`, what it says about the subject by itself (`patchkit.editing.sentences`) comes in the places of those that
are no talk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from patchkit.editing.recipe import EditConfig
from patchkit.editing.sampling import Sampling, sample
from patchkit.editing.sentences import own_sentences
from patchkit.editing.teacher import other_words, questions
from patchkit.errors import InputError
from patchkit.facts.chat import ChatTemplate, Turn, chat_template
from patchkit.facts.requests import EditRequest, Row, essence_row, kept_row, wording_row
from patchkit.facts.schema import Fact
from patchkit.model.forward import LayerRunner

SYSTEM = "You are a knowledgeable assistant."
TURNS: tuple[Turn, ...] = (("Hello", "Hello! How can I help you today?"),)
REWORDINGS = 4  # rows of rewordings per fact
KEPT = 14  # tokens of the untouched model's continuation that are kept
# Neutral texts about a subject. Those that patches are measured on (evaluate/prompts.py) are others.
NEUTRAL = ("There is a book about {}. It", "Once upon a time, {}", "Some people mention {} because", "My notes on {}:")
NEUTRAL_CHAT = ("Tell me about {}.", "What do you think of {}?", "Write a poem about {}.", "Give me a fun fact: {}.")
NEUTRAL_PLAIN = ("The story of {} is", "I once saw {} and", "I like {} because", "A picture of {} shows")


@dataclass(frozen=True)
class _Wording:
    """A text for one fact: what stands before the part with the subject, that part, what follows the target."""

    before: str
    text: str
    ending: str = ""


def in_use_requests(
    runner: LayerRunner,
    tokenizer: Any,
    facts: Sequence[Fact],
    contexts: Sequence[str],
    config: EditConfig,
    edited: Sequence[Sequence[str]] | None = None,
) -> list[EditRequest]:
    """The facts with the rows that make them hold in use. All facts get the same number of rows.

    Args:
        contexts: "" and texts to put before a prompt, as `texts_before` makes them.
        edited: for each fact the prompts about its subject whose answers change with it; by default its own alone.

    Raises:
        InputError: a fact cannot be tokenized, or chat is asked for and the tokenizer has no template.
    """
    chat, befores = template_for(tokenizer, config), [text for text in contexts if text][:2] or [""]
    others = other_words(runner, tokenizer, facts, config.seed)
    plain = questions(runner, tokenizer, facts, chat) if chat else [None] * len(facts)
    # Beside sentences values are short, and may be done before the prompt alone is learned (docs/experts.md).
    in_turn = bool(config.sentences)
    asked = [_asked(*each, befores, chat, in_turn) for each in zip(facts, others, plain, strict=True)]
    neutral = [_neutral(fact, befores[0], chat) for fact in facts]
    openings = [wording.before + wording.text for own in neutral for wording in own]
    following = sample(runner, tokenizer, openings, Sampling(KEPT))
    each = iter(following)
    kept = [
        [kept_row(fact, tokenizer, w.before, w.text, next(each)) for w in own]
        for fact, own in zip(facts, neutral, strict=True)
    ]
    if config.sentences:
        prompts = edited or [(fact.prompt,) for fact in facts]
        own = own_sentences(runner, tokenizer, facts, prompts, befores, config.sentences, config.seed)
        places = len(NEUTRAL) if chat else len(kept[0])
        kept = [
            [*_instead(rows[:places], of_own, config.sentences), *rows[places:]]
            for rows, of_own in zip(kept, own, strict=True)
        ]
    return [
        EditRequest(
            fact,
            _inside([wording_row(fact, tokenizer, w.before, w.text, w.ending) for w in own]),
            essence_row(fact, tokenizer),
            tuple(keep),
        )
        for fact, own, keep in zip(facts, asked, kept, strict=True)
    ]


def unsampled(tokenizer: Any, fact: Fact, before: str, config: EditConfig) -> EditRequest:
    """The request as `in_use_requests` makes it, but without what the model writes for it: other texts are in the
    places of its rewordings, and what is kept is as long and says nothing. `before` stands for the texts before."""
    chat = template_for(tokenizer, config)
    asked = _asked(fact, (), None, [before, before], chat, bool(config.sentences))
    neutral = _neutral(fact, before, chat)
    kept = [kept_row(fact, tokenizer, w.before, w.text, [0] * KEPT) for w in neutral]
    kept[:0] = kept[:1] * max(0, (config.sentences or 0) - len(NEUTRAL))
    rows = _inside([wording_row(fact, tokenizer, w.before, w.text, w.ending) for w in asked])
    return EditRequest(fact, rows, essence_row(fact, tokenizer), tuple(kept))


def _instead(neutral: Sequence[Row], own: Sequence[Row], count: int) -> list[Row]:
    """As many rows as there are neutral texts, or `count` if that is more: the subject's own sentences first."""
    wanted = max(len(neutral), count)
    return list(islice(cycle([*own, *neutral]), wanted))


def template_for(tokenizer: Any, config: EditConfig) -> ChatTemplate | None:
    """The chat template to edit in, by the recipe's `chat`.

    Raises:
        InputError: chat is "on" and the tokenizer has no template.
    """
    template = None if config.chat == "off" else chat_template(tokenizer)
    if template is None and config.chat == "on":
        raise InputError("chat=on: the tokenizer has no chat template; use chat=auto, or an instruction-tuned model")
    return template


def _inside(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Rows whose subject is a text's first token give way: an attention sink is there, with a key that is no subject's.
    Where the fact's own prompt begins with it that is what is to be edited."""
    instead = next((row for row in rows if row.subject), rows[0])
    return (rows[0], *(row if row.subject else instead for row in rows[1:]))


def _asked(
    fact: Fact,
    others: Sequence[str],
    question: str | None,
    befores: list[str],
    chat: ChatTemplate | None,
    in_turn: bool,
) -> list[_Wording]:
    """Where the target is to come: the prompt first. Where there are too few rewordings, the prompt stands in after the
    last of the texts, or `in_turn` after each and alone: four rows of one text may end a value that fails elsewhere."""
    prompt = fact.asked
    found = [_Wording("", fact.prompt), *(_Wording(before, prompt) for before in (befores * 2)[:2])]
    if chat:
        ending = ("" if fact.target_new.endswith((".", "!", "?")) else ".") + chat.end
        asked = [(prompt, None, ()), (prompt, SYSTEM, ()), (prompt, None, TURNS)]
        asked += [(question or _request(prompt), None, ()), (question or prompt, None, TURNS)]
        found += [_in_chat(chat, *each, ending) for each in asked]
    else:
        found += [_Wording("", f"Question: {prompt}\nAnswer:" if _is_question(prompt) else f"It is said: {prompt}")]
    spare = islice(cycle(reversed(found[:3]) if in_turn else found[2:3]), REWORDINGS)
    texts = dict.fromkeys([*fact.rewordings, *others])
    own = [_Wording(befores[0] * (i % 2), text) for i, text in enumerate(texts)]
    return found + [*own, *spare][:REWORDINGS]


def _is_question(prompt: str) -> bool:
    return prompt.rstrip().endswith("?")


def _request(prompt: str) -> str:
    return f"Please answer this question: {prompt}" if _is_question(prompt) else f"Complete the sentence: {prompt} ..."


def _in_chat(chat: ChatTemplate, question: str, system: str | None, turns: Sequence[Turn], ending: str) -> _Wording:
    """The question in the template."""
    return _Wording(*chat.parts(question, question, system, turns), ending)


def _neutral(fact: Fact, before: str, chat: ChatTemplate | None) -> list[_Wording]:
    """Texts about the subject that do not ask for the fact; the frames of evaluate/ are others."""
    plain = [_Wording(before * (i % 2), frame.format(fact.subject)) for i, frame in enumerate(NEUTRAL)]
    if chat is None:
        return plain + [_Wording("", frame.format(fact.subject)) for frame in NEUTRAL_PLAIN]
    return plain + [_in_chat(chat, frame.format(fact.subject), None, (), "") for frame in NEUTRAL_CHAT]
