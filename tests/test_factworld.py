"""The embedded models, dense and of experts, know their world, and the example edits fit them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from patchkit.evaluate.routing import choices
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner

EXAMPLES = Path(__file__).parents[1] / "examples"
FOLDER, EXPERTS = EXAMPLES / "factworld", EXAMPLES / "factworld-moe"
Case = dict[str, Any]


def read_cases(name: str) -> list[Case]:
    return [json.loads(line) for line in (EXAMPLES / name).read_text(encoding="utf-8").splitlines()]


FACTS, WORLD = read_cases("facts.jsonl"), read_cases("world.jsonl")
ALL = FACTS + WORLD


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module", params=[FOLDER, EXPERTS], ids=lambda folder: folder.name)
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield AutoModelForCausalLM.from_pretrained(request.param, dtype=torch.float32)
    torch.set_num_threads(threads)


@torch.no_grad()
def answered(model: Any, tokenizer: Any, asked: list[tuple[str, str]]) -> list[bool]:
    """For each (prompt, target): is every token of " target" the argmax?"""
    right = []
    for prompt, target in asked:
        start = len(tokenizer(prompt)["input_ids"])
        ids = tokenizer(f"{prompt} {target}", return_tensors="pt")["input_ids"]
        best = model(input_ids=ids).logits[0, start - 1 : -1].argmax(-1)
        right.append(torch.equal(best, ids[0, start:]))
    return right


def share(right: list[bool]) -> float:
    return sum(right) / len(right)


@pytest.mark.parametrize(("folder", "size"), [(FOLDER, 8_000_000), (EXPERTS, 10_000_000)])
def test_folder_stays_small(folder: Path, size: int) -> None:
    assert sum(path.stat().st_size for path in folder.iterdir()) <= size


def test_both_models_read_alike() -> None:
    for name in ("tokenizer.json", "patchkit-text.txt", "patchkit-eval.txt"):
        assert (FOLDER / name).read_bytes() == (EXPERTS / name).read_bytes()


def test_every_expert_has_work() -> None:
    """On the text, in every layer, each of the eight gets at least a third of an equal share of the choices."""
    runner = LayerRunner(inspect_model(AutoModelForCausalLM.from_pretrained(EXPERTS, dtype=torch.float32)))
    text = (EXPERTS / "patchkit-eval.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(EXPERTS)(text)["input_ids"][:1024]
    found = choices(runner, [ids[i : i + 128] for i in range(0, 1024, 128)])
    assert set(found) == set(range(runner.depth))
    for chosen in found.values():
        assert chosen.float().mean(0).min() >= 2 / 8 / 3


def test_model_knows_the_true_targets(model: Any, tokenizer: Any) -> None:
    assert share(answered(model, tokenizer, [(c["prompt"], c["target_true"]) for c in ALL])) >= 0.98


def test_model_knows_them_in_other_words(model: Any, tokenizer: Any) -> None:
    asked = [(p, c["target_true"]) for c in ALL for p in c["paraphrases"]]
    assert share(answered(model, tokenizer, asked)) >= 0.95


def test_model_knows_them_after_another_sentence(model: Any, tokenizer: Any) -> None:
    opening = (FOLDER / "patchkit-eval.txt").read_text(encoding="utf-8").split(".")[0]
    asked = [(f"{opening}. {c['prompt']}", c["target_true"]) for c in ALL]
    assert share(answered(model, tokenizer, asked)) >= 0.95


def test_neighbors_are_true_of_the_model(model: Any, tokenizer: Any) -> None:
    asked = [(n["prompt"], n["target"]) for c in ALL for n in c["locality"]]
    assert all(answered(model, tokenizer, asked))


@pytest.mark.parametrize("case", ALL, ids=lambda case: case["id"])
def test_case_is_well_formed(case: Case) -> None:
    assert case["source"] == "factworld"
    assert all(case["subject"] in prompt for prompt in [case["prompt"], *case["paraphrases"]])
    assert case["target_new"] != case["target_true"]
    assert not case["target_new"].startswith(" ")
    assert len({case["prompt"], *case["paraphrases"]}) >= 3
    assert sum(case["subject"] not in neighbor["prompt"] for neighbor in case["locality"]) >= 2


def test_no_neighbor_is_edited_by_another_case() -> None:
    edited = {case["prompt"] for case in ALL}
    assert not edited & {neighbor["prompt"] for case in ALL for neighbor in case["locality"]}


def test_example_facts_span_relations_and_subjects() -> None:
    assert len(FACTS) == 12
    assert len({case["subject"] for case in FACTS}) == 12
    assert len({case["prompt"].replace(case["subject"], "{}") for case in FACTS}) >= 7


def test_world_has_other_subjects_and_room_for_fifty_edits() -> None:
    assert len(WORLD) >= 100
    assert len({case["id"] for case in ALL}) == len(ALL)
    assert not {case["subject"] for case in FACTS} & {case["subject"] for case in WORLD}
    assert len({case["subject"] for case in WORLD[:50]}) == 50


def test_texts_hold_no_edited_fact(tokenizer: Any) -> None:
    text = (FOLDER / "patchkit-text.txt").read_text(encoding="utf-8")
    held_out = (FOLDER / "patchkit-eval.txt").read_text(encoding="utf-8")
    assert len(tokenizer(text)["input_ids"]) >= 30_000
    assert len(tokenizer(held_out)["input_ids"]) >= 5_000
    for case in ALL:
        for prompt in [case["prompt"], *case["paraphrases"]]:
            assert f"{prompt} {case['target_new']}." not in text + held_out


def test_tokenizer_prepends_bos_and_splits_names(tokenizer: Any) -> None:
    assert tokenizer.is_fast
    for case in ALL:
        encoded = tokenizer(case["prompt"], return_offsets_mapping=True)
        assert encoded["input_ids"][0] == tokenizer.bos_token_id
        assert encoded["input_ids"].count(tokenizer.bos_token_id) == 1
        start = case["prompt"].index(case["subject"])
        end = start + len(case["subject"])
        inside = [o for o in encoded["offset_mapping"] if o[0] < end and o[1] > start]
        assert len(inside) >= 2
        assert inside[-1][1] == end
        assert tokenizer.decode(encoded["input_ids"], skip_special_tokens=True) == case["prompt"]
