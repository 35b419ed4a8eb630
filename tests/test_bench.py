"""The sequential benchmark: figures as apply and measure give them, nothing computed twice, nothing mixed up."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

import pytest
import torch

import patchkit
from patchkit import methods
from patchkit.bench.health import weight_drift
from patchkit.bench.judge import Judge
from patchkit.bench.measuring import TEXT_TOKENS
from patchkit.bench.records import Result, States, score
from patchkit.bench.run import Outcome, run_bench
from patchkit.errors import InputError, PatchkitError
from patchkit.evaluate.readings import EVAL_TOKENS, EVAL_WINDOW
from patchkit.evaluate.report import Report
from patchkit.maths.linalg import Delta
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.loading import LoadedModel, ModelChoice, load_model
from patchkit.model.weights import read_weight, write_weight
from patchkit.runs.locate import locate
from patchkit.statistics.corpus import read_corpus, window_of
from tests import zoo
from tests.benchmarks import sequential_oracle
from tests.helpers import Command, tree

EXAMPLES = Path(__file__).parents[1] / "examples"
FACTWORLD = EXAMPLES / "factworld"
WORLD = str(EXAMPLES / "world.jsonl")
QUICK = ("prompts=contexts", "steps=6", "contexts=1", "context_length=4")
Bench = Callable[..., Outcome]


@pytest.fixture(scope="module")
def eval_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "eval.txt"
    file.write_text((FACTWORLD / "patchkit-eval.txt").read_text(encoding="utf-8")[:1500], encoding="utf-8")
    return file


@pytest.fixture
def bench(tmp_path: Path, eval_text: Path, watch: Watch) -> Bench:
    """Runs the benchmark on the embedded model, four facts of its world unless told otherwise."""

    def run(*methods: str, **more: Any) -> Outcome:
        usual = {"methods": methods, "edits": 4, "checkpoints": (2,), "overrides": QUICK, "eval_text": str(eval_text)}
        usual["quick"] = True
        data, out = more.pop("data", WORLD), more.pop("out", tmp_path / "out")
        model = more.pop("model", FACTWORLD)
        more = {"progress": watch, **more}
        return run_bench(data, ModelChoice(str(model), "cpu", "float32"), out, **{**usual, **more})

    return run


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(str(FACTWORLD), "cpu", "float32")


class Watch:
    """What a run reports of its progress; raises where it is told to, as a kill or a failure there would.

    edited: each method with the number of every fact edited. measured: how often the base, and how often a patch was.
    """

    def __init__(self) -> None:
        self.edited: list[tuple[str, int]] = []
        self.measured: Counter[str] = Counter()
        self._last: tuple[str, int] | None = None
        self._stops: dict[tuple[str, int], BaseException] = {}

    def stop(self, phase: str, done: int, error: BaseException) -> None:
        """Raise `error` when `phase` has got that far; once."""
        self._stops[phase, done] = error

    def __call__(self, phase: str, done: int, total: int) -> None:
        if error := self._stops.pop((phase, done), None):
            raise error
        if phase not in methods.available():
            self._last = None
            self.measured[phase] += done == total
            return
        if self._last == (phase, done - 1):  # the first of a stretch says where it starts
            self.edited.append((phase, done))
        self._last = (phase, done)


@pytest.fixture
def watch() -> Watch:
    return Watch()


def places(outcome: Outcome) -> list[tuple[str, int, int]]:
    return [(row.method, row.edits, row.facts) for row in outcome.rows]


# --- what is measured -------------------------------------------------------------------------------------------------


def test_texts_are_written_and_states_compared_at_every_checkpoint(bench: Bench) -> None:
    """And for the unedited model, which needs no second asking."""
    outcome = bench("memit", edits=2, checkpoints=(1,), quick=False)
    unedited, first, last = outcome.rows
    assert first.count("in_use", "asked") == 1 * 3
    assert unedited.value("in_use", "unrelated") == 1.0
    assert unedited.value("in_use", "asked") == 0.0
    assert last.count("in_use", "asked") == 2 * 3
    assert last.value("in_use", "overfit") is not None
    for row in (first, last):
        assert len(row.shift) == 5  # the embedded model's layers
        assert row.shift[-1] > 0
    states = States.model_validate_json((outcome.folder / "memit" / "2.states.json").read_bytes())
    assert states.shift == last.shift
    assert len(states.before) == len(states.after) == states.prompts > 2


def test_rows_say_what_apply_and_measure_say(bench: Bench, loaded: LoadedModel, eval_text: Path) -> None:
    """One fact after another, in stretches, is the same as all of them in one run."""
    outcome = bench("alphaedit", "memit")
    assert places(outcome) == [
        ("unedited", 0, 4),
        *(("alphaedit", 2, 2), ("alphaedit", 4, 4), ("memit", 2, 2), ("memit", 4, 4)),
    ]
    facts = patchkit.read_facts(WORLD, limit=4).facts
    for row in outcome.rows[1:]:
        settings = (*QUICK, "batch_size=1")
        patch = patchkit.apply(loaded.model, loaded.tokenizer, facts[: row.edits], row.method, overrides=settings)
        kept = patchkit.Patch.load(outcome.folder / row.method / str(row.edits))
        assert kept.manifest.digest == patch.manifest.digest
        report = patchkit.measure(loaded.model, loaded.tokenizer, patch, text=eval_text, quick=True)
        for name, found in report.summary().items():
            if name != "perplexity":
                assert row.model_dump()[name] == found
        assert row.perplexity is not None
        assert report.perplexity is not None
        assert row.perplexity.ratio == pytest.approx(report.perplexity.ratio)
        assert row.rank == row.edits
        assert row.bytes == (outcome.folder / row.method / str(row.edits) / "patch.safetensors").stat().st_size
        assert {"contexts", "values", "keys", "solve", "measuring"} == row.seconds.keys()
        whole = Report.model_validate_json((outcome.folder / row.method / f"{row.edits}.json").read_bytes())
        assert [fact.id for fact in whole.per_fact] == [fact.id for fact in facts[: row.edits]]
    assert outcome.rows[2].score != outcome.rows[0].score == 0.0


@torch.no_grad()
def test_text_kl_is_that_of_the_whole_distributions(bench: Bench, loaded: LoadedModel, eval_text: Path) -> None:
    outcome = bench("memit", edits=1, checkpoints=())
    unedited, row = outcome.rows
    assert unedited.text_kl == 0.0
    windows = read_corpus(eval_text, loaded.tokenizer, EVAL_TOKENS, window_of(loaded.model, EVAL_WINDOW)).windows
    ids = [torch.tensor([list(window)]) for window in windows[: TEXT_TOKENS // len(windows[0])]]

    def said() -> list[torch.Tensor]:
        return [loaded.model(input_ids=each).logits[0, :-1].double().log_softmax(-1) for each in ids]

    before = said()
    with patchkit.Patch.load(outcome.folder / "memit" / "1").attached(loaded.model):
        after = said()
    by_window = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(before, after, strict=True)]
    assert row.text_kl == pytest.approx(sum(by_window) / len(by_window), rel=0.02)  # of a very small one, in float32
    assert row.text_kl > 1e-7


def test_the_unedited_model_is_measured_as_it_is(bench: Bench) -> None:
    unedited = bench("alphaedit", edits=2, checkpoints=()).rows[0]
    assert unedited.efficacy.exact == 0.0
    assert (unedited.locality.unchanged, unedited.perplexity and unedited.perplexity.ratio) == (1.0, 1.0)
    assert (unedited.norm_change, unedited.rank, unedited.bytes) == (None, None, None)


def test_drift_is_that_of_the_merged_weight(loaded: LoadedModel) -> None:
    facts = patchkit.read_facts(WORLD, limit=2).facts
    patch = patchkit.apply(loaded.model, loaded.tokenizer, facts, "memit", overrides=QUICK)
    found = weight_drift(loaded.model, patch, {})
    arch = inspect_model(load_model(str(FACTWORLD), "cpu", "float64").model)
    assert len(found) == len(patch.updates) > 1
    for name, (delta,) in patch.updates.items():
        assert isinstance(delta, Delta)
        site = next(site for site in arch.sites if site.weight_name == name)
        before = read_weight(site).clone()
        write_weight(site, before + delta.left.double() @ delta.right.double())
        norms = [torch.linalg.matrix_norm(weight) for weight in (read_weight(site), before)]
        conditions = [torch.linalg.cond(weight) for weight in (read_weight(site), before)]
        assert found[name].norm == pytest.approx(float(norms[0] / norms[1]) - 1, rel=1e-6)
        assert found[name].condition == pytest.approx(float(conditions[0] / conditions[1]) - 1, rel=1e-6)
        assert found[name].norm > 1e-4


def test_the_row_names_the_largest_drift(bench: Bench) -> None:
    row = bench("alphaedit", edits=2, checkpoints=()).rows[1]
    assert len(row.weights) > 1
    assert row.norm_change == max(abs(drift.norm) for drift in row.weights.values())
    assert row.condition_change == max(abs(drift.condition) for drift in row.weights.values())


def test_batches_follow_one_another_and_the_last_may_be_smaller(bench: Bench) -> None:
    for edits, batches in ((3, [2, 1]), (5, [2, 2, 1])):  # not [2, 1, 2], though three are saved already
        outcome = bench("memit", edits=edits, batch_size=2)
        manifest = patchkit.Patch.load(outcome.folder / "memit" / str(edits)).manifest
        assert [size for run in manifest.history for size in run.batches] == batches


def test_the_base_is_asked_once(bench: Bench, watch: Watch) -> None:
    assert len(bench("alphaedit", "rome", "memit").rows) == 7
    assert watch.measured["the base"] == 1
    assert watch.measured["measuring"] == 6


@pytest.mark.parametrize(
    ("efficacy", "generalization", "locality", "expected"),
    [
        ((None, 0.9), (0.8, 0.3), 0.7, harmonic_mean([0.9, 0.8, 0.7])),
        ((None, 0.9), (None, 0.3), 0.7, harmonic_mean([0.9, 0.3, 0.7])),
        ((1.0, 0.0), (0.8, 0.3), 0.7, 0.0),
        ((1.0, 0.9), (None, None), 0.7, None),
        ((1.0, 0.9), (0.8, 0.3), None, None),
    ],
)
def test_the_score_is_a_harmonic_mean_of_what_is_known_to_count(
    efficacy: tuple[float, float], generalization: tuple[float, float], locality: float, expected: float
) -> None:
    rates = [dict(zip(("success", "exact"), pair, strict=True), generated=None) for pair in (efficacy, generalization)]
    report = Report.model_validate(
        {
            "facts": 1,
            "efficacy": rates[0],
            "generalization": rates[1],
            "locality": {"success": None, "unchanged": locality},
            "perplexity": None,
            "per_fact": (),
        }
    )
    assert score(report) == (expected if expected is None else pytest.approx(expected))


# --- resuming ---------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What no handler catches."""


