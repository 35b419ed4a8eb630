"""What an attached patch costs at generation: tokens per second without and with it, taking turns.

    python tests/benchmarks/attach_overhead.py [--model M] [--rank 100] [--tokens 64] [--rounds 15] [--threads 1]

The patch is random, of the rank that many facts have, on five feed-forward projections. Exit status 1 when the ratio
of the medians is below 0.95.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import patchkit
from patchkit import Patch
from patchkit.maths.linalg import Delta
from patchkit.model.arch import inspect_model
from patchkit.model.digests import weight_digest
from patchkit.patch.manifest import BaseInfo, Manifest, UpdateInfo
from patchkit.patch.patch import updates_digest

ROOT = Path(__file__).parents[2]
LEAST_RATIO = 0.95


def random_patch(model: PreTrainedModel, layers: Sequence[int], rank: int, seed: int = 0, size: float = 1e-3) -> Patch:
    """A patch for `model` with a random change at each of `layers`, `size` times as large as the weight."""
    generator = torch.Generator().manual_seed(seed)
    updates, infos, weights = {}, [], {}
    for site in (inspect_model(model).sites[layer] for layer in layers):
        left = torch.randn(site.d_out, rank, generator=generator)
        delta = Delta(left, torch.randn(rank, site.d_in, generator=generator))
        norm = float(torch.linalg.norm(site.module.weight.detach().float()))  # type: ignore[arg-type, union-attr]
        updates[site.weight_name] = (Delta(left * (size * norm / delta.norm()), delta.right),)
        weights[site.weight_name] = weight_digest(site, site.weight_name)
        shape = (site.d_out, site.d_in)
        numbers, change = rank * sum(shape), size * norm
        infos.append(
            UpdateInfo(weight=site.weight_name, rank=rank, shape=shape, numbers=numbers, norm=change, weight_norm=norm)
        )
    name = str(model.config._name_or_path)
    base = BaseInfo(name=name, commit=None, architecture=type(model).__name__, weights=weights)
    return Patch(Manifest(base=base, facts=(), updates=infos, history=(), digest=updates_digest(updates)), updates)


def seconds(model: PreTrainedModel, tokens: int) -> float:
    """Wall time of generating just that many tokens, greedily."""
    prompt = torch.arange(5, 13)[None]  # (1, 8)
    began = time.perf_counter()
    model.generate(  # type: ignore[operator]
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    for option, value in (("rank", 100), ("tokens", 64), ("rounds", 15), ("threads", 1)):
        parser.add_argument(f"--{option}", type=int, default=value)
    asked = parser.parse_args()
    real = ROOT / "models" / "smollm2-135m"
    name = asked.model or str(real if real.is_dir() else ROOT / "examples" / "factworld")
    torch.set_num_threads(asked.threads)
    model = AutoModelForCausalLM.from_pretrained(name, dtype="float32").eval()
    patch = random_patch(model, range(1, min(6, model.config.num_hidden_layers)), asked.rank)
    load_before = os.getloadavg()[0]
    times: dict[str, list[float]] = {"base": [], "patched": []}
    for turn in range(asked.rounds + 1):  # the first is to warm up
        for what in ("base", "patched") if turn % 2 else ("patched", "base"):
            stack = patchkit.load(model, patch) if what == "patched" else None
            times[what].append(seconds(model, asked.tokens))
            if stack is not None:
                stack.unload()
    rates = {what: asked.tokens / statistics.median(spent[1:]) for what, spent in times.items()}
    best = {what: asked.tokens / min(spent[1:]) for what, spent in times.items()}
    ratio = rates["patched"] / rates["base"]
    print(f"{name}, rank {asked.rank} on {len(patch.updates)} weights, {asked.threads} threads, load {load_before:.1f}")
    print(f"tokens/s, median: base {rates['base']:.2f}, patched {rates['patched']:.2f}, ratio {ratio:.3f}")
    print(f"tokens/s, best:   base {best['base']:.2f}, patched {best['patched']:.2f}")
    sys.exit(ratio < LEAST_RATIO)


if __name__ == "__main__":
    main()
