"""What `patchkit report` shows: a benchmark's results, or a patch with what was measured or is measured now."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from patchkit.cli.jobs import verify_patch
from patchkit.editing.editor import Progress
from patchkit.errors import InputError
from patchkit.evaluate.report import Report
from patchkit.io.hub import patch_folder
from patchkit.model.loading import ModelChoice
from patchkit.patch.manifest import BaseInfo
from patchkit.patch.patch import read_manifest
from patchkit.report.benchmarks import bench_page
from patchkit.report.page import Page
from patchkit.report.patches import patch_page


def report_page(
    source: str,
    choose: Callable[[BaseInfo], ModelChoice],
    *,
    facts: str | None,
    text: str | None,
    measured: str | None,
    quick: bool,
    progress: Progress,
    say: Callable[[str], None],
) -> Page:
    """The page about `source`, a patch or the folder of a benchmark.

    Raises:
        InputError: it is neither, what was measured cannot be read, or the model or the facts cannot be used.
    """
    if (Path(source) / "results.jsonl").is_file():
        if measured or facts or text:
            raise InputError(
                f"{source}: the results of a benchmark, which are not measured again; leave out the options"
            )
        return bench_page(Path(source))
    folder = patch_folder(source)
    manifest = read_manifest(folder)
    if measured:
        return patch_page(source, manifest, _read(measured))
    report = verify_patch(
        folder,
        choose,
        facts=facts,
        text=text,
        zsre_target="alt",
        skip_bad=False,
        quick=quick,
        progress=progress,
        say=say,
    )
    return patch_page(source, manifest, report)


def _read(file: str) -> Report:
    """A report as `verify --json` prints it; what `apply --json` adds to it is left aside."""
    try:
        return Report.model_validate_json(Path(file).read_bytes())
    except OSError as error:
        raise InputError(f"--measured {file}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(
            f"--measured {file}: not what `verify --json` prints: {where or 'the file'}: {first['msg']}"
        ) from None
