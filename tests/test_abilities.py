"""`bench --abilities`: lm-eval's tasks on the live patched model, at every checkpoint, in all that is written."""

from __future__ import annotations

import csv
import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from patchkit.bench.abilities import Abilities, known_task
from patchkit.bench.run import Outcome, run_bench
from patchkit.errors import InputError
from patchkit.model.loading import LoadedModel, ModelChoice, load_model
from patchkit.report.benchmarks import bench_page
from tests.benchmarks.experts import script as make_factworld
from tests.helpers import Command, edited_fact, random_patch

EXAMPLES = Path(__file__).parents[1] / "examples"
FACTWORLD = EXAMPLES / "factworld"
TASKS = Path(__file__).parents[1] / "patchkit" / "bench" / "tasks"
QUESTIONS = [json.loads(line) for line in (TASKS / "factworld.jsonl").read_text(encoding="utf-8").splitlines()]
QUICK = ("prompts=contexts", "steps=2", "contexts=1", "context_length=4", "layers=1")
with_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval, which is not here")


@pytest.fixture(scope="module")
def eval_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "eval.txt"
    file.write_text((FACTWORLD / "patchkit-eval.txt").read_text(encoding="utf-8")[:800], encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(str(FACTWORLD), "cpu", "float32")


def arguments(eval_text: Path, out: Path, *more: Any) -> tuple[Any, ...]:
    settings = [part for setting in QUICK for part in ("--set", setting)]
    usual = (
        "--model",
        FACTWORLD,
        "--data",
        EXAMPLES / "world.jsonl",
        "--eval-text",
        eval_text,
        "--quick",
        "--out",
        out,
    )
    return ("bench", *usual, "--methods", "memit", *settings, *more)


# --- what comes with patchkit -----------------------------------------------------------------------------------------


def test_the_questions_are_about_facts_of_the_world_that_no_example_edits(tmp_path: Path) -> None:
    world = make_factworld()
    facts, _ = world.make_world(world.Sizes())
    world.write_questions(tmp_path / "again.jsonl", facts, set(facts), world.Sizes())
    assert (tmp_path / "again.jsonl").read_bytes() == (TASKS / "factworld.jsonl").read_bytes()
    edits = [json.loads(line) for name in ("facts", "world") for line in (EXAMPLES / f"{name}.jsonl").open()]
    wordings = {text for edit in edits for text in (edit["prompt"], *edit["paraphrases"])}
    told = {fact.prompt(number): fact.object for fact in facts for number in range(len(fact.relation.templates))}
    for question in QUESTIONS:
        assert question["prompt"] not in wordings
        assert question["choices"][question["answer"]] == told[question["prompt"]]
        assert len(set(question["choices"])) == 4


def test_without_lm_eval_one_line_says_what_to_install(
    run: Command, eval_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchkit.bench.abilities.find_spec", lambda name: None)
    ended = run(*arguments(eval_text, tmp_path / "out", "--edits", 1, "--abilities", "factworld"))
    assert (ended.status, ended.out) == (2, "")
    (line,) = ended.err.splitlines()
    assert line == 'error: --abilities: the package lm-eval is missing; pip install "patchkit-lm[abilities]"'
    assert not (tmp_path / "out").exists()


def test_no_task_named_is_refused(run: Command, eval_text: Path, tmp_path: Path) -> None:
    ended = run(*arguments(eval_text, tmp_path / "out", "--abilities", ","))
    assert ended.status == 2
    assert ended.err.startswith("error: --abilities: no task named")


@pytest.mark.parametrize(
    ("option", "value", "needed"), [("--abilities-limit", 3, "--abilities"), ("--judge-model", "m", "--judge")]
)
def test_an_option_that_would_do_nothing_is_refused(
    run: Command, eval_text: Path, tmp_path: Path, option: str, value: object, needed: str
) -> None:
    ended = run(*arguments(eval_text, tmp_path / "out", option, value))
    assert ended.status == 2
    assert f"error: {option}: of no use without {needed};" in ended.err
    assert not (tmp_path / "out").exists()


# --- what is asked ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def right(loaded: LoadedModel, question: dict[str, Any]) -> bool:
    """Whether the right choice is likelier after the prompt than the other three, by the model's own logits."""
    start = len(loaded.tokenizer(question["prompt"])["input_ids"])
    likely = []
    for choice in question["choices"]:
        ids = loaded.tokenizer(f"{question['prompt']} {choice}", return_tensors="pt")["input_ids"]
        logs = loaded.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        likely.append(float(logs.gather(1, ids[0, 1:, None])[start - 1 :].sum()))
    return max(range(4), key=likely.__getitem__) == question["answer"]


@with_harness
def test_the_live_patched_model_is_asked_and_nothing_else_is_touched(loaded: LoadedModel) -> None:
    """Equal to what its logits say by hand; a patch that breaks it shows; the tokenizer and random numbers stay."""
    abilities = Abilities.of(["factworld"], 24)
    ask = partial(abilities.ask, "factworld", loaded.model, loaded.tokenizer, lambda phase, done, total: None)
    broken = random_patch(loaded.model, str(FACTWORLD), [edited_fact()], ranks={1: 8, 2: 8}, size=40.0)
    before, tokens = torch.random.get_rng_state(), loaded.tokenizer.special_tokens_map
    with broken.attached(loaded.model):
        found, by_hand = ask()["factworld"], [right(loaded, question) for question in QUESTIONS[:24]]
    assert 0 < found.value == fmean(by_hand) < 1
    assert (found.questions, found.limit, found.metric) == (24, 24, "acc,none")
    assert found.stderr == pytest.approx((found.value * (1 - found.value) / 23) ** 0.5)
    assert ask()["factworld"].value == 1.0
    assert torch.equal(torch.random.get_rng_state(), before)
    assert loaded.tokenizer.special_tokens_map == tokens


@with_harness
def test_what_lm_eval_cannot_ask_is_refused_in_one_line(tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    (tmp_path / "far.yaml").write_text(
        "task: far\ndataset_path: nobody/nothing\ntest_split: test\noutput_type: generate_until\n"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)  # lm-eval's own take seconds to list
    with pytest.raises(InputError, match=r"--abilities nosuch: lm-eval has no such task"):
        known_task(manager, "nosuch")
    with pytest.raises(InputError, match=r"^--abilities far: its questions cannot be read: .+$"):
        known_task(manager, "far")


# --- in the benchmark -------------------------------------------------------------------------------------------------


def bench(eval_text: Path, out: Path, **more: Any) -> Outcome:
    usual: dict[str, Any] = {"methods": ["memit"], "edits": 2, "checkpoints": (1,), "overrides": QUICK, "quick": True}
    chosen = ModelChoice(str(FACTWORLD), "cpu", "float32")
    return run_bench(str(EXAMPLES / "world.jsonl"), chosen, out, eval_text=str(eval_text), **{**usual, **more})


class Watch:
    """Counts what is asked; raises where it is told to, as a kill there would."""

    def __init__(self, stop: int | None = None) -> None:
        self.asked, self.edited, self._stop = 0, 0, stop

    def __call__(self, phase: str, done: int, total: int) -> None:
        self.edited += phase == "memit"
        if phase == "factworld" and done == total:
            self.asked += 1
            if self.asked == self._stop:
                raise KeyboardInterrupt


@with_harness
def test_rows_that_lack_a_task_are_asked_it_and_nothing_is_edited_again(eval_text: Path, tmp_path: Path) -> None:
    out, asking = tmp_path / "out", {"abilities": ("factworld",), "abilities_limit": 8}
    without = bench(eval_text, out)
    with pytest.raises(KeyboardInterrupt):
        bench(eval_text, out, progress=Watch(stop=2), **asking)  # the untouched model's is written down by then
    watch = Watch()
    outcome = bench(eval_text, out, progress=watch, **asking)
    assert (watch.asked, watch.edited) == (2, 0)
    assert [list(row.abilities) for row in outcome.rows] == [["factworld"]] * 3
    assert [row.model_copy(update={"abilities": {}}).efficacy for row in outcome.rows] == [
        row.efficacy for row in without.rows
    ]
    assert outcome.rows[0].abilities["factworld"].value == 1.0
    again = Watch()
    assert bench(eval_text, out, progress=again, **asking).rows == outcome.rows
    assert again.asked == 0
    fewer = bench(eval_text, out, progress=again, **{**asking, "abilities_limit": 4})
    assert again.asked == 3
    assert [row.abilities["factworld"].questions for row in fewer.rows] == [4] * 3


@with_harness
def test_the_command_shows_it_in_every_table_and_in_the_page(run: Command, eval_text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asking = ("--edits", 1, "--abilities", "factworld", "--abilities-limit", 8)
    found = run(*arguments(eval_text, out, *asking, "--json"))
    assert found.status == 0, found.err
    rows = found.json()["rows"]
    assert [row["abilities"]["factworld"]["numbers"]["acc,none"] for row in rows] == [1.0, 1.0]
    assert rows == [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    ended = run(*arguments(eval_text, out, *asking))
    assert "factworld" in ended.out
    assert "it/s" not in ended.err  # no bars of lm-eval's own
    for record in csv.DictReader((out / "table.csv").open()):
        assert float(record["ability_factworld"]) == float(record["ability_factworld_high"]) == 1.0
    assert "| factworld |" in (out / "table.md").read_text()
    (noted,) = json.loads((out / "run.json").read_text())
    assert (noted["abilities"], "lm-eval" in noted["versions"]) == (["factworld"], True)
    page = bench_page(out).html()
    assert "acc of lm-eval&#x27;s task, 8 questions. The untouched model has 1.000." in page
    assert "1.000 (1.00 to 1.00)" in page
