"""The picture of an edit for README.md and docs/index.md, drawn from a report: some facts before and after, and rates.

Wide enough in its letters to be read on a phone, without a font of its own, on a card that fits light and dark pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from patchkit.evaluate.report import FactReport, Report

WIDTH, MARGIN = 720, 28
FACTS = 3
BARS = (
    ("says it when asked", "in_use", "asked", True),
    ("in other words, too", "generalization", "exact", True),
    ("neighbors unchanged", "locality", "unchanged", True),
    ("brings it up unasked", "in_use", "overfit", False),
)
"""Caption, group and name of a metric, and whether more is better."""
INK, FAINT, OLD, GOOD, BAD, TRACK = "#1f2933", "#5f6c7b", "#b23b3b", "#00796b", "#d9822b", "#e6eaee"


def picture(report: Report) -> str:
    """An SVG of the first facts that the base knows otherwise, and the rates."""
    known = [
        fact for fact in report.per_fact if fact.target_true and fact.says_before.strip().startswith(fact.target_true)
    ]
    lines = [*_facts(known[:FACTS]), *_bars(report, 66 + 84 * FACTS)]
    height = 66 + 84 * FACTS + 46 * len(BARS) + 18
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="Facts before and after an edit, and what was measured" '
        f'font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif">'
    )
    card = f'<rect x="1" y="1" width="{WIDTH - 2}" height="{height - 2}" rx="14" fill="#ffffff" stroke="#d5dbe1"/>'
    return "\n".join([head, card, *lines, "</svg>", ""])


def _facts(facts: Sequence[FactReport]) -> Iterator[str]:
    """Each fact's prompt, and below it how the base goes on and how the patched model does."""
    for i, fact in enumerate(facts):
        y = 46 + 84 * i
        yield _text(MARGIN, y, 23, FAINT, f"{fact.prompt} ...")
        after = " ".join(fact.says_after.split()[: len(fact.target_new.split())]).rstrip(",.;:")
        yield _text(MARGIN + 16, y + 37, 27, OLD, str(fact.target_true), ' text-decoration="line-through"')
        yield _text(WIDTH / 2 - 24, y + 37, 27, FAINT, "→")
        yield _text(WIDTH / 2 + 24, y + 37, 27, GOOD, after, ' font-weight="600"')


def _bars(report: Report, top: int) -> Iterator[str]:
    """A bar for each rate, in green where it should be long."""
    yield f'<path d="M{MARGIN} {top - 26}H{WIDTH - MARGIN}" stroke="{TRACK}" stroke-width="2"/>'
    left, room = 300, WIDTH - MARGIN - 300 - 84
    for i, (caption, group, name, more) in enumerate(BARS):
        value, y = report.value(group, name) or 0.0, top + 46 * i
        yield _text(MARGIN, y + 24, 24, INK, caption)
        yield f'<rect x="{left}" y="{y + 6}" width="{room}" height="22" rx="5" fill="{TRACK}"/>'
        color = GOOD if more else BAD
        yield f'<rect x="{left}" y="{y + 6}" width="{room * value:.1f}" height="22" rx="5" fill="{color}"/>'
        yield _text(WIDTH - MARGIN, y + 24, 24, INK, f"{value:.0%}", ' text-anchor="end"')


def _text(x: float, y: float, size: int, color: str, text: str, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}"{more}>{escape(text)}</text>'