def test_a_killed_run_goes_on_from_the_last_patch_it_saved(bench: Bench, tmp_path: Path, watch: Watch) -> None:
    whole = bench("alphaedit", edits=5, checkpoints=(), save_every=2, out=tmp_path / "whole")
    assert watch.edited == [("alphaedit", count) for count in (1, 2, 3, 4, 5)]
    watch.stop("alphaedit", 5, Killed())
    with pytest.raises(Killed):
        bench("alphaedit", edits=5, checkpoints=(), save_every=2)
    assert len(patchkit.Patch.load(tmp_path / "out" / "alphaedit" / "unfinished").manifest.facts) == 4
    watch.edited.clear()
    again = bench("alphaedit", edits=5, checkpoints=(), save_every=2)
    assert watch.edited == [("alphaedit", 5)]
    assert not (again.folder / "alphaedit" / "unfinished").exists()
    patches = [patchkit.Patch.load(run.folder / "alphaedit" / "5").manifest.digest for run in (whole, again)]
    assert patches[0] == patches[1]
    assert bare(whole) == bare(again)


def bare(outcome: Outcome) -> list[dict[str, Any]]:
    """The rows without what no two runs share."""
    return [row.model_dump(exclude={"seconds"}) for row in outcome.rows]


def test_one_killed_while_measuring_edits_nothing_again(bench: Bench, watch: Watch) -> None:
    watch.stop("measuring", 6, Killed())
    with pytest.raises(Killed):
        bench("memit", checkpoints=())
    assert watch.edited == [("memit", count) for count in (1, 2, 3, 4)]
    watch.edited.clear()
    assert places(bench("memit", checkpoints=())) == [("unedited", 0, 4), ("memit", 4, 4)]
    assert not watch.edited


