"""The charts and facts of a page as PNG pictures, for model cards and papers; drawn by matplotlib, on white."""

from __future__ import annotations

import io
import math
import re
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchkit.errors import InputError
from patchkit.evaluate.metrics import metrics
from patchkit.evaluate.report import Summary
from patchkit.export.evidence import Picture
from patchkit.io.files import write_atomically
from patchkit.report.charts import LOG_FROM, Bars, Cloud, Heat, Lines
from patchkit.report.facts import Shown
from patchkit.report.page import Page
from patchkit.words import agreeing, counted, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, RULE, GOOD, BAD = "#1d2733", "#5b6775", "#dde2e8", "#16794a", "#b3261e"
COLORS = ("#00796b", "#c2570c", "#4254c5", "#a3307f", "#6b7a00", "#0277a8", "#8a4b2a", "#5f6c7b")
DASHES = ("-", "--", ":")
_INSIDE, _IN_ROW = 6, 5
"""Names that a chart has room for, and how many go into a row below it where there are more."""
"""Those of the page's style sheet, in light."""
FACTS = 8
"""Facts in a picture; the page has all."""
_LOST = 3
"""Of those, so many that do not hold, where there are any."""
_LINE = 0.17
"""Inches from a line of what is asked to the next."""
_DPI = 160
_MORE_FONTS = (
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "Hiragino Sans", "PingFang SC", "Yu Gothic", "Microsoft YaHei"),
    *("Malgun Gothic", "Noto Sans Thai", "Noto Sans Devanagari", "Noto Sans Bengali", "Arial Unicode MS"),
)
"""Looked for on this machine, for what matplotlib's own font has no letters for."""


def check_drawing() -> None:
    """Raises InputError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError('pictures need the package matplotlib; pip install "patchkit-lm[pictures]"') from None


def check_place(folder: Path, option: str) -> None:
    """Raises InputError where pictures cannot be drawn, or cannot be put."""
    check_drawing()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{option} {folder}: a file has that name; name a folder")


def write_pictures(page: Page, folder: Path) -> list[Path]:
    """Draw all that a page has into a folder, in place of pictures of the same names.

    Raises:
        InputError: matplotlib is not installed, or the folder cannot be written.
    """
    drawn = pictures_of(page)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for each in drawn:
            write_atomically(folder / each.name, partial(_put, each.png))
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}") from None
    return [folder / each.name for each in drawn]


def _put(png: bytes, file: Path) -> None:
    file.write_bytes(png)


def pictures_of(page: Page, facts: Sequence[Shown] | None = None) -> list[Picture]:
    """All that a page has to draw: facts (by default those of its first report), what was measured, and each chart.

    Raises:
        InputError: matplotlib is not installed.
    """
    check_drawing()
    import matplotlib

    taken: dict[str, int] = {}
    with matplotlib.rc_context({"font.family": _fonts()}):
        drawn = [
            facts_picture(page.shown if facts is None else facts),
            measures_picture(page.headline) if page.headline else None,
            *(_chart_picture(chart, taken) for chart in (*page.charts, *page.rest)),
        ]
    return [each for each in drawn if each]


def _fonts() -> list[str]:
    """matplotlib's own font, and after it those that are here for letters that it lacks."""
    from matplotlib import font_manager

    here = set(font_manager.get_font_names())
    return ["DejaVu Sans", *(name for name in _MORE_FONTS if name in here)]


# --- facts ------------------------------------------------------------------------------------------------------------


def facts_picture(facts: Sequence[Shown]) -> Picture | None:
    """Some facts with what the base says and what the patched model does; None without facts."""
    if not facts:
        return None
    some = chosen(facts)
    held = sum(fact.holds for fact in facts)
    asked = [wrapped(fact.question or f"{fact.prompt} ...", 42, 2) for fact in some]
    rooms = [0.62 + _LINE * (len(lines) - 1) for lines in asked]
    height = 0.85 + sum(rooms)
    figure = _figure(8.0, height)

    def put(x: float, down: float, text: str, room: int, **style: Any) -> None:
        figure.text(x, 1 - down / height, _cut(text, room), va="baseline", parse_math=False, **style)

    for x, heading in ((0.035, "asked"), (0.45, "before"), (0.725, "after")):
        put(x, 0.32, heading, 20, color=FAINT, size=9.5)
    for fact, lines, down in zip(some, asked, accumulate(rooms, initial=0.75), strict=False):
        color = GOOD if fact.holds else BAD
        put(0.012, down, "✓" if fact.holds else "✗", 1, color=color, size=11)
        for number, line in enumerate(lines):
            put(0.035, down + _LINE * number, line, 42, color=INK, size=10)
        put(0.45, down, fact.before, 28, color=FAINT, size=10)
        put(0.725, down, fact.after, 24, color=color, size=10, weight="bold")
        put(0.035, down + 0.22 + _LINE * (len(lines) - 1), f"to be: {fact.target}", 52, color=FAINT, size=8)
        _rule(figure, 1 - (down - 0.29) / height)
    put(0.012, height - 0.12, _said_of(facts, some, held), 130, color=FAINT, size=8)
    says = f"{_said_of(facts, some, held)}: what is asked, what the base says, and what the patched model says"
    return Picture("facts.png", says, _png(figure))


