"""`patchkit bench`: methods side by side, in the papers' sequential protocol."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from patchkit.cli.common import (
    ModelOptions,
    model_options,
    note,
    print_json,
    progress_bars,
    quick_option,
    stdout,
    zsre_option,
)
from patchkit.errors import InputError


def _parts(given: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (given or "").split(",") if name.strip())


def _tasks(context: click.Context, option: click.Parameter, given: str | None) -> tuple[str, ...]:
    if given is not None and not _parts(given):
        raise InputError("--abilities: no task named; give some of `lm-eval ls tasks`, or factworld")
    return _parts(given)


def _names(context: click.Context, option: click.Parameter, given: str) -> tuple[str, ...]:
    names = _parts(given)
    if not names:
        raise InputError("--methods: none named; give some of `patchkit methods`, such as alphaedit,memit")
    return names


def _numbers(context: click.Context, option: click.Parameter, given: str | None) -> tuple[int, ...]:
    try:
        return tuple(map(int, _parts(given)))
    except ValueError:
        raise InputError(f"--checkpoints {given}: not numbers of edits; write 10,25,50") from None


@click.command("bench")
@model_options
@click.option("--data", metavar="F", required=True, help="File of facts, edited in its order.")
@click.option("--methods", metavar="A,B", required=True, callback=_names, help="Some of `patchkit methods`.")
@click.option("--edits", type=click.IntRange(1), metavar="N", help="Facts to edit [default: last checkpoint, or all].")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    metavar="B",
    default=1,
    show_default=True,
    help="Facts solved for together; batches follow one another.",
)
@click.option("--checkpoints", metavar="K,L", callback=_numbers, help="Measure after so many edits, and at the end.")
@click.option("--recipe", metavar="F", help="A recipe file, or the name of one that every method has.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one setting; may be repeated.")
@click.option("--text", type=click.Path(), help="Plain text for the statistics; more is better.")
@click.option("--eval-text", type=click.Path(), help="Plain text for the perplexity.")
@click.option("--stats", type=click.Path(), help="Folder of statistics, instead of the cache.")
@click.option("--seed", type=int, help="Seed of the generated contexts [default: 0].")
@zsre_option
@click.option("--skip-bad", is_flag=True, help="Leave out bad facts.")
@quick_option
@click.option(
    "--judge",
    metavar="URL",
    help="Have an OpenAI-compatible server judge the answers as well, such as http://localhost:8000/v1; its key is in "
    "PATCHKIT_JUDGE_KEY.",
)
@click.option(
    "--judge-model", metavar="M", help='The model that the judge\'s server is asked for [default: "default"].'
)
@click.option(
    "--abilities",
    metavar="TASKS",
    callback=_tasks,
    help="Ask tasks of lm-eval as well, such as hellaswag,arc_easy; factworld needs no network.",
)
@click.option("--abilities-limit", type=click.IntRange(1), metavar="N", help="Only the first N questions of each task.")
@click.option("--out", metavar="DIR", required=True, help="Folder of the results; a run that was killed goes on there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def command(
    model: ModelOptions,
    data: str,
    methods: tuple[str, ...],
    edits: int | None,
    batch_size: int,
    checkpoints: tuple[int, ...],
    recipe: str | None,
    overrides: tuple[str, ...],
    text: str | None,
    eval_text: str | None,
    stats: str | None,
    seed: int | None,
    zsre_target: str,
    skip_bad: bool,
    quick: bool,
    judge: str | None,
    judge_model: str | None,
    abilities: tuple[str, ...],
    abilities_limit: int | None,
    out: str,
    as_json: bool,
) -> None:
    """Edit the same facts with several methods, one batch after another, and measure them all at every checkpoint.

    All facts edited so far are measured as `patchkit verify` does, with intervals; with them, how far the edited
    weights' norm, condition number and directions have moved, and hidden states at other prompts. DIR gets
    results.jsonl, table.md, table.csv and the patches; `patchkit report DIR` shows them. What is there already is not
    computed again, so methods, checkpoints, a judge and tasks can be added later.
    """
    from patchkit.bench.run import run_bench
    from patchkit.bench.tables import rich_table
    from patchkit.cli.tables import legend
    from patchkit.evaluate.metrics import leads

    for given, what, needs in ((judge_model, "judge-model", judge), (abilities_limit, "abilities-limit", abilities)):
        if given is not None and not needs:
            raise InputError(f"--{what}: of no use without --{what.partition('-')[0]}; give that, too, or leave it out")
    with progress_bars() as progress:
        done = run_bench(
            data,
            model.choice(),
            Path(out),
            methods=methods,
            edits=edits,
            batch_size=batch_size,
            checkpoints=checkpoints,
            recipe=recipe,
            overrides=(*overrides, *([] if seed is None else [f"seed={seed}"])),
            text=text,
            eval_text=eval_text,
            stats=stats,
            zsre_target=zsre_target,
            skip_bad=skip_bad,
            quick=quick,
            judge=judge,
            judge_model=judge_model or "default",
            abilities=abilities,
            abilities_limit=abilities_limit,
            progress=progress,
            say=note,
        )
    if as_json:
        print_json(done.as_json())
    else:
        # In a narrow terminal lines may wrap; squeezed into it, the numbers would lose their digits.
        wide, table = Console(width=1000, markup=False, highlight=False), rich_table(done.rows)
        wide.width = wide.measure(table).maximum
        wide.print(table)
        stdout.print(legend(leads()), soft_wrap=True)
        for name, why in done.stopped.items():
            stdout.print(f"{name}: {why}", soft_wrap=True)
        stdout.print(f"results: {Path(out) / 'results.jsonl'}, table.md, table.csv", soft_wrap=True)
