"""`patchkit generate`: what patched models answer, and their bases."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len
from transformers import AutoModelForCausalLM

import patchkit
from patchkit import InputError, Patch
from patchkit.cli.generate import stacked
from patchkit.evaluate.generation import Sampling, answers
from tests import zoo
from tests.helpers import Command

# Random weights carry nothing from one position to the next, so the subject ends the prompts.
ROME = {"prompt": "the city of Rome", "subject": "Rome", "target_new": "capital"}
ADA = {"prompt": "a friend of Ada", "subject": "Ada", "target_new": "is"}
LOUD = ("value.clamp=20", "value.steps=60", "null_energy=0.9", "kl_weight=0", "contexts=0", "layers=1-2")
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}{% if add_generation_prompt %} of {% endif %}"


@dataclass(frozen=True)
class Saved:
    """A base's folder and two patches for it."""

    base: Path
    rome: Path
    ada: Path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("generate")
    tokenizer = zoo.tiny_tokenizer()
    found = Saved(zoo.save(zoo.FAMILIES["llama"](), tokenizer, folder / "base"), folder / "rome", folder / "ada")
    model = AutoModelForCausalLM.from_pretrained(found.base)
    for fact, out in ((ROME, found.rome), (ADA, found.ada)):
        patchkit.apply(model, tokenizer, [fact], overrides=LOUD).save(out)
    return found


@pytest.fixture
def generate(run: Command) -> Command:
    """Calls `patchkit generate ARGS...`."""
    return partial(run, "generate")


def test_the_patched_answer_alone(saved: Saved, generate: Command) -> None:
    """Without --model: the base that the patch names. The last -- lets a prompt begin with a dash."""
    ended = generate("--patch", saved.rome, ROME["prompt"], ADA["prompt"], "--max-new-tokens", 3)
    assert ended.status == 0
    first, second = ended.out.rstrip("\n").split("\n" + ADA["prompt"])
    assert first.startswith("the city of Rome capital")
    assert not second.startswith(" is")


def test_two_patches_stack(saved: Saved, generate: Command) -> None:
    patches = ("--patch", saved.rome, "--patch", saved.ada)
    ended = generate(*patches, "--json", "--compare", "-", ADA["prompt"], stdin=f"{ROME['prompt']}\n".encode())
    found = json.loads(ended.out)
    assert found["model"] == str(saved.base)
    assert found["patches"] == [str(saved.rome), str(saved.ada)]
    assert [row["prompt"] for row in found["answers"]] == [ROME["prompt"], ADA["prompt"]]
    for row, fact in zip(found["answers"], (ROME, ADA), strict=True):
        assert row["patched"].startswith(f" {fact['target_new']}")
        assert not row["base"].startswith(f" {fact['target_new']}")


def test_without_compare_the_base_is_not_asked(saved: Saved, generate: Command) -> None:
    (row,) = json.loads(generate("--patch", saved.rome, "--json", ROME["prompt"]).out)["answers"]
    assert row.keys() == {"prompt", "patched"}


def test_one_below_the_other(saved: Saved, generate: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = generate("--model", saved.base, "--patch", saved.rome, "--compare", "--max-new-tokens", 1, ROME["prompt"])
    prompt, base, patched = ended.out.splitlines()
    assert prompt == "the city of Rome"
    assert (base.split()[0], patched.split()) == ("base", ["patched", "capital"])
    both = generate("--patch", saved.rome, "--compare", "--max-new-tokens", 40, ROME["prompt"], ADA["prompt"])
    lines = both.out.splitlines()
    assert [line.split("  ")[0] for line in lines if line[:1].strip()] == [ROME["prompt"], ADA["prompt"]]
    monkeypatch.setenv("COLUMNS", "60")
    wrapped = generate("--patch", saved.rome, "--compare", "--max-new-tokens", 40, ROME["prompt"]).out.splitlines()
    assert len(wrapped) > 3
    assert max(map(cell_len, wrapped)) <= 60
    assert all(line.startswith(" " * 11) for line in wrapped[2:] if not line.startswith("  patched"))


def test_a_model_answers_without_a_patch(saved: Saved, generate: Command) -> None:
    """As one that was merged, which has none any more."""
    ended = generate("--model", saved.base, "--max-new-tokens", 3, ROME["prompt"])
    assert ended.status == 0, ended.err
    base = generate("--patch", saved.rome, "--compare", "--json", "--max-new-tokens", 3, ROME["prompt"]).json()
    assert ended.out == f"{ROME['prompt']}{base['answers'][0]['base']}\n"
    found = generate("--model", saved.base, "--max-new-tokens", 3, "--json", ROME["prompt"]).json()
    assert found["patches"] == []
    assert found["answers"] == [{"prompt": ROME["prompt"], "base": base["answers"][0]["base"]}]


def test_sampling_goes_by_the_seed(saved: Saved, generate: Command) -> None:
    def sampled(seed: int) -> str:
        return generate("--patch", saved.rome, "--temperature", 2, "--seed", seed, ADA["prompt"]).out

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(3)}) > 1


