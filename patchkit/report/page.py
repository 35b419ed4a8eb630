"""The page itself: one file that asks the network for nothing, in light and dark, on a phone and on a desk."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from patchkit.errors import InputError
from patchkit.evaluate.metrics import metrics
from patchkit.evaluate.report import Report, Summary
from patchkit.io.files import write_text
from patchkit.report.charts import Bars, Cloud, Heat, Lines
from patchkit.report.facts import Shown, Texts, packed_report, shown
from patchkit.version import patchkit_version
from patchkit.words import counted, in_html, json_in_html

GENERATOR = '<meta name="generator" content="patchkit">'
_HERE = Path(__file__).parent
_HIDE = "<noscript><p>The facts are shown by a script of this page's own, and scripts are switched off.</p></noscript>"


@dataclass(frozen=True)
class Table:
    """A table: headings, and cells as text; `numbers` says that all columns but the first are numbers."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: bool = True

    def markup(self) -> str:
        """It scrolls sideways where there is no room; empty without rows."""
        if not self.rows:
            return ""
        head = "".join(f'<th scope="col">{in_html(cell)}</th>' for cell in self.headings)
        body = "".join(
            f'<tr><th scope="row">{in_html(first)}</th>{"".join(f"<td>{in_html(cell)}</td>" for cell in rest)}</tr>'
            for first, *rest in self.rows
        )
        kind = ' class="numbers"' if self.numbers else ""
        return (
            f"<h2>{in_html(self.title)}</h2>"
            f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )


@dataclass(frozen=True)
class Page:
    """What a page shows.

    Attributes:
        lead: sentences below the title.
        headline: the one report whose few numbers stand at the top, if there is one; its facts come next. Without one
            tables and curves are the first to be looked at.
        rest: charts that are folded away below the others.
        reports: by name, facts before and after; one of several is chosen on the page.
    """

    title: str
    lead: Sequence[str]
    headline: Summary | None
    charts: Sequence[Lines | Bars | Cloud | Heat]
    tables: Sequence[Table]
    reports: Mapping[str, Report]
    rest: Sequence[Lines | Bars | Cloud | Heat] = ()

    @property
    def shown(self) -> list[Shown]:
        """The facts of the first report."""
        return [fact for report in list(self.reports.values())[:1] for fact in shown(report)]

    def html(self) -> str:
        """The whole file."""
        style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
        texts = Texts()
        sets = [packed_report(name, report, texts) for name, report in self.reports.items()]
        data = json_in_html({"texts": texts.all(), "sets": sets})
        charts, tables = _charts(self.charts, self.rest), "".join(table.markup() for table in self.tables)
        facts = _facts() if sets else ""
        body = [
            f"<header><h1>{in_html(self.title)}</h1>",
            *(f"<p>{in_html(sentence)}</p>" for sentence in self.lead),
            "</header><main>",
            _headline(self.headline) if self.headline else "",
            *((facts, charts, tables) if self.headline else (tables, charts, facts)),
            f"</main><footer><p>Made by patchkit {in_html(patchkit_version())}. This file asks for nothing from "
            "anywhere else.</p></footer>",
        ]
        # The policy lets this style and this script run and nothing else, wherever the page is opened.
        policy = (
            f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; "
            "form-action 'none'"
        )
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">{GENERATOR}'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
            f"<title>{in_html(self.title)}</title><style>{style}</style></head>\n<body>{''.join(body)}"
            f'<script id="data" type="application/json">{data}</script><script>{script}</script></body></html>\n'
        )


def write_page(page: Page, file: Path) -> None:
    """Write the page; one that was written before is replaced."""
    write_text(file, page.html())


def check_file(file: Path, option: str = "--out") -> None:
    """Raises InputError where a page cannot be written, or would replace anything but a page."""
    if file.is_dir():
        raise InputError(f"{option} {file}: it is a folder; name a file, such as {file / 'report.html'}")
    if file.exists() and GENERATOR not in file.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise InputError(f"{option} {file}: it exists and is no report of patchkit's; choose another file")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _charts(first: Sequence[Lines | Bars | Cloud | Heat], rest: Sequence[Lines | Bars | Cloud | Heat]) -> str:
    """Charts side by side, and below them those that are shown when they are asked for."""
    shown, folded = ([drawn for chart in some if (drawn := chart.markup())] for some in (first, rest))
    if not shown and not folded:
        return ""
    more = f'<summary>{counted(len(folded), "more chart")}</summary><div class="charts">{"".join(folded)}</div>'
    below = f'<details class="rest">{more}</details>' if folded else ""
    return f'<h2>Curves and weights</h2><div class="charts">{"".join(shown)}</div>{below}'


def _headline(found: Summary) -> str:
    """All metrics that were measured, the few that a user meets first and large."""
    large, small = [], []
    for metric in metrics():
        value = metric.of(found)
        if value is None:
            continue
        said = (in_html(each) for each in (metric.shown(found), metric.label, metric.explained(found)))
        shown, label, explained = said
        items = in_html(metric.items(found))
        if metric.headline:
            bar = _bar(value, metric.better == "up") if metric.share else ""
            less = " <small>(lower is better)</small>" if metric.share and metric.better == "down" else ""
            large.append(f"<li><b>{shown}</b><span>{label}{less}</span>{bar}<small>{explained}, {items}</small></li>")
        else:
            small.append((metric.label, metric.shown(found), metric.explained(found), metric.items(found)))
    table = Table("", ("metric", "value", "what it counts", "on"), small, numbers=False).markup()
    table = table.removeprefix("<h2></h2>")
    more = f"<details><summary>{counted(len(small), 'more measure')}</summary>{table}</details>" if small else ""
    return f'<ul class="cards">{"".join(large)}</ul>{more}'


def _bar(value: float, up: bool) -> str:
    width = 100 * min(1.0, max(0.0, value))
    kind = "good" if up else "bad"
    return (
        '<svg class="bar" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="6"/><rect class="{kind}" width="{width:.1f}" height="6"/></svg>'
    )


def _facts() -> str:
    """Where the script puts the facts."""
    choices = (
        ("all", "all facts"),
        ("lost", "do not hold"),
        ("held", "hold"),
        ("unasked", "text about the subject spoiled"),
        ("moved", "a neighbor changed"),
    )
    options = "".join(f'<option value="{value}">{words}</option>' for value, words in choices)
    return (
        '<h2>Facts, before and after</h2><p class="hint">On each line: what is asked, the target, and what the base '
        "said → what the patched model says. Open it for all that was asked.</p>"
        '<form id="search" role="search">'
        '<label>Search<input id="words" type="search" autocomplete="off" spellcheck="false" '
        'placeholder="words of a prompt, an answer, a reason"></label>'
        f'<label>Show<select id="kind">{options}</select></label>'
        '<label id="which-label" hidden>Of<select id="which"></select></label>'
        f'<output id="count" for="words kind which"></output></form>{_HIDE}<div id="facts"></div>'
        '<button id="more" type="button" hidden></button>'
        '<details id="others" hidden><summary>Unrelated texts</summary><div></div></details>'
    )
