"""The figures, by matplotlib, as SVG that the page sets in its own colours and type.

Colours are placeholders until the SVG is made; then each becomes a CSS variable of page.css, so that one figure serves
light, dark and paper. Text stays text. A series has a colour and a dash of its own, so that none is told by colour
alone. No figure holds a script: what can be pointed at carries its words in `<title>` or on it.
"""

import io
import itertools
import math
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import lru_cache
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from align.stats.intervals import Estimate

Point = tuple[float, ...]  # of a line: x, the mean over seeds, the least and the greatest of them

SERIES = 8  # colours; a ninth method has the first one again, dashed
_INK, _MUTED, _LINE, _HEAT, _PAPER = "#010101", "#020202", "#030303", "#040404", "#060606"
_COLOURS = [f"#0505{number:02x}" for number in range(SERIES)]
_VARIABLES = {_INK: "ink", _MUTED: "muted", _LINE: "line", _HEAT: "heat", _PAPER: "paper"} | {
    colour: f"c{number}" for number, colour in enumerate(_COLOURS)
}
_WIDTH = 3.5  # inches, of 96 pixels each: what a phone shows unscaled
_LONG_LABEL = 18  # characters
_LINE_OF_LABEL = 44
_BEHIND: Any = {"facecolor": _PAPER, "edgecolor": "none", "pad": 0.8}
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
_MARKERS = "osD^vPXh"

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "align",
    "font.size": 10,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "text.parse_math": False,  # a label may hold a dollar
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def whiskers(
    rows: Sequence[tuple[int, str, Estimate]], label: str, line: float | None, hollow: Set[int] = frozenset()
) -> str:
    """Draw a row for each (number, label, estimate): the mean, its 95% interval where there is one, a dashed line.

    Among intervals over seeds one over prompts only is dotted: it promises less, however short it is.
    """
    mixed = len({value.over for *_, value in rows} - {"nothing"}) > 1
    above = max(len(name) for _, name, _ in rows) > _LONG_LABEL  # else the labels leave no room for the rest
    names = ["\n".join(textwrap.wrap(name, _LINE_OF_LABEL)) for _, name, _ in rows]
    lines = 1 + max(name.count("\n") for name in names)
    with _figure(_WIDTH, 0.55 + (0.25 + 0.15 * lines if above else 0.26) * len(rows)) as (figure, axes):
        for at, (number, _, value) in enumerate(rows):
            colour = _COLOURS[number % SERIES]
            if value.over != "nothing":
                dash = (0, (1, 1)) if mixed and value.over == "prompts" else "-"
                ends = [value.low, value.high]
                axes.plot(ends, [at, at], linestyle=dash, color=colour, linewidth=2, alpha=0.55, gid=_gid(number))
            inside = _PAPER if number in hollow else colour
            marker = _MARKERS[number % SERIES]
            axes.plot([value.mean], [at], marker, color=colour, markersize=6, markerfacecolor=inside, gid=_gid(number))
            if above:
                beside: Any = {"transform": axes.get_yaxis_transform(), "fontsize": 9, "va": "bottom", "bbox": _BEHIND}
                axes.text(0.005, at - 0.25, names[at], **beside)
        if line is not None:
            axes.axvline(line, color=_MUTED, linewidth=1, linestyle=(0, (3, 3)))
        if above:
            axes.set_yticks([])
        else:
            axes.set_yticks(range(len(rows)), [name for _, name, _ in rows])
        axes.tick_params(axis="y", labelcolor=_INK)
        axes.set_ylim(len(rows) - 0.4, -0.9 if above else -0.6)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        return _svg(figure, label)


def curves(title: str, lines: Mapping[int, Sequence[Point]], x_label: str) -> str:
    """Draw the lines of methods by number, over steps or iterations; the range over seeds is behind them."""
    with _figure(_WIDTH, 2.2) as (figure, axes):
        for number, points in lines.items():
            if not points:
                continue
            x, mean, low, high = zip(*points, strict=True)
            colour, dash = _COLOURS[number % SERIES], _DASHES[number // SERIES % len(_DASHES)]
            if low != high:
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0, gid=_gid(number))
            marker = _MARKERS[number % SERIES] if len(x) <= 12 else None
            axes.plot(x, mean, color=colour, linestyle=dash, marker=marker, markersize=3.5, gid=_gid(number))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(x_label)
        return _svg(figure, title)


