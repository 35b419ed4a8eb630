"""Whether keys of experts suffer from texts before a prompt, and what passes over the layers leave.

    python -m tests.benchmarks.expert_keys [--facts examples/world.jsonl] [--edits 40] [PATCH]

By number of contexts and edited layer: how much of an edit in the mean key x̄ arrives at a paraphrase's key x, which is
x'x̄ / x̄'x̄ with the keys taken as they are, and how many experts a subject goes to in all contexts. Of a patch of one
batch it says, by layer and pass, how long the residual is beside the first pass's, and the share of the experts that
are the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from patchkit import Patch
from patchkit.editing.contexts import make_contexts
from patchkit.editing.editor import requests_of
from patchkit.editing.recipe import load_recipe
from patchkit.editing.session import plan
from patchkit.facts.reader import read_facts
from patchkit.facts.requests import build_request
from patchkit.facts.schema import Fact
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.inputs import watching_site
from patchkit.model.loading import LoadedModel, ModelChoice
from patchkit.model.weights import Site

EXAMPLES = Path(__file__).parents[2] / "examples"
CONTEXTS = (0, 1, 3, 5)


@torch.no_grad()
def keys_at(runner: LayerRunner, site: Site, texts: Sequence[Sequence[int]]) -> Tensor:
    """Keys (n, d_in) at the last tokens of texts of token ids."""
    found: list[Tensor] = []
    for ids in texts:
        last = torch.tensor([0]), torch.tensor([len(ids) - 1])
        with watching_site(site, 1, lambda seen, _, last=last: found.append(seen.at(*last))):
            runner.run({"input_ids": torch.tensor([list(ids)]), "use_cache": False}, stop=site.layer + 1)
    return torch.cat(found)


def arriving(loaded: LoadedModel, facts: Sequence[Fact], contexts: int) -> Iterator[tuple[int, float, float]]:
    """By edited layer, how much arrives at paraphrases, and the number of experts."""
    runner = LayerRunner(inspect_model(loaded.model))
    config = load_recipe("alphaedit", None, [f"contexts={contexts}"])
    texts = make_contexts(runner, loaded.tokenizer, config)
    requests = requests_of(runner, loaded.tokenizer, facts, texts, config, set())
    for site in plan(runner.arch, config).sites:
        shares, experts = list[Tensor](), list[Tensor]()
        for request in requests:
            keys = keys_at(runner, site, [row.ids[: row.subject + 1] for row in request.rows])
            mean = keys.mean(0)
            others = [
                build_request(request.fact.model_copy(update={"prompt": prompt}), loaded.tokenizer).rows[0]
                for prompt in request.fact.paraphrases
            ]
            asked = keys_at(runner, site, [row.ids[: row.subject + 1] for row in others])
            shares.append((asked @ mean / mean.square().sum()).mean())
            experts.append((keys.unflatten(1, (site.blocks, -1)) != 0).any(2).any(0).sum())
        yield site.layer, float(torch.stack(shares).mean()), float(torch.stack(experts).double().mean())


def passes(patch: Patch) -> Iterator[tuple[int, int, float, float]]:
    """By layer and pass, what is left of the first residual, and the share of the experts that are those of before."""
    sweeps = int(patch.manifest.history[-1].recipe["sweeps"])
    for layer, (stack, count) in enumerate(patch.manifest.base.stacks.items()):
        keys = patch.state[f"{stack}.keys"].unflatten(1, (sweeps, -1)).unflatten(0, (count, -1))
        chosen = (keys != 0).any(1)  # (experts, sweeps, n)
        lengths = patch.state[f"{stack}.residuals"].unflatten(1, (sweeps, -1)).norm(dim=0).mean(1)  # (sweeps,)
        for sweep in range(1, sweeps):
            same = (chosen[:, sweep] & chosen[:, sweep - 1]).sum() / chosen[:, sweep - 1].sum()
            yield layer, sweep + 1, float(lengths[sweep] / lengths[0]), float(same)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patch", nargs="?")
    parser.add_argument("--facts", default=str(EXAMPLES / "world.jsonl"))
    parser.add_argument("--edits", type=int, default=40)
    options = parser.parse_args()
    if options.patch:
        print("| layer | pass | residual | experts as before |", "| --- " * 4 + "|", sep="\n")
        for layer, sweep, left, same in passes(Patch.load(options.patch)):
            print(f"| {layer} | {sweep} | {left:.3f} | {same:.3f} |")
        return
    facts = read_facts(options.facts).facts[: options.edits]
    print("| | contexts | layer | arriving | experts |", "| --- " * 5 + "|", sep="\n")
    for name in ("factworld", "factworld-moe"):
        loaded = ModelChoice(str(EXAMPLES / name), "cpu", "float32").load()
        for contexts in CONTEXTS:
            for layer, share, experts in arriving(loaded, facts, contexts):
                print(f"| {name} | {contexts} | {layer} | {share:.2f} | {experts:.1f} |", flush=True)


if __name__ == "__main__":
    main()
