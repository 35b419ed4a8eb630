"""The page that lies in a patch's folder, and what of it goes to the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from patchkit.errors import InputError
from patchkit.evaluate.report import Report
from patchkit.export.evidence import PAGE, Evidence
from patchkit.patch.manifest import Manifest
from patchkit.report.facts import Shown, shown_in
from patchkit.report.page import check_file, write_page
from patchkit.report.patches import digest_line, patch_page
from patchkit.report.pictures import pictures_of

_DATA = re.compile(r'<script id="data" type="application/json">(.*?)</script>', re.DOTALL)


def keep_page(folder: Path, manifest: Manifest, report: Report, say: Callable[[str], None]) -> None:
    """Put the page into the patch's folder; a file of that name that is somebody else's stays."""
    file = folder / PAGE
    try:
        check_file(file, "the page")
    except InputError as error:
        say(f"note: no page was written: {error}")
        return
    write_page(patch_page(folder.absolute().name, manifest, report), file)


def evidence(folder: Path, manifest: Manifest, name: str) -> Evidence:
    """The page in a patch's folder with pictures of it; where the folder has none, or one of another patch, a page that
    is made from the manifest.

    Args:
        name: of the patch, for a page that is made here.
    """
    page = patch_page(name, manifest, None)
    kept = _kept(folder / PAGE, manifest)
    facts = _facts_in(kept) if kept else []
    html = kept or page.html()
    try:
        return Evidence(html.encode(), tuple(pictures_of(page, facts)))
    except InputError as error:
        return Evidence(html.encode(), (), str(error))


def _kept(file: Path, manifest: Manifest) -> str | None:
    """The page that lies there, if it is one of this very patch."""
    if not file.is_file() or file.is_symlink():
        return None
    text = file.read_text(encoding="utf-8", errors="replace")
    return text if digest_line(manifest) in text else None


def _facts_in(page: str) -> list[Shown]:
    """The facts on a page; none where it has been changed so that they cannot be read."""
    found = _DATA.search(page)
    try:
        return shown_in(json.loads(found[1])) if found else []
    except (ValueError, LookupError, TypeError):
        return []
