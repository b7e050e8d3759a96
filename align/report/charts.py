"""A study's charts, each a figure with its words: the methods at a glance, sweeps, curves, iterations."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from align.metrics import Metric, row, shown
from align.report import figures
from align.report.figures import Point
from align.report.methods import Method, Sweep, short_name
from align.report.study import Study
from align.stats.intervals import Estimate, Over

MOST = figures.SERIES  # methods in a chart
_POINTS = 150  # of a curve, at most


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure under its title."""

    title: str
    svg: str
    note: str = ""  # stands small below the title


def at_a_glance(study: Study) -> list[Chart]:
    """Draw the first methods: the main quantity, what each differs from the highest by, and length or entropy."""
    methods = study.methods[:MOST]
    return [
        *_of_methods(study, methods, study.main.name),
        *_from_the_highest(study, methods),
        *_of_methods(study, methods, "sample_length" if study.judged else "entropy"),
    ]


def hollow(study: Study) -> set[int]:
    """Select the methods of the first charts that do not differ significantly from the highest."""
    against = [(method, study.main.between(method, study.methods[0])) for method in study.methods[1:MOST]]
    return {method.number for method, one in against if one and not one.result.significant}


def _of_methods(study: Study, methods: Sequence[Method], name: str) -> list[Chart]:
    rows = [(method.number, method.label, value) for method in methods if (value := method.figures.get(name))]
    metric = row(name)
    if not rows or metric is None:
        return []
    items = study.main.items if name == study.main.name else "prompts"
    svg = figures.whiskers(rows, metric.label(), study.start(name))
    return [Chart(title=metric.label(), svg=svg, note=_interval({value.over for *_, value in rows}, items))]


def _from_the_highest(study: Study, methods: Sequence[Method]) -> list[Chart]:
    best, *others = methods
    rows = [(best.number, best.label, Estimate(mean=0.0, low=0.0, high=0.0, over="nothing"))]
    for method in others:
        if one := study.main.between(method, best):
            rows.append((method.number, method.label, one.result))
    if len(rows) == 1:
        return []
    title = f"{study.main.quantity} minus that of {best.label}"
    interval = _interval({value.over for *_, value in rows}, study.main.items)
    return [Chart(title=title, svg=figures.whiskers(rows, title, 0.0, hollow(study)), note=f"paired, {interval}")]


def _interval(over: set[Over], items: str) -> str:
    """Say what intervals are over, beside those that have none."""
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
    assert sweep.y is not None
    at = {(method.settings[sweep.x], method.settings[sweep.y]): method for method in sweep.methods}
    cells = {cell: value.mean for cell, method in at.items() if (value := method.figures.get(metric.name))}
    if not cells:
        return ""
    best = max(cells, key=lambda cell: cells[cell]) if metric.goal == "maximize" else None
    alike = set()
    if best and metric.name == study.main.name:
        against = {cell: study.main.between(at[best], method) for cell, method in at.items()}
        alike = {best} | {cell for cell, one in against.items() if one and not one.result.significant}
    x, y = short_name(sweep.x), short_name(sweep.y)
    return figures.heat_map(metric.heading, x, y, cells, metric.digits, best, alike)


def _line(study: Study, sweep: Sweep, metric: Metric) -> str:
    points = [(m.settings[sweep.x], value) for m in sweep.methods if (value := m.figures.get(metric.name))]
    lines = [method for one in study.sweeps if not one.y for method in one.methods]  # on one scale, to be compared
    values = [value for method in lines if (value := method.figures.get(metric.name))]
    if not points:
        return ""
    low, high = min(value.low for value in values), max(value.high for value in values)
    return figures.sweep_line(metric.heading, short_name(sweep.x), points, low, high)


def curves(study: Study) -> list[Chart]:
    """Draw what is comparable of each step."""
    drawn = []
    methods = study.methods[:MOST]
    for metric in shown("curve"):
        held_out = [run.curves.get(f"eval/{metric.name}", ()) for method in methods for run in method.runs]
        often = all(len(points) > 2 for points in held_out)  # between start and end, too
        split, words = ("eval", "held-out pairs") if often else ("train", "training pairs")
        lines = {method.number: _line_of(_by_step(method, f"{split}/{metric.name}")) for method in methods}
        if any(lines.values()):
            svg = figures.curves(f"{metric.title}, {words}", lines, "step")
            drawn.append(Chart(title=metric.title, svg=svg, note=words))
    return drawn


def _by_step(method: Method, name: str) -> dict[int, list[float]]:
    """Return the values of all seeds at each step."""
    by_step: dict[int, list[float]] = {}
    for step, value in (point for run in method.runs for point in run.curves.get(name, ())):
        if math.isfinite(value):
            by_step.setdefault(step, []).append(value)
    return by_step


def _line_of(by_step: Mapping[int, Sequence[float]]) -> list[Point]:
    """Return a line of at most `_POINTS` points, each the mean of some steps; nothing for a single step."""
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
            runs = [[iteration.get(metric.name, math.nan) for iteration in run.iterations] for run in method.runs]
            known = [values for values in zip(*runs, strict=False) if not any(map(math.isnan, values))]
            lines[method.number] = _line_of(dict(enumerate(known, 1)))
        if any(lines.values()):
            svg = figures.curves(metric.title, lines, "iteration of self-play")
            drawn.append(Chart(title=metric.title, svg=svg))
    return drawn
