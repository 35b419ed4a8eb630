"""Facts in twenty scripts: where subjects end on three kinds of tokenizers, and what comes before targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from patchkit.facts.reader import parse_facts
from patchkit.facts.requests import build_request, encode_prompt, encode_target
from patchkit.facts.schema import Fact
from patchkit.facts.text import continuation
from tests.conftest import ROOT

# prompt, subject, target, whether the script puts spaces between words
SCRIPTS = {
    "Latin": ("Łódź lies in", "Łódź", "Perú", True),
    "Greek": ("Η Αθήνα βρίσκεται στην", "Αθήνα", "Ιταλία", True),
    "Cyrillic": ("Москва находится в", "Москва", "Италии", True),
    "Armenian": ("Երևանը գտնվում է", "Երևան", "Իտալիայում", True),
    "Georgian": ("თბილისი მდებარეობს", "თბილისი", "იტალიაში", True),
    "Hebrew": ("ירושלים נמצאת ב", "ירושלים", "איטליה", True),
    "Arabic": ("تقع القاهرة في", "القاهرة", "إيطاليا", True),
    "Devanagari": ("दिल्ली यहाँ है:", "दिल्ली", "इटली", True),
    "Bengali": ("ঢাকা অবস্থিত", "ঢাকা", "ইতালিতে", True),
    "Gurmukhi": ("ਅੰਮ੍ਰਿਤਸਰ ਸਥਿਤ ਹੈ", "ਅੰਮ੍ਰਿਤਸਰ", "ਇਟਲੀ", True),
    "Tamil": ("சென்னை அமைந்துள்ளது", "சென்னை", "இத்தாலியில்", True),
    "Sinhala": ("කොළඹ පිහිටා ඇත්තේ", "කොළඹ", "ඉතාලියේ", True),
    "Ethiopic": ("አዲስ አበባ የሚገኘው", "አዲስ አበባ", "ጣሊያን", True),
    "Hangul": ("서울의 위치는", "서울", "이탈리아", True),
    "Emoji": ("🦊 lives in", "🦊", "Perú", True),
    "Han": ("李娜出生于", "李娜", "巴黎", False),
    "Kana": ("ひらがなの東京タワーは", "東京タワー", "ローマにある", False),
    "Thai": ("สมชายเกิดที่", "สมชาย", "โรม", False),
    "Lao": ("ວຽງຈັນຢູ່ໃນ", "ວຽງຈັນ", "ອີຕາລີ", False),
    "Khmer": ("ភ្នំពេញស្ថិតនៅ", "ភ្នំពេញ", "អ៊ីតាលី", False),
    "Burmese": ("ရန်ကုန်တည်ရှိရာမှာ", "ရန်ကုန်", "အီတလီ", False),
}
NAMES = ("李娜", "李婷", "李婧")
LATIN = ["The capital of France is Paris.", "It is true - Alan Turing was born in London and lives in Rome."] * 4


def wrapped(core: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3, Qwen: characters it has not learned are a token a byte, each with the character's span."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([*LATIN, *(prompt[:3] for prompt, *_ in SCRIPTS.values())], trainer)
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    return wrapped(core)


def unigram() -> PreTrainedTokenizerFast:
    """As sentencepiece's unigram models, T5 and XGLM: pieces of several characters, a visible space before words."""
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    texts = [*LATIN, *NAMES, *(f"{prompt} {target}" for prompt, _, target, _ in SCRIPTS.values())]
    trainer = trainers.UnigramTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2, Mistral and Gemma: characters it has not learned are a token a byte, only the last with a span."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]  # type: ignore[list-item]
    )
    special = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=special, show_progress=False)
    core.train_from_iterator([text.replace(" ", "▁") for text in LATIN], trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrapped(core)


KINDS: dict[str, Callable[[], Any]] = {"byte-level": byte_level, "unigram": unigram, "byte-fallback": byte_fallback}
for name in ("smollm2-135m", "gemma3-270m"):
    if (ROOT / "models" / name / "tokenizer.json").is_file():
        KINDS[name] = lambda folder=ROOT / "models" / name: AutoTokenizer.from_pretrained(folder)


@pytest.fixture(params=KINDS, scope="module")
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


def fact_of(script: str, **more: Any) -> Fact:
    prompt, subject, target, _ = SCRIPTS[script]
    return parse_facts([{"prompt": prompt, "subject": subject, "target_new": target, **more}]).facts[0]


def decoded(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False)).removeprefix("<s>").removeprefix("<bos>")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("before", ["", "It is true. "])
def test_a_subject_ends_with_the_token_that_completes_it(script: str, before: str, tokenizer: Any) -> None:
    fact = fact_of(script)
    row = build_request(fact, tokenizer, (before,)).rows[0]
    text = before + fact.prompt
    wanted = text[: text.index(fact.subject, len(before)) + len(fact.subject)]
    assert decoded(tokenizer, row.ids[: row.subject + 1]).startswith(wanted)
    assert not decoded(tokenizer, row.ids[: row.subject]).startswith(wanted)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_target_follows_the_tokens_that_the_prompt_has_alone(script: str, tokenizer: Any) -> None:
    prompt, _, target, spaced = SCRIPTS[script]
    ids, first = encode_target(tokenizer, prompt, target)
    assert ids[:first] == encode_prompt(tokenizer, prompt)
    assert decoded(tokenizer, ids) == f"{prompt}{' ' if spaced else ''}{target}"
    row = build_request(fact_of(script), tokenizer).rows[0]
    assert (list(row.ids), row.target) == (ids, first)


