"""What several commands share: options, loading with a notice, progress bars."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from patchkit.cli.numbers import Bound, Number
from patchkit.errors import InputError
from patchkit.evaluate.gates import Gates
from patchkit.evaluate.metric import Gate, Metric
from patchkit.evaluate.metrics import gated
from patchkit.io.files import finish_folder, is_folder_with, is_free, one_at_a_time, refuse_folders, refuse_unwritable
from patchkit.words import in_json, visible

if TYPE_CHECKING:
    from patchkit.model.loading import ModelChoice
    from patchkit.patch.manifest import BaseInfo

F = TypeVar("F", bound=Callable[..., Any])


class HarmlessConsole(Console):
    """What it prints may come from anybody: characters that a terminal would obey are shown instead."""

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(visible(text), **how)  # before there is a layout

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


_UNBOUNDED = 10_000
"""Columns where nobody has said how many there are."""


class _Stdout(HarmlessConsole):
    """Standard output; in a pipe or a file a row is one line, for grep and cut, unless $COLUMNS says otherwise."""

    @property
    def size(self) -> ConsoleDimensions:
        found = super().size
        bounded = self.is_terminal or os.environ.get("COLUMNS", "").isdigit()
        return found if bounded else ConsoleDimensions(_UNBOUNDED, found.height)

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self._width, self._height = new_size


# Prompts and paths are printed as they are: "[/b]" is no markup here and ":smile:" no emoji.
stderr = HarmlessConsole(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
stdout = _Stdout(highlight=False, markup=False, emoji=False)


def say(text: str) -> None:
    """A line as it is, in no columns, on stdout."""
    click.echo(visible(text))


def say_answer(text: str) -> None:
    """What a model said: into a file or a pipe every character of it, on a terminal what the terminal does not obey."""
    click.echo(visible(text) if stdout.is_terminal else text)


def print_json(text: str) -> None:
    """A text of JSON on stdout."""
    click.echo(in_json(text.rstrip("\n")))


zsre_option = click.option(
    "--zsre-target",
    type=click.Choice(["alt", "answers"]),
    default="alt",
    show_default=True,
    help="What a ZsRE record teaches: the counterfactual answer, or the first true one.",
)


quick_option = click.option(
    "--quick",
    is_flag=True,
    help="Have the model write no texts to measure: neither asked for the facts nor about anything else.",
)


page_option = click.option("--page", metavar="FILE", help="Write `patchkit report`'s HTML page about it, too.")


def check_page(page: str | None) -> None:
    """Raises InputError where a page that is asked for cannot be written; before any work."""
    if page:
        from patchkit.report.page import check_file

        check_file(Path(page), "--page")


@dataclass(frozen=True)
class ModelOptions:
    """--model, --device, --device-map, --dtype and --trust-remote-code."""

    name: str | None
    device: str
    device_map: str | None
    dtype: str
    run_code: bool

    def choice(self, base: BaseInfo | None = None) -> ModelChoice:
        """The model to work on, `base` where the user named none; says on stderr which one it is then.

        Raises:
            InputError: the base is a folder that is not known here, with no $PATCHKIT_MODEL that says where it is; or
                code is to be run of a model nobody named.
        """
        from patchkit.model.loading import choose_model

        named = None
        if base is not None and not self.name and not self.run_code:
            from patchkit.patch.bases import base_to_load, is_known

            if is_known(base.name) or not os.environ.get("PATCHKIT_MODEL"):
                named = base_to_load(base.name)
        chosen = choose_model(self.name, self.device, self.dtype, self.device_map, self.run_code, named)
        if chosen.notice:
            note(chosen.notice)
        quiet_transformers()
        return chosen


def model_options(command: F) -> F:
    """The options of `ModelOptions`, which reach the command together as `model`."""

    @wraps(command)
    def with_model(
        *arguments: Any,
        model_name: str | None,
        device: str,
        device_map: str | None,
        dtype: str,
        trust_remote_code: bool,
        **others: Any,
    ) -> Any:
        options = ModelOptions(model_name, device, device_map, dtype, trust_remote_code)
        return command(*arguments, model=options, **others)

    return with_options(
        cast(F, with_model),
        click.option(
            "--trust-remote-code",
            is_flag=True,
            help="Run the Python code that comes with --model, which can do whatever you can.",
        ),
        click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16, float16 or float64."),
        click.option(
            "--device-map",
            metavar="HOW",
            help='Spread the model over all GPUs, and the CPU if they are too small: "auto"; in place of --device.',
        ),
        click.option(
            "--device", default="auto", show_default=True, help="auto (a CUDA GPU or the CPU), cpu, cuda:N, mps or xpu."
        ),
        click.option(
            "--model",
            "model_name",
            metavar="M",
            help="Folder or Hub name [default: $PATCHKIT_MODEL, or the embedded one].",
        ),
    )


def base_of(base: BaseInfo) -> str:
    """The base that a patch names, where the user named none; says on stderr which one it is.

    Raises:
        InputError: it is a folder that is not known here.
    """
    from patchkit.patch.bases import base_to_load

    name = base_to_load(base.name)
    note(f"model: {name} (the base that the patch names)")
    return name


def with_options(command: F, *options: Callable[[F], F]) -> F:
    """A command with options, the last one first in its help."""
    for option in options:
        command = option(command)
    return command


class GatedCommand(click.Command):
    """A command with an option for every gate in the table of metrics, which reach it together as `gates`."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        *own, last = super().get_params(ctx)  # the last is --help
        return [*own, *(_gate_option(metric, gate) for metric, gate in gated().values()), last]

    def invoke(self, ctx: click.Context) -> Any:
        given = {name: ctx.params.pop(name) for name in gated()}
        ctx.params["gates"] = Gates({name: bound for name, bound in given.items() if bound is not None})
        return super().invoke(ctx)


