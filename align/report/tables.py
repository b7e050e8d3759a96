"""The tables of methods, as strings that page and Markdown share, and how figures are written."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from align.metrics import Metric, row, shown
from align.report.methods import Method, Study
from align.stats.intervals import Estimate, mean_over_seeds


@dataclass(frozen=True, kw_only=True)
class Table:
    """A row for each method, and at the end, as None, the start model. Cells are a figure and what stands small below it."""

    title: str
    heads: list[str]  # but for the method's
    rows: list[tuple[Method | None, list[tuple[str, str]]]]
    figures: str  # what they are; "{small}" is how those that stand small are shown
    notes: list[str]
    columns: list[Metric]  # that are to be explained

    def told(self, small: str) -> list[str]:
        """All that stands with it, on a page or in a text."""
        return [*filter(None, [self.figures.format(small=small)]), *self.notes]


def tables(study: Study) -> list[Table]:
    """All figures of the methods."""
    made = []
    if columns := study.columns(shown("column", "answers", "report")):
        made.append(_of_answers(study, columns))
    if columns := study.columns(shown("column", "pairs", "cost")):
        made.append(_compared(study, columns, "Held-out pairs and cost"))
    if columns := study.columns(shown("column", "suite")):
        made.append(_of_suites(study, columns, "Benchmarks"))
    suites = {name for method in study.methods for run in method.runs for name in run.suites}
    of_suite: dict[str, list[Metric]] = {}
    for name in study.other_results:
        suite, _, rest = name.partition("/")
        own = suite in suites
        of_suite.setdefault(suite if own else "", []).append(_other(name, rest if own else name, own))
    for suite, columns in sorted(of_suite.items()):
        made.append(_of_suites(study, columns, f"Suite {suite}" if suite else "Further results"))
    return made


def _of_answers(study: Study, columns: list[Metric]) -> Table:
    made = _compared(study, columns, "Answers to held-out prompts")
    if not any(method.shares() for method in study.methods):
        return made
    at = made.heads.index("win rate") + 1 if "win rate" in made.heads else 1
    parts = [shares(method) if method else "–" for method, _ in made.rows]
    return Table(
        title=made.title,
        heads=[*made.heads[:at], _unbroken("win / tie / loss, %"), *made.heads[at:]],
        rows=[
            (method, [*cells[:at], (_unbroken(part), ""), *cells[at:]])
            for (method, cells), part in zip(made.rows, parts, strict=True)
        ],
        figures=made.figures,
        notes=made.notes,
        columns=columns,
    )


def _other(name: str, heading: str, of_suite: bool) -> Metric:
    if of_suite and heading.rpartition("/")[2] == "length":
        heading += ", characters"  # of all suites
    return row(name) or Metric(name, "suite", heading, unit="any")


def _compared(study: Study, columns: list[Metric], title: str) -> Table:
    """Means over all seeds of a method."""
    rows: list[tuple[Method | None, list[tuple[str, str]]]] = []
    over = set()
    for method in study.methods:
        cells = [(str(len(method.runs)), "")]
        for column in columns:
            value = method.figure(column.name)
            small = bounds(column, value)
            cells.append((figure(column, value.mean if value else None), small))
            if value and small:
                over.add(value.over)
        rows.append((method, cells))
    rows.append((None, [("", ""), *((figure(column, study.start(column.name)), "") for column in columns)]))
    what, items = ("the win rate", "prompts") if columns[0].name == "win_rate" else ("accuracies", "held-out pairs")
    told = [f"of {what} over seeds and {items}"] * ("seeds and prompts" in over)
    told += [f"of {what} of one seed over {items}"] * ("prompts" in over)
    told += [f"of {'the others' if told else 'all'} over seeds"] * ("seeds" in over)
    one_each = all(len(method.runs) == 1 for method in study.methods)
    figures = "One seed each: no intervals." if one_each else "Mean over seeds."
    if told:
        figures = f"Mean over seeds; {{small}}, its 95% interval, {', '.join(told)}."
    if over == {"prompts"}:
        figures = f"One seed each; {{small}}, the 95% interval of {what} over {items}."
    return Table(
        title=title,
        heads=["seeds", *(column.heading or column.title for column in columns)],
        rows=rows,
        figures=figures,
        notes=[],
        columns=columns,
    )


def _of_suites(study: Study, columns: list[Metric], title: str) -> Table:
    """Means over the seeds that were evaluated."""
    rows: list[tuple[Method | None, list[tuple[str, str]]]] = []
    intervals = errors = False
    for method in study.methods:
        cells, seeds = [], set()
        for column in columns:
            values = method.of_suite(column.name)
            value = mean_over_seeds(values) if values else None
            interval, error = bounds(column, value), _standard_error(method, column)
            intervals, errors = intervals or bool(interval), errors or bool(error)
            cells.append((figure(column, value.mean if value else None), interval or error))
            seeds |= {len(values)} if values else set()
        if seeds:
            rows.append((method, [(f"{span(sorted(seeds))} of {len(method.runs)}", ""), *cells]))
    if any(study.start(column.name) is not None for column in columns):
        rows.append((None, [("", ""), *((figure(column, study.start(column.name)), "") for column in columns)]))
    told = ["its 95% interval over seeds only: all runs answered the same prompts"] * intervals
    told += ["of one seed ± the standard error over prompts"] * errors
    measured = {column.name.partition("/")[0] for column in columns}
    notes = {name: note for method in study.methods for run in method.runs for name, note in run.suites.items()}
    return Table(
        title=title,
        heads=["seeds", *(column.heading or column.title for column in columns)],
        rows=rows,
        figures=f"Mean over seeds; {{small}}, {', or '.join(told)}." if told else "",
        notes=[f"{name}: {note}." for name, note in notes.items() if name in measured and note],
        columns=[column for column in columns if column.heading],
    )


def _standard_error(method: Method, column: Metric) -> str:
    """A suite's own, where it was run on one seed."""
    suite, _, name = column.name.rpartition("/")
    of = {"win_rate": "standard_error", "lc_win_rate": "lc_standard_error"}.get(name, f"{name}/standard_error")
    errors = method.of_suite(f"{suite}/{of}")
    return f"± {figure(column, errors[0])} s.e." if len(errors) == 1 else ""


