"""A line chart as a PNG, with Pillow alone: the demo installs no plotting library.

lines ──> ranges of the axes ──> ticks, grid, names ──> bands, lines, points ──> one third of the size, smoothed
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

Point = tuple[float, float]
Place = tuple[float, float]
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
"""Okabe and Ito's, which colour-blind people tell apart."""
INK, GRID = "#333333", "#dddddd"
SIZE, SCALE = (900, 540), 3
LEFT, RIGHT, TOP, BOTTOM = 84, 24, 52, 62
TEXT, TITLE = 16, 19
TICKS = 6
MARKED = 30
"""A line of more points has no dots."""


@dataclass(frozen=True)
class Line:
    """One line of a chart, its points in the order in which they are joined."""

    name: str
    points: tuple[Point, ...]
    band: tuple[tuple[float, float, float], ...] = ()
    """(x, lowest, highest), shaded: the range over seeds, say."""


@dataclass(frozen=True)
class Labels:
    title: str
    x: str
    y: str


def draw(path: Path, lines: Sequence[Line], labels: Labels) -> None:
    """Write the chart of `lines`, which have a point at least, to `path`."""
    from PIL import Image, ImageDraw

    size = SIZE[0] * SCALE, SIZE[1] * SCALE
    picture = Image.new("RGB", size, "white")
    axes = Axes.of(lines)
    for number, line in enumerate(lines):
        if line.band:
            picture.paste(_colour(number), mask=_band(line, axes, size))
    pen = ImageDraw.Draw(picture)
    _frame(picture, pen, axes, labels)
    for number, line in enumerate(lines):
        _curve(pen, line, axes, _colour(number))
    _legend(pen, [line.name for line in lines])
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.resize(SIZE, Image.Resampling.LANCZOS).save(path, optimize=True)


@dataclass(frozen=True)
class Axes:
    """Where a point lies on the picture, in its large pixels."""

    x: tuple[float, ...]
    """Ticks, ascending; the first and the last are the ends of the axis."""
    y: tuple[float, ...]

    @classmethod
    def of(cls, lines: Sequence[Line]) -> Axes:
        xs = [x for line in lines for x, _ in line.points]
        ys = [y for line in lines for _, y in line.points]
        ys += [y for line in lines for _, *ends in line.band for y in ends]
        return cls(ticks(min(xs), max(xs)), ticks(min(ys), max(ys)))

    def place(self, x: float, y: float) -> Place:
        across = (x - self.x[0]) / (self.x[-1] - self.x[0])
        up = (y - self.y[0]) / (self.y[-1] - self.y[0])
        width, height = SIZE[0] - LEFT - RIGHT, SIZE[1] - TOP - BOTTOM
        return (LEFT + across * width) * SCALE, (TOP + (1 - up) * height) * SCALE


def ticks(low: float, high: float) -> tuple[float, ...]:
    """About six round numbers, the first not above `low` and the last not below `high`."""
    span = (high - low) or abs(high) or 1.0
    rough = span / (TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 2.5 * power, 5 * power, 10 * power) if step >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(number * step for number in range(first, max(last, first + 1) + 1))


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size * SCALE)


def _band(line: Line, axes: Axes, size: tuple[int, int]) -> Any:
    from PIL import Image, ImageDraw

    mask = Image.new("L", size)
    edge = [axes.place(x, low) for x, low, _ in line.band] + [axes.place(x, high) for x, _, high in line.band[::-1]]
    ImageDraw.Draw(mask).polygon(edge, fill=50)
    return mask


def _frame(picture: Any, pen: ImageDraw, axes: Axes, labels: Labels) -> None:
    font, gap = _font(TEXT), 8 * SCALE
    (left, bottom), (right, top) = axes.place(axes.x[0], axes.y[0]), axes.place(axes.x[-1], axes.y[-1])
    for y in axes.y:
        height = axes.place(axes.x[0], y)[1]
        pen.line([(left, height), (right, height)], GRID, SCALE)
        pen.text((left - gap, height), f"{y:.10g}", INK, font, anchor="rm")
    for x in axes.x:
        across = axes.place(x, axes.y[0])[0]
        pen.line([(across, bottom), (across, bottom + gap / 2)], INK, SCALE)
        pen.text((across, bottom + gap), f"{x:.10g}", INK, font, anchor="mt")
    pen.line([(left, top), (left, bottom), (right, bottom)], INK, SCALE)
    pen.text(((left + right) / 2, (SIZE[1] - 8) * SCALE), labels.x, INK, font, anchor="ms")
    pen.text((left, (TOP - 26) * SCALE), labels.title, INK, _font(TITLE), anchor="ls")
    _upright(picture, labels.y, (8 * SCALE, (top + bottom) / 2))


def _upright(picture: Any, text: str, middle: Place) -> None:
    """`text` from bottom to top, its left edge and its middle at `middle`."""
    from PIL import Image, ImageDraw

    font = _font(TEXT)
    width, height = int(font.getlength(text)) + 1, int(1.4 * TEXT * SCALE)
    strip = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(strip).text((0, height / 2), text, INK, font, anchor="lm")
    picture.paste(strip.rotate(90, expand=True), (int(middle[0]), int(middle[1] - width / 2)))


def _curve(pen: ImageDraw, line: Line, axes: Axes, colour: str) -> None:
    places = [axes.place(x, y) for x, y in line.points]
    pen.line(places, colour, int(2.5 * SCALE), joint="curve")
    for x, y in places if len(places) <= MARKED else ():
        radius = 3.5 * SCALE
        pen.ellipse([(x - radius, y - radius), (x + radius, y + radius)], colour)


def _legend(pen: ImageDraw, names: Sequence[str]) -> None:
    """In one row under the title, from the left."""
    font, across, height = _font(TEXT), LEFT * SCALE, (TOP - 10) * SCALE
    advance: Callable[[str], float] = font.getlength
    for number, name in enumerate(names):
        pen.line([(across, height), (across + 22 * SCALE, height)], _colour(number), 3 * SCALE)
        pen.text((across + 28 * SCALE, height), name, INK, font, anchor="lm")
        across += int(advance(name)) + 52 * SCALE
