"""`patchkit apply`: facts in, a patch out."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import click

from patchkit.cli.common import (
    F,
    GatedCommand,
    ModelOptions,
    check_page,
    force_option,
    model_options,
    note,
    own_folder,
    page_option,
    place_of_its_own,
    print_json,
    progress_bars,
    quick_option,
    refuse_quick,
    stdout,
    with_options,
    zsre_option,
)
from patchkit.cli.merge import show_merged
from patchkit.cli.push import packed, show_pushed
from patchkit.errors import GateError, InputError, Interrupted, PatchkitError
from patchkit.evaluate.gates import Gates
from patchkit.facts.typed import FORM
from patchkit.ranks import world

if TYPE_CHECKING:
    from patchkit.cli.applying import Applied
    from patchkit.model.loading import LoadedModel
    from patchkit.runs.dry_run import PlannedRun


def request_options(command: F) -> F:
    """What `apply` is asked to write, and how; `plan` takes the same."""
    return with_options(command, *reversed(_REQUEST))


_REQUEST: tuple[Callable[[Any], Any], ...] = (
    click.argument("facts", required=False),
    click.option("--fact", "typed", multiple=True, metavar="TEXT", help=f'A fact as "{FORM}"; may be repeated.'),
    model_options,
    click.option(
        "--onto",
        metavar="PATCH",
        help="Go on from this patch, with its recipe unless told otherwise: facts that it has are skipped, and one "
        "with another target supersedes the earlier one.",
    ),
    click.option(
        "--beside",
        multiple=True,
        metavar="PATCH",
        help="A patch made apart that this one is to act together with; may be repeated.",
    ),
    click.option("--method", metavar="NAME", help="One of `patchkit methods` [default: alphaedit]."),
    click.option("--recipe", metavar="F", help="A recipe file, or the name of one under recipes/<method>/."),
    click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one setting; may be repeated."
    ),
    click.option("--layers", metavar="L", help="Layers to edit: 4-8, or 4,6, or 14%-27% of the depth, or locate."),
    click.option("--batch-size", type=click.IntRange(1), help="Facts solved for together; batches follow one another."),
    click.option("--text", type=click.Path(), help="Plain text for the statistics; more is better."),
    click.option("--stats", type=click.Path(), help="Folder of statistics, instead of the cache."),
    click.option("--seed", type=int, help="Seed of the generated contexts [default: 0]."),
    zsre_option,
    click.option("--skip-bad", is_flag=True, help="Leave out bad facts, list them in rejected.jsonl beside the patch."),
    click.option("--yes", is_flag=True, help="Take the subjects that are proposed for facts without one."),
)


@click.command("apply", cls=GatedCommand)
@request_options
@click.option(
    "--allow-close-keys",
    is_flag=True,
    help="Write facts although their subjects' keys are all over plain text or the chat template.",
)
@click.option(
    "--guard",
    "bounds",
    multiple=True,
    metavar="NAME=X",
    help="Where to stop: norm (of a weight, over the base's) 2, kl (on plain text, nats) 0.2, or answers (share of "
    "unrelated ones that are empty or loop) 0.5; may be repeated.",
)
@click.option("--no-guard", is_flag=True, help="Go on whatever becomes of the model.")
@click.option(
    "--no-retry", is_flag=True, help="Leave facts that do not hold as they are, instead of editing them again."
)
@quick_option
@click.option("--out", metavar="DIR", help="The patch's folder [default: that of --onto, else <name of FACTS>-patch].")
@force_option
@click.option("--merge", "merged", metavar="DIR", help="If the gates hold: write the base with the patch merged, too.")
@click.option("--push", "repo", metavar="REPO", help="If the gates hold: publish the patch as REPO (user/name), too.")
@click.option(
    "--dry-run", "dry", is_flag=True, help="Show what would be edited, in what time and memory; edit nothing."
)
@page_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def command(
    facts: str | None,
    typed: tuple[str, ...],
    model: ModelOptions,
    onto: str | None,
    beside: tuple[str, ...],
    method: str | None,
    recipe: str | None,
    overrides: tuple[str, ...],
    layers: str | None,
    batch_size: int | None,
    text: str | None,
    stats: str | None,
    seed: int | None,
    zsre_target: str,
    skip_bad: bool,
    yes: bool,
    allow_close_keys: bool,
    bounds: tuple[str, ...],
    no_guard: bool,
    no_retry: bool,
    quick: bool,
    out: str | None,
    force: bool,
    merged: str | None,
    repo: str | None,
    gates: Gates,
    dry: bool,
    page: str | None,
    as_json: bool,
) -> None:
    """Write FACTS (a file, "-" for standard input, or hf://datasets/ORG/NAME/FILE) into a model, as a patch.

    The model itself is not changed. Native facts have prompt, subject and target_new; CounterFact, ZsRE and many other
    formats are recognized (docs/formats.md). Afterward every fact is measured with and without the patch. Facts that do
    not hold are edited once more, with twice the steps. After every batch a guard looks at the model: past a bound the
    run stops, what was good by then is written, and the exit status is 1.

    A gate that does not hold makes the exit status 1, and nothing is merged or published; the patch is written all the
    same. --merge and --push ask for what the gates below say "to publish", unless told otherwise.
    """
    began = time.process_time()
    from patchkit.cli.applying import ApplyRequest, apply_file, dry_run
    from patchkit.runs.guard import Bounds

    overrides = (*overrides, *settings(layers=layers, batch_size=batch_size, seed=seed))
    request = ApplyRequest(
        *(source(facts, typed), onto, method, recipe, overrides, zsre_target, skip_bad, yes),
        tuple(sys.argv[1:]),
        beside,
    )
    guard = None if no_guard else Bounds.of(bounds)
    choose, folder = model.choice, _folder(out, onto, facts)
    if dry and not world().first:
        return
    if dry:
        show_planned(dry_run(request, choose, text=text, stats=stats, quick=quick, began=began, say=note), as_json)
        return
    gates = gates.within(Gates.published()) if merged or repo else gates
    refuse_quick(quick, gates)
    check_page(page)
    after = _After(merged, repo, gates, stats, as_json, page)
    after.check(folder)
    place = place_of_its_own(folder, onto, force) if world().first else nullcontext()
    with place, progress_bars() as progress:
        done = apply_file(
            request,
            choose,
            folder,
            text=text,
            stats=stats,
            quick=quick,
            allow_close_keys=allow_close_keys,
            progress=progress,
            say=note,
            check=after.check_base,
            bounds=guard,
            retry=not no_retry,
        )
    if done is not None:
        after.run(done)


def show_planned(found: PlannedRun, as_json: bool) -> None:
    """What a run would do."""
    from patchkit.cli.tables import planned_table

    if as_json:
        print_json(found.model_dump_json())
    else:
        stdout.print(planned_table(found))


def source(facts: str | None, typed: tuple[str, ...]) -> str | tuple[str, ...]:
    """The fact file, or the facts that were typed."""
    if bool(facts) == bool(typed):
        raise click.UsageError(f'give either FACTS or --fact "{FORM}"')
    return facts or typed


def settings(**short: object) -> list[str]:
    """Options that stand for a setting each, as --set takes them."""
    return [f"{key}={value}" for key, value in short.items() if value is not None]


def _folder(out: str | None, onto: str | None, facts: str | None) -> Path:
    """Where the patch goes."""
    if out or onto:
        return Path(out) if out else own_folder(str(onto))
    stem = "stdin" if facts == "-" else PurePath((facts or "facts").removesuffix(".gz")).stem
    return Path(f"{stem}-patch")


@dataclass(frozen=True)
class _After:
    """What follows the edit: show it, and if the gates hold, merge and publish it."""

    merged: str | None
    repo: str | None
    gates: Gates
    stats: str | None
    as_json: bool
    page: str | None = None

    def check(self, folder: Path) -> None:
        """Raises PatchkitError for what cannot be done however the edit turns out."""
        from patchkit.export.merge import check_out
        from patchkit.export.publish import check_destination

        if self.merged:
            check_out(self.merged)
            if folder.resolve() in (Path(self.merged).resolve(), *Path(self.merged).resolve().parents):
                raise InputError(f"--merge {self.merged}: the patch itself goes to {folder}; choose another folder")
        if self.repo:
            check_destination(self.repo)

    def check_base(self, model: LoadedModel) -> None:
        """Raises InputError where the model's files are not what merging needs."""
        from patchkit.export.merge import find_base

        if self.merged:
            find_base(model.name, model.commit, self.merged)

    def run(self, done: Applied) -> None:
        """Show what was made; merge and publish it.

        Raises:
            GateError: a gate does not hold.
            PatchkitError: merging or publishing failed.
        """
        from patchkit.cli.tables import apply_table

        more: dict[str, Any] = {}
        self._draw(done)
        if not self.as_json:
            stdout.print(apply_table(done.report))
            again = f"`patchkit verify {done.folder}` measures it again"
            stdout.print(f"patch: {done.folder} ({done.size / 1e3:,.0f} kB; {again})", soft_wrap=True)
        try:
            if done.stopped:
                raise GateError(done.stopped)
            self.gates.check(done.report)
            self._merge(done, more)
            self._push(done, more)
        except GateError as error:
            nothing = "; nothing was merged or pushed" if self.merged or self.repo else ""
            raise GateError(f"{error}; the patch is kept: {done.folder}{nothing}") from None
        except PatchkitError as error:
            raise type(error)(f"{error}; the patch is finished all the same: {done.folder}") from None
        except KeyboardInterrupt:
            what = "`patchkit merge`" if self.merged else "`patchkit push`"
            raise Interrupted(f"the patch is finished: {done.folder}; go on with {what}") from None
        finally:
            if self.as_json:
                print_json(done.as_json(more))

    def _draw(self, done: Applied) -> None:
        if self.page:
            from patchkit.report.page import write_page
            from patchkit.report.patches import patch_page

            write_page(patch_page(done.folder.name, done.patch.manifest, done.report), Path(self.page))

    def _merge(self, done: Applied, more: dict[str, Any]) -> None:
        from patchkit.cli.jobs import merge_patches

        if self.merged is None:
            return
        merged = merge_patches([done.patch], done.base, Path(self.merged), stats=self.stats, say=note)
        more["merged"] = {"folder": self.merged, **merged.model_dump(mode="json", exclude={"parents"})}
        if not self.as_json:
            show_merged(merged, self.merged)

    def _push(self, done: Applied, more: dict[str, Any]) -> None:
        from patchkit.export.publish import push

        if self.repo is None:
            return
        pushed = push(packed(str(done.folder), self.repo), self.repo, say=note)
        more["pushed"] = asdict(pushed)
        if not self.as_json:
            show_pushed(pushed, usable=True)
