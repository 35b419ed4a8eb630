"""Patchkit against the plain implementation of the published procedure: the same edit, its time and its outcome.

    python -m tests.benchmarks.end_to_end --model FOLDER --facts FACTS --text TEXT --threads 1 --json

The procedure seeks values by Adam. So does "ours, by Adam", which has to find the same ones; "ours" seeks them as
patchkit does by itself. Loading, statistics (with what is computed once per model and kept: P, the inverse of C) and
verification are not part of any time. Contexts are made once and their time counts for all. Times are the process's
own on a CPU, peak memory the whole process's. `--quick` leaves out what the model is asked to write.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from patchkit.editing.contexts import make_contexts
from patchkit.editing.editor import edit, requests_of
from patchkit.editing.recipe import EditConfig, load_recipe
from patchkit.editing.session import plan
from patchkit.editing.state import EditRun
from patchkit.evaluate.readings import EVAL_WINDOW
from patchkit.evaluate.trial import Trial
from patchkit.evaluate.verify import ask_base, verify
from patchkit.facts.reader import read_facts
from patchkit.maths.covariance import Covariance
from patchkit.methods.alphaedit import AlphaEditConfig
from patchkit.methods.memit import MemitConfig
from patchkit.methods.rome import RomeConfig
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.hooks import live_deltas
from patchkit.model.loading import load_model
from patchkit.runs.settle import with_steps
from patchkit.statistics.corpus import Corpus, read_corpus, window_of
from patchkit.statistics.moments import statistics

from .common import fresh_peak, peak_memory, seconds
from .oracle import OracleResult, added, oracle_edit

SIDES = {"ours": "ours", "adam": "ours, by Adam", "oracle": "published"}
"""What is compared, by its name in the result, and its heading."""


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
    published = by_adam_alone(config)
    runner = LayerRunner(inspect_model(model))
    corpus = read_corpus(options.text, tokenizer)
    covariances = statistics(runner, plan(runner.arch, config).sites, corpus)

    device = options.device
    contexts_s, contexts = seconds(lambda: make_contexts(runner, tokenizer, config), device)
    words_s, requests = seconds(lambda: requests_of(runner, tokenizer, facts, contexts, config), device)
    factor(config, covariances)

    def timed(chosen: EditConfig) -> tuple[float, int, EditRun]:
        with fresh_peak(device):
            spent, run = seconds(lambda: edit(runner, tokenizer, facts, chosen, covariances, contexts=contexts), device)
            return spent + contexts_s, peak_memory(device), run

    ours_s, ours_peak, ours = timed(with_steps(config, tokenizer))
    adam_s, _, by_adam = timed(published)
    with fresh_peak(device):
        oracle_s, oracle = seconds(lambda: oracle_edit(model, requests, published, covariances), device)
        oracle_peak = peak_memory(device)
    # All edit in the same contexts, which cost all the same; `edit` has made the words in them once more itself.
    oracle_s += contexts_s + words_s - oracle.seconds["statistics"]

    plain = read_corpus(
        options.eval_text or options.text, tokenizer, options.eval_tokens, window_of(model, EVAL_WINDOW)
    )

    before = ask_base(Trial(runner, tokenizer, facts, plain, options.quick))

    def rates(attached: Callable[[], AbstractContextManager[Any]]) -> dict[str, Any]:
        report = verify(runner, tokenizer, facts, attached, plain, before=before, quick=options.quick)
        return report.model_dump(exclude={"per_fact", "details"})

    def side(run: EditRun) -> dict[str, Any]:
        return _side(rates(lambda: live_deltas(runner.arch, run.state.deltas(runner.arch))), run.seconds, _steps(run))

    return {
        "model": options.model,
        "method": config.method,
        "facts": len(facts),
        "contexts": len(ours.contexts),
        "ours_s": ours_s,
        "adam_s": adam_s,
        "oracle_s": oracle_s,
        "ratio": oracle_s / ours_s,
        "adam_ratio": oracle_s / adam_s,
        "contexts_s": contexts_s,
        "peak_ratio": ours_peak / oracle_peak,
        "ours": side(ours),
        "adam": side(by_adam),
        "oracle": _side(rates(lambda: added(runner.arch, oracle.deltas)), oracle.seconds, oracle.steps),
        "target_difference": _difference(by_adam, oracle),
        "machine": _machine(corpus),
    }


def by_adam_alone(config: EditConfig) -> EditConfig:
    """The recipe with values sought as published methods seek them."""
    value = config.value.model_copy(update={"second_moment": "diagonal", "products": "float32"})
    return config.model_copy(update={"value": value})


def factor(config: EditConfig, covariances: Mapping[int, Covariance]) -> None:
    """Compute of the statistics what the method's solves ask for, which stays with them."""
    settings = config.method_config()
    for covariance in covariances.values():
        if isinstance(settings, AlphaEditConfig):
            covariance.leading(settings.null_energy)
        elif isinstance(settings, MemitConfig | RomeConfig):
            covariance.solve(covariance.matrix[:, :1].double(), settings.damping)


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
    sides = [result[side] for side in SIDES]
    ratios = f"   ratio {result['ratio']:.2f}, by Adam {result['adam_ratio']:.2f}"
    lines = [
        f"{result['facts']} facts, {result['method']}, {result['model']}",
        " " * 28 + "".join(f"{title:>15}" for title in SIDES.values()),
        _line("seconds", [result[f"{side}_s"] for side in SIDES]) + ratios,
        _line("optimizer steps", [side["steps"] for side in sides]),
    ]
    for group, found in {**sides[0]["metrics"], **sides[0]["metrics"].get("more", {})}.items():
        if isinstance(found, dict) and group not in ("counts", "more"):
            every = [{**side["metrics"], **side["metrics"].get("more", {})}[group] for side in sides]
            lines += [_line(f"{group} {name}", [each[name] for each in every]) for name in found]
    lines.append(f"peak memory {result['peak_ratio']:.2f}, targets apart {result['target_difference']:.1e} (by Adam)")
    lines.append(" ".join(f"{name}={value}" for name, value in result["machine"].items()))
    return "\n".join(lines)


def _line(name: str, values: Sequence[float | None]) -> str:
    return f"{name:28}" + "".join(f"{'-':>15}" if value is None else f"{value:15.4f}" for value in values)


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
    parser.add_argument("--quick", action="store_true", help="measure only what takes no writing")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
