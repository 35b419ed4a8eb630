"""`patchkit chat`: talk to a patched model, and to its base beside it; or to any model by itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from patchkit.cli.common import (
    ModelOptions,
    model_options,
    note,
    say_answer,
    stdout,
)
from patchkit.cli.numbers import Number
from patchkit.errors import InputError

if TYPE_CHECKING:
    from patchkit.serve.session import Session

HELP = """/patch off              only the plain model answers; /patch on: both do
/prompt system TEXT     what the system prompt is from now on; without TEXT, none
/save SUBJECT | TARGET  the last question as a fact, with the answer it should have, into --facts
/new                    begin a new conversation
/quit                   or end of input"""


@click.command("chat")
@model_options
@click.option(
    "--patch",
    "patches",
    multiple=True,
    metavar="P",
    help="A patch's folder or Hub repository; may be repeated, then they stack in that order.",
)
@click.option("--system", default="", metavar="TEXT", help="The system prompt.")
@click.option("--facts", default="chat-facts.jsonl", show_default=True, metavar="F", help="Where /save appends facts.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    help="Tokens of an answer [default: 256, or what there is room for].",
)
@click.option("--temperature", type=Number(0), default=0.0, show_default=True, help="0: the likeliest token.")
def command(
    model: ModelOptions,
    patches: tuple[str, ...],
    system: str,
    facts: str,
    max_new_tokens: int | None,
    temperature: float,
) -> None:
    """Talk to a patched model and, beside it, to the model without the patch. /help lists what can be done there.

    Without --model: the base that the first patch names. Without --patch the model answers as it is, such as one that
    `patchkit merge` has written.
    """
    from patchkit.patch.patch import Patch
    from patchkit.patch.together import refuse_shared_neurons
    from patchkit.serve.session import Session
    from patchkit.serve.talker import Length, Talker

    read = [Patch.load(patch) for patch in patches]
    refuse_shared_neurons({f"{place}": patch.manifest for place, patch in enumerate(read, 1)})
    chosen = model.choice(read[0].manifest.base if read else None)
    loaded = chosen.load(packed=True)
    talker = Talker(loaded.model, loaded.tokenizer)
    names = [f"{number} {patch}" for number, patch in enumerate(patches, 1)]
    for name, patch in zip(names, read, strict=True):
        talker.load(name, patch)
    session = Session(talker, names, Length(max_new_tokens, temperature), bool(read), system)
    both = f" with {', '.join(patches)}, and without" if read else ""
    note(f"{chosen.name}{both}; /help lists commands")
    for line in _lines():
        if line == "/quit":
            return
        try:
            _do(session, line, Path(facts))
        except InputError as error:  # the conversation goes on
            note(f"error: {error}")


def _lines() -> Iterator[str]:
    """What the user types, until the end of input."""
    interactive = bool(sys.stdin.isatty())
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        if line:
            yield line


def _do(session: Session, line: str, facts: Path) -> None:
    """One line: a question, or a command."""
    if not line.startswith("/"):
        _show(session, line)
        return
    word, _, rest = line[1:].partition(" ")
    commands: dict[str, Callable[[str], None]] = {
        "help": lambda _: click.echo(HELP),
        "patch": lambda text: _switch(session, text),
        "prompt": lambda text: _prompt(session, text),
        "save": lambda text: _save(session, text, facts),
        "new": lambda _: session.forget(),
    }
    if word not in commands:
        raise InputError(f"/{word}: no such command; /help lists them")
    commands[word](rest.strip())


def _switch(session: Session, text: str) -> None:
    if text not in ("on", "off"):
        raise InputError(f"/patch {text}: write /patch on or /patch off")
    if text == "on" and not session.patches:
        raise InputError("/patch on: no patch was given; begin again with --patch")
    session.patched = text == "on"


def _prompt(session: Session, text: str) -> None:
    kind, _, prompt = text.partition(" ")
    if kind != "system":
        raise InputError(f"/prompt {text}: write /prompt system TEXT")
    session.system = prompt.strip()


def _save(session: Session, text: str, facts: Path) -> None:
    parts = [part.strip() for part in text.split("|")]
    if len(parts) != 2:
        raise InputError("/save: write /save SUBJECT | TARGET, such as /save Ada Lovelace | Turin")
    session.save(parts[0], parts[1], facts)
    note(f"saved to {facts}; `patchkit apply {facts} --onto PATCH` writes it")


def _show(session: Session, question: str) -> None:
    """Both answers as they come: in two columns on a terminal, else one below the other."""
    answers = dict.fromkeys(session.sides, "")
    if not stdout.is_terminal:
        for side, piece in session.ask(question):
            answers[side] += piece
        for side, text in answers.items():
            say_answer(f"{side}: {text.strip()}")
        return
    from rich.live import Live
    from rich.table import Table

    def table() -> Table:
        columns = Table(*answers, box=None, expand=True, header_style="bold")
        columns.add_row(*(text.strip() for text in answers.values()))
        return columns

    with Live(table(), console=stdout, refresh_per_second=8) as live:
        for side, piece in session.ask(question):
            answers[side] += piece
            live.update(table())
