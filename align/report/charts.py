"""A study's charts, by matplotlib, as SVG that the page sets in its own colours and type.

Colours are placeholders until the SVG is made; then each becomes a CSS variable of page.css, so that one figure serves
light, dark and paper. Text stays text. A method has a colour and a dash of its own, so that none is told by colour
alone. No figure holds a script: what can be pointed at carries its words in `<title>` or on it.
"""

import io
import itertools
import math
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from align.metrics import Metric, row, shown
from align.report.methods import Method, Sweep, short_name
from align.report.study import Study
from align.stats.intervals import Estimate

Whisker = tuple[int, str, Estimate]  # number and label of a method, and its figure
Point = tuple[float, ...]  # of a line: x, the mean over seeds, the least and the greatest of them

MOST = 8  # methods in a chart, each with a colour; in tables a ninth has the first one again, dashed
_INK, _MUTED, _LINE, _HEAT, _PAPER = "#010101", "#020202", "#030303", "#040404", "#060606"
_COLOURS = [f"#0505{number:02x}" for number in range(MOST)]
_VARIABLES = {_INK: "ink", _MUTED: "muted", _LINE: "line", _HEAT: "heat", _PAPER: "paper"} | {
    colour: f"c{number}" for number, colour in enumerate(_COLOURS)
}
_POINTS = 150  # of a curve, at most
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
    **{f"{axis}tick.color": _LINE for axis in "xy"},
    **{f"{axis}tick.labelcolor": _MUTED for axis in "xy"},
    **{f"{axis}tick.major.size": 0 for axis in "xy"},
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure under its title."""

    title: str
    svg: str
    note: str = ""  # stands small below the title


def at_a_glance(study: Study) -> list[Chart]:
    """Draw the first methods: the main quantity, what each differs from the highest by, and length or entropy."""
    beside = "sample_length" if study.judged else "entropy"
    return [*_of_methods(study, study.main.name), *_from_the_highest(study), *_of_methods(study, beside)]


def hollow(study: Study) -> set[int]:
    """Select the methods of the first charts that do not differ significantly from the highest."""
    return {one.a.number for one in study.against_best if one.a.number < MOST and not one.result.significant}


def _of_methods(study: Study, name: str) -> list[Chart]:
    rows = [(m.number, m.label, m.figures[name]) for m in study.methods[:MOST] if name in m.figures]
    metric = row(name)
    if not rows or metric is None:
        return []
    items = study.main.items if name == study.main.name else "prompts"
    svg = _whiskers(rows, metric.label(), study.start(name))
    return [Chart(title=metric.label(), svg=svg, note=_interval(rows, items))]


def _from_the_highest(study: Study) -> list[Chart]:
    others = [one for one in study.against_best if one.a.number < MOST]
    if not others:
        return []
    best = others[0].b
    rows: list[Whisker] = [(best.number, best.label, Estimate(mean=0.0, low=0.0, high=0.0, over="nothing"))]
    rows += [(one.a.number, one.a.label, one.result) for one in others]
    title = f"{study.main.quantity} minus that of {best.label}"
    svg = _whiskers(rows, title, 0.0, hollow(study))
    return [Chart(title=title, svg=svg, note=f"paired, {_interval(rows, study.main.items)}")]


def _interval(rows: Sequence[Whisker], items: str) -> str:
    """Say what intervals are over, beside those that have none."""
    over = {value.over for *_, value in rows}
    words = [of.replace("prompts", items) for of in ("seeds and prompts", "seeds", "prompts") if of in over]
    if len(words) > 1:
        return f"95% interval over {words[0]}; dotted: over {words[1]}"
    return f"95% interval over {words[0]}" if words else "no interval of one seed"


def swept(study: Study) -> list[Metric]:
    """Select the metrics that sweeps are drawn of, the main quantity first."""
    return sorted(study.columns(shown("sweep")), key=lambda metric: metric.name != study.main.name)


def of_sweep(study: Study, sweep: Sweep) -> list[Chart]:
    """Draw a sweep, once for each of its metrics."""
    drawn = [(metric, (_map if sweep.y else _line)(study, sweep, metric)) for metric in swept(study)]
    return [Chart(title=f"{sweep.title}: {metric.heading}", svg=svg) for metric, svg in drawn if svg]


def _map(study: Study, sweep: Sweep, metric: Metric) -> str:
    """Draw a value for each (x, y), written on it; deeper is higher, the highest is framed, a dash has no complete run."""
    assert sweep.y is not None
    at = {(method.settings[sweep.x], method.settings[sweep.y]): method for method in sweep.methods}
    cells = {cell: value.mean for cell, method in at.items() if (value := method.figures.get(metric.name))}
    if not cells:
        return ""
    best = max(cells, key=lambda cell: cells[cell]) if metric.goal == "maximize" else None
    bold = set()  # not significantly below the highest
    if best and metric.name == study.main.name:
        against = {cell: study.main.between(at[best], method) for cell, method in at.items()}
        bold = {best} | {cell for cell, one in against.items() if one and not one.result.significant}
    xs, ys = (sorted({cell[axis] for cell in cells}) for axis in (0, 1))
    low, high = min(cells.values()), max(cells.values())
    with _figure(0.6 + 0.6 * len(xs), 0.85 + 0.36 * len(ys)) as (figure, axes):
        for (column, x), (line, y) in itertools.product(enumerate(xs), enumerate(ys)):
            mean = cells.get((x, y))
            depth = 0.0 if mean is None else 0.06 + 0.5 * ((mean - low) / (high - low) if high > low else 0.5)
            corner = (column - 0.48, line - 0.46)
            axes.add_patch(Rectangle(corner, 0.96, 0.92, color=_HEAT, alpha=depth, linewidth=0))
            if (x, y) == best:
                axes.add_patch(Rectangle(corner, 0.96, 0.92, fill=False, edgecolor=_INK, linewidth=1.4))
            text = "–" if mean is None else f"{mean:.{metric.digits}f}".replace("-", "−")
            colour, weight = _MUTED if mean is None else _INK, "bold" if (x, y) in bold else "normal"
            axes.text(column, line, text, ha="center", va="center", color=colour, fontweight=weight)
        axes.set(xlim=(-0.5, len(xs) - 0.5), ylim=(-0.5, len(ys) - 0.5), xlabel=short_name(sweep.x))
        axes.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
        axes.set_yticks(range(len(ys)), [f"{y:g}" for y in ys])
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        # Level, as beside two rows there is no room for it.
        axes.set_title(short_name(sweep.y), loc="left", fontsize=10, color=_MUTED)
        return _svg(figure, metric.heading)


def _line(study: Study, sweep: Sweep, metric: Metric) -> str:
    """Draw a figure over one number, with its intervals, all sweeps on one scale."""
    points = [(m.settings[sweep.x], value) for m in sweep.methods if (value := m.figures.get(metric.name))]
    if not points:
        return ""
    lines = [method for one in study.sweeps if not one.y for method in one.methods]
    values = [value for method in lines if (value := method.figures.get(metric.name))]
    points.sort(key=lambda point: point[0])
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
        axes.update_datalim([(xs[0], min(value.low for value in values)), (xs[0], max(value.high for value in values))])
        axes.autoscale_view()
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(short_name(sweep.x))
        return _svg(figure, metric.heading)


def curves(study: Study) -> list[Chart]:
    """Draw what is comparable of each step."""
    drawn = []
    methods = study.methods[:MOST]
    for metric in shown("curve"):
        held_out = [run.curves.get(f"eval/{metric.name}", ()) for method in methods for run in method.runs]
        often = all(len(points) > 2 for points in held_out)  # between start and end, too
        split, words = ("eval", "held-out pairs") if often else ("train", "training pairs")
        name = f"{split}/{metric.name}"
        lines = {m.number: _line_of(point for run in m.runs for point in run.curves.get(name, ())) for m in methods}
        if any(lines.values()):
            svg = _curves(f"{metric.title}, {words}", lines, "step")
            drawn.append(Chart(title=metric.title, svg=svg, note=words))
    return drawn


def _line_of(points: Iterable[tuple[int, float]]) -> list[Point]:
    """Return a line of at most `_POINTS` points over the points of all seeds, each of some steps; none of one step."""
    by_step: dict[int, list[float]] = {}
    for step, value in points:
        if math.isfinite(value):
            by_step.setdefault(step, []).append(value)
    steps = sorted(by_step) if len(by_step) > 1 else []
    size = math.ceil(len(steps) / _POINTS) or 1
    bins = [steps[i : i + size] for i in range(0, len(steps), size)]
    return [(fmean(some), *(fmean(of(by_step[step]) for step in some) for of in (fmean, min, max))) for some in bins]


def played(study: Study) -> list[Method]:
    """Select the methods of self-play that have several iterations."""
    return [method for method in study.methods if len(method.runs[0].iterations) > 1][:MOST]


def iterations(study: Study) -> list[Chart]:
    """Draw the figures of self-play after each iteration."""
    drawn = []
    for metric in shown("iteration"):
        lines = {}
        for method in played(study):
            rows = [numbered for run in method.runs for numbered in enumerate(run.iterations, 1)]
            lines[method.number] = _line_of((number, its.get(metric.name, math.nan)) for number, its in rows)
        if any(lines.values()):
            svg = _curves(metric.title, lines, "iteration of self-play")
            drawn.append(Chart(title=metric.title, svg=svg))
    return drawn


def _whiskers(rows: Sequence[Whisker], label: str, line: float | None, hollow: Set[int] = frozenset()) -> str:
    """Draw a row for each (number, label, estimate): the mean, its 95% interval where there is one, a dashed line.

    Among intervals over seeds one over prompts only is dotted: it promises less, however short it is.
    """
    mixed = len({value.over for *_, value in rows} - {"nothing"}) > 1
    above = max(len(name) for _, name, _ in rows) > _LONG_LABEL  # else the labels leave no room for the rest
    names = ["\n".join(textwrap.wrap(name, _LINE_OF_LABEL)) for _, name, _ in rows]
    lines = 1 + max(name.count("\n") for name in names)
    with _figure(_WIDTH, 0.55 + (0.25 + 0.15 * lines if above else 0.26) * len(rows)) as (figure, axes):
        for at, (number, _, value) in enumerate(rows):
            colour = _COLOURS[number % MOST]
            if value.over != "nothing":
                dash = (0, (1, 1)) if mixed and value.over == "prompts" else "-"
                ends = [value.low, value.high]
                axes.plot(ends, [at, at], linestyle=dash, color=colour, linewidth=2, alpha=0.55, gid=_gid(number))
            inside = _PAPER if number in hollow else colour
            marker = _MARKERS[number % MOST]
            axes.plot([value.mean], [at], marker, color=colour, markersize=6, markerfacecolor=inside, gid=_gid(number))
            if above:
                beside: Any = {"transform": axes.get_yaxis_transform(), "fontsize": 9, "va": "bottom", "bbox": _BEHIND}
                axes.text(0.005, at - 0.25, names[at], **beside)
        if line is not None:
            axes.axvline(line, color=_MUTED, linewidth=1, linestyle=(0, (3, 3)))
        beside_axis = [] if above else names
        axes.set_yticks(range(len(beside_axis)), beside_axis)
        axes.tick_params(axis="y", labelcolor=_INK)
        axes.set_ylim(len(rows) - 0.4, -0.9 if above else -0.6)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        return _svg(figure, label)


def _curves(title: str, lines: Mapping[int, Sequence[Point]], x_label: str) -> str:
    """Draw the lines of methods by number, over steps or iterations; the range over seeds is behind them."""
    with _figure(_WIDTH, 2.2) as (figure, axes):
        for number, points in lines.items():
            if not points:
                continue
            x, mean, low, high = zip(*points, strict=True)
            colour, dash = _COLOURS[number % MOST], _DASHES[number // MOST % len(_DASHES)]
            if low != high:
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0, gid=_gid(number))
            marker = _MARKERS[number % MOST] if len(x) <= 12 else None
            axes.plot(x, mean, color=colour, linestyle=dash, marker=marker, markersize=3.5, gid=_gid(number))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(x_label)
        return _svg(figure, title)


@lru_cache
def key_of(number: int) -> str:
    """Draw the mark of a method in legends and tables: its colour, dash and marker."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(0.36, 0.16))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.axis("off")
        axes.set(xlim=(0, 1), ylim=(0, 1))
        colour, dash = _COLOURS[number % MOST], _DASHES[number // MOST % len(_DASHES)]
        axes.plot([0.08, 0.92], [0.5, 0.5], color=colour, linestyle=dash)
        axes.plot([0.5], [0.5], _MARKERS[number % MOST], color=colour, markersize=4)
        return _svg(figure, "")


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
