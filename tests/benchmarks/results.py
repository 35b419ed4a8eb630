"""The tables and the reports of docs/results: methods one by one and in batches, on all measures.

    python -m tests.benchmarks.results --facts F --text T --eval-text E [--model M] [--skip N] [--set KEY=VALUE]
        [--stage one-by-one|in-batches] [--edits N] [--batch-size B] [--checkpoints K,L] [--methods A,B]
    python -m tests.benchmarks.results --stage embedded --stage embedded-trained
    python -m tests.benchmarks.results --stage default-one-by-one --stage default-in-batches

runs `patchkit bench` into out/results/<stage>, where a run that was killed goes on, and writes docs/results/<stage>.md
from its rows, docs/results/<stage>-charts.html, the report without facts, and out/results/<stage>.html, all of it.
`make results` runs two stages as they stand in STAGES: 100 facts one by one for all methods of the four papers and
their baselines, 1,000 in batches of 100 for six. `make results-embedded` runs the third, on the embedded model, and the
fourth, a method that is trained before, on facts that come after those that it edits, in a quarter of an hour;
`make results-default` the last two, 50 facts with methods at their defaults, in ten minutes. All but the first three
have no charts among the pages.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from patchkit.bench.records import UNEDITED, Result
from patchkit.bench.results import Results
from patchkit.bench.run import run_bench
from patchkit.cli.jobs import train_network
from patchkit.evaluate.metrics import GROUPS
from patchkit.facts.reader import read_facts
from patchkit.model.loading import ModelChoice
from patchkit.report.benchmarks import bench_page
from patchkit.report.page import write_page
from patchkit.runs.train import TrainConfig
from patchkit.words import listed
from tests.benchmarks.common import parser

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PAPERS = (
    *("ft", "rome", "r-rome", "memit", "pmet", "memit+prune", "memit+rect", "emmet", "wilke"),
    *("alphaedit", "adaedit", "oedit", "oedit+", "mose", "mose-right"),
)
BEST = ("alphaedit", "memit", "encore", "betaedit", "mose-right", "locft")
CANDIDATES = ("alphaedit", "memit", "encore", "betaedit", "rome", "locft")
"""For the default: those that can have neurons of subjects' own, and the strongest fine-tuning."""
COLUMNS = (
    *("in_use_asked", "in_use_overfit", "in_use_unrelated", "in_use_fluency", "efficacy_exact", "efficacy_generated"),
    *("generalization_exact", "locality_unchanged", "perplexity_ratio"),
)


@dataclass(frozen=True)
class Stage:
    """One table: what is edited, how, and what is looked at on the way.

    Attributes:
        embedded: on the embedded model and its world.
        made: what makes it.
        charts: there are charts, beside what the papers found of sequences of edits.
        trained: a method whose network is trained first, on the facts of the file that are not edited.
    """

    methods: Sequence[str]
    edits: int
    batch_size: int
    checkpoints: Sequence[int]
    settings: Sequence[str] = ()
    embedded: bool = False
    made: str = "make results"
    charts: bool = True
    trained: str = ""


# As many as there are neurons of subjects' own in the embedded model's one layer for them.
_DEFAULT = Stage(CANDIDATES, 50, 25, (), embedded=True, made="make results-default", charts=False)
STAGES = {
    "one-by-one": Stage(PAPERS, 100, 1, (10, 50)),
    "in-batches": Stage(BEST, 1000, 100, (100, 500)),
    # As published: no neurons of subjects' own, which keep even ROME's edits apart.
    "embedded": Stage(PAPERS, 50, 1, (10, 25), ("prompts=contexts",), embedded=True, made="make results-embedded"),
    # Beside two of those, as it takes other facts to train on than the fifteen need.
    "embedded-trained": Stage(
        *(("mend", "memit", "alphaedit"), 50, 1, (10, 25), ("prompts=contexts",)),
        embedded=True,
        made="make results-embedded",
        charts=False,
        trained="mend",
    ),
    "default-one-by-one": replace(_DEFAULT, methods=("alphaedit", "memit", "locft"), batch_size=1),
    "default-in-batches": _DEFAULT,
}
UNPROTECTED = ("ft", "rome", "r-rome")
"""What the papers show collapsing: nothing in it knows of earlier edits."""
FALL, FLAT = 0.1, 1e-6
"""By how much a score is less that has collapsed; and what a norm that stays as it was moves by at most."""


