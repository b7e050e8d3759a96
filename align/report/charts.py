"""A study's figures in HTML: the methods at a glance, sweeps, curves, iterations. Nothing where there is nothing to show."""

import math
from collections.abc import Sequence
from statistics import fmean

from align.metrics import Metric, row, shown
from align.report import figures
from align.report.figures import Series
from align.report.html import figure_of, named, text_of
from align.report.methods import Comparisons, Method, Study, Sweep
from align.report.naming import short_name
from align.stats.intervals import Estimate, Over

_ROWS = 8  # methods in the first figures, at most


_POINTS = 150  # of a curve, at most


def at_a_glance(study: Study) -> str:
    """The first methods: the main quantity, what each differs from the highest by, and beside it length or entropy."""
    methods = study.methods[:_ROWS]
    names = [study.main.name, "sample_length" if study.judged else "entropy"]
    drawn = [_of_methods(study, methods, name) for name in names]
    apart = _from_the_highest(study.main, methods)
    drawn.insert(1, apart)
    most = f" The first {len(methods)} of {len(study.methods)} methods." if len(methods) < len(study.methods) else ""
    hollow = ""
    if apart and _alike(study.main, methods):
        hollow = " Hollow: no significant difference from the highest, after Holm's correction."
    note = f'<p class="note">Dashed: the start model, or no difference.{hollow}{most}</p>'
    return f'<div class="figures">{"".join(drawn)}</div>{note}' if any(drawn) else ""


def _of_methods(study: Study, methods: Sequence[Method], name: str) -> str:
    values = [(method, method.figure(name)) for method in methods]
    rows = [(method.number, method.label, value) for method, value in values if value]
    metric = row(name)
    if not rows or metric is None:
        return ""
    items = study.main.items if name == study.main.name else "prompts"
    told = _interval({value.over for *_, value in rows}, items)
    return figure_of(metric.label(), figures.whiskers(rows, metric.label(), study.start(name)), told)


def _from_the_highest(main: Comparisons, methods: Sequence[Method]) -> str:
    best, *others = methods
    against = [(method, main.between(method, best)) for method in others]
    if not any(one for _, one in against):
        return ""
    nothing = Estimate(mean=0.0, low=0.0, high=0.0, seeds=len(best.runs), over="nothing")
    rows = [(best.number, best.label, nothing)]
    for method, one in against:
        if one:
            of = one.made
            value = Estimate(mean=of.difference, low=of.low, high=of.high, seeds=min(of.seeds), over=of.over)
            rows.append((method.number, method.label, value))
    told = _interval({value.over for *_, value in rows}, main.items)
    title = f"{main.quantity} minus that of {best.label}"
    return figure_of(title, figures.whiskers(rows, title, 0.0, _alike(main, methods)), f"paired, {told}")


def _alike(main: Comparisons, methods: Sequence[Method]) -> set[int]:
    """Those that do not differ significantly from the first."""
    against = [(method, main.between(method, methods[0])) for method in methods[1:]]
    return {method.number for method, one in against if one and not one.made.significant}


def _interval(over: set[Over], items: str) -> str:
    """What intervals are over, beside those that have none."""
    words = [of.replace("prompts", items) for of in ("seeds and prompts", "seeds", "prompts") if of in over]
    if len(words) > 1:
        return f"95% interval over {words[0]}; dotted: over {words[1]}"
    return f"95% interval over {words[0]}" if words else "no interval of one seed"


def sweeps(study: Study) -> str:
    """The main quantity of every sweep; the others beside it, or where there are several sweeps behind a click."""
    columns = study.columns(shown("sweep"))
    columns.sort(key=lambda column: column.name != study.main.name)
    drawn = [[_of_sweep(study, sweep, column) for column in columns] for sweep in study.sweeps]
    if not any(map(any, drawn)):
        return ""
    maps = " More colour is higher; framed: the highest; bold: not significantly below it; a dash: no complete run."
    note = f"Mean over seeds, on a line with its 95% interval.{maps if any(sweep.y for sweep in study.sweeps) else ''}"
    first = drawn[0] if len(drawn) == 1 else [of_sweep[0] for of_sweep in drawn]
    more = "".join(f'<div class="maps">{"".join(of_sweep[1:])}</div>' for of_sweep in drawn) if len(drawn) > 1 else ""
    names = text_of("; ".join(column.heading for column in columns[1:]))
    also = f'<details class="paper"><summary>Also: {names}</summary>{more}</details>' if more else ""
    return f'<p class="note">{note}</p><div class="maps">{"".join(first)}</div>{also}'


def _of_sweep(study: Study, sweep: Sweep, column: Metric) -> str:
    svg = _map(study, sweep, column) if sweep.y else _line(study, sweep, column)
    return figure_of(f"{sweep.title}: {column.heading}", svg) if svg else ""


