"""A study in words and tables, which report.html and report.md share, and how figures are written; results.csv."""

import csv
import io
import math
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass

from align.metrics import Metric, row, shown
from align.report.methods import Method, shares, value_text
from align.report.read import Run, State
from align.report.study import Comparison, Comparisons, Study
from align.stats.intervals import Estimate, Over, mean_over_seeds

Cell = tuple[str, str]  # a figure, and what stands small below it
Row = tuple[Method | None, list[Cell]]  # None: the start model

_LONGER = 1.15  # answers that are so many times as long as the start model's are pointed out
_MANY = 6  # methods: of more the best owes something to being picked
_NAMED = 5  # methods in a sentence, at most


def size(study: Study) -> str:
    """Say in a line how many runs and methods there are."""
    number_of = Counter(run.state for run in study.runs)
    parts = [f"{number_of[State.complete]} complete run{'' if number_of[State.complete] == 1 else 's'}"]
    if len(study.methods) > 1:
        seeds = sorted({len(method.runs) for method in study.methods})
        parts[0] += f" of {len(study.methods)} methods, {span(seeds)} {'seed' if seeds == [1] else 'seeds'} each"
    parts += [f"{number_of[state]} {state.value}" for state in list(State)[1:] if number_of[state]]
    return "; ".join(parts)


def subject(study: Study) -> str:
    """Say which models and data the runs are about."""
    names = [
        ", ".join(dict.fromkeys(str(run.config[key]) for run in study.runs if key in run.config))
        for key in ("model.name", "dataset.name")
    ]
    return " on ".join(filter(None, names)) or "runs"


def findings(study: Study) -> list[str]:
    """Say what a reader must know first, a sentence each."""
    said = []
    if study.methods and not study.judged:
        said.append("No judge: there are no win rates, and accuracy on held-out pairs is not quality.")
    if ranked := [method for method in study.methods if study.main.name in method.figures]:
        said += _about_the_best(study, ranked)
    if start := study.start("sample_length"):
        lengths = [(method.label, method.figures.get("sample_length")) for method in study.methods]
        times = [(label, value.mean / start) for label, value in lengths if value]
        if longer := [f"{label} ({many:.2f} times)" for label, many in times if many > _LONGER]:
            said.append(f"Answers much longer than the start model's, and judges like long answers: {_few(longer)}.")
    if len(study.methods) > 1:
        for what, values in study.shared.items():
            if len(values) == 1:
                continue
            (most, of_most), *others = sorted(values.items(), key=lambda value: -len(value[1]))
            told = [f"{most} for {'most' if len(of_most) > 2 else _few(of_most)}"]
            told += [f"{value} for {_few(labels)}" for value, labels in others]
            said.append(f"Not the same for all methods: {what} ({'; '.join(told)}).")
        if equal := [what for what, values in study.shared.items() if len(values) == 1]:
            *first, last = equal
            said.append(f"The same for all methods: {' and '.join(filter(None, (', '.join(first), last)))}.")
    if any(len(method.runs) == 1 for method in study.methods):
        said.append(
            "One seed says nothing about other seeds: what is compared are these models. Add -m and "
            "seed=1,2,3 to the command."
        )
    return said


def _about_the_best(study: Study, ranked: list[Method]) -> list[str]:
    best, main = ranked[0], study.main
    value = best.figures[main.name]
    what = "win rate against the start model" if study.judged else main.quantity
    bounds = f"{number(max(0.0, value.low))} to {number(min(1.0, value.high))}"  # of a share, as in the tables
    over = "" if value.over == "nothing" else f" (95%: {bounds})"
    if len(ranked) == 1:
        tells = "does not differ" if value.low <= 0.5 <= value.high else "differs"
        half = f": it {tells} significantly from one half" if study.judged and over else ""
        return [f"{best.label}: {what} {number(value.mean)}{over}{half}."]
    luck = f" The highest of {len(ranked)} is partly luck: train it with other seeds." if len(ranked) > _MANY else ""
    said = [f"Highest {what}: {best.label}, {number(value.mean)}{over}.{luck}"]
    against = [(method.label, main.between(best, method)) for method in ranked[1:]]
    if apart := [label for label, one in against if one is None]:
        which = f"{_few(apart)} {'is' if len(apart) == 1 else 'are'}" if len(apart) < len(against) else "the others are"
        said.append(f"Whether {which} below it cannot be told: they have no {main.items} in common.")
    same = [label for label, one in against if one and not one.result.significant]
    below = [label for label, one in against if one and one.result.significant]
    if same:
        said.append(f"{'Not' if below or apart else 'No method is'} significantly below it: {_few(same)}.")
    if below:
        said.append(f"Significantly below it: {_few(below)}.")
    return said


