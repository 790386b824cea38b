"""Small charts as inline SVG: lines, histograms and points, drawn for a narrow screen first.

Colours and dashes are classes, which the page's style sheet fills for light and dark. All text is
escaped; nothing refers to anything outside.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

Point = tuple[float, float]
WIDTH, HEIGHT = 360, 236
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 22, 40
_LETTER = 6.2  # width of a character of the charts' small text


@dataclass(frozen=True)
class Series:
    """A line: its class decides colour and dash."""

    kind: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Label:
    """What a chart is called, what it says, and its axes."""

    title: str
    description: str
    x: str
    y: str = ""


class _Frame:
    """Maps values to places, and draws the axes."""

    def __init__(self, xs: Iterable[float], ys: Iterable[float], from_zero: bool = False) -> None:
        self.x_low, self.x_high = _range(xs, pad=0.0)
        self.y_low, self.y_high = _range([*ys, *([0.0] if from_zero else [])], pad=0.08)
        if from_zero:
            self.y_low = 0.0

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    def path(self, points: Sequence[Point]) -> str:
        return "M" + "L".join(f"{self.x(x)},{self.y(y)}" for x, y in points)

    def axes(self, label: Label) -> list[str]:
        found = []
        for value in ticks(self.y_low, self.y_high, 5):
            y = self.y(value)
            found.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
            found.append(_text(LEFT - 6, y + 3.5, short(value), anchor="end"))
        found += [
            _text(self.x(value), HEIGHT - BOTTOM + 15, short(value), anchor="middle")
            for value in ticks(self.x_low, self.x_high, 5)
        ]
        middle = (LEFT + WIDTH - RIGHT) / 2
        found.append(_text(middle, HEIGHT - 8, label.x, anchor="middle", kind="axis"))
        if label.y:
            found.append(_text(LEFT - 40, TOP - 10, label.y, anchor="start", kind="axis"))
        return found


def line_chart(
    label: Label,
    series: Sequence[Series],
    *,
    level: float | None = None,
    marks: Sequence[tuple[float, str, str]] = (),
) -> Markup:
    """Lines over a common axis.

    Args:
        level: a height at which a dashed line runs all the way: that of the base.
        marks: (x, text, kind) of places on the first line that have a name.
    """
    lines = [one for one in series if one.points]
    xs = [x for one in lines for x, _ in one.points]
    ys = [y for one in lines for _, y in one.points] + ([] if level is None else [level])
    frame = _Frame(xs, ys)
    parts = frame.axes(label)
    if level is not None:
        y = frame.y(level)
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
    for one in lines:
        parts.append(f'<path class="line {one.kind}" d="{frame.path(one.points)}"/>')
        if len(one.points) <= 12:
            parts += [
                f'<circle class="dot {one.kind}" cx="{frame.x(x)}" cy="{frame.y(y)}" r="2.6"/>'
                for x, y in one.points
            ]
    if lines:
        parts += _marks(frame, lines[0].points, marks)
    return _svg(label, parts)


def _marks(
    frame: _Frame, line: Sequence[Point], marks: Sequence[tuple[float, str, str]]
) -> list[str]:
    """Names beside places on a falling line: one below the other, so that none covers another."""
    parts = []
    for row, (x, text, kind) in enumerate(sorted(marks)):
        y = _height(line, x)
        at, top = frame.x(x), TOP + 12 + 15 * row
        right = at > (LEFT + WIDTH - RIGHT) / 2
        parts += [
            f'<line class="lead {kind}" x1="{at}" x2="{at}" y1="{frame.y(y)}" y2="{top}"/>',
            f'<circle class="mark {kind}" cx="{at}" cy="{frame.y(y)}" r="4"/>',
            _text(at - 5 if right else at + 5, top + 4, text, anchor="end" if right else "start",
                  kind=f"name {kind}"),
        ]  # fmt: skip
    return parts


def _height(line: Sequence[Point], x: float) -> float:
    """The height of a line at `x`, between the points beside it."""
    for (x0, y0), (x1, y1) in pairwise(line):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / max(x1 - x0, 1e-12)
    return line[-1][1] if x > line[-1][0] else line[0][1]


def histogram(label: Label, edges: Sequence[float], series: Sequence[Series]) -> Markup:
    """Shares per bin, one filled outline per series; the points' heights are the shares."""
    heights = [y for one in series for _, y in one.points]
    frame = _Frame(edges, heights, True)
    parts = frame.axes(label)
    for one in series:
        bins = list(zip(pairwise(edges), one.points, strict=True))
        filled = [place for place, (_, (_, share)) in enumerate(bins) if share]
        if not filled:
            continue
        outline: list[Point] = [(edges[filled[0]], 0.0)]
        for (low, high), (_, share) in bins[filled[0] : filled[-1] + 1]:
            outline += [(low, share), (high, share)]
        outline.append((edges[filled[-1] + 1], 0.0))
        parts.append(f'<path class="area {one.kind}" d="{frame.path(outline)}Z"/>')
    return _svg(label, parts)