def sweep_line(title: str, x_label: str, points: Sequence[tuple[float, Estimate]], low: float, high: float) -> str:
    """Draw a figure over one number, with its intervals; the axis holds `low` to `high`."""
    points = sorted(points, key=lambda point: point[0])
    xs = [x for x, _ in points]
    with _figure(_WIDTH, 2.2) as (figure, axes):
        axes.plot(xs, [value.mean for _, value in points], color=_COLOURS[0], marker="o", markersize=5)
        for x, value in points:
            if value.over != "nothing":
                axes.plot([x, x], [value.low, value.high], color=_COLOURS[0], linewidth=2, alpha=0.55)
        if min(xs) > 0 and max(xs) / min(xs) >= 8:
            axes.set_xscale("log")
        axes.set_xticks(xs, [f"{x:g}" for x in xs])
        axes.minorticks_off()
        axes.update_datalim([(xs[0], low), (xs[0], high)])
        axes.autoscale_view()
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(x_label)
        return _svg(figure, title)


def heat_map(
    title: str,
    x_label: str,
    y_label: str,
    cells: Mapping[tuple[float, float], float],
    digits: int,
    best: tuple[float, float] | None,
    bold: Set[tuple[float, float]],
) -> str:
    """Draw a value for each (x, y), written on it; deeper is higher, `best` is framed. An empty cell has no complete run."""
    xs, ys = (sorted({key[axis] for key in cells}) for axis in (0, 1))
    finite = [value for value in cells.values() if math.isfinite(value)]
    low, high = min(finite), max(finite)
    with _figure(0.6 + 0.6 * len(xs), 0.85 + 0.36 * len(ys)) as (figure, axes):
        for (column, x), (row, y) in itertools.product(enumerate(xs), enumerate(ys)):
            value = cells.get((x, y), math.nan)
            known = math.isfinite(value)
            depth = 0.06 + 0.5 * ((value - low) / (high - low) if high > low else 0.5) if known else 0.0
            where = (column - 0.48, row - 0.46)
            axes.add_patch(Rectangle(where, 0.96, 0.92, color=_HEAT, alpha=depth, linewidth=0))
            if (x, y) == best:
                axes.add_patch(Rectangle(where, 0.96, 0.92, fill=False, edgecolor=_INK, linewidth=1.4))
            text = f"{value:.{digits}f}".replace("-", "−") if known else "–"
            weight = "bold" if (x, y) in bold else "normal"
            colour = _INK if known else _MUTED
            axes.text(column, row, text, ha="center", va="center", color=colour, fontweight=weight)
        axes.set(xlim=(-0.5, len(xs) - 0.5), ylim=(-0.5, len(ys) - 0.5), xlabel=x_label)
        axes.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
        axes.set_yticks(range(len(ys)), [f"{y:g}" for y in ys])
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.set_title(y_label, loc="left", fontsize=10, color=_MUTED)  # level: beside two rows there is no room for it
        return _svg(figure, title)


@lru_cache
def key_of(number: int) -> str:
    """Draw the mark of a method in legends and tables: its colour, dash and marker."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(0.36, 0.16))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.axis("off")
        axes.set(xlim=(0, 1), ylim=(0, 1))
        colour, dash = _COLOURS[number % SERIES], _DASHES[number // SERIES % len(_DASHES)]
        axes.plot([0.08, 0.92], [0.5, 0.5], color=colour, linestyle=dash)
        axes.plot([0.5], [0.5], _MARKERS[number % SERIES], color=colour, markersize=4)
        return _svg(figure, "")


# The SVG --------------------------------------------------------------------------------------------------------------


def _gid(number: int) -> str:
    return f"series-{number}"


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """Open a figure of so many inches, at 96 pixels each on the page."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots()


def _svg(figure: Figure, label: str) -> str:
    file = io.StringIO()
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of letters that only the browser's font has
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="(series-\d+)">', r'<g class="series \1">', svg)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # an id may be on a page once
    svg = re.sub(r' id="\w+_\d+"|<style type="text/css">.*?</style>| transform="rotate\(-0 [^"]*\)"', "", svg)
    svg = re.sub(r" font-family: [^;]*;", "", svg)
    for placeholder, variable in _VARIABLES.items():
        svg = svg.replace(placeholder, f"var(--{variable})")
    width, height = (float(value) * 96 / 72 for value in re.findall(r'(?:width|height)="([\d.]+)pt"', svg)[:2])
    told = f'role="img" aria-label="{escape(label)}"' if label else 'aria-hidden="true"'
    least = f"min-width: {0.75 * width:.0f}px"  # what is wider scrolls
    opening = f'<svg {told} width="{width:.0f}" height="{height:.0f}" style="{least}" '
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', lambda found: f"{opening}{found[1]}>", svg, count=1)
    return re.sub(r"\s*\n\s*", "\n", svg)