def test_what_is_there_is_not_computed_again(bench: Bench, watch: Watch) -> None:
    first = bench("alphaedit")
    lines = (first.folder / "results.jsonl").read_bytes()
    watch.edited.clear()
    watch.measured.clear()
    assert bench("alphaedit").rows == first.rows
    assert not watch.edited
    assert not watch.measured  # not even the base
    assert (first.folder / "results.jsonl").read_bytes() == lines


def test_methods_checkpoints_and_facts_are_added_later(bench: Bench, watch: Watch) -> None:
    bench("alphaedit", edits=4, checkpoints=(2,))
    watch.edited.clear()
    outcome = bench("memit", "alphaedit", edits=5, checkpoints=(3,))
    # alphaedit's patch of two is on the way to three, and its patch of four on the way to five
    assert watch.edited == [*(("memit", count) for count in (1, 2, 3, 4, 5)), ("alphaedit", 3), ("alphaedit", 5)]
    assert places(outcome) == [
        ("unedited", 0, 5),
        *(("alphaedit", count, count) for count in (2, 3, 4, 5)),
        *(("memit", count, count) for count in (3, 5)),
    ]
    assert (outcome.folder / "results.jsonl").read_text().count('"unedited"') == 2
    assert places(bench("memit", edits=3, checkpoints=()))[1:] == [
        ("alphaedit", 2, 2),
        ("alphaedit", 3, 3),
        ("memit", 3, 3),
    ]


