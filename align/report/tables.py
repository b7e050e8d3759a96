"""The tables of methods, as strings that page and Markdown share, and how figures are written."""

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass

from align.metrics import Metric, row, shown
from align.report.methods import Method, shares
from align.report.study import Study
from align.stats.intervals import Estimate, Over, mean_over_seeds

Cell = tuple[str, str]  # a figure, and what stands small below it


@dataclass(frozen=True, kw_only=True)
class Table:
    """A row for each method, and at the end, as None, the start model."""

    title: str
    heads: list[str]  # but for the method's
    rows: list[tuple[Method | None, list[Cell]]]
    figures: str  # a sentence on the figures; "{small}" is how those that stand small are shown
    notes: list[str]
    columns: list[Metric]  # that are to be explained

    def sentences(self, small: str) -> list[str]:
        """All that stands with the table, on a page or in a text."""
        return [*filter(None, [self.figures.format(small=small)]), *self.notes]


def tables(study: Study) -> list[Table]:
    """Lay out all figures of the methods."""
    kinds = (
        ("Answers to held-out prompts", _compared, shown("column", "answers", "report")),
        ("Held-out pairs and cost", _compared, shown("column", "pairs", "cost")),
        ("Benchmarks", _of_suites, shown("column", "suite")),
    )
    found = [lay_out(study, columns, title) for title, lay_out, all_of in kinds if (columns := study.columns(all_of))]
    suites = {name for method in study.methods for run in method.runs for name in run.suites}
    of_suite: dict[str, list[Metric]] = {}
    for name in study.other_results:
        suite, _, rest = name.partition("/")
        of_suite.setdefault(suite if suite in suites else "", []).append(_other(name, rest if suite in suites else ""))
    for suite, columns in sorted(of_suite.items()):
        found.append(_of_suites(study, columns, f"Suite {suite}" if suite else "Further results"))
    return found


def _other(name: str, of_suite: str) -> Metric:
    """Return the row of a metric, or one for a figure that only a suite knows."""
    heading = of_suite + (", characters" if of_suite.rpartition("/")[2] == "length" else "")  # of all suites
    return row(name) or Metric(name, "suite", heading or name, unit="any")


def _compared(study: Study, columns: list[Metric], title: str) -> Table:
    """Lay out means over all seeds of a method."""
    rows: list[tuple[Method | None, list[Cell]]] = []
    over: set[Over] = set()
    for method in study.methods:
        values = [method.figure(column.name) for column in columns]
        cells = [(figure(c, v.mean if v else None), bounds(c, v)) for c, v in zip(columns, values, strict=True)]
        over |= {value.over for value, (_, small) in zip(values, cells, strict=True) if value and small}
        rows.append((method, [(str(len(method.runs)), ""), *cells]))
    rows.append((None, [("", ""), *((figure(column, study.start(column.name)), "") for column in columns)]))
    heads = ["seeds", *(column.heading for column in columns)]
    if columns[0].of in ("answers", "report") and any(shares(method.runs) for method in study.methods):
        at = 2 if columns[0].name == "win_rate" else 1
        heads.insert(at, _unbroken("win / tie / loss, %"))
        for method_, cells in rows:
            parts = shares(method_.runs) if method_ else None
            cells.insert(at, (_unbroken(" / ".join(f"{100 * part:.0f}" for part in parts)) if parts else "–", ""))
    return Table(
        title=title,
        heads=heads,
        rows=rows,
        figures=_sentence(study, over, columns[0].name == "win_rate"),
        notes=[],
        columns=columns,
    )


def _sentence(study: Study, over: Set[Over], judged: bool) -> str:
    """Say what the figures are, and over what their intervals are."""
    what, items = ("the win rate", "prompts") if judged else ("accuracies", "held-out pairs")
    if over == {"prompts"}:
        return f"One seed each; {{small}}, the 95% interval of {what} over {items}."
    intervals = [f"of {what} over seeds and {items}"] * ("seeds and prompts" in over)
    intervals += [f"of {what} of one seed over {items}"] * ("prompts" in over)
    intervals += [f"of {'the others' if intervals else 'all'} over seeds"] * ("seeds" in over)
    if intervals:
        return f"Mean over seeds; {{small}}, its 95% interval, {', '.join(intervals)}."
    one_each = all(len(method.runs) == 1 for method in study.methods)
    return "One seed each: no intervals." if one_each else "Mean over seeds."


def _of_suites(study: Study, columns: list[Metric], title: str) -> Table:
    """Lay out means over the seeds that were evaluated."""
    rows: list[tuple[Method | None, list[Cell]]] = []
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
    small = ["its 95% interval over seeds only: all runs answered the same prompts"] * intervals
    small += ["of one seed ± the standard error over prompts"] * errors
    measured = {column.name.partition("/")[0] for column in columns}
    notes = {name: note for method in study.methods for run in method.runs for name, note in run.suites.items()}
    return Table(
        title=title,
        heads=["seeds", *(column.heading or column.title for column in columns)],
        rows=rows,
        figures=f"Mean over seeds; {{small}}, {', or '.join(small)}." if small else "",
        notes=[f"{name}: {note}." for name, note in notes.items() if name in measured and note],
        columns=[column for column in columns if column.heading],
    )


def _standard_error(method: Method, column: Metric) -> str:
    """Write a suite's own standard error, where it was run on one seed."""
    suite, _, name = column.name.rpartition("/")
    of = {"win_rate": "standard_error", "lc_win_rate": "lc_standard_error"}.get(name, f"{name}/standard_error")
    errors = method.of_suite(f"{suite}/{of}")
    return f"± {figure(column, errors[0])} s.e." if len(errors) == 1 else ""


def figure(column: Metric, value: float | None) -> str:
    """Write a figure in a unit that is read at once."""
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
    """Write a number; an en dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}".replace("-", "−")


def bounds(column: Metric, value: Estimate | None) -> str:
    """Write "0.61 to 0.68", a share within 0 and 1; nothing where one value or equal ones cannot say, and of a cost."""
    if value is None or value.over == "nothing" or column.unit in ("seconds", "count", "GiB"):
        return ""
    if value.high - value.low <= 1e-9 * abs(value.mean):  # all seeds agree, which is no certainty
        return ""
    is_share = column.unit in ("share", "percent")
    low, high = (max(0.0, value.low), min(1.0, value.high)) if is_share else (value.low, value.high)
    return f"{figure(column, low)} to {figure(column, high)}"


def _unbroken(words: str) -> str:
    return words.replace(" ", "\N{NO-BREAK SPACE}")


def span(values: Sequence[int]) -> str:
    """Write "3", or "2 to 3"."""
    return str(values[0]) if values[0] == values[-1] else f"{values[0]} to {values[-1]}"
