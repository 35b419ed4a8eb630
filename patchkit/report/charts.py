"""Charts as SVG, in colors that the page's style sheet has for light and for dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from patchkit.words import in_html

WIDTH, HEIGHT = 480, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 44
COLORS = 8
"""Classes c0 to c7 of the style sheet; of more lines in one chart, the next as many are dashed, then dotted."""
DASHES = ("", " dashed", " dotted")
_TICKS = 6
"""At most so many on an axis."""
LOG_FROM = 100
"""Values that far apart are drawn on a logarithmic axis."""


@dataclass(frozen=True)
class Series:
    """A line: its name, and points (x, y) in the order of x; what is not finite is left out."""

    name: str
    points: Sequence[tuple[float, float]]

    @property
    def drawn(self) -> list[tuple[float, float]]:
        """The points that can be drawn."""
        return [(x, y) for x, y in self.points if math.isfinite(x) and math.isfinite(y)]


@dataclass(frozen=True)
class Lines:
    """Lines over one axis. bounds: what the y axis shows at least; caption: one sentence below."""

    title: str
    x: str
    series: Sequence[Series]
    bounds: tuple[float, float] | None = None
    caption: str = ""

    def markup(self) -> str:
        """A figure; empty where there is nothing to draw."""
        points = [point for each in self.series for point in each.drawn]
        if not points:
            return ""
        across = _Axis.of([x for x, _ in points], None, (_LEFT, WIDTH - _RIGHT))
        across = replace(across, whole=all(float(x).is_integer() for x, _ in points))  # edits, layers, runs
        up = _Axis.of([y for _, y in points], self.bounds, (HEIGHT - _BOTTOM, _TOP))
        drawn = "".join(_line(each.drawn, across, up, number, each.name) for number, each in enumerate(self.series))
        grid = "".join(_grid(across, up))
        named = f'<text class="name" x="{(_LEFT + WIDTH - _RIGHT) / 2:g}" y="{HEIGHT - 6}">{in_html(self.x)}</text>'
        return _figure(self.title, self.caption, _svg(self.title, HEIGHT, grid + named + drawn), _legend(self.series))


@dataclass(frozen=True)
class Cloud:
    """Points of a plane, without units: a group for each series, drawn over one another."""

    title: str
    series: Sequence[Series]
    caption: str = ""

    def markup(self) -> str:
        """A figure; empty where there is nothing to draw."""
        points = [point for each in self.series for point in each.drawn]
        if not points:
            return ""
        across = _Axis.of([x for x, _ in points], _around(x for x, _ in points), (8, WIDTH - 8))
        up = _Axis.of([y for _, y in points], _around(y for _, y in points), (HEIGHT - 8, 8))
        dots = "".join(
            f'<circle class="f{number % COLORS} point" cx="{across.at(x):.1f}" cy="{up.at(y):.1f}" r="2.4"/>'
            for number, each in enumerate(self.series)
            for x, y in each.drawn
        )
        return _figure(self.title, self.caption, _svg(self.title, HEIGHT, dots), _legend(self.series))


def _around(values: Iterable[float]) -> tuple[float, float]:
    """The range of values, so that the axis is not logarithmic."""
    known = list(values)
    return min(known), max(known)


@dataclass(frozen=True)
class Heat:
    """A row of cells for each name, one for each value, the darker the larger; nothing is drawn below 0."""

    title: str
    rows: Mapping[str, Sequence[float]]
    caption: str = ""

    def markup(self) -> str:
        """A figure; empty where there is nothing to draw."""
        values = [value for row in self.rows.values() for value in row if math.isfinite(value)]
        if not values:
            return ""
        most, columns = max(max(values), 1e-12), max(map(len, self.rows.values()))
        left, step = 110, 14
        width, cells = (WIDTH - left - 4) / columns, []
        for place, (name, row) in enumerate(self.rows.items()):
            y = step * place
            cells.append(
                f'<text class="tick" x="{left - 6}" y="{y + 11}" text-anchor="end">{in_html(_cut(name, 13))}</text>'
            )
            for column, value in enumerate(row):
                if not math.isfinite(value):
                    continue
                share = max(0.0, value / most)
                cells.append(
                    f'<rect class="f0" x="{left + width * column:.1f}" y="{y}" width="{width:.1f}" height="{step - 1}" '
                    f'fill-opacity="{share:.2f}"><title>{in_html(name)}, {column}: {value:.3f}</title></rect>'
                )
        height = step * len(self.rows) + 18
        for column in range(0, columns, max(1, columns // 10)):
            x = left + width * (column + 0.5)
            cells.append(f'<text class="tick" x="{x:.1f}" y="{height - 3}" text-anchor="middle">{column}</text>')
        return _figure(self.title, self.caption, _svg(self.title, height, "".join(cells)), "")


@dataclass(frozen=True)
class Bars:
    """A bar for each row (name, value), values not negative, with the value in `form` beside it."""

    title: str
    rows: Sequence[tuple[str, float]]
    form: str = ".3g"
    caption: str = ""

    def markup(self) -> str:
        """A figure; empty where there is nothing to draw."""
        rows = [(name, value) for name, value in self.rows if math.isfinite(value)]
        if not rows:
            return ""
        most, step = max(value for _, value in rows) or 1.0, 26
        name_room, number_room = min(230, 16 + 8 * max(len(name) for name, _ in rows)), 72
        room = WIDTH - name_room - number_room
        drawn = []
        for place, (name, value) in enumerate(rows):
            y = 6 + step * place
            drawn.append(
                f'<text class="tick" x="{name_room - 8}" y="{y + 14}" text-anchor="end">{in_html(_cut(name))}</text>'
                f'<rect class="f0" x="{name_room}" y="{y}" width="{max(1.0, room * value / most):.1f}" height="18">'
                f"<title>{in_html(name)}: {value:{self.form}}</title></rect>"
                f'<text class="tick" x="{name_room + room * value / most + 6:.1f}" y="{y + 14}">'
                f"{value:{self.form}}</text>"
            )
        return _figure(self.title, self.caption, _svg(self.title, 12 + step * len(rows), "".join(drawn)), "")


def _cut(name: str, most: int = 26) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"


# --- axes -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    """Values from `low` to `high` at pixels from `ends[0]` to `ends[1]`."""

    low: float
    high: float
    ends: tuple[float, float]
    logarithmic: bool
    whole: bool = False

    @classmethod
    def of(cls, values: Sequence[float], bounds: tuple[float, float] | None, ends: tuple[float, float]) -> _Axis:
        """An axis on which all values lie."""
        low, high = min((*values, *(bounds or ()))), max((*values, *(bounds or ())))
        logarithmic = bounds is None and low > 0 and high / low >= LOG_FROM
        if low == high:
            low, high = (low - 0.5, high + 0.5) if not logarithmic else (low / 2, high * 2)
        return cls(low, high, ends, logarithmic)

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high, value = (self._scaled(each) for each in (self.low, self.high, value))
        return self.ends[0] + (self.ends[1] - self.ends[0]) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values, at most six; of counts whole ones."""
        if self.logarithmic:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            step = max(1, (last - first) // 5 + 1)
            return [10.0**power for power in range(first, last + 1, step)]
        power = 10.0 ** math.floor(math.log10((self.high - self.low) / _TICKS))
        steps = (power * each for each in (1, 2, 5, 10, 20) if not self.whole or power * each >= 1)
        places = (self._multiples(step) for step in steps)
        return next(found for found in places if len(found) <= _TICKS)

    def _multiples(self, step: float) -> list[float]:
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [step * number for number in range(first, last + 1)]

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value


def _grid(across: _Axis, up: _Axis) -> Iterator[str]:
    for value in up.ticks():
        y = up.at(value)
        yield f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>'
        yield f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>'
    for value in across.ticks():
        x = across.at(value)
        yield f'<text class="tick" x="{x:.1f}" y="{HEIGHT - _BOTTOM + 18}" text-anchor="middle">{_number(value)}</text>'


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1e-3 or abs(value) >= 1e5 else f"{value:,.5g}"


def _line(points: Sequence[tuple[float, float]], across: _Axis, up: _Axis, number: int, name: str) -> str:
    color, dashes = number % COLORS, DASHES[number // COLORS % len(DASHES)]
    places = [(across.at(x), up.at(y), x, y) for x, y in points]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y, *_ in places)
    dots = "".join(
        f'<circle class="f{color}" cx="{x:.1f}" cy="{y:.1f}" r="4">'
        f"<title>{in_html(name)}, {_number(at)}: {value:.4g}</title></circle>"
        for x, y, at, value in places
    )
    return f'<path class="line s{color}{dashes}" d="M{path}"/>{dots}' if places else ""


# --- around them ------------------------------------------------------------------------------------------------------


def _svg(title: str, height: float, content: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{in_html(title)}">{content}</svg>'


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    items = "".join(
        f'<li class="k{number % COLORS}{DASHES[number // COLORS % len(DASHES)]}">{in_html(each.name)}</li>'
        for number, each in enumerate(series)
    )
    return f'<ul class="legend">{items}</ul>'


def _figure(title: str, caption: str, svg: str, legend: str) -> str:
    below = f"<p>{in_html(caption)}</p>" if caption else ""
    return f"<figure><figcaption>{in_html(title)}</figcaption>{svg}{legend}{below}</figure>"
