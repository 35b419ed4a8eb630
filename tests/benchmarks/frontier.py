"""The picture of docs/in_use.md: how often edits hold when asked against how often they leak, a point for each setting.

    python -m tests.benchmarks.frontier > docs/assets/frontier.svg

The points are the rows about CounterFact of results/in-use-2026-11-26.md, each the mean over the facts of its row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

RESULTS = Path(__file__).parent / "results" / "in-use-2026-11-26.md"
WIDTH, HEIGHT = 720, 460
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 56, 54
OVERFIT, ASKED = (0.0, 0.65), (0.25, 1.0)
OLD, OTHER, CHOSEN, INK, FAINT, LINE = "#b23b3b", "#7a8794", "#00796b", "#1f2933", "#5f6c7b", "#e6eaee"
DEFAULTS = "alphaedit", "alphaedit:layers=55%-65%"
BOUNDS = 0.15, 0.85
"""Of overfit and asked, drawn as a corner."""


@dataclass(frozen=True)
class Point:
    """A setting: where it is, and what it is called."""

    facts: str
    label: str
    asked: float
    overfit: float

    @property
    def color(self) -> str:
        """Red for edits in the ordinary key, green for the defaults, gray for what else was tried."""
        return OLD if "neurons=off" in self.label else CHOSEN if self.label in DEFAULTS else OTHER


def points() -> Iterator[Point]:
    """Those of the tables."""
    for line in RESULTS.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| CounterFact"):
            yield Point(cells[0], cells[1].strip("`"), float(cells[2]), float(cells[6]))


def place(asked: float, overfit: float) -> tuple[float, float]:
    """Where in the picture."""
    across = (overfit - OVERFIT[0]) / (OVERFIT[1] - OVERFIT[0])
    up = (asked - ASKED[0]) / (ASKED[1] - ASKED[0])
    return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def text(x: float, y: float, words: str, color: str = FAINT, anchor: str = "start") -> str:
    """Some words."""
    return f'<text x="{x:.0f}" y="{y:.0f}" fill="{color}" font-size="15" text-anchor="{anchor}">{escape(words)}</text>'


def drawn() -> Iterator[str]:
    """The lines of the SVG."""
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="asked against '
        f'overfit" font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif">'
    )
    yield f'<rect x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="14" fill="#ffffff" stroke="#d5dbe1"/>'
    left, bottom = place(ASKED[0], OVERFIT[0])
    right, top = place(ASKED[1], OVERFIT[1])
    for share in (0.25, 0.5, 0.75, 1.0):
        _, y = place(share, 0)
        yield f'<path d="M{left} {y:.0f}H{right}" stroke="{LINE}"/>' + text(
            left - 8, y + 5, f"{share:.0%}", anchor="end"
        )
    for share in (0.0, 0.2, 0.4, 0.6):
        x, _ = place(ASKED[0], share)
        yield f'<path d="M{x:.0f} {bottom}V{top}" stroke="{LINE}"/>'
        yield text(x, bottom + 20, f"{share:.0%}", anchor="middle")
    yield text(LEFT, 32, "answers with the fact when asked", INK)
    yield text(right, HEIGHT - 12, "brings it up in neutral texts about the subject", INK, "end")
    x, y = place(BOUNDS[1], BOUNDS[0])
    yield f'<path d="M{left} {y:.0f}H{x:.0f}V{top}" fill="none" stroke="{CHOSEN}" stroke-dasharray="5 4"/>'
    for point in sorted(points(), key=lambda each: each.color == CHOSEN):
        x, y = place(point.asked, point.overfit)
        fill = "#ffffff" if "2000" in point.facts else point.color  # hollow: the half that was chosen on
        title = escape(f"{point.facts}, {point.label}: asked {point.asked:.0%}, overfit {point.overfit:.0%}")
        circle = f'<circle cx="{x:.0f}" cy="{y:.0f}" r="7" fill="{fill}" stroke="{point.color}" stroke-width="3">'
        yield f"{circle}<title>{title}</title></circle>"
    for i, (color, words) in enumerate(
        (
            (CHOSEN, "the default, at 55-65 % of the depth"),
            (OTHER, "other settings, with own neurons"),
            (OLD, "before: rows of other words"),
        )
    ):
        yield f'<circle cx="{WIDTH - 330}" cy="{HEIGHT - 190 + 26 * i}" r="7" fill="{color}"/>'
        yield text(WIDTH - 314, HEIGHT - 185 + 26 * i, words)
    yield text(WIDTH - 336, HEIGHT - 107, "hollow: facts that were chosen on")
    yield "</svg>"


if __name__ == "__main__":
    print("\n".join(drawn()))