def test_facts_with_a_common_beginning_have_keys_of_their_own(tokenizer: Any) -> None:
    """They share a character and, byte for byte, the beginning of the next: only what completes that one differs."""
    facts = parse_facts([{"prompt": f"{n}出生于", "subject": n, "target_new": "巴黎"} for n in NAMES]).facts
    rows = [build_request(fact, tokenizer).rows[0] for fact in facts]
    assert len({row.ids[: row.subject + 1] for row in rows}) == len(NAMES)


@pytest.mark.parametrize(
    ("prompt", "target", "separator", "follows"),
    [
        ("The tower is in", "Rome", None, " Rome"),
        ("The tower is in ", "Rome", None, "Rome"),
        ("Where?\n", "Rome", None, "Rome"),
        ("", "Rome", None, "Rome"),
        ("The tower is in", " Rome", None, " Rome"),
        ("2 + 2 =", "4", None, " 4"),
        ("东京在哪里?", "日本", None, "日本"),
        ("东京在哪里？", "Japan", None, "Japan"),
        ("Where is Tokyo?", "日本", None, " 日本"),
        ("猫 in English:", "cat", None, " cat"),
        ("猫:", "cat", None, " cat"),
        ("성은 ", "김", None, "김"),
        ("李娜出生于", "巴黎", " ", " 巴黎"),
        ('print("', "hello", "", "hello"),
    ],
)
def test_what_comes_between_prompt_and_target(prompt: str, target: str, separator: str | None, follows: str) -> None:
    assert continuation(prompt, target, separator) == follows


def test_a_fact_may_say_what_comes_between(tokenizer: Any) -> None:
    fact = fact_of("Latin", separator="-")
    row = build_request(fact, tokenizer).rows[0]
    assert decoded(tokenizer, row.ids) == "Łódź lies in-Perú"
    assert (list(row.ids), row.target) == encode_target(tokenizer, *fact.pair(fact.prompt))


def test_whitespace_at_a_prompts_end_is_edited_as_it_is_typed(tokenizer: Any) -> None:
    for prompt in ("Alan Turing lives in ", "Where does Alan Turing live?\n", "Alan Turing: \t"):
        ids, first = encode_target(tokenizer, prompt, "Rome")
        assert ids[:first] == encode_prompt(tokenizer, prompt)
        assert decoded(tokenizer, ids[first:]).strip() == "Rome"


@pytest.mark.parametrize("before", ["", "It is true. "])
def test_a_bos_written_in_the_prompt_does_not_become_two(before: str) -> None:
    tokenizer = byte_fallback()
    written, plain = (
        parse_facts([{"prompt": f"{bos}Alan Turing lives in", "subject": "Alan Turing", "target_new": "Rome"}]).facts[0]
        for bos in ("<s>", "")
    )
    assert encode_prompt(tokenizer, written.prompt) == encode_prompt(tokenizer, plain.prompt)
    assert build_request(written, tokenizer, (before,)).rows == build_request(plain, tokenizer, (before,)).rows
