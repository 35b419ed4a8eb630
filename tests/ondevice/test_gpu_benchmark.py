"""The benchmark that is run on real GPUs runs through, and keeps what it has whatever happens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import gpu
from tests.zoo import FAMILIES, save, tiny_tokenizer

FACTS = ({"prompt": "the city of Rome", "subject": "Rome", "target_new": "capital"},)


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    model = save(FAMILIES["llama"](), tiny_tokenizer(), tmp_path / "tiny")
    (model / "patchkit-text.txt").write_text("The capital of France is Paris. Alan Turing was born in 1912. " * 20)
    facts = tmp_path / "facts.jsonl"
    facts.write_text("\n".join(map(json.dumps, FACTS)))
    quick = ["value.steps=2", "contexts=1", "layers=1"]
    settings = [part for setting in quick for part in ("--set", setting)]
    where = ["--model", str(model), "--facts", str(facts), "--out", str(tmp_path / "out")]
    return [*where, *settings, "--shape", "small", "--count", "1", "--quick", "--tokens", "200", "--threads", "1"]


def ran(arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("sys.argv", ["gpu", *arguments])
    gpu.main()
    found: dict[str, Any] = json.loads((folder / "out" / "gpu.json").read_text())
    return found


def test_all_of_it(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ran([*options, "--methods", "memit,ultraedit"], tmp_path, monkeypatch)
    assert found["finished"]
    assert found["machine"]["device"] == "fake GPU"
    assert not [row for row in found["results"] if "failed" in row.get("notes", "")]
    timed = {(row["model"], row["what"], row.get("method")): row for row in found["results"]}
    for what in ("load", "statistics"):
        assert timed["tiny", what, None].keys() >= {"cold_s", "warm_s"}
    for what in ("apply", "measure", "merge"):
        assert timed["tiny", what, "memit"].keys() >= {"cold_s", "warm_s"}
    shape = "random, SMALL shape, float32"
    assert timed[shape, "edit", "ultraedit"]["warm_s"] > 0
    assert timed[shape, "edit in use", "memit"]["facts_per_s"] > 0
    for what in ("values, the published procedure", "C, Cholesky factor"):
        assert timed[shape, what, None]["warm_s"] > 0
    for what in ("pass over text", "C, all eigenvectors"):
        assert timed[shape, what, None]["cold_s"] > 0
    assert timed[shape, "edit, two steps", "memit"]["facts"] == 10
    table = (tmp_path / "out" / "gpu.md").read_text()
    assert table.count("| tiny |") == 8
    assert "NOT ON A GPU" not in table


def test_a_method_that_fails_is_listed_and_time_is_kept(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ran([*options, "--methods", "memit", "--set", "layers=99", "--limit", "600"], tmp_path, monkeypatch)
    assert any("failed: InputError" in row.get("notes", "") for row in found["results"])
    found = ran([*options, "--methods", "memit", "--limit", "0"], tmp_path, monkeypatch)
    assert found["finished"]
    assert not [row for row in found["results"] if "warm_s" in row]
    assert "tiny: load  cold" in found["left_out"]
