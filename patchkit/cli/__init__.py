"""The command line. One file per command: each parses, calls one function, prints."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import NoReturn

import click

from patchkit import ranks
from patchkit.errors import CTRL_C, InputError, Interrupted, PatchkitError, shortage
from patchkit.version import DISTRIBUTION
from patchkit.words import visible

COMMANDS = {
    "apply": "Write facts into a model, as a patch.",
    "plan": "What a run would edit, in what time and memory.",
    "verify": "Measure a patch against the untouched base.",
    "report": "One page with every fact before and after, to look at.",
    "generate": "What a patched model answers, and its base.",
    "import": "A LoRA or an edited checkpoint as a patch.",
    "chat": "Talk to a patched model, and to its base beside it.",
    "serve": "Try patches over OpenAI's API.",
    "merge": "Write a patched checkpoint that loads by itself.",
    "show": "What a patch holds.",
    "log": "The history of a patch.",
    "diff": "How two patches differ.",
    "revert": "Take facts out of a patch.",
    "methods": "The editing methods, with their papers.",
    "export": "A patch for other runtimes: PEFT, vLLM, llama.cpp, MLX.",
    "pull": "Fetch a patch from the Hub into a folder.",
    "push": "Publish a patch, an adapter or a merged model on the Hub.",
    "sign": "Sign a patch.",
    "bench": "Compare methods in a long sequence of edits.",
    "locate": "Which layers hold what a model says of its subjects.",
    "train": "Train the network of a method that has one.",
    "stats": "Compute a model's key statistics ahead of time.",
    "autotune": "Measure once what a pass takes on this device.",
}
_MODULES = {"import": "importing"}  # a word that Python keeps for itself


class _Commands(click.Group):
    """Commands by name; a command's module is imported when it runs, so that --help does not wait for torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            close = get_close_matches(cmd_name, COMMANDS, 1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise click.UsageError(f"No such command '{cmd_name}'.{hint}", ctx)
        command = getattr(import_module(f"patchkit.cli.{_MODULES.get(cmd_name, cmd_name)}"), "command")  # noqa: B009
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name=DISTRIBUTION)
@click.option("--debug", is_flag=True, expose_value=False, help="Show where an unforeseen error happened.")
def cli() -> None:
    """Patch facts into open-weight language models: small, revertible weight edits with provenance."""


UNFORESEEN = 3
"""The exit status of an error that patchkit did not see coming; a gate that does not hold has 1, bad input 2."""


def main() -> None:
    """Run the command line: a refusal is one clear message on stderr and the error's exit status."""
    warnings.formatwarning = _warning
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as arguments are read: told where the text is used
    arguments, debug = [given for given in sys.argv[1:] if given != "--debug"], "--debug" in sys.argv[1:]
    try:
        _refuse_together(arguments)
        with ranks.together():
            cli(arguments, prog_name="patchkit", standalone_mode=False)
    except click.ClickException as error:
        if ranks.speaks():
            error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as ended:
        sys.exit(ended.exit_code)
    except (Exception, KeyboardInterrupt) as error:
        if (interrupt := _interrupt_behind(error)) or isinstance(error, click.Abort) or _came_of_ctrl_c(error):
            more = str(interrupt) if isinstance(interrupt, Interrupted) else _how_to_go_on(arguments)
            if ranks.speaks():
                click.echo(f"interrupted; {more}", err=True)
            sys.exit(130)
        if debug and not isinstance(error, PatchkitError):
            raise
        _fail(*_told(error, arguments))


_TOGETHER = ("apply", "stats", "bench")
"""The commands that several processes share the work of."""


def _refuse_together(arguments: Sequence[str]) -> None:
    """Raises InputError where torchrun was told to start what one process does by itself."""
    if ranks.started_together() and not set(arguments[:1]) <= set(_TOGETHER):
        names = f"{', '.join(_TOGETHER[:-1])} and {_TOGETHER[-1]}"
        raise InputError(f"torchrun: only {names} can be shared by several processes; run {arguments[0]} without it")


def _told(error: BaseException, arguments: Sequence[str]) -> tuple[str, int]:
    """One line about an error, and the exit status."""
    if isinstance(error, PatchkitError):
        return str(error), error.exit_status
    if line := shortage(error):
        return f"{line}; {_how_to_go_on(arguments)}", PatchkitError.exit_status
    if isinstance(error, OSError):  # a folder that may not be written
        return f"{error}{_where_else(error)}", InputError.exit_status
    return unforeseen(error), UNFORESEEN


def _where_else(error: OSError) -> str:
    """What to do about a cache that cannot be used, or "" where the error is not of the cache."""
    from patchkit.io.places import cache_folder

    at, cache = Path(os.fsdecode(error.filename or "")).absolute(), cache_folder().absolute()
    if not error.filename or not (at.is_relative_to(cache) or (cache.is_relative_to(at) and not cache.is_dir())):
        return ""
    return "; it is where patchkit keeps what it computes: set $PATCHKIT_CACHE to a folder that can be written"


_GO_ON = ("apply", "stats", "bench")
"""The commands that keep what is finished of them."""


def _how_to_go_on(arguments: Sequence[str]) -> str:
    goes_on = bool(set(_GO_ON) & set(arguments[:1]))
    return "the same command goes on where it stopped" if goes_on else "run the same command again"


def _interrupt_behind(error: BaseException | None) -> BaseException | None:
    """The Ctrl-C that it is or was raised from: some libraries make another error of one while they are imported."""
    if error is None or isinstance(error, KeyboardInterrupt):
        return error
    return _interrupt_behind(error.__cause__ or error.__context__)


def _came_of_ctrl_c(error: BaseException) -> bool:
    """What a compiled module raised instead, with nothing of the interrupt in it: "numpy._core.multiarray failed to
    import". Nothing else goes on after a Ctrl-C, so that an error nobody foresaw can have no other cause."""
    return CTRL_C.is_set() and not isinstance(error, PatchkitError)


def unforeseen(error: BaseException) -> str:
    """One line about an error that is none of the user's, and how to report it."""
    what = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    what = f"{type(error).__name__}{f': {what[:200]}' if what else ''}"
    return (
        f"{what} (unforeseen: this is a fault in patchkit, not in your input). Please report it in the project's issue "
        "tracker, with the output of the same command with --debug"
    )


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """One line, as for a person; the place in the code only of what is not about the user's input."""
    kind = "" if issubclass(category, UserWarning) else f"{category.__name__} in {filename}, line {lineno}: "
    return f"note: {kind}{visible(str(message))}\n"


def _fail(message: str, status: int) -> NoReturn:
    if ranks.speaks():
        click.echo(f"error: {visible(message)}", err=True)
    sys.exit(status)