def scatter(
    label: Label,
    old: Sequence[tuple[float, float, str]],
    new: Sequence[tuple[float, float, str]],
) -> Markup:
    """Points (x, y, name), new above old; names of new ones stand where there is room."""
    frame = _Frame([p[0] for p in (*old, *new)], [p[1] for p in (*old, *new)])
    parts = [
        f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" '
        f'height="{HEIGHT - TOP - BOTTOM}"/>',
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, label.x, anchor="middle", kind="axis"),
        _text(LEFT, TOP - 10, label.y, anchor="start", kind="axis"),
    ]
    for kind, points, radius in (("old", old, 1.8), ("new", new, 3)):
        parts += [
            f'<circle class="point {kind}" cx="{frame.x(x)}" cy="{frame.y(y)}" r="{radius}">'
            f"<title>{escape(name)}</title></circle>"
            for x, y, name in points
        ]
    taken: list[tuple[float, float, float, float]] = []
    for x, y, name in new:
        at, height = frame.x(x) + 5, frame.y(y) + 3.5
        box = (at, height - 9, at + _width(name) + 4, height + 3)
        if box[2] < WIDTH - RIGHT and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            parts.append(_text(at, height, name, anchor="start", kind="name new"))
    return _svg(label, parts)


def _width(text: str) -> float:
    """About how wide a text is: characters of East Asian scripts take twice the room."""
    return sum(_LETTER * (1.8 if ord(character) > 0x2E80 else 1) for character in text)


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _svg(label: Label, parts: Iterable[str]) -> Markup:
    name = f"{escape(label.title)}. {escape(label.description)}"
    # Parts are made here, of numbers and of texts that `_text` has escaped.
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">'
        f"{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, *, anchor: str, kind: str = "") -> str:
    return (
        f'<text class="{kind}" x="{round(x, 1)}" y="{round(y, 1)}" text-anchor="{anchor}">'
        f"{escape(text)}</text>"
    )


def _range(values: Iterable[float], pad: float) -> tuple[float, float]:
    found = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(found), max(found)
    room = (high - low) * pad or (abs(high) * 0.05 if low == high else 0.0)
    return low - room, high + (room or (1.0 if low == high else 0.0))


def ticks(low: float, high: float, most: int) -> list[float]:
    """About `most` round numbers from `low` to `high`.

    >>> ticks(0, 1000, 5), ticks(0.61, 0.75, 5)
    ([0.0, 200.0, 400.0, 600.0, 800.0, 1000.0], [0.65, 0.7, 0.75])
    """
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    digits = max(0, -math.floor(math.log10(step)))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, digits) for number in range(first, last + 1)]


def short(value: float) -> str:
    """A number for an axis.

    >>> short(12000), short(0.7), short(250.0), short(2500000)
    ('12k', '0.7', '250', '2.5M')
    """
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.6g}{sign}"
    return f"{value:.6g}"