def test_rows_are_judged_later_from_the_answers_that_are_there(
    bench: Bench, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(Judge, "_ask", lambda judge, question: asked.append(question) or "yes")
    first = bench("memit", edits=2, checkpoints=(1,), quick=False)
    assert [row.judged for row in first.rows] == [None] * 3
    assert "judged" not in (first.folder / "table.md").read_text(encoding="utf-8")
    watch.edited.clear()
    watch.measured.clear()
    asking: dict[str, Any] = {"edits": 2, "checkpoints": (1,), "quick": False, "judge": "http://localhost/v1"}
    judged = bench("memit", judge_model="m", **asking)
    assert [(row.judged, row.judge) for row in judged.rows] == [(1.0, "m")] * 3
    assert [bare.model_copy(update={"judged": None, "judge": None}) for bare in judged.rows] == list(first.rows)
    assert "judged" in (first.folder / "table.md").read_text(encoding="utf-8")
    assert asked
    assert not watch.edited
    assert not watch.measured
    asked.clear()
    assert (
        bench("memit", edits=2, checkpoints=(1,), quick=False, judge="http://localhost/v1", judge_model="m") == judged
    )
    assert not asked
    bench("memit", judge_model="other", **asking)
    assert asked


def test_a_row_stays_where_its_judge_does_not_answer(
    bench: Bench, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench("rome", edits=1, checkpoints=(), quick=False)
    monkeypatch.setattr(Judge, "_ask", lambda judge, question: "yes")
    asking: dict[str, Any] = {"edits": 1, "checkpoints": (), "quick": False, "judge": "http://localhost/v1"}
    bench("rome", **asking)

    def away(judge: Judge, question: str) -> str:
        raise PatchkitError("away")

    monkeypatch.setattr(Judge, "_ask", away)
    with pytest.raises(PatchkitError, match="away"):
        bench("memit", **asking)
    monkeypatch.setattr(Judge, "_ask", lambda judge, question: "no")
    watch.edited.clear()
    outcome = bench("memit", **asking)
    (row,) = (row for row in outcome.rows if row.method == "memit")
    assert row.judged is not None
    assert not watch.edited


def test_a_method_that_cannot_go_on_does_not_stop_the_others(bench: Bench, watch: Watch) -> None:
    watch.stop("rome", 3, InputError("the edit is not finite"))
    said: list[str] = []
    outcome = bench("rome", "memit", say=said.append)
    assert places(outcome)[1:] == [("rome", 2, 2), ("memit", 2, 2), ("memit", 4, 4)]
    assert outcome.stopped == {"rome": "stopped on the way to 4 edits: the edit is not finite"}
    assert json.loads(outcome.as_json())["stopped"] == outcome.stopped
    assert "rome: stopped on the way to 4 edits: the edit is not finite" in said
    assert "left" in said[-1]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, eval_text: Path) -> Path:
    out = tmp_path_factory.mktemp("done") / "out"
    chosen = ModelChoice(str(FACTWORLD), "cpu", "float32")
    run_bench(WORLD, chosen, out, methods=["memit"], edits=2, overrides=QUICK, eval_text=str(eval_text), quick=True)
    return out


def other_model(folder: Path) -> dict[str, Any]:
    loaded = load_model(str(FACTWORLD))
    with torch.no_grad():
        next(loaded.model.parameters()).mul_(1.5)
    loaded.model.save_pretrained(folder / "model")
    loaded.tokenizer.save_pretrained(folder / "model")
    return {"model": folder / "model", "text": FACTWORLD / "patchkit-text.txt"}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda folder: {"overrides": (*QUICK, "seed=3")}, "memit after 2 edits is from a run with different recipe"),
        (lambda folder: {"batch_size": 2}, "different recipe"),
        (lambda folder: {"data": str(EXAMPLES / "facts.jsonl")}, "different facts"),
        (lambda folder: {"text": FACTWORLD / "patchkit-eval.txt"}, "different text;"),
        (lambda folder: {"eval_text": WORLD}, "different eval text"),
        (other_model, "unedited after 0 edits is from a run with different model"),
    ],
    ids=["seed", "batch size", "facts", "text", "eval text", "model"],
)
def test_results_of_another_configuration_are_refused(
    bench: Bench,
    done: Path,
    tmp_path: Path,
    watch: Watch,
    change: Callable[[Path], dict[str, Any]],
    what: str,
) -> None:
    before = tree(done)
    with pytest.raises(InputError, match=what):
        bench("memit", **{"edits": 2, "checkpoints": (), "out": done, **change(tmp_path)})
    assert tree(done) == before
    assert not watch.edited


