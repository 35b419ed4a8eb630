"""What the benchmarks share: a clock, peak memory, a model with its facts, a random model of a given shape."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from patchkit.editing.contexts import make_contexts
from patchkit.editing.editor import requests_of
from patchkit.editing.recipe import EditConfig, load_recipe
from patchkit.editing.session import Plan, plan
from patchkit.facts.reader import read_facts
from patchkit.facts.requests import EditRequest
from patchkit.facts.schema import Fact
from patchkit.maths.covariance import Covariance
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.loading import load_model


def clock(device: str = "cpu") -> float:
    """Seconds: the process's own on a CPU, so that other programs on the machine count less; else the wall's, after
    all work that was queued."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds(run: Callable[[], Any], device: str = "cpu") -> tuple[float, Any]:
    """How long one call takes, and its result."""
    began = clock(device)
    result = run()
    return clock(device) - began, result


def peak_memory(device: str = "cpu") -> int:
    """The most bytes that were in use at once, of this process or of the device, since `fresh_peak`."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


@contextmanager
def fresh_peak(device: str = "cpu") -> Iterator[None]:
    """Inside, peak memory is counted anew."""
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield


@dataclass(frozen=True)
class Bench:
    """A model, frozen, and facts ready to edit it with."""

    model: Any
    tokenizer: Any
    runner: LayerRunner
    config: EditConfig
    plan: Plan
    facts: tuple[Fact, ...]
    contexts: tuple[str, ...]
    device: str

    @property
    def requests(self) -> list[EditRequest]:
        """The facts in their contexts."""
        return requests_of(self.runner, self.tokenizer, self.facts, self.contexts, self.config)


def prepared(options: argparse.Namespace, model: Any = None) -> Bench:
    """What the common options ask for; `model` takes the place of the one in `options.model`, whose tokenizer stays."""
    loaded = load_model(options.model, "cpu" if model is not None else options.device)
    model = (loaded.model if model is None else model).requires_grad_(False)
    facts = read_facts(options.facts, skip_bad=True, limit=options.count).facts
    config = load_recipe(options.method, None, options.set)
    runner = LayerRunner(inspect_model(model))
    contexts = make_contexts(runner, loaded.tokenizer, config)
    return Bench(
        model,
        loaded.tokenizer,
        runner,
        config,
        plan(runner.arch, config),
        tuple(facts),
        tuple(contexts),
        options.device,
    )


def random_llama(shape: dict[str, int], dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    """A Llama with random weights, made where it is to stay. Sites' weights are small, so that states stay finite."""
    torch.manual_seed(0)
    with torch.device(device):
        made = LlamaForCausalLM._from_config(LlamaConfig(**shape), dtype=dtype)
    return made.eval()


@cache
def spread(d_in: int) -> Covariance:
    """Second moments with a spectrum that falls off, along the axes: decomposing real ones is not what is measured."""
    values = torch.logspace(-3, 0, d_in, dtype=torch.float64)
    return Covariance(torch.diag(values), 1, (values, torch.eye(d_in, dtype=torch.float64)))


def parser(description: str | None, count: int = 20) -> argparse.ArgumentParser:
    """The options that benchmarks on a model have in common."""
    root = Path(__file__).parents[2]
    real = root / "models" / "smollm2-135m"
    known = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    known.add_argument("--model", default=str(real if real.is_dir() else root / "examples" / "factworld"))
    known.add_argument("--facts", default=str(root / "examples" / "real_facts.jsonl"))
    known.add_argument("--count", type=int, default=count, help="facts to edit")
    known.add_argument("--method", default="alphaedit", choices=["alphaedit", "memit", "rome"])
    known.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the recipe")
    known.add_argument("--threads", type=int, default=1)
    known.add_argument("--device", default="cpu")
    known.add_argument("--json", action="store_true")
    return known


def machine(device: str = "cpu") -> dict[str, Any]:
    """Where the figures are from."""
    return {
        "device": torch.cuda.get_device_name() if device != "cpu" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
    }


def show(results: Sequence[dict[str, Any]], as_json: bool, device: str = "cpu") -> None:
    """One line for each result, and one for the machine."""
    if as_json:
        print(json.dumps({"results": results, "machine": machine(device)}, indent=2))
        return
    for result in [*results, machine(device)]:
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in result.items()))