def chosen(facts: Sequence[Shown]) -> list[Shown]:
    """Facts for a picture: a few that do not hold, and the first ones that do, so that neither kind is left out."""
    lost = [fact for fact in facts if not fact.holds][:_LOST]
    return [*lost, *[fact for fact in facts if fact.holds][: FACTS - len(lost)]]


def _said_of(facts: Sequence[Shown], some: Sequence[Shown], held: int) -> str:
    shown = "" if len(some) == len(facts) else f"{len(some)} of "
    return f"{shown}{counted(len(facts), 'fact')}; {held:,} {agreeing(held, 'hold')} when asked"


def _cut(text: str, room: int) -> str:
    """One line of what fits, wide letters taking the room of two."""
    line = visible(" ".join(text.split()))
    there = _fitting(line, room)
    return line if there == len(line) else line[: there - 1].rstrip() + "…"


def wrapped(text: str, room: int, most: int) -> list[str]:
    """So many lines at most of what fits, the last one cut; they end between words where there are any."""
    rest, lines = visible(" ".join(text.split())), list[str]()
    while len(lines) < most - 1 and (there := _fitting(rest, room)) < len(rest):
        space = rest.rfind(" ", 0, there + 1)
        at = space if space > 0 else there
        lines.append(rest[:at])
        rest = rest[at:].lstrip()
    return [*lines, _cut(rest, room)]


def _fitting(text: str, room: int) -> int:
    """How many of its characters fit."""
    widths = accumulate(2.2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)
    return sum(width <= room for width in widths)


# --- what was measured ------------------------------------------------------------------------------------------------


def measures_picture(found: Summary) -> Picture | None:
    """A bar for each share that stands for all, and on how much it stands; None where none was measured."""
    rows = [metric for metric in metrics() if metric.headline and metric.share and metric.of(found) is not None]
    if not rows:
        return None
    figure = _figure(8.0, 0.5 + 0.46 * len(rows))
    axes = figure.add_axes((0.2, 0.08, 0.3, 0.86))
    for place, metric in enumerate(rows):
        value = metric.of(found) or 0.0
        axes.barh(place, 1, color=RULE, height=0.5)
        axes.barh(place, min(1.0, value), color=GOOD if metric.better == "up" else BAD, height=0.5)
        beside = ", ".join(filter(None, (f"{metric.shown(found)}  {metric.explained(found)}", metric.items(found))))
        lines = "\n".join(wrapped(beside, 58, 2))
        axes.text(1.04, place, lines, va="center", size=8.5, color=FAINT, parse_math=False)
    labels = [f"{metric.headline}\n({'higher' if metric.better == 'up' else 'lower'} is better)" for metric in rows]
    axes.set_yticks(range(len(rows)), labels, color=INK, size=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    _bare(axes)
    said = ", ".join(f"{metric.headline} {metric.shown(found)}" for metric in rows)
    return Picture("measures.png", f"Measured beside the untouched base: {said}", _png(figure))


# --- charts -----------------------------------------------------------------------------------------------------------


def _chart_picture(chart: Lines | Bars | Cloud | Heat, taken: dict[str, int]) -> Picture | None:
    """A chart with its title above and its caption below; None where there is nothing to draw."""
    if not chart.markup():
        return None
    height = 0.9 + 0.3 * len(chart.rows) if isinstance(chart, Bars | Heat) else 3.6 + _below(chart)
    caption = wrapped(chart.caption, 105, 3)
    figure = _figure(6.4, height + 0.14 * (len(caption) - 1))
    axes = figure.add_subplot()
    _DRAW[type(chart)](axes, chart)
    axes.set_title(_cut(chart.title, 70), color=INK, size=11, loc="left", parse_math=False)
    if chart.caption:
        figure.supxlabel("\n".join(caption), color=FAINT, size=8, parse_math=False)
    figure.set_layout_engine("tight")
    says = f"{chart.title}: {chart.caption}" if chart.caption else chart.title
    return Picture(_file_name(chart.title, taken), says, _png(figure))


def _lines(axes: Axes, chart: Lines) -> None:
    from matplotlib.ticker import MaxNLocator

    for number, series in enumerate(chart.series):
        if series.drawn:
            x, y = zip(*series.drawn, strict=True)
            color, line = COLORS[number % len(COLORS)], DASHES[number // len(COLORS) % len(DASHES)]
            axes.plot(x, y, line, color=color, label=_cut(series.name, 30), marker="o", ms=4, lw=1.8)
    values = [y for series in chart.series for _, y in series.drawn]
    if chart.bounds:
        low, high = min(*values, *chart.bounds), max(*values, *chart.bounds)
        axes.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))
    elif min(values) > 0 and max(values) / min(values) >= LOG_FROM:
        axes.set_yscale("log")
    if all(x == int(x) for series in chart.series for x, _ in series.drawn):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(chart.x, color=FAINT, size=9, parse_math=False)
    axes.grid(axis="y", color=RULE)
    _frame(axes, len(chart.series))