def test_a_saved_patch_of_another_recipe_is_refused(bench: Bench, watch: Watch) -> None:
    watch.stop("measuring", 6, Killed())
    with pytest.raises(Killed):
        bench("memit", checkpoints=())
    for options, what in (({"overrides": (*QUICK, "preserve=20")}, "another recipe"), ({"text": WORLD}, "text")):
        with pytest.raises(InputError, match=what):
            bench("memit", checkpoints=(), **options)


@pytest.mark.parametrize("by_hand", ["sweeps=2", "layers=2"])
def test_what_a_recipe_leaves_open_is_none_of_what_was_set_by_hand(bench: Bench, watch: Watch, by_hand: str) -> None:
    watch.stop("measuring", 6, Killed())
    with pytest.raises(Killed):
        bench("memit", edits=1, checkpoints=(), overrides=(*QUICK, by_hand))
    with pytest.raises(InputError, match=rf"another recipe \({by_hand.partition('=')[0]}\)"):
        bench("memit", edits=2, checkpoints=())


def test_layers_are_located_once_and_a_run_goes_on_in_them(bench: Bench, watch: Watch) -> None:
    recipe = {"overrides": (*QUICK, "layers=locate"), "checkpoints": (), "save_every": 1}
    watch.stop("memit", 2, Killed())
    with pytest.raises(Killed):
        bench("memit", "rome", edits=2, **recipe)
    assert watch.measured["tracing"] == 1
    outcome = bench("memit", "rome", edits=2, **recipe)
    assert watch.edited == [("memit", 1), ("memit", 2), ("rome", 1), ("rome", 2)]
    assert watch.measured["tracing"] == 2
    history = patchkit.Patch.load(outcome.folder / "memit" / "2").manifest.history
    facts = patchkit.read_facts(WORLD, limit=2).facts
    loaded = load_model(str(FACTWORLD), "cpu", "float32")
    found = locate(LayerRunner(inspect_model(loaded.model)), loaded.tokenizer, facts).recommended
    assert [run.recipe["layers"] for run in history] == [found, found]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoints": (2, 9)}, "--checkpoints 9: beyond the 4 facts of --edits"),
        ({"checkpoints": (0,)}, "--checkpoints 0: a checkpoint is a number of edits, 1 or more"),
        ({"checkpoints": (3,), "batch_size": 2}, "--checkpoints 3: in the middle of a batch; give a multiple of 2"),
        ({"edits": 500}, r"world.jsonl: 120 facts, and --edits or --checkpoints ask for 500"),
        ({"edits": None, "checkpoints": (500,)}, r"120 facts, .* ask for 500"),
        ({"overrides": ("layers=9",)}, "layers"),
        ({"overrides": ("no_such=1",)}, "no_such"),
        ({"eval_text": "nowhere.txt"}, "text nowhere.txt: cannot be read"),
        ({"judge": "http://localhost/v1"}, "--judge: with --quick no answers are written that could be judged"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(
    bench: Bench, tmp_path: Path, watch: Watch, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        bench("memit", **options)
    assert not watch.edited
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="it exists and holds no benchmark"):
        bench("memit")
    assert list(tree(tmp_path / "out")) == ["letter.txt"]


def test_a_damaged_line_is_named(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"results.jsonl line 1: not a result of this version"):
        bench("memit")


# --- the command and its tables ---------------------------------------------------------------------------------------


@pytest.fixture
def command(run: Command, eval_text: Path) -> Command:
    """Calls `patchkit bench ARGS...`."""
    settings = [part for setting in QUICK for part in ("--set", setting)]
    return partial(run, "bench", "--model", FACTWORLD, "--data", WORLD, "--eval-text", eval_text, *settings)


def test_the_same_table_three_times(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = command("--methods", "memit, rome", "--checkpoints", "1,2", "--seed", 4, "--out", out)
    assert ended.status == 0
    rows = [Result.model_validate_json(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(row.method, row.edits) for row in rows] == [
        ("unedited", 0),
        *(("memit", 1), ("memit", 2), ("rome", 1), ("rome", 2)),
    ]
    assert patchkit.Patch.load(out / "memit" / "2").manifest.history[-1].recipe["seed"] == 4
    told = list(csv.DictReader((out / "table.csv").open()))
    markdown = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in (out / "table.md").read_text().splitlines()
        if line.startswith("| ") and "score" not in line
    ]
    lines = [line.split() for line in ended.out.splitlines() if line.startswith(("unedited", "memit", "rome"))]
    assert len(told) == len(markdown) == len(lines) == 5
    for row, record, cells, words in zip(rows, told, markdown, lines, strict=True):
        assert cells == words
        assert (record["method"], int(record["edits"])) == (row.method, row.edits)
        assert float(record["generalization_exact"]) == row.generalization.exact
        assert record["norm_change"] == ("" if row.norm_change is None else repr(row.norm_change))
        assert row.perplexity is not None
        assert f"{row.perplexity.ratio:.4f}" in cells
        if row.seconds:
            assert float(record["seconds_editing"]) == pytest.approx(
                sum(row.seconds.values()) - row.seconds["measuring"]
            )
    assert "rome, 2 edits" in ended.err
    assert "left" in ended.err


def test_json_is_one_object_with_the_rows(command: Command, tmp_path: Path) -> None:
    found = command("--methods", "memit", "--edits", 1, "--out", tmp_path / "out", "--json").json()
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert found == {"out": str(tmp_path / "out"), "rows": rows, "stopped": {}}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--methods", "memit,nosuch"), 'unknown method "nosuch"'),
        (("--methods", ","), "--methods: none named"),
        (("--methods", "memit", "--checkpoints", "1,x"), "--checkpoints 1,x: not numbers of edits"),
    ],
)
def test_bad_options_end_with_2_and_one_line(
    command: Command, tmp_path: Path, args: tuple[str, ...], message: str
) -> None:
    ended = command(*args, "--out", tmp_path / "out")
    assert (ended.status, ended.out) == (2, "")
    (line,) = ended.err.splitlines()
    assert line.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_the_published_procedure_gets_rows_beside_ours(
    bench: Bench, tmp_path: Path, eval_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench("alphaedit")
    settings = [part for setting in QUICK for part in ("--set", setting)]
    options = ["--model", str(FACTWORLD), "--data", WORLD, "--eval-text", str(eval_text), "--checkpoints", "2,4"]
    monkeypatch.setattr("sys.argv", ["sequential_oracle", *options, *settings, "--out", str(tmp_path / "out")])
    for _ in range(2):  # the second time, everything is there
        sequential_oracle.main()
    rows = bench("alphaedit").rows
    assert [(row.method, row.edits) for row in rows[3:]] == [("alphaedit (published)", 2), ("alphaedit (published)", 4)]
    for ours, published in zip(rows[1:3], rows[3:], strict=True):
        assert ours.efficacy == published.efficacy
        assert ours.perplexity is not None
        assert published.perplexity is not None
        assert ours.perplexity.after == pytest.approx(published.perplexity.after, rel=1e-4)
        assert ours.norm_change == pytest.approx(published.norm_change, rel=1e-3)


def test_values_on_the_untouched_model_are_sought_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = zoo.FAMILIES["llama"](), zoo.tiny_tokenizer()
    facts = [{"prompt": "the city of Rome", "subject": "Rome", "target_new": "capital"}]
    known: dict[Any, Any] = {}
    alone = patchkit.apply(model, tokenizer, facts, "memit")
    made = [patchkit.apply(model, tokenizer, facts, method, values=known) for method in ("alphaedit", "memit")]
    assert len(known) == 1
    assert made[1].manifest.digest == alone.manifest.digest
    assert "values" not in made[1].manifest.history[0].seconds
    more = [{"prompt": "the city of Florence", "subject": "Florence", "target_new": "capital"}]
    patchkit.apply(model, tokenizer, more, onto=made[0], values=known)
    assert len(known) == 1
