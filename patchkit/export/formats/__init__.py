"""Formats that patches are exported to: one file each, found by scanning this folder.

An exporter is a function `(Job, folder) -> Exported` under the `@exporter` decorator: it writes its own files into the
folder. The card and patchkit-manifest.json beside them, and everything about where the folder lies, are written here. A
package of its own adds one by an entry point in the group "patchkit.exporters" that names its module.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from patchkit.errors import InputError
from patchkit.export.job import Exported, Job, Options
from patchkit.export.record import MANIFEST
from patchkit.io.files import is_folder_with, is_free, write_folder
from patchkit.model.loading import DTYPES
from patchkit.patch.bases import base_to_load
from patchkit.patch.card import Card
from patchkit.patch.patch import Patch
from patchkit.words import counted

ENTRY_POINTS = "patchkit.exporters"
Write = Callable[[Job, Path], Exported]


@dataclass(frozen=True)
class Exporter:
    """A registered format and what it declares about itself.

    Attributes:
        files: names of what it writes, in the order in which they appear; the last one tells its folders from others.
        library: what the Hub calls the library that reads it.
        commands: how it is used, as lines for a shell in which {title} is the folder and {base} the base's name.
        python: the same for Python, with {load} for loading the base.
        takes: the options that it takes beside the dtype.
        dtypes: those that it can write.
    """

    name: str
    summary: str
    write: Write
    files: tuple[str, ...]
    library: str
    commands: Callable[[Exported], Sequence[str]]
    python: str = ""
    takes: Collection[str] = ("rank",)
    dtypes: Collection[str] = tuple(DTYPES)

    @property
    def mark(self) -> str:
        """The file by which a folder is known to be of this format."""
        return self.files[-1]

    def card(self, exported: Exported, title: str, **published: Any) -> str:
        """The README.md; `published` is what else `patchkit.patch.card.Card` should say."""
        worst = max((weight.error for weight in exported.weights), default=0.0)
        weights = counted(len(exported.weights), "weight")
        details = (
            f"It is an adapter of rank {exported.rank} on {weights} in {exported.dtype}, and "
            f"differs from the patch by at most {worst:.2g} of each weight's change (Frobenius norm)."
        )
        python = f"```python\n{self.python}\n```\n" if self.python else ""
        commands = "\n".join(self.commands(exported))
        use = f"{python}```sh\n{commands}\n```"
        card = Card(exported.parents, title, "adapter", details=details, use=use, library=self.library)
        return replace(card, **published).markdown()


_EXPORTERS: dict[str, Exporter] = {}


def exporter(
    name: str, *, files: tuple[str, ...], library: str, commands: Callable[[Exported], Sequence[str]], **declared: Any
) -> Callable[[Write], Write]:
    """Register the decorated function under `name`; its docstring's first line becomes the summary."""

    def register(write: Write) -> Write:
        summary = (write.__doc__ or "").strip().splitlines()[0]
        _EXPORTERS[name] = Exporter(name, summary, write, files, library, commands, **declared)
        return write

    return register


def available() -> dict[str, Exporter]:
    """All exporters by name, in alphabetical order: those of this folder and those of installed packages."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    for point in entry_points(group=ENTRY_POINTS):
        point.load()
    return dict(sorted(_EXPORTERS.items()))


def get(name: str) -> Exporter:
    """The exporter called `name`.

    Raises:
        InputError: there is none; the message lists those there are.
    """
    known = available()
    if name not in known:
        raise InputError(f"--format {name}: no such format; choose one of: {', '.join(known)}")
    return known[name]


def export(
    patch: Patch, out: str | Path, kind: str = "peft", base: str | None = None, *, options: Options | None = None
) -> Exported:
    """Write `patch` in the format `kind` to the folder `out`; exact up to rounding unless a rank cuts it.

    An export of the same format that is there is replaced; other files in the folder stay.

    Args:
        base: folder or Hub name of the base; by default the one the patch names. Only config.json is read, but for a
            rotation, which needs the weights that it turns.

    Raises:
        InputError: an unknown format, an option that it does not take, a base that is not at hand or of another
            architecture, or an `out` that holds something else.
    """
    form, wanted, folder = get(kind), options or Options(), Path(out)
    _check(form, wanted)
    if not is_free(folder) and not _holds(folder, form):
        raise InputError(f"--out {folder}: it exists and holds no export to {kind}; choose another folder")
    job = Job(patch, base or base_to_load(patch.manifest.base.name), folder.absolute().name, wanted)
    done: list[Exported] = []

    def write(into: Path) -> None:
        done.append(form.write(job, into))
        (into / MANIFEST).write_text(done[-1].model_dump_json(indent=1) + "\n", encoding="utf-8")
        (into / "README.md").write_text(form.card(done[-1], job.title), encoding="utf-8")

    *first, mark = form.files
    write_folder(folder, (*first, "README.md", MANIFEST, mark), write)
    return done[-1]


def _holds(folder: Path, form: Exporter) -> bool:
    """Whether an export of this format is there; several have a file of the same name."""
    try:
        record = json.loads((folder / MANIFEST).read_bytes())
    except OSError:  # an adapter that something else wrote
        return is_folder_with(folder, form.mark)
    except ValueError:
        return False
    return is_folder_with(folder, form.mark) and isinstance(record, dict) and record.get("format") == form.name


def _check(form: Exporter, options: Options) -> None:
    if options.dtype not in form.dtypes:
        known = ", ".join(form.dtypes)
        raise InputError(f"--dtype {options.dtype}: {form.name} has no such numbers; choose one of: {known}")
    usual = Options()
    for name in (field.name for field in fields(Options) if field.name != "dtype"):
        if name not in form.takes and getattr(options, name) != getattr(usual, name):
            raise InputError(f"--{name.replace('_', '-')}: {form.name} does not take it; leave it out")
