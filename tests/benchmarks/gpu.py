"""Facts into a large model on a GPU, against the published procedure on the same GPU, and the embedded model likewise.

    python -m tests.benchmarks.gpu --count 100 --oracle-count 4

The large model is an 8B-shaped Llama in bfloat16 with random weights; what a step costs does not depend on them, and
with `stop_loss=0` no fact stops early. The oracle edits fewer facts, one at a time as it does, and its time is scaled.
Statistics are made up and not timed. Without a GPU a small shape runs on the CPU, and the table says so.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from patchkit.editing.editor import edit
from patchkit.editing.state import EditRun
from patchkit.maths.linalg import Covariance

from .common import Bench, fresh_peak, parser, peak_memory, prepared, random_llama, seconds, show, spread
from .oracle import oracle_edit

LARGE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 448,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
    "max_position_embeddings": 512,
}
EMBEDDED = Path(__file__).parents[2] / "examples" / "factworld"


def main() -> None:
    """Parse the options, measure, print."""
    known = parser(__doc__, count=100)
    known.add_argument("--oracle-count", type=int, default=4, help="facts that the oracle edits")
    known.set_defaults(model=str(EMBEDDED))
    if torch.cuda.is_available():
        known.set_defaults(device="cuda", threads=os.cpu_count())
    options = known.parse_args()
    torch.set_num_threads(options.threads)
    show(measure(options), options.json, options.device)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One result for the random model and one for the embedded one."""
    large = options.device != "cpu"
    shape, dtype = (LARGE, torch.bfloat16) if large else (SMALL, torch.float32)
    random = argparse.Namespace(**{**vars(options), "set": ["stop_loss=0", *options.set]})
    name = "random Llama, 8B shape, bfloat16" if large else "random Llama, SMALL shape ON THE CPU, float32"
    results = [compared(name, prepared(random, random_llama(shape, dtype, options.device)), options.oracle_count)]
    if large:
        torch.cuda.empty_cache()
    return [*results, compared("embedded model", prepared(options), options.oracle_count)]


def compared(name: str, bench: Bench, oracle_count: int) -> dict[str, Any]:
    """All facts our way, the first few the oracle's way."""
    covariances = {site.layer: spread(site.d_in) for site in bench.plan.sites}
    few = replace(bench, facts=bench.facts[:oracle_count])
    _ours(few, covariances)  # to warm up
    with fresh_peak(bench.device):
        ours_s, found = seconds(lambda: _ours(bench, covariances), bench.device)
        peak = peak_memory(bench.device)
    oracle_s, oracle = seconds(lambda: _oracle(few, covariances), bench.device)
    per_fact = (oracle_s - oracle.seconds["statistics"]) / len(few.facts)
    steps = sum(written.steps for written in found.facts)
    return {
        "model": name,
        "facts": len(bench.facts),
        "steps": steps / len(bench.facts),
        "ours_s": ours_s,
        **{f"{phase}_s": spent for phase, spent in found.seconds.items()},
        "oracle_s_per_fact": per_fact,
        "oracle_steps": sum(oracle.steps) / len(few.facts),
        "ratio": per_fact * len(bench.facts) / ours_s,
        "peak_gb": peak / 2**30,
    }


def _ours(bench: Bench, covariances: dict[int, Covariance]) -> EditRun:
    return edit(bench.runner, bench.tokenizer, bench.facts, bench.config, covariances, contexts=bench.contexts)


def _oracle(bench: Bench, covariances: dict[int, Covariance]) -> Any:
    return oracle_edit(bench.model, bench.requests, bench.config, covariances)


if __name__ == "__main__":
    main()
