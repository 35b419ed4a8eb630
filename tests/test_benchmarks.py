"""The benchmarks run, at tiny shapes, and what both sides compute is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from patchkit.bench.records import Drift, Result, Setup
from patchkit.evaluate.report import LocalityRates, Rates, Report
from patchkit.statistics.corpus import WINDOW
from tests.benchmarks import (
    adaedit,
    earlier_edits,
    generalization,
    gpu,
    guard,
    in_use,
    preserving,
    results,
    retries,
    solve,
    text_statistics,
    value_engine,
    value_steps,
    warm_starts,
)
from tests.test_oracle import FACTS
from tests.test_serve import TEMPLATE
from tests.zoo import FAMILIES, save, tiny_tokenizer


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("bench")
    model = save(FAMILIES["llama"](), tiny_tokenizer(), folder / "model")
    facts = folder / "facts.jsonl"
    facts.write_text("\n".join(fact.model_dump_json() for fact in FACTS))
    settings = ["--set", "steps=3", "--set", "contexts=1", "--set", "layers=1-2"]
    return ["--model", str(model), "--facts", str(facts), "--count", "3", *settings, "--json"]


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text("The capital of France is Paris. Alan Turing studied at Cambridge. " * 60)
    return str(file)


def output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: object, arguments: list[str]
) -> list[dict[str, float]]:
    monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
    module.main()  # type: ignore[attr-defined]
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["threads"] == 1
    results: list[dict[str, float]] = found["results"]
    assert all(result["ratio"] > 0 for result in results)
    return results


def test_value_engine(options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    values, keys = output(monkeypatch, capsys, value_engine, options)
    assert values["difference"] < 1e-4
    assert values["steps"] == 9
    assert keys["sites"] == 2


def test_solve(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--d-in", "200", "--facts", "10", "--earlier", "50", "--d-out", "8", "--json"]
    (found,) = output(monkeypatch, capsys, solve, sizes)
    assert found["earlier"] == 50
    assert found["difference"] < 1e-9


def test_text_statistics(
    options: list[str], text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (found,) = output(monkeypatch, capsys, text_statistics, [*options, "--text", text])
    assert found["tokens"] % WINDOW == 0
    assert found["ratio"] == pytest.approx(found["ours_tokens_per_s"] / found["plain_tokens_per_s"])


def test_earlier_edits(
    options: list[str], text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = output(monkeypatch, capsys, earlier_edits, [*options, "--text", text, "--earlier", "0", "7", "200"])
    assert [result["earlier"] for result in found] == [0, 7, 200]
    assert len({result["steps"] for result in found}) == 1


def test_gpu_says_that_there_is_none(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a device, tests/ondevice runs it."""
    arguments = ["--device", "cpu", "--threads", "1", "--limit", "0", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["gpu", *options[:4], *arguments])
    gpu.main()
    assert "NOT ON A GPU" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "gpu.json").read_text())["finished"]


@pytest.fixture
def files(options: list[str], text: str, tmp_path: Path) -> list[str]:
    """What benchmarks that print a table take: the model, facts with paraphrases and neighbors, texts."""
    facts = tmp_path / "facts.jsonl"
    asked = {"paraphrases": [FACTS[0].prompt], "locality": [{"prompt": FACTS[1].prompt, "target": FACTS[1].target_new}]}
    facts.write_text("\n".join(json.dumps(fact.model_dump() | asked) for fact in FACTS))
    return [*options[:2], "--facts", str(facts), *options[6:-1], "--text", text, "--eval-text", text]


