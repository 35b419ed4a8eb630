"""Patchkit against the plain implementation of the published procedure: the same edit, its time and its outcome.

    python -m tests.benchmarks.end_to_end --model FOLDER --facts FACTS --text TEXT --threads 1 --json

Loading, statistics (with what published code computes once per model and keeps: P, the inverse of C) and verification
are not part of either time. Contexts are made once and their time counts for both. Times are the process's own on a
CPU, peak memory the whole process's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from patchkit.editing.contexts import make_contexts
from patchkit.editing.editor import edit, requests_of
from patchkit.editing.recipe import load_recipe
from patchkit.editing.session import plan
from patchkit.editing.state import EditRun
from patchkit.evaluate.readings import EVAL_WINDOW
from patchkit.evaluate.verify import verify
from patchkit.facts.reader import read_facts
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.hooks import live_deltas
from patchkit.model.loading import load_model
from patchkit.statistics.corpus import Corpus, read_corpus, window_of
from patchkit.statistics.moments import statistics

from .common import fresh_peak, peak_memory, seconds
from .oracle import OracleResult, added, oracle_edit


def main() -> None:
    """Parse the options, measure, print."""
    options = _options()
    torch.set_num_threads(options.threads)
    result = measure(options)
    print(json.dumps(result, indent=2) if options.json else _table(result))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Edit the same facts both ways, one after the other, and verify each on the otherwise untouched model."""
    loaded = load_model(options.model, options.device)
    model, tokenizer = loaded.model, loaded.tokenizer
    facts = read_facts(options.facts, skip_bad=True, limit=options.count).facts
    config = load_recipe(options.method, None, options.set)
    runner = LayerRunner(inspect_model(model))
    corpus = read_corpus(options.text, tokenizer)
    covariances = statistics(runner, plan(runner.arch, config).sites, corpus)

    device = options.device
    contexts_s, contexts = seconds(lambda: make_contexts(runner, tokenizer, config), device)
    words_s, requests = seconds(lambda: requests_of(runner, tokenizer, facts, contexts, config), device)
    with fresh_peak(device):
        ours_s, ours = seconds(lambda: edit(runner, tokenizer, facts, config, covariances, contexts=contexts), device)
        ours_peak = peak_memory(device)
    with fresh_peak(device):
        oracle_s, oracle = seconds(lambda: oracle_edit(model, requests, config, covariances), device)
        oracle_peak = peak_memory(device)
    # Both edit in the same contexts, which cost both the same; `edit` has made the words in them once more itself.
    ours_s, oracle_s = ours_s + contexts_s, oracle_s + contexts_s + words_s - oracle.seconds["statistics"]

    plain = read_corpus(
        options.eval_text or options.text, tokenizer, options.eval_tokens, window_of(model, EVAL_WINDOW)
    )

    def rates(attached: Callable[[], AbstractContextManager[Any]]) -> dict[str, Any]:
        return verify(runner, tokenizer, facts, attached, plain).model_dump(exclude={"per_fact"})

    return {
        "model": options.model,
        "method": config.method,
        "facts": len(facts),
        "contexts": len(ours.contexts),
        "ours_s": ours_s,
        "oracle_s": oracle_s,
        "ratio": oracle_s / ours_s,
        "contexts_s": contexts_s,
        "peak_ratio": ours_peak / oracle_peak,
        "ours": _side(
            rates(lambda: live_deltas(runner.arch, ours.state.deltas(runner.arch))), ours.seconds, _steps(ours)
        ),
        "oracle": _side(rates(lambda: added(runner.arch, oracle.deltas)), oracle.seconds, oracle.steps),
        "target_difference": _difference(ours, oracle),
        "machine": _machine(corpus),
    }


def _side(rates: dict[str, Any], seconds: dict[str, float], steps: list[int]) -> dict[str, Any]:
    return {"steps": sum(steps), "seconds": seconds, "metrics": rates}


def _steps(run: EditRun) -> list[int]:
    return [written.steps for written in run.facts]


def _difference(ours: EditRun, oracle: OracleResult) -> float:
    """The largest relative difference of a fact's target states."""
    targets = torch.cat([values.targets for values in ours.state.values], 1)  # (d, n)
    return float(((targets - oracle.values).norm(dim=0) / oracle.values.norm(dim=0)).max())


def _machine(corpus: Corpus) -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "text_tokens": corpus.tokens,
    }


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['facts']} facts, {result['method']}, {result['model']}",
        f"{'':28}{'ours':>10}{'oracle':>10}",
        f"{'seconds':28}{result['ours_s']:10.2f}{result['oracle_s']:10.2f}   ratio {result['ratio']:.2f}",
        f"{'optimizer steps':28}{result['ours']['steps']:10d}{result['oracle']['steps']:10d}",
    ]
    theirs = result["oracle"]["metrics"]
    for group, found in result["ours"]["metrics"].items():
        if isinstance(found, dict):
            lines += [
                f"{f'{group} {name}':28}{_cell(value)}{_cell(theirs[group][name])}" for name, value in found.items()
            ]
    lines.append(" ".join(f"{name}={value}" for name, value in result["machine"].items()))
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return f"{'-':>10}" if value is None else f"{value:10.4f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="patchkit against the published procedure, written plainly")
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--facts", required=True, help="file of facts")
    parser.add_argument("--text", required=True, help="plain text for the statistics")
    parser.add_argument("--eval-text", help="plain text for the perplexity, if another")
    parser.add_argument("--eval-tokens", type=int, default=5000)
    parser.add_argument("--count", type=int, default=20, help="facts to edit")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--method", default="alphaedit", choices=["alphaedit", "memit", "rome"])
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the recipe"
    )
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