def _few(labels: list[str]) -> str:
    if len(labels) <= _NAMED:
        return ", ".join(labels)
    return f"{', '.join(labels[: _NAMED - 2])} and {len(labels) - _NAMED + 2} others"


def unfinished_rows(study: Study) -> list[tuple[str, str, str, str]]:
    """Return (run, folder, state, why) of runs that have no results, and of those that count as another's twin."""
    rows = [(run, run.state.value, run.note) for run in study.runs if run.state is not State.complete]
    rows += [(run, "left out", f"same settings and seed as {kept.name}") for run, kept in study.twins]
    # Where the settings are unknown, the name is all there is of a run.
    return [(study.name(run), run.name if run.has_settings else "", state, why) for run, state, why in rows]


def provenance(run: Run) -> dict[str, str]:
    """Say where a run's figures come from."""
    code = ", ".join(f"{k.partition('.')[2]} {v}" for k, v in run.identity.items() if k.startswith("objective_code."))
    return {
        "steps": value_text(run.steps),
        "start model": str(run.identity.get("start", "–")),
        "pairs": str(run.identity.get("pairs", "–")),
        "objective's code": code or "–",
        "device": f"{run.identity.get('device', '–')}, {'bf16' if run.identity.get('bf16') else 'fp32'}",
        "made with": run.made_with or "–",
        "command": run.command or "–",
    }


def provenance_of_all(study: Study) -> tuple[dict[str, str], list[str]]:
    """Return (what is the same for all known runs, the names of what is not); there is one at least."""
    all_of = [provenance(run) for run in study.known]
    differs = [name for name in all_of[0] if len({own[name] for own in all_of}) > 1]
    return {name: value for name, value in all_of[0].items() if name not in differs and value != "–"}, differs


def selected(study: Study, comparisons: Comparisons) -> list[Comparison]:
    """Select the comparisons that are told in words: all of a few methods, of many those with the best."""
    few = len(study.methods) <= _MANY
    return comparisons.pairs if few else [one for one in comparisons.pairs if one.a is study.methods[0]]


def about_comparisons(comparisons: Comparisons) -> str:
    """Say what comparisons rest on."""
    items = comparisons.items
    number_of = span(sorted({one.result.prompts for one in comparisons.pairs}))
    over = " or ".join(sorted({one.result.over.replace("prompts", items) for one in comparisons.pairs}))
    pairs = len(comparisons.pairs)
    correction = f", after Holm's correction for {pairs} comparisons" if pairs > 1 else ""
    what = "Win rates against the start model" if comparisons.name == "win_rate" else comparisons.quantity.capitalize()
    return (
        f"{what} at the same {number_of} {items}, paired; 95% intervals over {over}. "
        f"Significant: p at most 0.05{correction}; the intervals are not corrected."
    )


def results_csv(study: Study) -> str:
    """Write results.csv: a row for each run, complete or not, with all its results at full precision."""
    trained, start = (sorted({name for run in study.runs for name in getattr(run, of)}) for of in ("trained", "start"))
    varied = [key for key in study.varied if key not in ("seed", "objective.name", "run_dir")]
    fixed, outcome = ["run", "state", "method", "objective", "seed", "steps"], ["win_share", "tie_share", "loss_share"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*fixed, *varied, *outcome, *trained, *(f"start/{name}" for name in start)])
    for run in study.runs:
        writer.writerow(
            [run.name, run.state.value, study.labels[run.dir], run.objective, run.seed, run.last_step]
            + [value_text(run.config[key]) if key in run.config else "" for key in varied]
            + [*(shares([run]) or ["", "", ""])]
            + [run.trained.get(name, "") for name in trained]
            + [run.start.get(name, "") for name in start]
        )
    return file.getvalue()


