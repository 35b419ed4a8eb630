"""The texts a model writes for its own editing."""

from __future__ import annotations

import pytest

from patchkit.editing.contexts import FOLLOWERS, MOST, about, make_contexts, texts_before
from patchkit.editing.recipe import EditConfig, load_recipe
from patchkit.facts.requests import SUBJECT, build_request
from patchkit.facts.schema import Fact
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from tests.zoo import FAMILIES, tiny_tokenizer

ROME = Fact(id="rome", prompt="the city of Rome", subject="Rome", target_new="capital")
ADA = Fact(id="ada", prompt="the friend of Ada Lovelace", subject="Ada Lovelace", target_new="is")
CURIE = Fact(id="curie", prompt="the language of Marie Curie", subject="Marie Curie", target_new="Polish")


def config_of(seed: int = 0, count: int = 6) -> EditConfig:
    return load_recipe(None, None, [f"seed={seed}", f"contexts={count}"])


def contexts_of(seed: int = 0, count: int = 6) -> list[str]:
    return make_contexts(LayerRunner(inspect_model(FAMILIES["llama"]())), tiny_tokenizer(), config_of(seed, count))


def words_of(facts: list[Fact], seed: int = 0, family: str = "llama") -> list[list[str]]:
    runner, config = LayerRunner(inspect_model(FAMILIES[family]())), config_of(seed)
    return about(runner, tiny_tokenizer(), facts, make_contexts(runner, tiny_tokenizer(), config), config)


@pytest.mark.parametrize("count", [0, 1, 2, 6])
def test_the_prompt_alone_then_behind_a_text_then_other_words_about_the_subject(count: int) -> None:
    contexts = contexts_of(count=count)
    assert len(contexts) == count + 1
    assert contexts[0] == ""
    assert not any("\n" in context or "<s>" in context for context in contexts)
    for context in contexts[1:2]:
        assert context.startswith("The")
        assert context.endswith(". ")
    for context, follower in zip(contexts[2:], (*FOLLOWERS, FOLLOWERS[0]), strict=False):
        before, slot, after = context.partition(SUBJECT)
        assert slot
        assert not before or before.endswith(". ")
        assert after == follower


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_model_goes_on_about_each_subject_in_a_few_words(family: str) -> None:
    plain, (rome, ada) = contexts_of(), words_of([ROME, ADA], family=family)
    assert rome[:2] == plain[:2] if family == "llama" else rome[0] == ""
    assert rome[2:] != ada[2:]
    for context, follower in zip(rome[2:], (*FOLLOWERS, FOLLOWERS[0]), strict=True):
        _, slot, after = context.partition(SUBJECT)
        assert slot
        assert SUBJECT not in after
        assert after.startswith(follower.rstrip(","))
        assert len(after.split()) <= len(follower.split()) + MOST
        assert after == follower or not after.endswith((" ", ","))
    request = build_request(ROME, tiny_tokenizer(), rome)
    assert len(request.rows) == len(rome)
    assert {row.ids[row.target :] for row in request.rows} == {request.target_ids}


def test_a_facts_words_do_not_depend_on_the_facts_beside_it() -> None:
    assert words_of([ROME, ADA, CURIE])[1] == words_of([CURIE, ADA])[1] == words_of([ADA])[0]


def test_they_are_the_models_own_and_the_seeds() -> None:
    assert contexts_of(0) == contexts_of(0)
    assert contexts_of(0) != contexts_of(1)
    assert words_of([ROME], 0) == words_of([ROME], 0)
    assert words_of([ROME], 0) != words_of([ROME], 1)


def test_texts_before_prompts_as_the_published_methods_have_them() -> None:
    runner = LayerRunner(inspect_model(FAMILIES["llama"]()))
    texts = texts_before(runner, tiny_tokenizer(), config_of(count=5))
    assert len(set(texts)) == 5
    assert all(text.endswith(". ") and SUBJECT not in text for text in texts)
