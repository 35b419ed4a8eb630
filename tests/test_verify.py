"""Every figure of a report against the same figure worked out by hand, the base always being the untouched one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import patchkit
from patchkit.errors import GateError
from patchkit.evaluate.gates import Gates
from patchkit.evaluate.readings import generate, perplexity, read_targets
from patchkit.evaluate.report import Report
from patchkit.evaluate.verify import verify
from patchkit.facts.schema import Fact, Locality
from patchkit.maths.linalg import Delta
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.hooks import live_deltas
from patchkit.statistics.corpus import PACKAGE_TEXT, read_corpus
from tests.zoo import FAMILIES, HIDDEN, INNER, tiny_tokenizer

PROMPTS = ("The capital of France is", "the city of Rome", "Ada Lovelace was born in", "who")
TARGETS = ("Paris", "is", "the mother tongue")


@pytest.fixture
def model() -> PreTrainedModel:
    return FAMILIES["llama"]()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def logits_of(model: PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return result


def by_hand(model: PreTrainedModel, tokenizer: Any, prompt: str, target: str) -> tuple[float, bool, tuple[int, ...]]:
    """Mean log-probability of the target's tokens, whether each is the argmax, and the argmaxes: one row, no batch."""
    start = tokenizer(prompt)["input_ids"]
    ids = tokenizer(f"{prompt} {target}")["input_ids"]
    assert ids[: len(start)] == start
    log_probs = logits_of(model, ids).log_softmax(-1)[len(start) - 1 : -1]  # (target tokens, vocab)
    wanted = ids[len(start) :]
    best = tuple(log_probs.argmax(-1).tolist())
    return float(log_probs[range(len(wanted)), wanted].mean()), best == tuple(wanted), best


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gemma2", "opt", "cohere"]
)  # soft-capped, flattened, scaled logits
def test_readings_of_a_batch_are_those_of_single_rows(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = FAMILIES[family]()
    pairs = [(prompt, target) for prompt in PROMPTS for target in TARGETS]
    found = read_targets(LayerRunner(inspect_model(model)), tokenizer, pairs)
    for pair in pairs:
        log_probability, exact, best = by_hand(model, tokenizer, *pair)
        assert found[pair].log_probability == pytest.approx(log_probability, abs=1e-4)
        assert (found[pair].exact, found[pair].argmax) == (exact, best)


def test_what_is_generated_is_the_greedy_continuation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    pairs = [(prompt, target) for prompt in PROMPTS for target in TARGETS]
    said = generate(LayerRunner(inspect_model(model)), tokenizer, pairs, extra=2)
    for prompt, target in pairs:
        ids = tokenizer(prompt)["input_ids"]
        length = len(ids) + len(tokenizer(f" {target}", add_special_tokens=False)["input_ids"]) + 2
        start = len(ids)
        while len(ids) < length and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(logits_of(model, ids)[-1].argmax()))
        assert said[prompt, target] == tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_perplexity_is_that_of_every_token_but_the_first(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "t.txt").write_text(PACKAGE_TEXT.read_text(encoding="utf-8")[:500], encoding="utf-8")
    corpus = read_corpus(tmp_path / "t.txt", tokenizer, window=100)
    losses = [
        F.cross_entropy(logits_of(model, list(window))[:-1], torch.tensor(window[1:]), reduction="none")
        for window in corpus.windows
    ]
    expected = math.exp(torch.cat(losses).double().mean())
    assert perplexity(LayerRunner(inspect_model(model)), corpus) == pytest.approx(expected, rel=1e-5)


def test_a_ruined_model_still_has_a_finite_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """exp(89) overflows float32, and infinity is no JSON."""
    (tmp_path / "t.txt").write_text("The capital of France is Paris.", encoding="utf-8")
    corpus = read_corpus(tmp_path / "t.txt", tokenizer)
    with torch.no_grad():
        model.get_parameter("lm_head.weight").mul_(60)
    assert 1e39 < perplexity(LayerRunner(inspect_model(model)), corpus) < math.inf


# --- reports ----------------------------------------------------------------------------------------------------------


