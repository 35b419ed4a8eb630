"""The guard stops a run before the model is ruined and keeps what was good; facts that do not hold are edited again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import patchkit
from patchkit.editing.recipe import load_recipe
from patchkit.errors import GateError, InputError
from patchkit.evaluate.divergence import as_said, divergences
from patchkit.facts.limits import Limits
from patchkit.maths.linalg import Delta
from patchkit.model.hooks import live_deltas
from patchkit.model.loading import LoadedModel, load_model
from patchkit.patch.patch import Patch
from patchkit.runs.execute import run
from patchkit.runs.guard import EVERY, Bounds, Guard
from patchkit.runs.prepare import Prepared, prepare
from patchkit.runs.workspace import Workspace
from tests.helpers import Command, command_line, tree

EXAMPLES = Path(__file__).parents[1] / "examples"
FACTWORLD = str(EXAMPLES / "factworld")
WORLD = str(EXAMPLES / "world.jsonl")
QUICK = ("steps=6", "contexts=1", "context_length=4")
FACTS = patchkit.read_facts(WORLD, limit=24).facts


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(FACTWORLD, "cpu", "float32")


def prepared(loaded: LoadedModel, onto: Patch | None = None, count: int = 24, **settings: Any) -> Prepared:
    """A run of the first facts in batches of 4, unless told otherwise."""
    overrides = [*QUICK, *(f"{key}={value}" for key, value in {"batch_size": 4, **settings}.items())]
    config = load_recipe("alphaedit", None, overrides)

    def read(**more: Any) -> Any:
        return patchkit.facts.reader.parse_facts(FACTS[:count], **more)

    return prepare(read, loaded.tokenizer, config, onto, limits=Limits.of(loaded.model.config))


def workspace(loaded: LoadedModel) -> Workspace:
    return Workspace.of(loaded.model, loaded.tokenizer)


class After(Guard):
    """Finds something wrong once so many facts are written."""

    facts = 0

    def _fault(self, run: Any) -> str:
        return "something is wrong" if len(run.facts) >= self.facts else super()._fault(run)


def stopped_after(loaded: LoadedModel, facts: int) -> After:
    guard = After(workspace(loaded))
    guard.facts = facts
    return guard


# --- what it sees -----------------------------------------------------------------------------------------------------


def test_what_is_read_of_plain_text_is_the_models_own(loaded: LoadedModel) -> None:
    """KL of the untouched model from itself is 0, and KL from an edited one is that of its logits."""
    space = workspace(loaded)
    windows = [tuple(loaded.tokenizer(text)["input_ids"]) for text in ("Mira lives in Oslo .", "The sea is blue and")]
    said = as_said(space.runner, windows)
    assert all(kl < 1e-6 for kl in divergences(space.runner, said).values())
    site = space.runner.arch.sites[1]
    with torch.no_grad():
        inputs = [torch.tensor([window]) for window in windows]
        before = [loaded.model(each).logits[0, :-1].log_softmax(-1) for each in inputs]
        draw = torch.Generator().manual_seed(0)
        left, right = torch.randn(site.d_out, 2, generator=draw), torch.randn(2, site.d_in, generator=draw)
        with live_deltas(space.runner.arch, {site.layer: Delta(left * 0.1, right)}):
            after = [loaded.model(each).logits[0, :-1].log_softmax(-1) for each in inputs]
            found = list(divergences(space.runner, said).values())
    for kl, old, new in zip(found, before, after, strict=True):
        assert kl == pytest.approx(float((old.exp() * (old - new)).sum(-1).mean()), rel=1e-4)
        assert kl > 0.01


def test_good_edits_pass(loaded: LoadedModel) -> None:
    guard = Guard(workspace(loaded))
    patch = run(prepared(loaded, count=8), workspace(loaded), guard=guard)
    assert guard.reason == ""
    assert len(patch.manifest.facts) == 8
    assert patch.manifest.digest == run(prepared(loaded, count=8), workspace(loaded)).manifest.digest


@pytest.mark.parametrize(
    ("bounds", "reason"),
    [
        (Bounds(norm=1 + 1e-9), "times its norm"),
        (Bounds(kl=1e-9), "nats per token"),
        (Bounds(answers=-0.1), "of unrelated answers are empty or loop"),
    ],
)
def test_each_bound_is_one(loaded: LoadedModel, bounds: Bounds, reason: str) -> None:
    guard = Guard(workspace(loaded), bounds)
    with pytest.raises(GateError, match=f"guard: after 8 of 8 facts .*{reason}.*none is kept.*--no-guard"):
        run(prepared(loaded, count=8), workspace(loaded), guard=guard)


def test_bounds_are_read() -> None:
    assert Bounds.of(("kl=0.25", "norm=3")) == Bounds(norm=3.0, kl=0.25)
    for bad in ("kl", "kl=much", "kl=0", "speed=3"):
        with pytest.raises(InputError, match=r"--guard .*write name=number"):
            Bounds.of((bad,))


# --- what it keeps ----------------------------------------------------------------------------------------------------


def test_a_stopped_runs_patch_is_the_patch_of_the_facts_that_were_good(loaded: LoadedModel) -> None:
    guard = stopped_after(loaded, 24)
    patch = run(prepared(loaded), workspace(loaded), guard=guard)
    assert guard.reason
    assert guard.looked_at == 24
    kept = 12  # in batches of 4 it looks after 12 and 24: at least EVERY facts apart
    assert EVERY == 10
    assert patch.manifest.digest == run(prepared(loaded, count=kept), workspace(loaded)).manifest.digest
    assert [fact.id for fact in patch.manifest.facts] == [fact.id for fact in FACTS[:kept]]
    assert patch.manifest.history[-1].facts == tuple(fact.id for fact in FACTS[:kept])
    assert patch.manifest.history[-1].batches == (4, 4, 4)
    assert "the first 12 are kept" in guard.told(24)


def test_a_stopped_patch_can_be_continued_and_reverted(loaded: LoadedModel) -> None:
    patch = run(prepared(loaded), workspace(loaded), guard=stopped_after(loaded, 24))
    whole = run(prepared(loaded, patch), workspace(loaded))
    assert whole.manifest.digest == run(prepared(loaded), workspace(loaded)).manifest.digest
    less = patchkit.revert(loaded.model, loaded.tokenizer, patch, [FACTS[3].id])
    assert len(less.manifest.facts) == 11


def test_an_earlier_fact_stays_whose_successor_was_not_kept(loaded: LoadedModel) -> None:
    first = patchkit.apply(loaded.model, loaded.tokenizer, FACTS[20:22], "alphaedit", overrides=QUICK)
    changed = [fact.model_copy(update={"target_new": "Oslo", "id": f"new-{fact.id}"}) for fact in FACTS[20:22]]
    config = load_recipe("alphaedit", None, [*QUICK, "batch_size=4"])

    def read(**more: Any) -> Any:
        return patchkit.facts.reader.parse_facts([*FACTS[:18], *changed], **more)

    ready = prepare(read, loaded.tokenizer, config, first, limits=Limits.of(loaded.model.config))
    assert len(ready.incoming.superseded) == 2
    patch = run(ready, workspace(loaded), guard=stopped_after(loaded, 20))
    assert [fact.id for fact in patch.manifest.facts] == [fact.id for fact in (*FACTS[20:22], *FACTS[:12])]


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATCHKIT_MODEL", FACTWORLD)
    return command_line(monkeypatch, capsys)


SETTINGS = [part for setting in QUICK for part in ("--set", setting)]


def test_apply_stops_with_status_1_and_leaves_nothing_where_nothing_is_good(call: Command, tmp_path: Path) -> None:
    facts = tmp_path / "facts.jsonl"
    facts.write_text("".join(fact.model_dump_json(exclude_defaults=True) + "\n" for fact in FACTS[:2]), "utf-8")
    before = tree(tmp_path)
    ended = call("apply", "facts.jsonl", "--out", "p", "--quick", "--guard", "kl=1e-9", *SETTINGS)
    assert ended.status == 1
    assert "guard: after 2 of 2 facts plain text has moved by" in ended.err
    assert tree(tmp_path) == before
    assert call("apply", "facts.jsonl", "--out", "p", "--quick", "--no-guard", *SETTINGS).status == 0


def test_apply_edits_facts_again_that_do_not_hold(call: Command, tmp_path: Path) -> None:
    """With few steps some values are not found; the second time there are twice as many."""
    (tmp_path / "facts.jsonl").write_text(
        "".join(fact.model_dump_json(exclude_defaults=True) + "\n" for fact in FACTS[:4]), "utf-8"
    )
    settings = ["--set", "contexts=1", "--set", "context_length=4", "--quick", "--json", "--force"]

    def lost_after(steps: int, *more: str) -> tuple[Any, list[str]]:
        made = call("apply", "facts.jsonl", "--out", "p", *settings, "--set", f"steps={steps}", *more).json()
        return made, [fact["id"] for fact in made["per_fact"] if not fact["efficacy"]["exact"]]

    found = {steps: lost_after(steps, "--no-retry") for steps in (2, 3, 4, 5, 6)}
    some = [steps for steps, (_, lost) in found.items() if 0 < len(lost) <= 2]
    all_lost = [steps for steps, (_, lost) in found.items() if len(lost) > 2]
    assert some
    assert all_lost
    assert "retried" not in lost_after(all_lost[0])[0]  # more than half: something else is wrong
    once, lost = found[some[0]]
    twice = lost_after(some[0])[0]
    assert twice["retried"] == lost
    assert twice["efficacy"]["exact"] > once["efficacy"]["exact"]
    history = json.loads((tmp_path / "p" / "manifest.json").read_text("utf-8"))["history"]
    assert [run["action"] for run in history] == ["apply", "revert", "apply"]
    assert history[2]["facts"] == lost
    assert history[2]["recipe"]["value"]["steps"] == 2 * some[0]
