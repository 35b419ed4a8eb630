"""The embedded mixture of experts beside the embedded dense model: fifty facts one by one, and fifty in a batch.

    python -m tests.benchmarks.experts [--edits 50] [--out out/experts]

"The strongest expert alone" edits, for each fact, the one expert that its key is longest in, as a tool would that takes
the most chosen expert for the feed-forward: the solve sees no other.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchkit.bench.records import Result
from patchkit.bench.run import run_bench
from patchkit.editing import session
from patchkit.methods import LayerProblem
from patchkit.model.loading import ModelChoice

EXAMPLES = Path(__file__).parents[2] / "examples"
SETTINGS = ("contexts=1", "sweeps=2")
"""One text before the prompt, as the sequential test of the dense model has it; the second sweep meets what is missing
where the first one has changed what routers read. Chosen on other facts of the world (61 to 100)."""
TITLE = "| | exact | paraphrases success | neighbors unchanged | perplexity | routing text |"


def strongest(problem: LayerProblem) -> LayerProblem:
    """The problem with each key in the one block in which it is longest."""
    blocks = problem.keys.unflatten(0, (problem.blocks, -1))  # (blocks, width, n)
    place = blocks.norm(dim=1).argmax(0)  # (n,)
    only = torch.zeros_like(blocks)
    every = torch.arange(blocks.shape[2], device=place.device)
    only[place, :, every] = blocks[place, :, every]
    kept: Tensor = only.flatten(0, 1)
    return problem.replace(keys=kept)


@contextmanager
def one_expert_alone() -> Iterator[None]:
    """Inside the block, solves see the strongest expert of each fact alone."""
    own = session.problem_at

    def problem_at(*args: Any, **kwargs: Any) -> LayerProblem:
        return strongest(own(*args, **kwargs))

    session.problem_at = problem_at
    try:
        yield
    finally:
        session.problem_at = own


def rows(model: str, method: str, out: Path, edits: int, batch: int) -> Result:
    """The last row of a benchmark on an embedded model."""
    chosen = ModelChoice(str(EXAMPLES / model), "cpu", "float32")
    facts = str(EXAMPLES / "world.jsonl")
    found = run_bench(
        facts, chosen, out, methods=[method], edits=edits, batch_size=batch, overrides=SETTINGS, quick=True
    )
    assert not found.stopped, found.stopped
    return next(row for row in found.rows if row.method == method and row.edits == edits)


def line(name: str, row: Result) -> str:
    """A row of the table."""
    ratio = row.perplexity.ratio if row.perplexity else float("nan")
    routing = row.value("routing", "text")
    numbers = (row.efficacy.exact, row.generalization.success, row.locality.unchanged, ratio, routing)
    return f"| {name} | " + " | ".join("-" if each is None else f"{each:.3f}" for each in numbers) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("out/experts"))
    parser.add_argument("--methods", nargs="*", default=["alphaedit"])
    options = parser.parse_args()
    print(TITLE, "| --- " * 6 + "|", sep="\n", flush=True)
    for batch, how in ((1, "one by one"), (options.edits, "in a batch")):
        for method in options.methods:
            for model in ("factworld", "factworld-moe"):
                row = rows(model, method, options.out / f"{model}-{method}-{batch}", options.edits, batch)
                print(line(f"{model}, {method}, {how}", row), flush=True)
        with one_expert_alone():
            row = rows("factworld-moe", "alphaedit", options.out / f"one-{batch}", options.edits, batch)
            print(line(f"factworld-moe, the strongest expert alone, {how}", row), flush=True)


if __name__ == "__main__":
    main()