def rows(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """The cells of a Markdown table's rows, its heading among them."""
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def test_adaedit(files: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark", *files, "--try", "1:1:1", "--try", "1:0.4:0.4"])
    adaedit.main()
    heading, memit, whole, thin = rows(capsys)
    assert len({len(row) for row in (heading, memit, whole, thin)}) == 1
    share = heading.index("of MEMIT")
    assert memit[share] == "100%"
    assert float(thin[share].rstrip("%")) < 50 < float(whole[share].rstrip("%"))


def test_preserving(files: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tried = ["--others", "2", "--row", "memit@64", "--row", "alphaedit:ridge=1e9"]
    monkeypatch.setattr("sys.argv", ["benchmark", *files, *tried])
    preserving.main()
    heading, _, held = rows(capsys)
    assert held[:3] == ["alphaedit", "32", "ridge=1e9"]
    assert held[heading.index("other prompts")] == "1.000"
    assert held[heading.index("perplexity")] == "1.000"


def test_in_use(options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [*options[: options.index("--set")], "--skip", "1", "--raw", "3"]
    row = "memit:prompts=in-use,steps=2,layers=1-2"
    monkeypatch.setattr("sys.argv", ["benchmark", *chosen, "--row", row])
    in_use.main()
    asking, heading, _, found, *said = capsys.readouterr().out.splitlines()
    assert asking.endswith("paraphrases ask for the fact")
    cells = dict(zip(heading.split(" | "), found.split(" | "), strict=True))
    assert cells["| row"] == f"| {row}"
    assert 0 <= float(cells["asked"]) <= 1
    assert 0 <= float(cells["unrelated"]) <= 1
    assert len([line for line in said if line.startswith("        before: ")]) >= 1


@pytest.mark.parametrize("prompts", ["in-use", "contexts"])
def test_value_steps(
    prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps of the second row are as many as it says, and facts are edited as `--prompts` says."""
    tokenizer, seen = tiny_tokenizer(), list[bool]()
    tokenizer.chat_template = TEMPLATE
    model, facts = save(FAMILIES["llama"](), tokenizer, tmp_path / "model"), tmp_path / "facts.jsonl"
    facts.write_text(FACTS[0].model_dump_json())
    sought = value_steps.optimize

    def noting(runner: Any, requests: Any, *rest: Any) -> Any:
        seen.append(bool(requests[0].kept))
        return sought(runner, requests, *rest)

    monkeypatch.setattr(value_steps, "optimize", noting)
    monkeypatch.setitem(value_steps.BASES, prompts, [*value_steps.BASES[prompts], "layers=1-2"])
    given = ["--model", str(model), "--facts", str(facts), "--count", "1", "--prompts", prompts]
    monkeypatch.setattr("sys.argv", ["benchmark", *given, "--row", "value.steps=2", "--row", "value.steps=3"])
    value_steps.main()
    heading, *found = rows(capsys)
    assert [float(row[heading.index("steps")]) for row in found] == [2, 3]
    assert seen == [prompts == "in-use"] * 2


def test_warm_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Values that begin elsewhere end elsewhere, and further the more of the others' change they begin with."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model, facts = save(FAMILIES["llama"](), tokenizer, tmp_path / "model"), tmp_path / "facts.jsonl"
    people = ("Ada Lovelace", "Alan Turing", "Marie Curie", "Rome")
    asked = ({"prompt": f"{name} was born in", "subject": name, "target_new": "Paris"} for name in people)
    facts.write_text("".join(json.dumps(fact) + "\n" for fact in asked))
    settings = [*value_steps.BASES["contexts"], "layers=1-2", "value.steps=1"]
    monkeypatch.setitem(value_steps.BASES, "contexts", settings)
    given = ["--model", str(model), "--facts", str(facts), "--count", "2", "--relations", "1", "--prompts", "contexts"]
    monkeypatch.setattr("sys.argv", ["benchmark", *given])
    warm_starts.main()
    heading, *found = rows(capsys)
    assert [row[0] for row in found] == [name for name, *_ in warm_starts.ROWS]
    lengths = {row[0]: float(row[heading.index("length")]) for row in found}
    assert lengths["cold"] < lengths["0.5 of relation"] < lengths["1 of relation"]
    assert lengths["1 of all"] == lengths["1 of relation"]  # there is but one


def test_in_use_names_the_layers_that_tracing_found() -> None:
    assert in_use.named("memit:neurons=off,layers=locate", (2, 3)) == "memit:neurons=off,layers=locate (2, 3)"
    assert in_use.named("memit:layers=2-3", (2, 3)) == "memit:layers=2-3"


def test_generalization(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [files[3], *files[:2], *files[4:], "--limit", "2"]
    assert generalization.main([*arguments, "--only", "the prompt alone", "2 texts, 3 about the subject"]) == 0
    heading, *found = rows(capsys)
    assert [row[0] for row in found] == ["the prompt alone", "2 texts, 3 about the subject"]
    assert {len(row) for row in found} == {len(heading)}


def test_guard(files: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A line where it was asked for and at the end, and below after how many facts which bound was passed."""
    rows_of = [
        "--count",
        "3",
        "--at",
        "2",
        "--row",
        "ft:steps=3,layers=1,rate=1,bound=9",
        "--row",
        "ft:steps=1,layers=1,rate=1e-9",
    ]
    monkeypatch.setattr("sys.argv", ["benchmark", *files[:-2], *rows_of])
    guard.main()
    heading, *found = rows(capsys)
    facts, moved = heading.index("facts"), heading.index("text KL")
    assert [row[facts] for row in found if len(row) > 1] == ["2", "3", "2", "3"]
    assert float(found[1][moved]) > 0.05
    assert "past 0.05 after 1" in found[2][0]
    assert "past none of the bounds; the guard took" in found[-1][0]


def test_retries(files: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark", *files[:-2], "--batch-size", "2", "--set", "prompts=contexts"])
    retries.main()
    heading, *found = rows(capsys)
    assert [row[0] for row in found] == ["never", "at the end", "after each batch"]
    assert found[0][heading.index("how many")] == "0"


def test_results(options: list[str], monkeypatch: pytest.MonkeyPatch, text: str, tmp_path: Path) -> None:
    """One stage, at a tiny size: a page with a row for each method and checkpoint, and the report."""
    stage = ["--stage", "in-batches", "--methods", "memit,encore", "--edits", "2", "--batch-size", "1"]
    where = ["--skip", "1", "--checkpoints", "1", "--out", str(tmp_path / "out"), "--pages", str(tmp_path / "pages")]
    arguments = [each for each in options if each != "--json"]
    texts = ["--text", text, "--eval-text", text, "--quick"]
    monkeypatch.setattr("sys.argv", ["results", *arguments, *stage, *where, *texts])
    results.main()
    page = (tmp_path / "pages" / "in-batches.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[:2] for line in page.splitlines() if line.startswith(("| memit", "| encore"))]
    assert rows == [["| memit", "1"], ["| memit", "2"], ["| encore", "1"], ["| encore", "2"]]
    assert f"2 facts of in-batches.jsonl ({FACTS[1].id} to {FACTS[2].id})" in page
    whole, small = tmp_path / "out" / "in-batches.html", tmp_path / "pages" / "in-batches-charts.html"
    assert FACTS[1].prompt in whole.read_text(encoding="utf-8")
    assert FACTS[1].prompt not in small.read_text(encoding="utf-8")
    assert "condition change" in small.read_text(encoding="utf-8")


def test_results_at_the_defaults_are_a_page_without_charts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stage = ["--stage", "default-in-batches", "--methods", "memit", "--edits", "2", "--batch-size", "2", "--quick"]
    where = ["--out", str(tmp_path / "out"), "--pages", str(tmp_path / "pages"), "--set", "steps=2"]
    monkeypatch.setattr("sys.argv", ["results", *stage, *where])
    results.main()
    assert [file.name for file in (tmp_path / "pages").iterdir()] == ["default-in-batches.md"]
    page = (tmp_path / "pages" / "default-in-batches.md").read_text(encoding="utf-8")
    assert page.startswith(
        "# Methods in batches of 2 on factworld\n\n2 facts of world.jsonl (world-001 to world-002), "
    )
    assert "`make results-default` makes this page.\n" in page
    assert "| memit | 2 |" in page


def test_a_method_that_is_trained_learns_from_facts_that_are_not_edited(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stage = ["--stage", "embedded-trained", "--methods", "mend", "--edits", "2", "--quick", "--steps", "2"]
    monkeypatch.setattr("sys.argv", ["results", *stage, "--out", str(tmp_path / "out"), "--pages", str(tmp_path)])
    monkeypatch.setenv("PATCHKIT_CACHE", str(tmp_path / "cache"))
    results.main()
    page = (tmp_path / "embedded-trained.md").read_text(encoding="utf-8")
    assert "2 facts of world.jsonl (world-001 to world-002), prompts=contexts" in page
    assert "`mend` was trained on the facts that follow them." in page
    assert "| mend | 2 |" in page
    learned = (tmp_path / "out" / "embedded-trained.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["id"] for line in learned][:2] == ["world-003", "world-004"]


def row_of(method: str, edits: int, efficacy: float, norm: float) -> Result:
    setup = Setup(model="0", dtype="float32", facts="0", text="0", eval_text="0", recipe=None)
    rates = Rates(success=efficacy, exact=efficacy, generated=efficacy)
    near = LocalityRates(success=1.0, unchanged=1.0)
    report = Report(facts=edits, efficacy=rates, generalization=rates, locality=near, perplexity=None, per_fact=())
    return Result.of(method, edits, report, setup, {"w": Drift(norm=norm, condition=-2 * norm)})


def test_findings_have_each_methods_course_and_say_who_fell() -> None:
    """Of ROME, which falls, of MEMIT, which does not and grows, and of MOSE, which stays as it was."""
    rows = [row_of("rome", 10, 1.0, 0.1), row_of("rome", 50, 0.4, 0.5)]
    rows += [row_of("memit", 10, 1.0, 0.1), row_of("memit", 50, 0.95, 0.4)]
    rows += [row_of("mose", 10, 1.0, 0.0), row_of("mose", 50, 0.95, 1e-16)]
    fell, norms, conditions = results.findings(rows)
    assert "so it is here" in fell
    assert "rome 1.00, 0.50. No other falls" in fell
    assert "so here (relative change): memit 1.0e-01, 4.0e-01; mose 0.0e+00, 1.0e-16" in norms
    assert "memit 2.0e-01, 8.0e-01" in conditions
    rows += [row_of("ft", 10, 1.0, 0.1), row_of("ft", 50, 0.95, 0.1), row_of("pmet", 10, 1.0, 0.1)]
    rows += [row_of("pmet", 50, 0.4, 0.1), row_of("mose", 50, 0.95, 0.2)]
    fell, norms, _ = results.findings(rows)
    assert "not so here for ft" in fell
    assert "1 of 3 others fall: pmet 1.00, 0.50" in fell
    assert "not so here (relative change)" in norms
    assert list(results.findings([row_of("encore", 1, 1.0, 0.1)])) == []
