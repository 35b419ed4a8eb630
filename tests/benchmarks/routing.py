"""What an edit does to routing, and what routing does to the edit, in the embedded mixture of experts.

    python -m tests.benchmarks.routing PATCH [--facts examples/world.jsonl] [--edits 50]

The first table has the share of choices, of a token for an expert, that are as they were, by layer: of plain text, at
the last token of a fact's subject, and at the tokens after it. The second one has how facts hold where the routers
choose as they like, and where they are made to choose, with their gates, what they chose in the base: in all layers, or
in those above the edited ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patchkit import Patch
from patchkit.evaluate.routing import choices
from patchkit.facts.reader import read_facts
from patchkit.facts.requests import build_request, encode_prompt
from patchkit.facts.schema import Fact
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.loading import ModelChoice

MODEL = Path(__file__).parents[2] / "examples" / "factworld-moe"
WINDOW, TOKENS = 128, 4096
Routed = dict[str, Any]
"""What each router put out, by its name."""


@dataclass(frozen=True)
class Asked:
    """A prompt with what may be said after it: ids, and first tokens."""

    ids: list[int]
    new: int
    old: int


@dataclass
class Mixture:
    """A model whose routers can be watched and held."""

    model: Any
    tokenizer: Any

    def __post_init__(self) -> None:
        self.runner = LayerRunner(inspect_model(self.model))
        self.routers: dict[str, nn.Module] = {
            name: module for name, module in self.model.named_modules() if name.endswith("mlp.gate")
        }

    @contextmanager
    def held(self, routed: Mapping[str, Any]) -> Iterator[None]:
        """Inside the block these routers say what they said."""
        with ExitStack() as stack:
            for name, said in routed.items():
                handle = self.routers[name].register_forward_hook(lambda *_, said=said: said)
                stack.callback(handle.remove)
            yield

    @torch.no_grad()
    def run(self, ids: Sequence[int]) -> tuple[Tensor, Routed]:
        """Logits (vocab,) after a text, and what the routers said."""
        said: Routed = {}
        with ExitStack() as stack:
            for name, router in self.routers.items():
                handle = router.register_forward_hook(lambda _, __, out, name=name: said.__setitem__(name, out))
                stack.callback(handle.remove)
            logits = self.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1]
        return logits, said

    def asked(self, prompt: str, new: str, old: str) -> Asked:
        """A prompt with the first tokens of two answers."""
        first = [self.tokenizer(f" {each}", add_special_tokens=False)["input_ids"][0] for each in (new, old)]
        return Asked(encode_prompt(self.tokenizer, prompt), *first)

    def answers(self, base: Mapping[str, Any], ask: Mapping[str, Asked], layers: Sequence[int]) -> dict[str, Tensor]:
        """Logits after every prompt, the routers of `layers` held to what they said in the base."""
        found = {}
        for name, each in ask.items():
            kept = {router: said for router, said in base[name][1].items() if int(router.split(".")[2]) in layers}
            with self.held(kept):
                found[name] = self.run(each.ids)[0]
        return found


def prompts(mixture: Mixture, facts: Sequence[Fact]) -> dict[str, dict[str, Asked]]:
    """By kind, the prompts of facts, with first tokens of the new and the old answer."""
    found: dict[str, dict[str, Asked]] = {"fact": {}, "paraphrase": {}, "neighbor": {}}
    for fact in facts:
        old = fact.target_true or ""
        found["fact"][fact.id] = mixture.asked(fact.prompt, fact.target_new, old)
        for number, prompt in enumerate(fact.paraphrases):
            found["paraphrase"][f"{fact.id} paraphrase {number}"] = mixture.asked(prompt, fact.target_new, old)
        for number, other in enumerate(fact.locality):
            found["neighbor"][f"{fact.id} neighbor {number}"] = mixture.asked(other.prompt, fact.target_new, old)
    return found


def kept_by_layer(before: Mapping[int, Tensor], after: Mapping[int, Tensor], rows: Tensor | None = None) -> list[float]:
    """The share of choices that are as they were, in each layer."""
    found = []
    for layer, chosen in before.items():
        old, new = (chosen, after[layer]) if rows is None else (chosen[rows], after[layer][rows])
        found.append(float((old & new).sum() / old.sum()))
    return found


def by_layer(mixture: Mixture, patch: Patch, facts: Sequence[Fact], text: str) -> Iterator[tuple[str, list[float]]]:
    """The rows of the first table."""
    ids = mixture.tokenizer(text, add_special_tokens=False)["input_ids"][:TOKENS]
    windows = [ids[first : first + WINDOW] for first in range(0, len(ids) - WINDOW + 1, WINDOW)]
    rows = [build_request(fact, mixture.tokenizer).rows[0] for fact in facts]
    texts = [list(row.ids[: row.target]) for row in rows]
    before = [choices(mixture.runner, each) for each in (windows, texts)]
    with patch.attached(mixture.model):
        after = [choices(mixture.runner, each) for each in (windows, texts)]
    starts = torch.tensor([0, *(len(each) for each in texts)]).cumsum(0)
    subjects = torch.tensor([int(start) + row.subject for start, row in zip(starts, rows, strict=False)])
    later = [torch.arange(int(s) + 1, int(end)) for s, end in zip(subjects, starts[1:], strict=True)]
    yield "plain text", kept_by_layer(before[0], after[0])
    yield "last token of the subject", kept_by_layer(before[1], after[1], subjects)
    yield "tokens after it", kept_by_layer(before[1], after[1], torch.cat(later))


def holding(mixture: Mixture, patch: Patch, facts: Sequence[Fact]) -> Iterator[tuple[str, tuple[float, float, float]]]:
    """The rows of the second table: facts and paraphrases answered with the new target rather than the old, neighbors
    with the same first token as before."""
    asked = prompts(mixture, facts)
    base = {name: mixture.run(each.ids) for kind in asked.values() for name, each in kind.items()}
    every = range(len(mixture.runner.arch.layers))
    edited = {site.layer for site in patch.sites(mixture.runner.arch).values()}
    for name, layers in (
        ("routers as they like", []),
        ("held above the edited layers", [layer for layer in every if layer > max(edited)]),
        ("held in all layers", every),
    ):
        with patch.attached(mixture.model):
            found = {kind: mixture.answers(base, each, layers) for kind, each in asked.items()}
        says = [
            [float(found[kind][name][each.new] > found[kind][name][each.old]) for name, each in asked[kind].items()]
            for kind in ("fact", "paraphrase")
        ]
        says.append([float(each.argmax() == base[name][0].argmax()) for name, each in found["neighbor"].items()])
        yield name, tuple(sum(each) / len(each) for each in says)  # type: ignore[misc]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patch")
    parser.add_argument("--facts", default=str(MODEL.parent / "world.jsonl"))
    parser.add_argument("--edits", type=int, default=50)
    options = parser.parse_args()
    loaded = ModelChoice(str(MODEL), "cpu", "float32").load()
    mixture, patch = Mixture(loaded.model, loaded.tokenizer), Patch.load(options.patch)
    facts = read_facts(options.facts).facts[: options.edits]
    text = (MODEL / "patchkit-eval.txt").read_text(encoding="utf-8")
    print("| choices as they were | layer 0 | 1 | 2 | 3 | 4 |", "| --- " * 6 + "|", sep="\n")
    for name, shares in by_layer(mixture, patch, facts, text):
        print(f"| {name} | " + " | ".join(f"{share:.3f}" for share in shares) + " |")
    print("", "| | facts | paraphrases | neighbors unchanged |", "| --- " * 4 + "|", sep="\n")
    for name, shares in holding(mixture, patch, facts):
        print(f"| {name} | " + " | ".join(f"{share:.3f}" for share in shares) + " |", flush=True)


if __name__ == "__main__":
    main()