def options_of() -> argparse.Namespace:
    """The options of the command."""
    known = parser(__doc__)
    known.add_argument("--stage", choices=[*STAGES], action="append")
    known.add_argument("--methods")
    known.add_argument("--edits", type=int)
    known.add_argument("--batch-size", type=int)
    known.add_argument("--checkpoints")
    known.add_argument("--skip", type=int, default=0, help="facts at the beginning of the file to leave out")
    known.add_argument("--text")
    known.add_argument("--eval-text")
    known.add_argument("--steps", type=int, default=2000, help="of the training of a method that is trained")
    known.add_argument("--quick", action="store_true", help="measure nothing that the model has to write texts for")
    known.add_argument("--out", type=Path, default=ROOT / "out" / "results")
    known.add_argument("--pages", type=Path, default=ROOT / "docs" / "results")
    return known.parse_args()


def main() -> None:
    """Run the stages, and write what they found."""
    options = options_of()
    for name in options.stage or [name for name, stage in STAGES.items() if not stage.embedded]:
        stage = asked_for(STAGES[name], options)
        out = options.out / name
        data = EXAMPLES / "world.jsonl" if stage.embedded else Path(options.facts)
        model = ModelChoice(str(EXAMPLES / "factworld") if stage.embedded else options.model, options.device, "auto")
        if stage.trained:
            train(stage, data, model, out, options)
        done = run_bench(
            str(data if stage.embedded or not options.skip else facts_from(data, options.skip, out)),
            model,
            out,
            methods=stage.methods,
            edits=stage.edits,
            batch_size=stage.batch_size,
            checkpoints=stage.checkpoints,
            overrides=(*stage.settings, *options.set),
            text=options.text,
            eval_text=options.eval_text,
            quick=options.quick,
            say=lambda line: print(line, flush=True),
        )
        options.pages.mkdir(parents=True, exist_ok=True)
        (options.pages / f"{name}.md").write_text(page(name, out, done.stopped), encoding="utf-8")
        if stage.charts:
            write_page(bench_page(out, facts=False), options.pages / f"{name}-charts.html")
        write_page(bench_page(out), options.out / f"{name}.html")


def asked_for(stage: Stage, options: argparse.Namespace) -> Stage:
    """The stage as the options have it."""
    edits = options.edits or stage.edits
    given = [int(each) for each in options.checkpoints.split(",")] if options.checkpoints else stage.checkpoints
    return replace(
        stage,
        methods=tuple(options.methods.split(",")) if options.methods else stage.methods,
        edits=edits,
        batch_size=options.batch_size or stage.batch_size,
        checkpoints=[each for each in given if each < edits],
    )


def train(stage: Stage, data: Path, model: ModelChoice, out: Path, options: argparse.Namespace) -> None:
    """Train the network of the stage's method, or what is left of its training, on the facts that are not edited."""
    done = train_network(
        str(facts_from(data, stage.edits, out)),
        model,
        TrainConfig(steps=options.steps),
        method=stage.trained,
        recipe=None,
        overrides=(*stage.settings, *options.set),
        text=options.text,
        stats=None,
        zsre_target="alt",
        skip_bad=True,
        progress=lambda phase, done, total: None,
        say=print,
    )
    print(f"{stage.trained} trained: {done.steps} steps, layers {listed(list(map(str, done.layers)))}", flush=True)


def facts_from(data: Path, skip: int, out: Path) -> Path:
    """A file of what follows the first `skip` facts of another."""
    file = out.with_suffix(".jsonl")
    file.parent.mkdir(parents=True, exist_ok=True)
    facts = read_facts(str(data), skip_bad=True).facts[skip:]
    file.write_text("".join(fact.model_dump_json(exclude_defaults=True) + "\n" for fact in facts), encoding="utf-8")
    return file