def figure(column: Metric, value: float | None) -> str:
    """A column's figure as it is read."""
    if value is None or not math.isfinite(value):
        return "–"
    match column.unit:
        case "percent":
            return number(100 * value, 1)
        case "seconds":
            size, unit = (1, "s") if value < 120 else (60, "min") if value < 7200 else (3600, "h")
            return _unbroken(f"{value / size:.1f} {unit}")
        case "count":
            size, unit = (1, "") if value < 10_000 else (1_000, "k") if value < 1_000_000 else (1_000_000, "M")
            return f"{value / size:,.{0 if size == 1 else 1}f}{unit}"
        case "GiB":
            return _unbroken(f"{value:.{2 if value < 10 else 1}f} GiB")
        case "any":
            is_count = value == int(value) and abs(value) > 1
            return number(value, 0 if is_count or abs(value) >= 100 else 1 if abs(value) >= 10 else 3)
    return number(value, column.digits)


def number(value: float | None, digits: int = 3) -> str:
    """A figure as it is read; an en dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}".replace("-", "−")


def bounds(column: Metric, value: Estimate | None) -> str:
    """ "0.61 to 0.68"; nothing where one value or equal ones cannot say, and of a cost. Of a share what a share can be."""
    if value is None or value.over == "nothing" or column.unit in ("seconds", "count", "GiB"):
        return ""
    if value.high - value.low <= 1e-9 * abs(value.mean):  # all seeds agree, which is no certainty
        return ""
    is_share = column.unit in ("share", "percent")
    low, high = (max(0.0, value.low), min(1.0, value.high)) if is_share else (value.low, value.high)
    return f"{figure(column, low)} to {figure(column, high)}"


def _unbroken(words: str) -> str:
    return words.replace(" ", "\N{NO-BREAK SPACE}")


def shares(method: Method) -> str:
    """ "55 / 18 / 27", percent of wins, ties and losses against the start model."""
    parts = method.shares()
    return " / ".join(f"{100 * part:.0f}" for part in parts) if parts else "–"


def count(number_of: int, word: str) -> str:
    """ "1 run", "2 runs"."""
    return f"{number_of} {word}{'' if number_of == 1 else 's'}"


def span(values: Sequence[int]) -> str:
    """ "3", or "2 to 3"."""
    return str(values[0]) if values[0] == values[-1] else f"{values[0]} to {values[-1]}"
