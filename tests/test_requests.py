"""Where subject and target lie, on tokenizers with and without BOS, EOS and leading spaces in their offsets."""

from __future__ import annotations

import string
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from patchkit.errors import InputError
from patchkit.facts.reader import parse_facts
from patchkit.facts.requests import SUBJECT, build_request, encode_prompt, encode_target, subject_span
from patchkit.facts.schema import Fact
from tests.zoo import _TEXT, tiny_tokenizer

CONTEXT = "Rome is true. "


def appending_eos() -> PreTrainedTokenizerFast:
    """As tokenizers of T5 and of some Llama derivatives do."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]),
        ]
    )
    return tokenizer


def trimming() -> PreTrainedTokenizerFast:
    """Offsets without the leading space of a word."""
    tokenizer = tiny_tokenizer(bos=False)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def metaspace() -> PreTrainedTokenizerFast:
    """As Llama 2 and Gemma: a space is a visible character of the next word, and one is put before the text."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    special, alphabet = ["<unk>", "<s>"], list(string.printable)
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(_TEXT.splitlines(), trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", unk_token="<unk>")


TOKENIZERS = {
    "bos": tiny_tokenizer,
    "no bos": lambda: tiny_tokenizer(bos=False),
    "eos": appending_eos,
    "trimming": trimming,
    "metaspace": metaspace,
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


def fact(prompt: str, subject: str, target: str = "Paris") -> Fact:
    return parse_facts([{"prompt": prompt, "subject": subject, "target_new": target}]).facts[0]


FACTS = [
    fact("The capital of France is", "France"),
    fact("France has the capital", "France"),
    fact("Rome", "Rome", "is the capital of Italy."),
    fact("In Italian, Rome is the capital; in Rome they say", "Rome"),
    fact("The mother tongue of Marie Curie is", "Marie Curie", "Polish, and German"),
    fact('Who said "Ada Lovelace"?', "Ada Lovelace", "Alan Turing"),
]


@pytest.mark.parametrize("one", FACTS, ids=[one.prompt for one in FACTS])
def test_subject_and_target_are_where_the_text_has_them(one: Fact, tokenizer: Any) -> None:
    request = build_request(one, tokenizer, ("", CONTEXT))
    for context, row in zip(("", CONTEXT), request.rows, strict=True):
        # Decoding a part loses what stands between it and the next, hence the strip.
        until_subject = tokenizer.decode(row.ids[: row.subject + 1], skip_special_tokens=True)
        text = context + one.prompt
        at = text.index(one.subject, len(context)) + len(one.subject)
        assert squeeze(until_subject) == squeeze(text[:at])
        assert squeeze(tokenizer.decode(row.ids[: row.target], skip_special_tokens=True)) == squeeze(text)
        assert squeeze(tokenizer.decode(row.ids[row.target :])) == squeeze(one.target_new)
    assert request.target_ids == request.rows[0].ids[request.rows[0].target :]


def squeeze(text: str) -> str:
    return text.replace("▁", " ").replace(" ", "")


def texts(one: Fact, tokenizer: Any, contexts: tuple[str, ...]) -> list[str]:
    """What each row says before the target."""
    rows = build_request(one, tokenizer, contexts).rows
    return [squeeze(tokenizer.decode(row.ids[: row.target], skip_special_tokens=True)) for row in rows]


@pytest.mark.parametrize("one", FACTS, ids=[one.prompt for one in FACTS])
def test_a_context_with_the_subject_takes_the_prompts_place(one: Fact, tokenizer: Any) -> None:
    """Also where the text before it names the subject itself, which is not where the edit goes."""
    before = f"{one.subject} is true. "
    row = build_request(one, tokenizer, (f"{before}{SUBJECT} was",)).rows[0]
    said = squeeze(tokenizer.decode(row.ids[: row.subject + 1], skip_special_tokens=True))
    assert said == squeeze(before + one.subject)
    assert texts(one, tokenizer, (f"{before}{SUBJECT} was",)) == [squeeze(f"{before}{one.subject} was")]
    assert squeeze(tokenizer.decode(row.ids[row.target :])) == squeeze(one.target_new)


def test_rewordings_take_the_place_of_generated_words_and_paraphrases_are_never_edited_on(tokenizer: Any) -> None:
    contexts = ("", CONTEXT, f"{CONTEXT}{SUBJECT} is", f"{SUBJECT}, who")
    one = FACTS[0]
    before = squeeze(CONTEXT)
    assert texts(one, tokenizer, contexts) == [
        squeeze(one.prompt),
        before + squeeze(one.prompt),
        before + "Franceis",
        "France,who",
    ]
    scored = one.model_copy(update={"paraphrases": ("In France one travels to",)})
    assert build_request(scored, tokenizer, contexts).rows == build_request(one, tokenizer, contexts).rows
    reworded = one.model_copy(update={"rewordings": ("They govern France from",)})
    assert texts(reworded, tokenizer, contexts)[2:] == [before + "TheygovernFrancefrom", "France,who"]


def test_words_about_the_subject_leave_the_attention_sink_alone() -> None:
    tokenizer = tiny_tokenizer(bos=False)
    contexts = ("", CONTEXT, f"{SUBJECT} was")
    short = build_request(fact("the city of R is", "R"), tokenizer, contexts)
    assert short.rows[2] == short.rows[1]
    long = build_request(fact("the city of Rome is", "Rome"), tokenizer, contexts)
    assert long.rows[2].subject == len(encode_prompt(tokenizer, "Rome")) - 1 > 0


@pytest.mark.parametrize("one", FACTS, ids=[one.prompt for one in FACTS])
def test_the_essence_prompt_ends_in_its_own_last_word(one: Fact, tokenizer: Any) -> None:
    """What comes next is read there, so a token that the tokenizer appends would be the wrong place."""
    essence = build_request(one, tokenizer).essence
    assert squeeze(tokenizer.decode(essence.ids, skip_special_tokens=True)) == squeeze(f"{one.subject} is a")
    assert tokenizer.decode(essence.ids[-1:]).strip() == "a"
    assert essence.target == len(essence.ids)


def test_a_prompt_to_be_continued_has_no_eos(tokenizer: Any) -> None:
    ids = encode_prompt(tokenizer, "The capital")
    assert tokenizer.eos_token_id is None or ids[-1] != tokenizer.eos_token_id
    assert squeeze(tokenizer.decode(ids, skip_special_tokens=True)) == "Thecapital"


def test_a_target_is_tokenized_with_what_stands_before_it(tokenizer: Any) -> None:
    ids, first = encode_target(tokenizer, "The capital of France is", "Paris")
    whole = tokenizer("The capital of France is Paris")["input_ids"]
    assert ids == (whole[:-1] if whole[-1] == 1 and tokenizer.eos_token_id == 1 else whole)
    assert ids[:first] == encode_prompt(tokenizer, "The capital of France is")


@pytest.mark.parametrize(
    ("prompt", "subject", "start"),
    [
        ("Hahn has a Ha", "Ha", 11),
        ("Hahn", "Ha", 0),
        ("Rome, Rome", "Rome", 0),
        ("C++ or C", "C", 0),
        ("in São Paulo", "São", 3),
    ],
)
def test_the_subject_is_its_first_whole_word(prompt: str, subject: str, start: int) -> None:
    assert subject_span(prompt, subject) == (start, start + len(subject))


def test_a_subject_that_the_tokenizer_drops_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("Rome", "")
    with pytest.raises(InputError, match="Rome"):
        build_request(fact("Rome is in", "Rome"), tokenizer)