def test_chat_templates(saved: Saved, generate: Command, tmp_path: Path) -> None:
    refused = generate("--patch", saved.rome, "--chat", "Rome")
    assert refused.status == 2
    assert refused.err.splitlines()[-1].startswith("error: --chat: the tokenizer has no chat template")

    tokenizer = zoo.tiny_tokenizer(bos=False)
    tokenizer.chat_template = CHAT
    chatty = zoo.save(zoo.FAMILIES["llama"](), tokenizer, tmp_path / "chatty")
    ended = generate("--model", chatty, "--patch", saved.rome, "--chat", "--json", "--max-new-tokens", 4, "Rome")
    (row,) = json.loads(ended.out)["answers"]
    model, ids = zoo.FAMILIES["llama"](), tokenizer("user: Rome of ", return_tensors="pt")
    with Patch.load(saved.rome).attached(model):
        wanted = model.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert row == {"prompt": "Rome", "patched": tokenizer.decode(wanted, skip_special_tokens=True)}


def test_a_system_prompt_and_earlier_turns(saved: Saved, generate: Command, tmp_path: Path) -> None:
    """Both put the prompt into the chat template by themselves."""
    tokenizer = zoo.tiny_tokenizer(bos=False)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    chatty = zoo.save(zoo.FAMILIES["llama"](), tokenizer, tmp_path / "chatty")
    talk = ("--system", "Be true.", "--turn", "who", "Ada", "--turn", "in", "London")
    ended = generate("--model", chatty, "--patch", saved.rome, *talk, "--json", "--max-new-tokens", 4, "Rome")
    (row,) = json.loads(ended.out)["answers"]
    text = "system: Be true. user: who assistant: Ada user: in assistant: London user: Rome "
    model, ids = zoo.FAMILIES["llama"](), tokenizer(text, return_tensors="pt")
    with Patch.load(saved.rome).attached(model):
        wanted = model.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert row == {"prompt": "Rome", "patched": tokenizer.decode(wanted, skip_special_tokens=True)}
    refused = generate("--patch", saved.rome, "--turn", "who", "Ada", "Rome")
    assert refused.err.splitlines()[-1].startswith("error: --chat: the tokenizer has no chat template")


def test_what_is_refused(saved: Saved, generate: Command, tmp_path: Path) -> None:
    other = zoo.FAMILIES["llama"]()
    torch.nn.init.ones_(other.model.layers[1].mlp.down_proj.weight)
    zoo.save(other, zoo.tiny_tokenizer(), tmp_path / "other")
    for args, message in (
        (("--patch", saved.base, "x"), "not a patch"),
        (("--patch", saved.rome, "--model", tmp_path / "other", "x"), "other numbers"),
        (("--patch", saved.rome, "--max-new-tokens", 300, "x"), "more than the 256 positions"),
        (("--patch", saved.rome, "-"), "an empty prompt"),
        (("--model", saved.base, "--compare", "x"), "--compare: without --patch there is nothing to compare"),
    ):
        ended = generate(*args)
        assert (ended.status, ended.out) == (2, "")
        assert message in ended.err


def test_the_model_is_left_as_it_was(saved: Saved) -> None:
    """Also when the second patch is refused."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(saved.base), zoo.tiny_tokenizer()
    rome, ada = Patch.load(saved.rome), Patch.load(saved.ada)
    broken = Patch(ada.manifest, {"nowhere.weight": next(iter(ada.updates.values()))})
    answers(model, tokenizer, lambda: stacked(model, [rome]), ["Rome"], Sampling(2))
    with pytest.raises(InputError, match="no such weight"):
        answers(model, tokenizer, lambda: stacked(model, [rome, broken]), ["Rome"], Sampling(2))
    assert not any(module._forward_hooks for module in model.modules())
    assert not hasattr(model, "patchkit")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (("--temperature", "nan"), "nan is not a finite number"),
        (("--seed", "99999999999999999999999"), "is too large for a seed"),
        (("--system", "caf\udce9"), "not UTF-8 text, after"),
        (("--turn", "x", "caf\udce9"), "not UTF-8 text, after"),
        (("caf\udce9",), 'not UTF-8 text, after "caf'),
    ],
    ids=["no number", "too large", "bytes in the system prompt", "in a turn", "in a prompt"],
)
def test_what_no_model_can_be_asked_with(
    given: tuple[str, ...], reason: str, saved: Saved, generate: Command, tmp_path: Path
) -> None:
    tokenizer = zoo.tiny_tokenizer()
    tokenizer.chat_template = CHAT
    zoo.save(zoo.FAMILIES["llama"](), tokenizer, tmp_path / "chat")
    ended = generate("--model", tmp_path / "chat", "--patch", saved.rome, *given, "the city")
    assert ended.status == 2
    assert reason in ended.err


def test_bytes_from_standard_input_that_are_no_text(saved: Saved, generate: Command) -> None:
    ended = generate("--patch", saved.rome, "-", stdin=b"caf\xe9")
    assert ended.status == 2
    assert 'not UTF-8 text, after "caf' in ended.err