@dataclass(frozen=True, kw_only=True)
class Table:
    """A row for each method, and at the end, as None, the start model."""

    title: str
    heads: list[str]  # but for the method's
    rows: list[Row]
    sentences: list[str]  # "{small}" stands for how what is small is shown
    columns: list[Metric]  # that are to be explained


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
    for name in sorted({name for method in study.methods for run in method.runs for name in run.trained}):
        suite, _, rest = name.partition("/")
        if suite not in suites or not rest:
            suite, rest = "", name
        heading = rest + (", characters" if suite and rest.rpartition("/")[2] == "length" else "")  # of all suites
        metric = row(name) or Metric(name, "suite", heading, "further", unit="any")
        if "further" in metric.shown.split() and not name.endswith("standard_error"):
            of_suite.setdefault(suite, []).append(metric)
    for suite, columns in sorted(of_suite.items()):
        found.append(_of_suites(study, columns, f"Suite {suite}" if suite else "Further results"))
    return found


def _compared(study: Study, columns: list[Metric], title: str) -> Table:
    """Lay out means over all seeds of a method."""
    rows: list[Row] = []
    over: set[Over] = set()
    for method in study.methods:
        values = [method.figures.get(column.name) for column in columns]
        cells = [(figure(c, v.mean if v else None), bounds(c, v)) for c, v in zip(columns, values, strict=True)]
        over |= {value.over for value, (_, small) in zip(values, cells, strict=True) if value and small}
        rows.append((method, [(str(len(method.runs)), ""), *cells]))
    rows.append(_start_row(study, columns))
    heads = ["seeds", *(column.heading for column in columns)]
    if columns[0].of in ("answers", "report") and any(shares(method.runs) for method in study.methods):
        at = 2 if columns[0].name == "win_rate" else 1
        heads.insert(at, _unbroken("win / tie / loss, %"))
        for of_row, cells in rows:
            parts = shares(of_row.runs) if of_row else None
            cells.insert(at, (_unbroken(" / ".join(f"{100 * part:.0f}" for part in parts)) if parts else "–", ""))
    said = _sentence(study, over, columns[0].name == "win_rate")
    return Table(title=title, heads=heads, rows=rows, sentences=[said], columns=columns)


def _start_row(study: Study, columns: list[Metric]) -> Row:
    return None, [("", ""), *((figure(column, study.start(column.name)), "") for column in columns)]


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
    """Lay out means over the seeds that were evaluated, of one seed with the suite's own standard error."""
    rows: list[Row] = []
    for method in study.methods:
        measured = [(column, method.of_suite(column.name)) for column in columns]
        if seeds := sorted({len(values) for _, values in measured if values}):
            rows.append((method, [(f"{span(seeds)} of {len(method.runs)}", "")]))
        for column, values in measured if seeds else ():
            value = mean_over_seeds(values) if values else None
            small = bounds(column, value) or _standard_error(method, column)
            rows[-1][1].append((figure(column, value.mean if value else None), small))
    smalls = [small for _, cells in rows for _, small in cells if small]
    if any(study.start(column.name) is not None for column in columns):
        rows.append(_start_row(study, columns))
    said = ["its 95% interval over seeds only: all runs answered the same prompts"] * any(" to " in s for s in smalls)
    said += ["of one seed ± the standard error over prompts"] * any("±" in small for small in smalls)
    sentences = [f"Mean over seeds; {{small}}, {', or '.join(said)}."] if said else []
    measured_by = {column.name.partition("/")[0] for column in columns}
    notes = {name: note for method in study.methods for run in method.runs for name, note in run.suites.items()}
    return Table(
        title=title,
        heads=["seeds", *(column.heading or column.title for column in columns)],
        rows=rows,
        sentences=sentences + [f"{name}: {note}." for name, note in notes.items() if name in measured_by and note],
        columns=[column for column in columns if column.heading],
    )


def _standard_error(method: Method, column: Metric) -> str:
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


def number(value: float, digits: int = 3) -> str:
    """Write a number, with a real minus."""
    return f"{value:.{digits}f}".replace("-", "−")


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