def _map(study: Study, sweep: Sweep, column: Metric) -> str:
    assert sweep.y is not None
    at = {(method.settings[sweep.x], method.settings[sweep.y]): method for method in sweep.methods}
    cells = {cell: value.mean for cell, method in at.items() if (value := method.figure(column.name))}
    if not cells:
        return ""
    best = max(cells, key=lambda cell: cells[cell]) if column.goal == "maximize" else None
    alike = set()
    if best and column.name == study.main.name:
        against = {cell: study.main.between(at[best], method) for cell, method in at.items()}
        alike = {best} | {cell for cell, one in against.items() if one and not one.made.significant}
    x, y = short_name(sweep.x), short_name(sweep.y)
    return figures.heat_map(column.heading, x, y, cells, column.digits, best, alike)


def _line(study: Study, sweep: Sweep, column: Metric) -> str:
    points = [(m.settings[sweep.x], value) for m in sweep.methods if (value := m.figure(column.name))]
    lines = [method for one in study.sweeps if not one.y for method in one.methods]  # on one scale, to be compared
    values = [value for method in lines if (value := method.figure(column.name))]
    if not points:
        return ""
    low, high = min(value.low for value in values), max(value.high for value in values)
    return figures.sweep_line(column.heading, short_name(sweep.x), points, low, high)


def curves(study: Study) -> str:
    """What is comparable of each step."""
    drawn = []
    methods = study.methods[: figures.SERIES]
    for metric in shown("curve"):
        name, title = metric.name, metric.title
        split = _split(methods, name)
        series = [one for method in methods for one in [_series(method, f"{split}/{name}")] if one]
        if series:
            words = "held-out pairs" if split == "eval" else "training pairs"
            drawn.append(figure_of(title, figures.curves(f"{title}, {words}", series, "step"), words))
    if not drawn:
        return ""
    buttons = "".join(
        f'<button type="button" data-series="series-{m.number}" aria-pressed="false">{named(m)}</button>'
        for m in methods
    )
    left_out = len(study.methods) - len(methods)
    most = f" The first {len(methods)} methods, without {left_out} others." if left_out else ""
    own = (
        " Of self-play, each iteration has held-out pairs of its own." if any(r.iterations for r in study.runs) else ""
    )
    return (
        '<p class="note">Mean over seeds, and the range of them behind it. Losses and rewards are left out: each objective '
        f"has its own scale.{most}{own}</p>"
        f'<div class="legend">{buttons}</div><div class="figures">{"".join(drawn)}</div>'
    )


def _split(methods: Sequence[Method], name: str) -> str:
    """Held-out where it was measured between start and end, else training."""
    often = all(len(run.curves.get(f"eval/{name}", ())) > 2 for method in methods for run in method.runs)
    return "eval" if often else "train"


def _series(method: Method, name: str) -> Series | None:
    by_step: dict[int, list[float]] = {}
    for run in method.runs:
        for step, value in run.curves.get(name, ()):
            if math.isfinite(value):
                by_step.setdefault(step, []).append(value)
    if len(by_step) < 2:
        return None
    steps = sorted(by_step)
    size = math.ceil(len(steps) / _POINTS)  # steps to a point
    bins = [steps[i : i + size] for i in range(0, len(steps), size)]
    values = [[by_step[step] for step in some] for some in bins]
    return Series(
        number=method.number,
        label=method.label,
        x=[fmean(some) for some in bins],
        mean=[fmean(map(fmean, of_bin)) for of_bin in values],
        low=[fmean(map(min, of_bin)) for of_bin in values],
        high=[fmean(map(max, of_bin)) for of_bin in values],
    )


def iterations(study: Study) -> str:
    """What self-play came to after each iteration."""
    drawn = []
    methods = [method for method in study.methods if len(method.runs[0].iterations) > 1][: figures.SERIES]
    for metric in shown("iteration"):
        name, title = metric.name, metric.title
        series = []
        for method in methods:
            runs = [[made.get(name, math.nan) for made in run.iterations] for run in method.runs]
            values = [of_one for of_one in zip(*runs, strict=False) if not any(map(math.isnan, of_one))]
            if len(values) > 1:
                series.append(
                    Series(
                        number=method.number,
                        label=method.label,
                        x=range(1, len(values) + 1),
                        mean=[fmean(of_one) for of_one in values],
                        low=[min(of_one) for of_one in values],
                        high=[max(of_one) for of_one in values],
                    )
                )
        if series:
            drawn.append(figure_of(title, figures.curves(title, series, "iteration of self-play")))
    if not drawn:
        return ""
    legend = "".join(named(method) for method in methods)
    return f'<div class="legend">{legend}</div><div class="figures">{"".join(drawn)}</div>'