def page(name: str, out: Path, stopped: dict[str, str]) -> str:
    """The page about a stage: what was run, what of the papers' findings it shows, the table, and who stopped."""
    stage, rows = STAGES[name], Results(out, "").table(max(row.facts for row in Results(out, "").rows()))
    run = json.loads((out / "run.json").read_text(encoding="utf-8"))[-1]
    first, last = run["facts"][0], run["facts"][-1]
    settings = f", {', '.join(stage.settings)}" if stage.settings else ""
    others = f" `{stage.trained}` was trained on the facts that follow them." if stage.trained else ""
    size = next(iter(run["methods"].values()))["batch_size"]
    how = "one by one" if size == 1 else f"in batches of {size}"
    makes = f"`{stage.made}` makes this page" + (f" and [its charts]({name}-charts.html)" if stage.charts else "")
    head = (
        f"# Methods {how} on {run['model']}\n\n{len(run['facts'])} facts of {run['data']} ({first} to {last})"
        f"{settings}, with torch {run['versions']['torch']}.{others} {makes}.\n\n"
    )
    ended = "".join(f"\n`{method}` {why}\n" for method, why in stopped.items())
    below = (
        "\nIn parentheses: 95 % intervals over facts, for unrelated over answers. Score is the harmonic mean of exact "
        "efficacy, generalization success and unchanged locality. Seconds are the wall's.\n"
    )
    found = "".join(findings(rows)) if stage.charts else ""
    return head + found + "\n".join(table(rows)) + "\n" + below + ended


def findings(rows: Sequence[Result]) -> Iterator[str]:
    """What the papers found of sequences of edits, with this run's numbers and whether they agree."""
    of = {name: [row for row in rows if row.method == name] for name in dict.fromkeys(row.method for row in rows)}
    bare = {name: of[name] for name in UNPROTECTED if name in of}
    others = {name: each for name, each in of.items() if name not in (*UNPROTECTED, UNEDITED)}
    if bare:
        kept, fell = [name for name in bare if not _falls(of[name])], {k: v for k, v in others.items() if _falls(v)}
        shown = f"not so here for {listed(kept)}" if kept else "so it is here"
        among = (
            f"{len(fell)} of {len(others)} others fall: {_course(fell, 'score', '.2f')}" if fell else "No other falls"
        )
        yield (
            f"**Methods that know nothing of earlier edits collapse**, the papers find; {shown}, counted where the "
            f"score falls by over {FALL} from the first checkpoint to the last: {_course(bare, 'score', '.2f')}. "
            f"{among}.\n\n"
        )
    for title, field in (("Norms", "norm_change"), ("Condition numbers", "condition_change")):
        some = {name: of[name] for name in ("memit", "mose", "mose-right") if name in of}
        if "memit" in some and len(some) > 1:
            course = {name: [abs(getattr(row, field) or 0.0) for row in each] for name, each in some.items()}
            grows = course.pop("memit")
            so = FLAT < grows[0] < grows[-1] and all(max(each) < FLAT for each in course.values())
            yield (
                f"**{title} grow with MEMIT and stay with MOSE**, the papers find; {'so' if so else 'not so'} here "
                f"(relative change): {_course(some, field, '.1e')}.\n\n"
            )


def _falls(rows: Sequence[Result]) -> bool:
    return (rows[-1].score or 0) < (rows[0].score or 0) - FALL


def _course(some: Mapping[str, Sequence[Result]], field: str, form: str) -> str:
    """Each method's numbers at its checkpoints."""
    return "; ".join(
        f"{name} {', '.join('-' if (v := getattr(row, field)) is None else format(v, form) for row in each)}"
        for name, each in some.items()
    )


def table(rows: Sequence[Result]) -> Iterator[str]:
    """The rows as Markdown, the unedited model first."""
    headings = ("method", "edits", "score", *(key.replace("in_use_", "").replace("_", " ") for key in COLUMNS))
    more = ("norm change", "condition change", "shift of states", "s an edit")
    yield f"| {' | '.join((*headings, *more))} |"
    yield "|---|" + "---:|" * (len(headings) + len(more) - 1)
    most = max(row.facts for row in rows)
    for row in rows:
        if row.method != UNEDITED or row.facts == most:
            yield f"| {' | '.join(cells(row))} |"


def cells(row: Result) -> Iterator[str]:
    """One row's cells."""
    yield row.method
    yield f"{row.edits}"
    yield "-" if row.score is None else f"{row.score:.3f}"
    for key in COLUMNS:
        group = next(group.name for group in GROUPS if key.startswith(group.name))
        value, (low, high) = row.value(group, key.removeprefix(f"{group}_")), row.intervals.get(key, (None, None))
        yield ("-" if value is None else f"{value:.3f}") + ("" if low is None else f" ({low:.2f}-{high:.2f})")
    spent = sum(seconds for phase, seconds in row.seconds.items() if phase != "measuring")
    numbers = (row.norm_change, row.condition_change, row.shift[-1] if row.shift else None)
    yield from ("-" if number is None else f"{number:.1e}" for number in numbers)
    yield f"{spent / row.edits:.1f}" if row.edits and spent else "-"


if __name__ == "__main__":
    main()