class Attached:
    """An edit with some noise at one layer, and the model with it merged in, for figures worked out by hand."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, text: Path) -> None:
        settings = ("layers=2", "contexts=0", "value.clamp=20", "value.steps=60", "kl_weight=0", "null_energy=0.95")
        fact = {"prompt": "the city of Rome", "subject": "Rome", "target_new": "capital"}
        ((edit,),) = patchkit.apply(model, tokenizer, [fact], overrides=settings, text=text).updates.values()
        generator = torch.Generator().manual_seed(0)
        noise = Delta(torch.randn(HIDDEN, 3, generator=generator), 0.02 * torch.randn(3, INNER, generator=generator))
        self.delta, self.times = Delta.stack([edit, noise]), 0
        self.runner = LayerRunner(inspect_model(model))
        self.changed = FAMILIES["llama"]()
        with torch.no_grad():
            self.changed.get_parameter(self.runner.arch.sites[2].weight_name).add_(self.delta.dense())

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self.times += 1
        with live_deltas(self.runner.arch, {2: self.delta}):
            yield


@pytest.fixture
def attached(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Attached:
    (tmp_path / "text.txt").write_text(PACKAGE_TEXT.read_text(encoding="utf-8")[:2000], encoding="utf-8")
    return Attached(model, tokenizer, tmp_path / "text.txt")


@pytest.fixture
def facts() -> list[Fact]:
    return [
        Fact(
            id="full",
            prompt="the city of Rome",
            subject="Rome",
            target_new="capital",
            target_true="Paris",
            paraphrases=("I have been to Rome", "who has been to Rome"),
            locality=tuple(
                Locality(prompt=prompt, target=target)
                for prompt, target in (
                    ("the city of Berlin", "Germany"),
                    ("who", None),
                    ("The", "capital"),
                    ("in", "is"),
                )
            ),
        ),
        Fact(id="bare", prompt="Ada Lovelace is", subject="Ada Lovelace", target_new="a true engineer"),
    ]


def test_a_report_is_what_one_works_out_by_hand(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, attached: Attached, facts: list[Fact]
) -> None:
    report = verify(attached.runner, tokenizer, facts, attached)
    full, bare = report.per_fact
    fact, base, changed = facts[0], model, attached.changed

    def reading(of: PreTrainedModel, prompt: str, target: str) -> tuple[float, bool, tuple[int, ...]]:
        return by_hand(of, tokenizer, prompt, target)

    def rates(prompts: tuple[str, ...]) -> tuple[float, float]:
        new = [reading(changed, prompt, fact.target_new) for prompt in prompts]
        true = [reading(changed, prompt, "Paris") for prompt in prompts]
        success = sum(n[0] > t[0] for n, t in zip(new, true, strict=True)) / len(prompts)
        return success, sum(n[1] for n in new) / len(prompts)

    assert (full.efficacy.success, full.efficacy.exact) == rates((fact.prompt,))
    assert (full.generalization.success, full.generalization.exact) == rates(fact.paraphrases)
    asked = [(near.prompt, near.target or fact.target_new) for near in fact.locality]
    same = [reading(base, *pair)[2] == reading(changed, *pair)[2] for pair in asked]
    assert full.locality.unchanged == sum(same) / len(same)
    known = [("the city of Berlin", "Germany"), ("in", "is")]  # neither unknown nor the new target itself
    kept = [reading(changed, p, t)[0] > reading(changed, p, fact.target_new)[0] for p, t in known]
    assert full.locality.success == sum(kept) / len(kept)
    for name, of in (("before", base), ("after", changed)):
        probability = math.exp(reading(of, fact.prompt, fact.target_new)[0])
        assert getattr(full, f"probability_{name}") == pytest.approx(probability, rel=1e-3)
    assert bare.efficacy.success is None
    assert bare.generalization.model_dump() == {"success": None, "exact": None, "generated": None}
    assert bare.locality.model_dump() == {"success": None, "unchanged": None}
    assert report.perplexity is None
    assert report.efficacy.success == full.efficacy.success  # of the one fact that can be compared
    assert report.efficacy.exact == (float(full.efficacy.exact or 0) + float(bare.efficacy.exact or 0)) / 2
    assert report.generalization == full.generalization


def test_generation_is_judged_by_how_it_begins(
    tokenizer: PreTrainedTokenizerFast, attached: Attached, facts: list[Fact]
) -> None:
    report = verify(attached.runner, tokenizer, facts, attached)
    said = generate(LayerRunner(inspect_model(attached.changed)), tokenizer, [(f.prompt, f.target_new) for f in facts])
    for fact, found in zip(facts, report.per_fact, strict=True):
        text = said[fact.prompt, fact.target_new].strip()
        assert found.says_after == text
        assert found.efficacy.generated == float(text.startswith(fact.target_new))
        assert found.says_before != found.says_after
    assert report.per_fact[0].efficacy.generated == 1.0


def test_nothing_attached_changes_nothing(
    tokenizer: PreTrainedTokenizerFast, attached: Attached, facts: list[Fact], tmp_path: Path
) -> None:
    (tmp_path / "t.txt").write_text("The capital of France is Paris.", encoding="utf-8")

    @contextmanager
    def nothing() -> Iterator[None]:
        yield

    report = verify(attached.runner, tokenizer, facts, nothing, read_corpus(tmp_path / "t.txt", tokenizer))
    assert report.locality.unchanged == 1.0
    assert report.perplexity is not None
    assert report.perplexity.ratio == 1.0
    assert all(fact.says_before == fact.says_after for fact in report.per_fact)


def test_the_base_is_read_without_the_patch(
    tokenizer: PreTrainedTokenizerFast, attached: Attached, facts: list[Fact], tmp_path: Path
) -> None:
    (tmp_path / "t.txt").write_text("The capital of France is Paris.", encoding="utf-8")
    corpus = read_corpus(tmp_path / "t.txt", tokenizer)
    report = verify(attached.runner, tokenizer, facts, attached, corpus)
    assert attached.times == 1
    assert report.perplexity is not None
    assert report.perplexity.before == pytest.approx(perplexity(attached.runner, corpus))
    after = perplexity(LayerRunner(inspect_model(attached.changed)), corpus)
    assert report.perplexity.after == pytest.approx(after, rel=1e-4)
    assert report.perplexity.ratio == pytest.approx(report.perplexity.after / report.perplexity.before)


# --- gates ------------------------------------------------------------------------------------------------------------


def report_of(**more: Any) -> Report:
    rates = {"success": 0.9, "exact": 0.8, "generated": 0.1}
    parts = {
        "efficacy": rates,
        "generalization": rates,
        "locality": {"success": 0.2, "unchanged": 0.7},
        "perplexity": {"before": 10, "after": 11, "ratio": 1.1},
    }
    return Report.model_validate({"facts": 1, "per_fact": (), **parts, **more})


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        (Gates({"efficacy": 0.8, "generalization": 0.8, "locality": 0.7, "perplexity_ratio": 1.1}), None),
        (Gates(), None),
        (Gates({"efficacy": 0.81}), "efficacy 0.8, asked for at least 0.81"),
        (Gates({"generalization": 0.91}), "generalization 0.8, asked for at least 0.91"),
        (Gates({"locality": 0.75}), "locality 0.7, asked for at least 0.75"),
        (Gates({"perplexity_ratio": 1.05}), "perplexity ratio 1.1, asked for at most 1.05"),
        (Gates({"efficacy": 1, "locality": 1}), "gate failed: efficacy 0.8, .* 1; locality 0.7, asked for at least 1"),
    ],
)
def test_gates_hold_at_their_bound_and_name_every_failure(gates: Gates, message: str | None) -> None:
    if message is None:
        gates.check(report_of())
        return
    with pytest.raises(GateError, match=message):
        gates.check(report_of())


def test_a_gate_on_generalization_counts_exact_matches_as_one_on_efficacy_does() -> None:
    found = report_of(generalization={"success": 1.0, "exact": 0.5, "generated": 0.0})
    Gates({"generalization": 0.5}).check(found)
    with pytest.raises(GateError, match=r"generalization 0\.5"):
        Gates({"generalization": 0.6}).check(found)
