"""`patchkit generate`: ask a patched model, and its base beside it; or any model by itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from patchkit.cli.common import (
    ModelOptions,
    model_options,
    print_json,
    say_answer,
    stdout,
)
from patchkit.cli.numbers import Number, Seed
from patchkit.errors import InputError

if TYPE_CHECKING:
    from patchkit.evaluate.generation import Answer
    from patchkit.patch.patch import Patch


@click.command("generate")
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@model_options
@click.option(
    "--patch",
    "patches",
    multiple=True,
    metavar="P",
    help="A patch's folder or Hub repository; may be repeated, then they stack in that order.",
)
@click.option("--compare", is_flag=True, help="Show what the base says above what the patched model says.")
@click.option("--chat", is_flag=True, help="Put each prompt into the tokenizer's chat template, as a user's message.")
@click.option("--system", metavar="TEXT", default="", help="The system prompt; implies --chat.")
@click.option(
    "--turn",
    "turns",
    nargs=2,
    multiple=True,
    metavar="USER ASSISTANT",
    help="What was said before each PROMPT, and answered; may be repeated, and implies --chat.",
)
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=40, show_default=True, help="Tokens of an answer at most."
)
@click.option(
    "--temperature",
    type=Number(0),
    default=0.0,
    show_default=True,
    help="Sample at this temperature; 0 takes the likeliest token.",
)
@click.option("--seed", type=Seed(), default=0, show_default=True, help="Seed of sampling.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    prompts: tuple[str, ...],
    model: ModelOptions,
    patches: tuple[str, ...],
    compare: bool,
    chat: bool,
    system: str,
    turns: tuple[tuple[str, str], ...],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    as_json: bool,
) -> None:
    """Let a patched model continue each PROMPT ("-" for standard input).

    Without --model: the base that the first patch names. Without --patch the model answers as it is, such as one that
    `patchkit merge` has written.
    """
    from patchkit.evaluate.generation import Sampling, answers
    from patchkit.io.hub import patch_folder
    from patchkit.patch.patch import Patch

    if compare and not patches:
        raise InputError("--compare: without --patch there is nothing to compare; give one, or leave --compare out")
    read = [Patch.load(patch_folder(patch)) for patch in patches]
    asked = [sys.stdin.read().rstrip("\n") if prompt == "-" else prompt for prompt in prompts]
    chosen = model.choice(read[0].manifest.base if read else None)
    loaded = chosen.load(packed=True)
    chat = chat or bool(system or turns)
    sampling = Sampling(max_new_tokens, temperature, seed, chat, system, turns)
    attached = partial(stacked, loaded.model, read) if read else None
    found = answers(loaded.model, loaded.tokenizer, attached, asked, sampling, compare)
    if as_json:
        rows = [{key: text for key, text in asdict(answer).items() if text is not None} for answer in found]
        print_json(json.dumps({"model": chosen.name, "patches": patches, "answers": rows}))
    elif compare:
        _print_pairs(found)
    else:
        for answer in found:
            say_answer(answer.text.strip("\n") if chat else answer.prompt + answer.text)


@contextmanager
def stacked(model: Any, patches: Sequence[Patch]) -> Iterator[None]:
    """Inside the block the model has `patches` on top of one another; afterward it is as it was.

    Raises:
        InputError: a patch is for another base, or two have rewritten the same neuron.
    """
    from patchkit.patch.together import refuse_shared_neurons

    refuse_shared_neurons({f"{place}": patch.manifest for place, patch in enumerate(patches, 1)})
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch.attached(model))
        yield


def _print_pairs(found: Sequence[Answer]) -> None:
    """Each prompt, and below it what both models say, one below the other: answers may be long."""
    from rich.table import Table
    from rich.text import Text

    for number, answer in enumerate(found):
        both = Table.grid(padding=(0, 2))
        both.add_column(no_wrap=True)
        both.add_column(overflow="fold")
        both.add_row("  base", (answer.base or "").strip())
        both.add_row("  patched", (answer.patched or "").strip())
        stdout.print(*([""] if number else []), Text(answer.prompt, style="bold"), both, sep="\n")