def _gate_option(metric: Metric, gate: Gate) -> click.Option:
    kind = Number(0, 1) if metric.share else Bound()
    flag = f"--{'min' if metric.better == 'up' else 'max'}-{gate.name.replace('_', '-')}"
    publishing = "" if gate.published is None else f" [to publish: {gate.published:g}]"
    return click.Option([flag, gate.name], type=kind, metavar="X", help=gate.help + publishing)


def refuse_quick(quick: bool, gates: Gates) -> None:
    """Raises InputError where --quick leaves out what a bound stands on; before any work."""
    if quick and (names := gates.written()):
        raise InputError(
            f"--quick: {', '.join(names)} would not be measured, and there is a gate on it; leave out --quick"
        )


def note(line: str) -> None:
    """A remark for the person at the terminal, on stderr."""
    stderr.print(line, style="dim")


def quiet_transformers() -> None:
    """Keep the library's own bars and warnings off our output, and those of what it loads quantized models with."""
    import logging as standard
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name in ("bitsandbytes", "compressed_tensors"):
        standard.getLogger(name).setLevel(standard.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # what one library asks of another


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A callback (phase, done, total) that draws one bar per phase on stderr, with time left; none in a pipe."""
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr, disable=not stderr.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def update(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield update


def own_folder(patch: str) -> Path:
    """Where a patch that goes on from `patch` is written: over it, or for one on the Hub in a folder of its name."""
    return Path(patch) if Path(patch).exists() else Path(PurePath(patch.partition("@")[0]).name)


force_option = click.option("--force", is_flag=True, help="Replace another patch in --out, with its history.")


def refuse_place(folder: Path, continued: str | None, force: bool) -> None:
    """Raises InputError where a patch cannot be written, or would replace anything but the patch that it continues.

    With `force` it may replace any patch, and still nothing that is not one.
    """
    if folder.is_dir():
        finish_folder(folder)
    if is_folder_with(folder, "manifest.json"):
        if not force and not (continued and Path(continued).resolve() == folder.resolve()):
            raise InputError(
                f"--out {folder}: there is a patch already; go on from it with `apply --onto {folder}`, choose another "
                "folder, or replace it and its history with --force"
            )
    elif not is_free(folder):
        raise InputError(f"--out {folder}: it exists and is not a patch; choose another folder")
    from patchkit.patch.patch import OWN_FILES

    refuse_folders(folder, OWN_FILES)
    refuse_unwritable(folder, "--out ")


@contextmanager
def place_of_its_own(folder: Path, continued: str | None, force: bool) -> Iterator[None]:
    """Inside the block, `folder` is written by no other command, and may be by this one: see `refuse_place`."""
    refuse_place(folder, continued, force)
    with one_at_a_time(folder, note):
        refuse_place(folder, continued, force)  # once more: what was waited for may have made a patch there
        yield
