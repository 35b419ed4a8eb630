"""The embedded mixture of experts beside the embedded dense model: fifty facts one by one, and fifty in a batch.

    python -m tests.benchmarks.experts [--edits 50] [--out out/experts] [--facts fresh] [--how "in a batch"]
        [--set key=value ...]

"The strongest expert alone" edits, for each fact, the one expert that its key is longest in; "the most chosen expert
alone", of a batch, the one of each layer that most facts go to. So tools would that take an expert for the
feed-forward: the solve sees no other. `--facts` may be "world", the embedded ones; "fresh", which no other benchmark,
test or default has seen, drawn from those of the world that world.jsonl and facts.jsonl leave alone; and "tune",
another draw, which the number of passes over the layers was looked at with.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from patchkit.bench.records import Result
from patchkit.bench.run import run_bench
from patchkit.editing import session
from patchkit.facts.reader import read_facts
from patchkit.methods import LayerProblem
from patchkit.model.loading import ModelChoice

EXAMPLES = Path(__file__).parents[2] / "examples"
TITLE = (
    "| | exact | paraphrases success | neighbors unchanged | of them, subjects that are not edited | perplexity "
    "| routing text | routing prompts |"
)
HOW = ("one by one", "in a batch")
Kept = Callable[[LayerProblem], LayerProblem]
"""What of a problem a solve is shown."""


# --- what is edited ---------------------------------------------------------------------------------------------------


def whole(problem: LayerProblem) -> LayerProblem:
    """All of it."""
    return problem


def strongest(problem: LayerProblem) -> LayerProblem:
    """The problem with each key in the one block in which it is longest."""
    blocks = problem.keys.unflatten(0, (problem.blocks, -1))  # (blocks, width, n)
    place = blocks.norm(dim=1).argmax(0)  # (n,)
    only = torch.zeros_like(blocks)
    every = torch.arange(blocks.shape[2], device=place.device)
    only[place, :, every] = blocks[place, :, every]
    kept: Tensor = only.flatten(0, 1)
    return problem.replace(keys=kept)


def most_chosen(problem: LayerProblem) -> LayerProblem:
    """The problem in the one block that most keys are in."""
    blocks = problem.keys.unflatten(0, (problem.blocks, -1))
    place = int((blocks != 0).any(1).sum(1).argmax())
    only = torch.zeros_like(blocks)
    only[place] = blocks[place]
    kept: Tensor = only.flatten(0, 1)
    return problem.replace(keys=kept)


@contextmanager
def seeing(kept: Kept) -> Iterator[None]:
    """Inside the block, solves see no more than `kept` of their problems."""
    own = session.problem_at

    def problem_at(*args: Any, **kwargs: Any) -> LayerProblem:
        return kept(own(*args, **kwargs))

    session.problem_at = problem_at
    try:
        yield
    finally:
        session.problem_at = own


# --- facts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """Facts drawn from those of the world that are in neither of the example files, no subject twice.

    Attributes:
        order, cases: seeds of which ones, and of their new targets and neighbors.
        apart: facts after these that are no neighbors either.
    """

    name: str
    order: int
    cases: int
    apart: int = 0

    def write(self, file: Path, count: int) -> Path:
        """A file of the first `count`."""
        world = script()
        facts, _ = world.make_world(world.Sizes())
        lines = [line for name in ("world", "facts") for line in (EXAMPLES / f"{name}.jsonl").read_text().splitlines()]
        used = {json.loads(line)["prompt"] for line in lines}
        pool = [fact for fact in facts if fact.prompt() not in used]
        random.Random(self.order).shuffle(pool)
        chosen = _first(pool, count)
        taken = [*chosen, *_first([fact for fact in pool if fact not in chosen], self.apart)]
        spare = [fact for fact in facts if fact not in taken]
        cases = [world.make_case(fact, i + 1, self.name, facts, spare, self.cases) for i, fact in enumerate(chosen)]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(case) + "\n" for case in cases))
        return file


DRAWS = {draw.name: draw for draw in (Draw("fresh", 50, 8), Draw("tune", 99, 1234, 50))}


def _first(facts: Sequence[Any], count: int) -> list[Any]:
    """The first `count`, no subject twice."""
    once: dict[str, Any] = {}
    for fact in facts:
        once.setdefault(fact.subject, fact)
    return list(once.values())[:count]


def script() -> Any:
    """`examples/make_factworld.py`, as a module."""
    spec = importlib.util.spec_from_file_location("make_factworld", EXAMPLES / "make_factworld.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- rows -------------------------------------------------------------------------------------------------------------


def rows(
    model: str,
    method: str,
    out: Path,
    edits: int,
    batch: int,
    facts: Path = EXAMPLES / "world.jsonl",
    settings: Sequence[str] = (),
) -> Result:
    """The last row of a benchmark on an embedded model."""
    chosen = ModelChoice(str(EXAMPLES / model), "cpu", "float32")
    found = run_bench(
        str(facts), chosen, out, methods=[method], edits=edits, batch_size=batch, overrides=settings, quick=True
    )
    assert not found.stopped, found.stopped
    return next(row for row in found.rows if row.method == method and row.edits == edits)


def elsewhere(out: Path, row: Result, facts: Path) -> float:
    """The share of neighbors unchanged among those that are not about a subject that the facts edit, of a benchmark in
    the folder `out`."""
    subjects = {fact.subject for fact in read_facts(str(facts)).facts[: row.edits]}
    measured = json.loads((out / row.method / f"{row.edits}.json").read_text(encoding="utf-8"))
    near = [each for fact in measured["per_fact"] for each in fact["neighbors"]]
    return fmean(each["unchanged"] for each in near if not any(subject in each["prompt"] for subject in subjects))


def line(name: str, row: Result, others: float) -> str:
    """A row of the table; `others` is what `elsewhere` says."""
    ratio = row.perplexity.ratio if row.perplexity else float("nan")
    routing = (row.value("routing", "text"), row.value("routing", "prompts"))
    numbers = (row.efficacy.exact, row.generalization.success, row.locality.unchanged, others, ratio, *routing)
    return f"| {name} | " + " | ".join("-" if each is None else f"{each:.3f}" for each in numbers) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("out/experts"))
    parser.add_argument("--methods", nargs="*", default=["alphaedit"])
    parser.add_argument("--facts", choices=["world", *DRAWS], default="world")
    parser.add_argument("--how", nargs="*", choices=HOW, default=HOW)
    parser.add_argument("--set", nargs="*", default=[], dest="settings", help="in place of defaults")
    options = parser.parse_args()
    draw = DRAWS.get(options.facts)
    facts = draw.write(options.out / f"{draw.name}.jsonl", options.edits) if draw else EXAMPLES / "world.jsonl"
    print(TITLE, "| --- " * 8 + "|", sep="\n", flush=True)
    sizes = {"one by one": 1, "in a batch": options.edits}
    for how, batch in ((how, sizes[how]) for how in options.how):
        for place, (name, model, method, kept) in enumerate(_jobs(options.methods, batch)):
            with seeing(kept):
                out = options.out / f"{place}-{batch}"
                row = rows(model, method, out, options.edits, batch, facts, options.settings)
            print(line(f"{name}, {how}", row, elsewhere(out, row, facts)), flush=True)


def _jobs(methods: Sequence[str], batch: int) -> Iterator[tuple[str, str, str, Kept]]:
    """Of each row its name, model and method, and what its solves see."""
    for method in methods:
        for model in ("factworld", "factworld-moe"):
            yield f"{model}, {method}", model, method, whole
    yield "factworld-moe, the strongest expert alone", "factworld-moe", "alphaedit", strongest
    if batch > 1:
        yield "factworld-moe, the most chosen expert alone", "factworld-moe", "alphaedit", most_chosen


if __name__ == "__main__":
    main()
