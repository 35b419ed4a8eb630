"""The guard stops a run before the model is ruined and keeps what was good; facts that do not hold are edited again."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import patchkit
from patchkit.editing.recipe import load_recipe
from patchkit.editing.state import EditRun, EditState, WrittenFact
from patchkit.errors import GateError, InputError
from patchkit.evaluate.divergence import as_said, divergences
from patchkit.facts.limits import Limits
from patchkit.maths.linalg import Delta
from patchkit.model.hooks import live_deltas
from patchkit.model.loading import LoadedModel, load_model
from patchkit.patch.patch import Patch
from patchkit.runs.advice import advice
from patchkit.runs.execute import run
from patchkit.runs.guard import Bounds, Guard
from patchkit.runs.prepare import Prepared, prepare
from patchkit.runs.retry import retried
from patchkit.runs.tally import Tally
from patchkit.runs.workspace import Workspace
from patchkit.statistics.corpus import PACKAGE_TEXT
from tests.helpers import Command, command_line, tree

EXAMPLES = Path(__file__).parents[1] / "examples"
FACTWORLD = str(EXAMPLES / "factworld")
WORLD = str(EXAMPLES / "world.jsonl")
QUICK = ("steps=6", "contexts=1", "context_length=4")
PLAIN: dict[str, Any] = {"batch_size": 2, "prompts": "contexts", "neurons": "off"}
FACTS = patchkit.read_facts(WORLD, limit=24).facts
MOVED = re.compile(r"plain text has moved by (\S+) nats")


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

    def _fault(self, run: Any, last: bool) -> tuple[str, bool]:
        return ("something is wrong", False) if len(run.facts) >= self.facts else super()._fault(run, last)


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
    ("bounds", "after", "reason"),
    [
        (Bounds(norm=1 + 1e-9), 4, "times its norm .* they were one batch, so that "),
        (Bounds(kl=1e-9), 4, "nats per token .* they were one batch, so that "),
        (Bounds(answers=-0.1), 8, "of unrelated answers are empty or loop"),  # asked for at the end, or after 10 facts
    ],
)
def test_each_bound_is_one(loaded: LoadedModel, bounds: Bounds, after: int, reason: str) -> None:
    guard = Guard(workspace(loaded), bounds)
    with pytest.raises(
        GateError,
        match=f"guard: after {after} of 8 facts .*{reason}.*none is kept and nothing is written. Try --batch-size 1",
    ):
        run(prepared(loaded, count=8), workspace(loaded), guard=guard)


class Scripted(Guard):
    """Reads what it is told to: how far plain text has moved, and the share of spoiled answers, after each batch."""

    course: Sequence[tuple[float, float]] = ()
    done: list[str]

    def run_through(self, *course: tuple[float, float]) -> list[str]:
        """After each batch of one fact what it looked at, until it stops."""
        self.course, run = course, EditRun(EditState(), [])
        self.begin(run)
        said = []
        for number, fact in enumerate(FACTS[: len(course)], 1):
            run.facts.append(WrittenFact(fact, number - 1, (), 1, 0.0, 1))
            self.done = []
            stopped = self.stops(run, last=number == len(course))
            said.append(" ".join(self.done))
            if stopped:
                break
        return said

    def moved(self, tokens: int | None = None) -> float:
        self.done.append("text" if tokens is None else "glance")
        return self.course[self.looked_at][0]

    def spoiled(self) -> float:
        self.done.append("answers")
        return self.course[self.looked_at][1]


def test_it_looks_after_every_batch_and_at_everything_now_and_then(loaded: LoadedModel) -> None:
    """A glance at the text each time; all of it from half the bound on; the answers too after ten facts, where the text
    has moved by a quarter of the bound since, and at the end."""
    guard, everything = Scripted(workspace(loaded), Bounds(kl=1.0)), "glance text answers"
    still = guard.run_through(*[(0.1, 0.0)] * 12)
    assert still == [*["glance"] * 9, everything, "glance", everything]
    moving = guard.afresh().run_through((0.2, 0), (0.3, 0), (0.4, 0), (0.51, 0), (0.6, 0), (0.6, 0))  # type: ignore[attr-defined]
    assert moving == ["glance", everything, "glance", "glance text", everything, everything]


def test_what_is_kept_was_found_to_be_good(loaded: LoadedModel) -> None:
    """Of text, the facts before the last batch; of answers, those that had been written when they were last asked."""
    guard = Scripted(workspace(loaded), Bounds(kl=1.0))
    assert len(guard.run_through((0.1, 0), (0.2, 0), (1.1, 0), (0.2, 0))) == 3
    assert [guard.looked_at, len(guard.kept.facts)] == [3, 2]
    assert "after 3 of 4 facts plain text has moved by 1.1 nats per token (bound 1); the first 2 are" in told(guard, 4)
    assert len(guard.run_through((0.1, 0), (0.3, 0.5), (0.35, 0.6), (0.6, 0.6), (0.6, 0.6))) == 4
    assert [guard.looked_at, len(guard.kept.facts)] == [4, 2]
    assert "after 4 of 5 facts 60% of unrelated answers are empty or loop (bound 50%)" in told(guard, 5)


def told(guard: Guard, asked: int) -> str:
    guard.tell(asked, ["something else"])
    return guard.message


def test_bounds_are_read() -> None:
    assert Bounds.of(("kl=0.25", "norm=3")) == Bounds(norm=3.0, kl=0.25)
    for bad in ("kl", "kl=much", "kl=0", "speed=3"):
        with pytest.raises(InputError, match=r"--guard .*write name=number"):
            Bounds.of((bad,))


# --- what it advises --------------------------------------------------------------------------------------------------


def ended(ready: Prepared, space: Workspace, batch: int, looked_at: int) -> Guard:
    guard = Guard(space)
    guard.begin(EditRun(EditState(), []))
    guard.batch, guard.looked_at = batch, looked_at
    return guard


def test_advice_is_not_to_do_what_was_done(loaded: LoadedModel) -> None:
    """A batch in which a run ends is to be smaller, which one of a single fact cannot be."""
    space, ready = workspace(loaded), prepared(loaded)
    found = advice(ready, ended(ready, space, 24, 24))
    assert found[0].startswith("--batch-size 6,")
    assert not any("--method" in each for each in found)  # alphaedit is what was used
    assert found[-1].startswith("less strict bounds")
    assert advice(ready, ended(ready, space, 1, 1))[0] == f'the facts without "{FACTS[0].id}"'
    assert not any("batch" in each or "without" in each for each in advice(ready, ended(ready, space, 1, 20)))


def test_advice_hangs_on_the_method_and_on_why_the_run_ended(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchkit.editing.neurons.SPACIOUS", 10**6)  # no neurons to give
    space, ready = workspace(loaded), prepared(loaded, neurons="off")
    fine_tuned = replace(ready, config=load_recipe("ft"))
    assert "a method that keeps more (--method alphaedit)" in advice(fine_tuned, ended(fine_tuned, space, 4, 4))
    assert not any("--text" in each for each in advice(fine_tuned, ended(fine_tuned, space, 4, 4)))
    assert not any("--text" in each for each in advice(ready, ended(ready, space, 4, 4)))  # the model has its own
    with_little = replace(space, texts=[PACKAGE_TEXT])
    assert any("--text" in each for each in advice(ready, ended(ready, with_little, 4, 4)))
    grown = ended(ready, space, 4, 4)
    grown._growth[0] = 3.0
    assert any("--method mose-right" in each for each in advice(ready, grown))
    turned = replace(ready, config=load_recipe("mose-right"))
    assert not any("--method" in each for each in advice(turned, grown))


@pytest.mark.parametrize(
    ("method", "how"),
    [("alphaedit", "--set neurons=auto"), ("rome", "--set neurons=auto"), ("ft", "--method alphaedit")],
)
def test_advice_is_neurons_of_subjects_own_where_there_are_any(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, method: str, how: str
) -> None:
    """And no more subjects than there are such neurons."""
    space, ready = workspace(loaded), prepared(loaded)
    ready = replace(ready, config=load_recipe(method, None, ["prompts=contexts"]))
    (own,) = (each for each in advice(ready, ended(ready, space, 24, 24)) if "neurons" in each)
    assert how in own
    assert "at most" not in own
    with monkeypatch.context() as few:
        few.setattr("patchkit.runs.advice.at_most", lambda *_: 20)
        (own,) = (each for each in advice(ready, ended(ready, space, 24, 24)) if "neurons" in each)
    assert own.endswith("and at most 20 subjects)")
    done = replace(ready, config=ready.config.model_copy(update={"neurons": "on"}))
    assert not any("neurons" in each for each in advice(done, ended(done, space, 24, 24)))
    monkeypatch.setattr("patchkit.editing.neurons.SPACIOUS", 10**6)
    assert not any("neurons" in each for each in advice(ready, ended(ready, space, 24, 24)))


# --- what it keeps ----------------------------------------------------------------------------------------------------


def test_a_stopped_runs_patch_is_the_patch_of_the_facts_that_were_good(loaded: LoadedModel) -> None:
    guard = stopped_after(loaded, 24)
    patch = run(prepared(loaded), workspace(loaded), guard=guard)
    assert guard.reason
    assert guard.looked_at == 24
    kept = 20  # it looks after every batch of 4
    assert patch.manifest.digest == run(prepared(loaded, count=kept), workspace(loaded)).manifest.digest
    assert [fact.id for fact in patch.manifest.facts] == [fact.id for fact in FACTS[:kept]]
    assert patch.manifest.history[-1].facts == tuple(fact.id for fact in FACTS[:kept])
    assert patch.manifest.history[-1].batches == (4, 4, 4, 4, 4)
    assert "the first 20 are kept" in guard.message


def test_a_stopped_patch_can_be_continued_and_reverted(loaded: LoadedModel) -> None:
    patch = run(prepared(loaded), workspace(loaded), guard=stopped_after(loaded, 24))
    whole = run(prepared(loaded, patch), workspace(loaded))
    assert whole.manifest.digest == run(prepared(loaded), workspace(loaded)).manifest.digest
    less = patchkit.revert(loaded.model, loaded.tokenizer, patch, [FACTS[3].id])
    assert len(less.manifest.facts) == 19


def test_an_earlier_fact_stays_whose_successor_was_not_kept(loaded: LoadedModel) -> None:
    first = patchkit.apply(loaded.model, loaded.tokenizer, FACTS[20:22], "alphaedit", overrides=QUICK)
    changed = [fact.model_copy(update={"target_new": "Oslo", "id": f"new-{fact.id}"}) for fact in FACTS[20:22]]
    config = load_recipe("alphaedit", None, [*QUICK, "batch_size=4"])

    def read(**more: Any) -> Any:
        return patchkit.facts.reader.parse_facts([*FACTS[:18], *changed], **more)

    ready = prepare(read, loaded.tokenizer, config, first, limits=Limits.of(loaded.model.config))
    assert len(ready.incoming.superseded) == 2
    patch = run(ready, workspace(loaded), guard=stopped_after(loaded, 20))
    assert [fact.id for fact in patch.manifest.facts] == [fact.id for fact in (*FACTS[20:22], *FACTS[:16])]


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
    stop = ("--quick", "--guard", "kl=1e-9", *SETTINGS)
    stopped = call("apply", "facts.jsonl", "--out", "p", *stop)
    assert stopped.status == 1
    assert "guard: after 2 of 2 facts plain text has moved by" in stopped.err
    assert "they were one batch, so that none is kept and nothing is written. Try --batch-size 1," in stopped.err
    assert "--method" not in stopped.err  # what helps is not what was done
    assert tree(tmp_path) == before
    assert call("apply", "facts.jsonl", "--out", "p", "--quick", "--no-guard", *SETTINGS).status == 0
    facts.write_text("".join(fact.model_dump_json(exclude_defaults=True) + "\n" for fact in FACTS[:4]), "utf-8")
    before = tree(tmp_path)
    assert call("apply", "facts.jsonl", "--onto", "p", *stop).status == 1
    assert tree(tmp_path) == before  # nor is a patch touched that a run goes on from


def test_smaller_batches_keep_what_is_good_of_a_batch_that_is_not(call: Command, tmp_path: Path) -> None:
    """The advice, taken."""
    facts = tmp_path / "facts.jsonl"
    facts.write_text("".join(fact.model_dump_json(exclude_defaults=True) + "\n" for fact in FACTS[:8]), "utf-8")
    usual = ["--out", "p", "--quick", "--set", "neurons=off", "--set", "prompts=contexts", *SETTINGS]
    moved = MOVED.search(call("apply", "facts.jsonl", *usual, "--guard", "kl=1e-9").err)
    assert moved
    bound = f"kl={float(moved[1]) / 2}"
    whole = call("apply", "facts.jsonl", *usual, "--guard", bound)
    assert "Try --batch-size 2," in whole.err
    assert not (tmp_path / "p").exists()
    parts = call("apply", "facts.jsonl", *usual, "--guard", bound, "--batch-size", "2")
    assert parts.status == 1
    assert 0 < len(Patch.load(tmp_path / "p").manifest.facts) < 8


def test_a_run_that_collapses_is_stopped_after_the_batch_in_which_it_does(call: Command, tmp_path: Path) -> None:
    """Fine-tuning in steps that are far too long, one fact at a time."""
    loaded, few = load_model(FACTWORLD, "cpu", "float32"), "contexts=1 context_length=4 rate=0.1 bound=1"
    facts = tmp_path / "facts.jsonl"
    facts.write_text("".join(fact.model_dump_json(exclude_defaults=True) + "\n" for fact in FACTS[:4]), "utf-8")
    usual = ["--method", "ft", "--batch-size", "1", "--quick"]
    usual += [part for setting in few.split() for part in ("--set", setting)]
    ended = call("apply", "facts.jsonl", "--out", "p", *usual, "--guard", "kl=0.1")
    assert ended.status == 1
    told = [line for line in ended.err.splitlines() if "guard:" in line]
    assert len(told) == 1
    assert "guard: after 2 of 4 facts plain text has moved by" in told[0]
    assert "the first one is kept. Try neurons of subjects' own (--method alphaedit); or less strict" in told[0]
    kept = Patch.load(tmp_path / "p")
    assert [fact.id for fact in kept.manifest.facts] == [FACTS[0].id]
    assert call("apply", "facts.jsonl", "--out", "all", *usual, "--no-guard").status == 0
    guard = Guard(workspace(loaded))
    guard.read_base()
    with kept.attached(loaded.model):
        assert guard.moved() < 0.1
    with Patch.load(tmp_path / "all").attached(loaded.model):
        assert guard.moved() > 0.1


def test_a_second_edit_that_the_guard_would_end_does_not_count(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready, said = prepared(loaded, count=3, **PLAIN), list[str]()
    patch = run(ready, workspace(loaded))
    monkeypatch.setattr("patchkit.runs.retry._lost", lambda *_: list(FACTS[:1]))
    guard = Guard(workspace(loaded), Bounds(kl=1e-9))
    assert retried(ready, workspace(loaded), patch, guard, True, said.append).patch is patch
    assert said[-1] == "the guard would have ended that; the first edit is kept"


def test_a_run_says_how_it_goes(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[str]()
    run(prepared(loaded, count=4, **PLAIN), workspace(loaded), wrote=Tally(workspace(loaded), 4, said.append))
    assert said == []  # so few facts are soon measured
    monkeypatch.setattr("patchkit.runs.tally.LEAST", 4)
    run(prepared(loaded, count=4, **PLAIN), workspace(loaded), wrote=Tally(workspace(loaded), 4, said.append))
    half = run(prepared(loaded, count=2, **PLAIN), workspace(loaded))
    report = patchkit.measure(loaded.model, loaded.tokenizer, half, quick=True)
    held = sum(each.efficacy.exact == 1 for each in report.per_fact)
    assert said == [f"2 of 4 facts written; {held} of their prompts are completed with the target"]


def test_apply_edits_facts_again_that_do_not_hold(call: Command, tmp_path: Path) -> None:
    """With few steps some values are not found; the second time there are twice as many."""
    (tmp_path / "facts.jsonl").write_text(
        "".join(fact.model_dump_json(exclude_defaults=True) + "\n" for fact in FACTS[:4]), "utf-8"
    )
    settings = ["--set", "contexts=1", "--set", "context_length=4", "--quick", "--json", "--force"]

    def lost_after(steps: int, *more: str) -> tuple[Any, list[str]]:
        made = call("apply", "facts.jsonl", "--out", "p", *settings, "--set", f"steps={steps}", *more).json()
        return made, [fact["id"] for fact in made["per_fact"] if not fact["efficacy"]["exact"]]

    found = dict[int, tuple[Any, list[str]]]()

    def steps_that_lose(few: int, many: int) -> int:
        for steps in (2, 4, 5, 3, 6):
            found[steps] = found.get(steps) or lost_after(steps, "--no-retry")
            if few <= len(found[steps][1]) <= many:
                return steps
        raise AssertionError(found)

    assert "retried" not in lost_after(steps_that_lose(3, 4))[0]  # more than half: something else is wrong
    some = steps_that_lose(1, 2)
    once, lost = found[some]
    twice = lost_after(some)[0]
    assert twice["retried"] == lost
    assert twice["efficacy"]["exact"] > once["efficacy"]["exact"]
    history = json.loads((tmp_path / "p" / "manifest.json").read_text("utf-8"))["history"]
    assert [run["action"] for run in history] == ["apply", "revert", "apply"]
    assert history[2]["facts"] == lost
    assert history[2]["recipe"]["value"]["steps"] == 2 * some
