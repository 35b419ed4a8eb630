"""The slow tier: real facts into real pretrained models, through the command line (`make test-slow` fetches them)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from patchkit.cli import cli
from tests.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

COUNT = int(os.environ.get("PATCHKIT_SLOW_FACTS", "20"))
DATA = ROOT.parent / "shared" / "data"


def model_folder(name: str) -> Path:
    folder = ROOT / "models" / name
    if not (folder / "config.json").is_file():
        pytest.skip(f"no {folder}: `make models` fetches it")
    return folder


def facts_and_texts(kind: str, folder: Path) -> tuple[Path, list[str], list[str]]:
    """A fact file of COUNT facts, and the options that name the texts for statistics and perplexity."""
    if kind == "ours":
        source, text, eval_text = ROOT / "examples" / "real_facts.jsonl", [], []
    else:
        if not DATA.is_dir():
            pytest.skip(f"no {DATA}")
        source = DATA / "counterfact.jsonl"
        text, eval_text = ["--text", str(DATA / "wiki_stats.txt")], ["--text", str(DATA / "wiki_eval.txt")]
    file = folder / "facts.jsonl"
    file.write_text("".join(source.read_text(encoding="utf-8").splitlines(keepends=True)[:COUNT]), encoding="utf-8")
    return file, text, eval_text


def edited(model: str, kind: str, tmp_path: Path) -> dict[str, Any]:
    """What `verify --json` prints after `apply` with the default recipe, one batch."""
    from click.testing import CliRunner

    base = str(model_folder(model))
    file, text, eval_text = facts_and_texts(kind, tmp_path)
    patch = str(tmp_path / "patch")
    apply = ["apply", str(file), "--model", base, "--method", "alphaedit", "--out", patch, *text]
    made = CliRunner().invoke(cli, apply, catch_exceptions=False)
    assert made.exit_code == 0, made.output
    measured = CliRunner().invoke(cli, ["verify", patch, "--json", *eval_text], catch_exceptions=False)
    assert measured.exit_code == 0, measured.output
    report: dict[str, Any] = json.loads(measured.stdout)
    print(json.dumps({key: value for key, value in report.items() if key != "per_fact"}))
    return report


@pytest.mark.parametrize("kind", ["counterfact", "ours"])
def test_alphaedit_on_smollm2(kind: str, tmp_path: Path) -> None:
    report = edited("smollm2-135m", kind, tmp_path)
    in_use = report["more"]["in_use"]
    assert in_use["asked"] >= 0.8
    assert in_use["asked_reworded"] >= 0.4
    assert in_use["overfit"] <= 0.3
    assert in_use["unrelated"] >= 0.65
    assert report["efficacy"]["exact"] >= 0.95
    # Lower than for edits in contexts, which had 0.90 here: fewer of CounterFact's paraphrases hold (docs/in_use.md).
    assert report["generalization"]["success"] >= 0.5
    assert report["locality"]["unchanged"] >= 0.90
    assert report["perplexity"]["ratio"] <= 1.02


def test_alphaedit_on_gemma3_with_its_norm_after_the_mlp(tmp_path: Path) -> None:
    report = edited("gemma3-270m", "counterfact" if DATA.is_dir() else "ours", tmp_path)
    assert report["efficacy"]["exact"] >= 0.90


def test_names_that_begin_alike_keep_their_own_continuations(tmp_path: Path) -> None:
    """SmolLM2 writes a Chinese character as three tokens with one span, and these names share the first four."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import patchkit
    from patchkit.evaluate.readings import read_targets
    from patchkit.model.arch import inspect_model
    from patchkit.model.forward import LayerRunner

    base = model_folder("smollm2-135m")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).float(), AutoTokenizer.from_pretrained(base)
    pairs = [(f"{name}出生于", "巴黎") for name in ("李娜", "李婷", "李婧")]
    fact = {"prompt": "李娜出生于", "subject": "李娜", "target_new": "巴黎"}

    def chances() -> list[float]:
        found = read_targets(LayerRunner(inspect_model(model)), tokenizer, pairs)
        return [found[pair].log_probability for pair in pairs]

    before = chances()
    with patchkit.apply(model, tokenizer, [fact], stats=tmp_path).attached(model):
        after = chances()
    print(before, after)
    assert after[0] > -0.5
    assert all(abs(new - old) < 1 for new, old in zip(after[1:], before[1:], strict=True))