def _cloud(axes: Axes, chart: Cloud) -> None:
    for number, series in enumerate(chart.series):
        if series.drawn:
            x, y = zip(*series.drawn, strict=True)
            color = COLORS[number % len(COLORS)]
            axes.scatter(x, y, s=9, color=color, alpha=0.55, label=_cut(series.name, 30), linewidths=0)
    axes.set_xticks([])
    axes.set_yticks([])
    _frame(axes, len(chart.series))


def _bars(axes: Axes, chart: Bars) -> None:
    names, values = [_cut(name, 34) for name, _ in chart.rows], [value for _, value in chart.rows]
    drawn = axes.barh(range(len(values)), values, color=COLORS[0], height=0.62)
    axes.bar_label(drawn, [f"{value:{chart.form}}" for value in values], padding=4, color=FAINT, size=8)
    axes.set_yticks(range(len(names)), names, color=INK, size=8, parse_math=False)
    axes.invert_yaxis()
    axes.margins(x=0.16)
    _bare(axes)


def _heat(axes: Axes, chart: Heat) -> None:
    width = max(map(len, chart.rows.values()))
    cells = [[max(0.0, value) for value in row] + [0.0] * (width - len(row)) for row in chart.rows.values()]
    axes.imshow(cells, aspect="auto", cmap="Greens", vmin=0, interpolation="nearest")
    axes.set_yticks(range(len(cells)), [_cut(name, 20) for name in chart.rows], color=FAINT, size=7, parse_math=False)
    axes.set_xlabel("layer", color=FAINT, size=9)
    _frame(axes, 1)


_DRAW: Mapping[type, Callable[[Any, Any], None]] = {Lines: _lines, Cloud: _cloud, Bars: _bars, Heat: _heat}


def _below(chart: Lines | Cloud) -> float:
    """Inches for the names of more series than fit inside the chart."""
    count = len(chart.series)
    return 0.2 * math.ceil(count / _IN_ROW) if count > _INSIDE else 0.0


# --- around them ------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen

    return Figure(figsize=(width, height), dpi=_DPI, facecolor="white")


def _rule(figure: Figure, y: float) -> None:
    from matplotlib.lines import Line2D

    figure.add_artist(Line2D([0.012, 0.988], [y, y], color=RULE, lw=0.8))


def _frame(axes: Axes, series: int) -> None:
    axes.tick_params(colors=FAINT, labelsize=8)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(RULE)
    if series > _INSIDE:
        below = (0.5, -0.16)
        axes.legend(
            loc="upper center",
            bbox_to_anchor=below,
            ncols=_IN_ROW,
            handlelength=3.5,  # a dashed line is seen to be one
            frameon=False,
            fontsize=8,
            labelcolor=FAINT,
        )
    elif series > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=FAINT, ncols=2)


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _file_name(title: str, taken: dict[str, int]) -> str:
    """A title as a file's name; a second one of the same gets a number."""
    name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:60] or "chart"
    taken[name] = taken.get(name, 0) + 1
    return f"{name}.png" if taken[name] == 1 else f"{name}-{taken[name]}.png"


def _png(figure: Figure) -> bytes:
    """The same bytes for the same picture: no date, no version."""
    out = io.BytesIO()
    with warnings.catch_warnings():  # letters that no font here has are boxes
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
