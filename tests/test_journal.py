"""A run that was cut off goes on where it was, to the same numbers; the journal it left is not taken for another's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from patchkit import Patch
from patchkit.editing import value_log
from patchkit.editing.recipe import load_recipe
from patchkit.editing.values import _Optimizer
from patchkit.facts.limits import Limits
from patchkit.facts.reader import parse_facts
from patchkit.io import checked
from patchkit.io.places import cache_folder
from patchkit.runs.execute import run
from patchkit.runs.journals import forget
from patchkit.runs.prepare import prepare
from patchkit.runs.workspace import Workspace
from tests import zoo

NAMES = ("Rome", "Florence", "Ada Lovelace", "Marie Curie", "Alan Turing")
FACTS = [{"id": n[:3], "prompt": f"the city of {n}", "subject": n, "target_new": "capital"} for n in NAMES]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
RUNS = {
    "batches": ("alphaedit", "layers=1-2", "batch_size=3", "value.parallel=2", "contexts=2", "value.steps=5"),
    "one by one": ("rome", "layers=1", "contexts=1", "value.steps=4"),
    "rotations": ("mose", "layers=0-1", "choose_layer=true", "contexts=0", "value.steps=3", "sweeps=2"),
    "gradients": ("ultraedit", "layers=1-2", "batch_size=2", "contexts=1"),
    "fitted": ("ft", "layers=1", "batch_size=2", "contexts=1", "steps=3"),
    "in use": ("memit", "layers=1", "batch_size=2", "prompts=in-use", "value.parallel=1", "value.steps=4"),
}


class Cut(KeyboardInterrupt):
    """Where a test cuts a run off."""


@dataclass(frozen=True)
class Apply:
    """Runs as `patchkit apply` does, but for measuring and writing what comes out."""

    model: PreTrainedModel
    text: Path
    folder: Path

    def __call__(self, method: str, *settings: str, facts: Sequence[dict[str, Any]] = (), **changed: Any) -> Patch:
        tokenizer, model = zoo.tiny_tokenizer(), changed.get("model", self.model)
        tokenizer.chat_template = TEMPLATE if "prompts=in-use" in settings else None
        config = load_recipe(method, None, settings)
        reading = partial(parse_facts, facts or FACTS[: 3 if "prompts=in-use" in settings else 5])
        prepared = prepare(reading, tokenizer, config, limits=Limits.of(model.config))
        return run(prepared, Workspace.of(model, tokenizer, (self.text,)), folder=changed.get("folder", self.folder))


@pytest.fixture
def apply(tmp_path: Path) -> Apply:
    text = tmp_path / "text.txt"
    text.write_text("The city is old. It has a river. People came from far. " * 40)
    return Apply(zoo.FAMILIES["llama"](), text, tmp_path / "p")


CutAfter = Callable[[int | None], None]


@pytest.fixture
def cut_after(monkeypatch: pytest.MonkeyPatch) -> CutAfter:
    """Cuts what follows off after so many writes to the journal; None lets it come to its end.

    The state of the optimizer is written after every step, which would not be worth it on so small a model.
    """
    left: list[int | None] = [None]
    write = checked.write_checked

    def counted(*args: Any) -> None:
        write(*args)
        if left[0] is not None:
            left[0] -= 1
            if left[0] == 0:
                raise Cut

    for module in ("value_log", "journal"):
        monkeypatch.setattr(f"patchkit.editing.{module}.write_checked", counted)
    monkeypatch.setattr(value_log, "SHARE", 0)
    return lambda writes: left.__setitem__(0, writes)


def assert_same(found: Patch, expected: Patch) -> None:
    assert found.manifest.digest == expected.manifest.digest
    assert found.state.keys() == expected.state.keys()
    assert all(torch.equal(found.state[name], tensor) for name, tensor in expected.state.items())
    assert found.manifest.facts == expected.manifest.facts
    assert found.manifest.history[0].contexts == expected.manifest.history[0].contexts


@pytest.fixture(autouse=True)
def _no_other_journals(_own_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests leave some, of runs that they cut off."""
    monkeypatch.setenv("PATCHKIT_CACHE", str(tmp_path / "cache"))


def journals() -> list[Path]:
    return sorted((cache_folder() / "journals").rglob("*.safetensors"))


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_that_is_cut_off_again_and_again_ends_in_the_same_patch(
    kind: str, apply: Apply, cut_after: CutAfter, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    evaluate = _Optimizer._evaluate

    def counted(self: _Optimizer, free: Any) -> Any:
        steps.append(self.step)
        return evaluate(self, free)

    monkeypatch.setattr(_Optimizer, "_evaluate", counted)
    whole, needed = apply(*RUNS[kind], folder=None), len(steps)
    steps.clear()
    for writes in (2, 5, 3, 1) if needed else (2, 1):  # before the first batch, within an optimization, after a batch
        cut_after(writes)
        with pytest.raises(Cut):
            apply(*RUNS[kind])
    cut_after(None)
    assert_same(apply(*RUNS[kind]), whole)
    assert len(steps) == needed  # every step was taken once
    assert journals()
    forget(apply.folder)
    assert not journals()


def test_what_another_run_has_left_is_not_taken(apply: Apply, cut_after: CutAfter) -> None:
    """Each of these differs from the run that was cut off in one thing, and ends as it does without a journal."""
    settings, other = RUNS["one by one"], zoo.FAMILIES["llama"]()
    with torch.no_grad():
        other.get_parameter("lm_head.weight").mul_(1.01)
    changes: list[tuple[tuple[str, ...], dict[str, Any]]] = [
        ((*settings, "value.steps=6"), {}),
        (settings, {"facts": [{**FACTS[0], "target_new": "the"}, *FACTS[1:]]}),
        (settings, {"model": other}),
    ]
    cut_after(8)
    with pytest.raises(Cut):
        apply(*settings)
    cut_after(None)
    assert len(journals()) > 2
    for changed, options in changes:
        assert_same(apply(*changed, **options), apply(*changed, **options, folder=None))


def test_a_damaged_journal_is_made_again(apply: Apply, cut_after: CutAfter) -> None:
    cut_after(9)
    with pytest.raises(Cut):
        apply(*RUNS["batches"])
    cut_after(None)
    assert len(journals()) > 1
    for file in journals():
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged; made again"):
        found = apply(*RUNS["batches"])
    assert_same(found, apply(*RUNS["batches"], folder=None))


def test_a_full_disk_under_the_cache_does_not_end_the_run(apply: Apply, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for module in ("value_log", "journal"):
        monkeypatch.setattr(f"patchkit.editing.{module}.write_checked", full)
    with pytest.warns(UserWarning, match=r"a kill would lose it.*No space left"):
        assert apply(*RUNS["one by one"]).manifest.facts
