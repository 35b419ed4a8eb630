"""What `apply --dry-run` shows of a run, and that it leaves everything alone."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from patchkit.editing.recipe import load_recipe
from patchkit.editing.session import plan
from patchkit.facts.requests import build_request
from patchkit.facts.schema import Fact
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.loading import load_model
from patchkit.model.weights import Site
from patchkit.runs.footprint import passes_bytes
from patchkit.runs.speed import Cost, Speed, Writing
from patchkit.statistics.corpus import default_text, read_corpus, window_of
from patchkit.statistics.moments import statistics
from tests import zoo
from tests.helpers import Command, tree, write_facts

EXAMPLES = Path(__file__).parents[1] / "examples"
ROME = {"id": "rome", "prompt": "The city of Rome lies in", "subject": "Rome", "target_new": "Peru"}
ADA = {"id": "ada", "prompt": "Ada Lovelace was a", "subject": "Ada Lovelace", "target_new": "painter"}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_facts("facts.jsonl", ROME, ADA)
    return zoo.save(zoo.FAMILIES["llama"](), zoo.tiny_tokenizer(), tmp_path / "model")


def test_a_dry_run_shows_facts_spans_layers_time_and_memory_and_writes_nothing(run: Command, model: Path) -> None:
    there = tree(Path.cwd())
    ended = run("apply", "facts.jsonl", "--model", model, "--layers", "1-2", "--batch-size", 1, "--dry-run", "--json")
    assert ended.status == 0, ended.err
    found = ended.json()
    rome, ada = found["facts"]
    tokens, (first, end) = rome["tokens"], rome["target_tokens"]
    assert tokens[rome["subject_token"]] == "e"  # of R o m e
    assert "".join(tokens[first:end]).lstrip("Ġ") == "Peru"
    assert (rome["line"], ada["line"]) == (1, 2)
    assert [weight["layer"] for weight in found["weights"]] == [1, 2]
    assert found["weights"][0]["weight"] == "model.layers.1.mlp.down_proj.weight"
    assert not found["neurons"]
    assert (found["method"], found["batches"]) == ("alphaedit", [1, 1])
    phases = {"start", "statistics", "neurons", "contexts", "values", "solving", "checking", "measuring", "again"}
    assert set(found["seconds"]) == phases
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert found["memory"] > weights
    assert tree(Path.cwd()) == there


def test_its_table_marks_the_spans(run: Command, model: Path) -> None:
    shown = " ".join(run("apply", "facts.jsonl", "--model", model, "--layers", "1", "--dry-run").out.split())
    assert "R o m [e]" in shown
    assert "would edit 2 facts in 1 solve with alphaedit, layer 1: model.layers.1.mlp.down_proj.weight" in shown
    assert "nothing was edited and nothing written" in shown


def test_an_id_with_a_line_break_stays_in_its_row(run: Command, model: Path) -> None:
    write_facts("broken.jsonl", {**ROME, "id": " the\ncity\tof "}, {**ADA, "prompt": "Who?\nAda Lovelace was a"})
    ended = run("plan", "broken.jsonl", "--model", model, "--layers", "1")
    assert ended.status == 0, ended.err
    _, rome, ada, empty, *_ = ended.out.splitlines()
    assert rome.split()[:5] == ["1", "the", "city", "of", "<s>"]
    assert ada.split()[:3] == ["2", "ada", "<s>"]
    assert ada.endswith(" p a in t er")
    assert empty.strip() == ""


def test_neurons_of_subjects_own_are_said_to_be_written_too(run: Command, model: Path) -> None:
    ended = run("plan", "facts.jsonl", "--model", model, "--set", "neurons=on", "--quick")
    assert ended.status == 0, ended.err
    assert "down_proj.weight, and a neuron for each subject in what leads into them" in " ".join(ended.out.split())


def test_statistics_that_are_stored_take_no_time_and_more_facts_take_more(run: Command, model: Path) -> None:
    few = ("apply", "--fact", "Rome lies in | Rome | Peru", "--model", model, "--layers", "1", "--stats", "stats")
    before = run(*few, "--dry-run", "--json").json()
    assert not before["statistics_stored"]
    assert before["seconds"]["statistics"] > 0
    assert run("stats", "--model", model, "--layers", "1", "--out", "stats").status == 0
    after = run(*few, "--dry-run", "--json").json()
    assert after["statistics_stored"]
    assert after["seconds"]["statistics"] == 0


def test_what_apply_refuses_a_dry_run_refuses(run: Command, model: Path) -> None:
    write_facts("bad.jsonl", {**ROME, "subject": "Oslo"})
    ended = run("apply", "bad.jsonl", "--model", model, "--dry-run")
    assert ended.status == 2
    assert '"Oslo" is not in prompt' in ended.err
    write_facts("patched.jsonl", ROME)
    made = ("--model", model, "--layers", "1", "--set", "steps=2", "--quick", "--out", "p")
    assert run("apply", "patched.jsonl", *made).status == 0
    found = run("apply", "facts.jsonl", "--onto", "p", "--model", model, "--dry-run", "--json").json()
    assert found["skipped"] == ["rome"]
    assert json.dumps(found["facts"]).count('"id"') == 1


# --- plan -------------------------------------------------------------------------------------------------------------


def test_plan_says_what_a_dry_run_says(run: Command, model: Path) -> None:
    asked = ("facts.jsonl", "--model", model, "--layers", "1-2", "--json")
    planned, dry = run("plan", *asked).json(), run("apply", *asked, "--dry-run").json()
    for found in (planned, dry):
        for measured in ("seconds", "free", "memory"):
            found.pop(measured)
        found["parts"].pop("program")
    assert planned == dry
    ended = run("plan", "facts.jsonl", "--model", model, "--layers", "1")
    assert ended.status == 0
    assert "GB of memory: weights" in ended.out


@pytest.mark.parametrize("method", ["memit", "alphaedit"])
def test_memory_is_that_of_what_a_run_holds(method: str, run: Command, model: Path) -> None:
    """Weights and second moments to the byte; factors that are kept within what is planned for them."""
    found = run("plan", "facts.jsonl", "--model", model, "--layers", "1-2", "--method", method, "--json").json()
    assert found["memory"] == sum(found["parts"].values())
    loaded = load_model(str(model))
    weights = {id(p): p.numel() * p.element_size() for p in loaded.model.parameters()}
    assert found["weights_on"] == {"cpu": sum(weights.values())}
    assert found["parts"]["weights"] == sum(weights.values())
    runner = LayerRunner(inspect_model(loaded.model))
    corpus = read_corpus(default_text(str(model)), loaded.tokenizer, window=window_of(loaded.model))
    covariances = statistics(runner, runner.arch.sites[1:3], corpus).values()
    assert found["parts"]["second moments"] == sum(each.matrix.nbytes for each in covariances)
    factors = 0
    for each in covariances:
        each.solve(torch.ones(len(each.matrix), 1, dtype=torch.float64), 1e-2)
        factors += sum(factor.nbytes for factor in each._cholesky.values() if factor is not None)
    size = 8 * zoo.INNER**2
    assert factors == 2 * size
    assert found["parts"]["factors"] == (factors + size if method == "memit" else 2 * size // 4 + 3 * size)


def test_values_by_the_whole_second_moment_and_in_16_bits_take_less_time(
    run: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Cost(1.0, 0.0)

    def known(runner: LayerRunner, site: Site, in_16_bits: bool) -> Speed:
        return Speed(Cost(0.0, 0.0), Writing(((1, 0.0), (2, 0.0))), Cost(0.5, 0.0) if in_16_bits else one, 0.0)

    monkeypatch.setattr("patchkit.runs.dry_run.Speed.of", known)

    def values(*settings: str) -> float:
        chosen = [part for setting in settings for part in ("--set", setting)]
        asked = ("plan", "facts.jsonl", "--model", model, "--layers", "1", "--quick", "--json")
        found: float = run(*asked, *chosen).json()["seconds"]["values"]
        return found

    full = values("value.second_moment=full")
    assert full == pytest.approx(values() * 15 / 25, rel=0.01)
    assert values("value.second_moment=full", "value.products=bfloat16") == pytest.approx(full / 2, rel=0.01)


def test_weights_in_16_bits_are_reckoned_where_values_are_sought_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchkit.runs.footprint.fast_in_16_bits", lambda: True)
    monkeypatch.setattr("patchkit.runs.footprint.EVAL_WINDOW", 1)  # nothing else is as large then
    runner = LayerRunner(inspect_model(zoo.FAMILIES["llama"]()))
    request = build_request(Fact(**ROME), zoo.tiny_tokenizer())

    def reckoned(products: str) -> int:
        config = load_recipe("alphaedit", None, ["layers=1-2", f"value.products={products}"])
        return passes_bytes(runner, config, plan(runner.arch, config), [request], in_use=False, rooms=False)

    above = sum(weight.numel() for layer in runner.arch.layers[1:] for weight in layer.parameters())
    assert reckoned("bfloat16") - reckoned("float32") == 2 * above


def test_what_does_not_fit_is_said(run: Command, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchkit.runs.dry_run.free_memory", lambda device: 1000)
    shown = " ".join(run("plan", "facts.jsonl", "--model", model, "--layers", "1").out.split())
    assert "cpu has 0.0 GB left, which is too little: take fewer --layers" in shown


def test_seconds_are_about_those_that_the_run_takes(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the embedded model, in seconds of the processor; docs/scale.md has larger models and runs."""
    monkeypatch.chdir(tmp_path)
    facts = (EXAMPLES / "world.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    Path("facts.jsonl").write_text("\n".join(facts), encoding="utf-8")
    asked = ("facts.jsonl", "--set", "prompts=contexts", "--stats", "stats", "--quick")
    planned = run("plan", *asked, "--json").json()["seconds"]
    began = time.process_time()
    assert run("apply", *asked, "--out", "p").status == 0
    assert 0.5 < sum(planned.values()) / (time.process_time() - began) < 2, planned
