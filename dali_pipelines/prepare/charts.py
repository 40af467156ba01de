"""Small bar charts, drawn once for two surfaces: SVG in a page, and a picture. Bars need no plotting library."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 400, 240
"""Of a chart, in pixels."""

_BAR, _INK, _PALE = "#3b6ea5", "#222222", "#8a8a8a"
_TOP, _BOTTOM, _SIDE = 44, 34, 16
_BINS = 24
_ROWS = 8


@dataclass(frozen=True)
class Chart:
    """A title, what stands below it, and bars: upright ones for a distribution, lying ones for counts by name.

    Attributes:
        title: what is shown.
        note: a line below the title.
        bars: ``(label, height)``; labels are shown for lying bars alone.
        ends: labels of the left and right end of a distribution.
        lying: bars lie one below the other.
    """

    title: str
    note: str
    bars: tuple[tuple[str, float], ...]
    ends: tuple[str, str] = ("", "")
    lying: bool = False


def distribution(title: str, values: Sequence[float], unit: str = "", about: str = "") -> Chart:
    """How values spread. Bins grow by a factor where the values reach over more than two powers of ten."""
    if not values:
        return Chart(title, "none", ())
    array = np.array(values, np.float64)
    low, high = float(array.min()), float(array.max())
    unit = f" {unit}" if unit else ""
    note = f"median {number(float(np.median(array)))}{unit}, mean {number(float(array.mean()))}{unit}"
    note += f"; {about}" if about else f", n {len(array):,}"
    if low == high:
        return Chart(title, note, (("", float(len(array))),), (f"{number(low)}{unit}", ""))
    logarithmic = low > 0 and high / low > 100
    edges = np.geomspace(low, high, _BINS + 1) if logarithmic else np.linspace(low, high, _BINS + 1)
    edges[0], edges[-1] = low, high  # what rounding may have moved
    counts, _ = np.histogram(array, edges)
    ends = number(low) + unit, number(high) + unit + (" (log)" if logarithmic else "")
    return Chart(title, note, tuple(("", float(count)) for count in counts), ends)


def counts(title: str, counter: Counter[str]) -> Chart:
    """The most frequent names; the rest in one bar."""
    common = counter.most_common()
    bars = common[:_ROWS] if len(common) <= _ROWS else common[: _ROWS - 1]
    rest = sum(n for _, n in common[len(bars) :])
    if rest:
        bars = [*bars, (f"{len(common) - len(bars)} others", rest)]
    return Chart(title, f"{sum(counter.values()):,} in all", tuple((n, float(v)) for n, v in bars), lying=True)


def number(value: float) -> str:
    """Three significant digits, or all of a whole number below a million."""
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        step = min(int(math.log10(abs(value)) // 3), 4)
        return f"{value / 1000**step:.3g}{' kMGT'[step].strip()}"
    return f"{value:.3g}"


class Surface(Protocol):
    """Where a chart is drawn. Colours are ``#rrggbb``."""

    def rectangle(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """A filled one."""

    def text(self, x: float, y: float, words: str, colour: str, bold: bool = False, right: bool = False) -> None:
        """One line whose upper left (or right) corner is given."""


def draw(chart: Chart, on: Surface) -> None:
    """Draw a chart."""
    on.text(_SIDE, 6, chart.title, _INK, bold=True)
    on.text(_SIDE, 24, chart.note, _PALE)
    highest = max((height for _, height in chart.bars), default=0.0)
    if highest and chart.lying:
        _lying(chart, on, highest)
    elif highest:
        width = (WIDTH - 2 * _SIDE) / len(chart.bars)
        room = HEIGHT - _TOP - _BOTTOM
        for i, (_, height) in enumerate(chart.bars):
            if height:
                tall = max(height / highest * room, 1.0)
                on.rectangle(_SIDE + i * width + 0.5, _TOP + room - tall, max(width - 1, 1), tall, _BAR)
        on.text(WIDTH - _SIDE, 6, f"highest {number(highest)}", _PALE, right=True)
        on.rectangle(_SIDE, HEIGHT - _BOTTOM, WIDTH - 2 * _SIDE, 1, _PALE)
        on.text(_SIDE, HEIGHT - _BOTTOM + 6, chart.ends[0], _PALE)
        on.text(WIDTH - _SIDE, HEIGHT - _BOTTOM + 6, chart.ends[1], _PALE, right=True)


def _lying(chart: Chart, on: Surface, longest: float) -> None:
    step = (HEIGHT - _TOP - 8) / _ROWS
    for i, (label, length) in enumerate(chart.bars):
        y = _TOP + i * step
        on.rectangle(_SIDE, y + 15, max(length / longest * (WIDTH - 2 * _SIDE), 1), step - 17, _BAR)
        on.text(_SIDE, y, label if len(label) <= 52 else f"{label[:51]}…", _INK)
        on.text(WIDTH - _SIDE, y, number(length), _INK, right=True)


class SvgSurface:
    """Collects the elements of an SVG picture."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def rectangle(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """As `Surface` says."""
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>')

    def text(self, x: float, y: float, words: str, colour: str, bold: bool = False, right: bool = False) -> None:
        """As `Surface` says."""
        style = (' font-weight="bold"' if bold else "") + (' text-anchor="end"' if right else "")
        self.parts.append(f'<text x="{x:.1f}" y="{y + 11:.1f}" fill="{colour}"{style}>{escape(words)}</text>')

    def svg(self, title: str) -> str:
        """The picture."""
        size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
        font = 'font-family="sans-serif" font-size="11"'
        label = f'role="img" aria-label="{escape(title)}"'
        return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font} {label}>{"".join(self.parts)}</svg>'


class PictureSurface:
    """Draws into a part of a picture."""

    def __init__(self, image: Image.Image, left: int, top: int) -> None:
        self.pen, self.left, self.top = ImageDraw.Draw(image), left, top

    def rectangle(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """As `Surface` says."""
        x, y = x + self.left, y + self.top
        self.pen.rectangle([x, y, x + max(width - 1, 0), y + max(height - 1, 0)], fill=colour)

    def text(self, x: float, y: float, words: str, colour: str, bold: bool = False, right: bool = False) -> None:
        """As `Surface` says."""
        font = ImageFont.load_default(12 if bold else 11)
        anchor = "ra" if right else "la"
        self.pen.text((x + self.left, y + self.top), words, fill=colour, font=font, anchor=anchor)


def to_svg(chart: Chart) -> str:
    """A chart as an SVG element."""
    surface = SvgSurface()
    draw(chart, surface)
    return surface.svg(chart.title)


def to_picture(charts: Sequence[Chart], columns: int = 3) -> Image.Image:
    """Charts side by side."""
    rows = -(-len(charts) // columns)
    image = Image.new("RGB", (columns * WIDTH, rows * HEIGHT), "#ffffff")
    for i, chart in enumerate(charts):
        draw(chart, PictureSurface(image, i % columns * WIDTH, i // columns * HEIGHT))
    return image
