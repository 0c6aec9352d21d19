"""The chart that the demo draws: where things lie, and that they are there."""

from __future__ import annotations

import pytest
from PIL import Image, ImageColor

from dpo_service.demo.plot import COLOURS, SIZE, Axes, Labels, Line, draw, ticks

RISING = Line("rising", ((0, 0.2), (50, 0.5), (100, 0.8)))
FLAT = Line("flat", ((0, 0.2), (100, 0.2)), band=((0, 0.2, 0.4), (100, 0.2, 0.4)))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 96, (0, 20, 40, 60, 80, 100)),
        (0.21, 0.89, (0.2, 0.4, 0.6, 0.8, 1.0)),
        (-3, 2, (-3, -2, -1, 0, 1, 2)),
        (5, 5, (5, 6)),
    ],
)
def test_ticks_are_round_and_hold_the_range(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def drawn(path, *lines):
    draw(path, lines, Labels("title", "x", "y"))
    with Image.open(path) as picture:
        return picture.convert("RGB")


def colour_at(picture, axes, x, y):
    across, down = axes.place(x, y)
    return picture.getpixel((int(across / 3), int(down / 3)))


def near(one, other):
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) < 30


def test_lines_pass_through_their_points(tmp_path):
    picture, axes = drawn(tmp_path / "a" / "chart.png", RISING, FLAT), Axes.of([RISING, FLAT])
    assert picture.size == SIZE
    blue, red = (ImageColor.getrgb(colour) for colour in COLOURS[:2])
    assert near(colour_at(picture, axes, 50, 0.5), blue)
    assert near(colour_at(picture, axes, 75, 0.65), blue), "between two points"
    assert near(colour_at(picture, axes, 50, 0.2), red)
    assert near(colour_at(picture, axes, 30, 0.7), (255, 255, 255))


def test_higher_is_up_and_later_is_right():
    axes = Axes.of([RISING])
    (left, low), (right, high) = (axes.place(*RISING.points[end]) for end in (0, -1))
    assert left < right
    assert low > high, "places count from the top"


def test_a_band_is_shaded(tmp_path):
    axes = Axes.of([FLAT])
    picture = drawn(tmp_path / "chart.png", FLAT)
    blue = ImageColor.getrgb(COLOURS[0])
    fifth = tuple(round(255 - (255 - part) * 50 / 255) for part in blue)
    assert colour_at(picture, axes, 30, 0.33) == pytest.approx(fifth, abs=2)


def test_names_are_written(tmp_path):
    """Two charts that differ in a name only differ over the axes."""
    one, other = (drawn(tmp_path / f"{name}.png", Line(name, RISING.points)) for name in ("one", "other"))
    box = (0, 0, SIZE[0], 52)
    assert one.crop(box).tobytes() != other.crop(box).tobytes()
