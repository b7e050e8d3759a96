"""The tables of a study as strings, which page and Markdown share; report.md and results.csv."""

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from align.report.methods import Column, Comparison, Method, Study, value_text
from align.report.read import Run, State
from align.report.stats import Estimate

_LONGER = 1.15  # answers that are so many times as long as the start model's are pointed out

_MANY = 6  # methods, of which the best owes something to being picked
_NAMED = 5  # methods in a sentence, at most


def number(value: float | None, digits: int = 3) -> str:
    """A figure as it is read; an en dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}".replace("-", "−")


def bounds(value: Estimate | None, digits: int = 3, share: bool = False) -> str:
    """ "0.61 to 0.68", or nothing where one value cannot say. Of a share no more than what a share can be."""
    if value is None or value.over == "nothing":
        return ""
    low, high = (max(0.0, value.low), min(1.0, value.high)) if share else (value.low, value.high)
    return f"{number(low, digits)} to {number(high, digits)}"


def shares(method: Method) -> str:
    """ "55 / 18 / 27", percent of wins, ties and losses against the start model."""
    parts = method.shares()
    return " / ".join(f"{100 * part:.0f}" for part in parts) if parts else "–"


def size(study: Study) -> str:
    """How much there is, in a line."""
    parts = [count(len(study.runs) - len(study.unfinished), "complete run")]
    if len(study.methods) > 1:
        seeds = sorted({len(method.runs) for method in study.methods})
        parts[0] += f" of {len(study.methods)} methods, {span(seeds)} {'seed' if seeds == [1] else 'seeds'} each"
    parts += [
        f"{number_of} {state.value}"
        for state in State
        if state is not State.complete and (number_of := sum(run.state is state for run in study.runs))
    ]
    return "; ".join(parts)


def count(number_of: int, word: str) -> str:
    """ "1 run", "2 runs"."""
    return f"{number_of} {word}{'' if number_of == 1 else 's'}"


def span(values: Sequence[int]) -> str:
    """ "3", or "2 to 3"."""
    return str(values[0]) if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def subject(study: Study) -> str:
    """Which models and data the runs are about."""
    names = [
        ", ".join(dict.fromkeys(str(run.config[key]) for run in study.runs if key in run.config))
        for key in ("model.name", "dataset.name")
    ]
    return " on ".join(filter(None, names)) or "runs"


def findings(study: Study) -> list[str]:
    """What a reader must know first, a sentence each."""
    said = []
    judged = [method for method in study.methods if method.figure("win_rate")]
    if judged:
        said += _about_win_rate(study, judged)
    elif study.methods:
        said.append("No judge: there are no win rates, and accuracy is not quality.")
    start = study.start("sample_length")
    lengths = [(method.label, method.figure("sample_length")) for method in judged]
    longer = [
        f"{label} ({v.mean / start:.2f} times)" for label, v in lengths if start and v and v.mean > _LONGER * start
    ]
    if longer:
        said.append(f"Answers much longer than the start model's, and judges like long answers: {_few(longer)}.")
    if len(study.methods) > 1:
        for what, values in study.unequal.items():
            (most, of_most), *others = sorted(values.items(), key=lambda value: -len(value[1]))
            told = [f"{most} for {'most' if len(of_most) > 2 else _few(of_most)}"]
            told += [f"{value} for {_few(labels)}" for value, labels in others]
            said.append(f"Not the same for all methods: {what} ({'; '.join(told)}).")
        if not study.unequal:
            said.append(
                "The same for all methods: start model, training pairs, steps, evaluation, seeds and precision."
            )
    if any(len(method.runs) == 1 for method in study.methods):
        said.append(
            "One seed says nothing about other seeds: figures of such methods have no interval over seeds. "
            "Add seed=1,2,3 to the command."
        )
    return said


def _about_win_rate(study: Study, judged: list[Method]) -> list[str]:
    best = judged[0]
    value = best.figure("win_rate")
    assert value is not None
    luck = f" The highest of {len(judged)} is partly luck: train it with other seeds." if len(judged) > _MANY else ""
    said = [f"Highest win rate against the start model: {best.label}, {number(value.mean)}.{luck}"]
    if len(judged) == 1:
        over = best.over_prompts()
        half = over and not over.low <= 0.5 <= over.high
        tells = "differs significantly" if half else "does not differ significantly"
        return [
            f"{best.label}: win rate {number(value.mean)} against the start model"
            + (f" (95% over {over.over}: {bounds(over, share=True)}): it {tells} from one half." if over else ".")
        ]
    if not study.comparisons:
        said.append("Whether the others are below it cannot be told: they answered other prompts.")
    against = [(method, study.between(best, method)) for method in judged[1:]]
    same = [method.label for method, one in against if one and not one.made.significant]
    below = [method.label for method, one in against if one and one.made.significant]
    if same and not below:
        said.append(f"No method is significantly below it: {_few(same)}.")
    elif same:
        said.append(f"Not significantly below it: {_few(same)}.")
    if below:
        said.append(f"Significantly below it: {_few(below)}.")
    return said


def _few(labels: list[str]) -> str:
    if len(labels) <= _NAMED:
        return ", ".join(labels)
    return f"{', '.join(labels[: _NAMED - 2])} and {len(labels) - _NAMED + 2} others"


def method_rows(study: Study) -> tuple[list[Column], list[tuple[Method, list[tuple[str, str]]]]]:
    """The table of methods: its columns, and of each method (mean, interval) for each column."""
    columns = study.columns
    rows = []
    for method in study.methods:
        cells = []
        for column in columns:
            value = method.figure(column.name)
            cells.append(
                (number(value.mean if value else None, column.digits), bounds(value, column.digits, column.share))
            )
        rows.append((method, cells))
    return columns, rows


def unfinished_rows(study: Study) -> list[tuple[str, str, str, str]]:
    """(run, folder, state, why) of runs that have no results, and of those that count as another's twin."""
    rows = [(study.name(run), run.name, run.state.value, run.note) for run in study.unfinished]
    left_out = [(run, f"same settings and seed as {kept.name}") for run, kept in study.twins]
    return rows + [(study.name(run), run.name, "left out", why) for run, why in left_out]


def provenance(run: Run) -> dict[str, str]:
    """Where a run's figures come from."""
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
    """(what is the same for all runs, the names of what is not)."""
    all_of = [provenance(run) for run in study.runs]
    differs = [name for name in all_of[0] if len({own[name] for own in all_of}) > 1]
    return {name: value for name, value in all_of[0].items() if name not in differs and value != "–"}, differs


# Files ----------------------------------------------------------------------------------------------------------------


def markdown(study: Study, made: str) -> str:
    """report.md: the tables of the page, without its figures."""
    columns, rows = method_rows(study)
    judged = any(method.shares() for method in study.methods)
    parts = [f"# {subject(study)}", f"{size(study)}. {made}", "\n".join(f"- {line}" for line in findings(study))]
    if rows:
        heads = [
            "method",
            "seeds",
            *(["win / tie / loss, %"] if judged else []),
            *(column.heading for column in columns),
        ]
        table = [
            [
                method.label,
                str(len(method.runs)),
                *([shares(method)] if judged else []),
                *(f"{mean} ({over})" if over else mean for mean, over in cells),
            ]
            for method, cells in rows
        ]
        start = [number(study.start(column.name), column.digits) for column in columns]
        table.append(["start model", "", *(["–"] if judged else []), *start])
        parts += ["## Methods", "Mean over seeds, with the 95% interval of that mean.", _table(heads, table)]
        parts.append("\n".join(f"- {column.heading}: {column.explanation}" for column in columns))
    if study.comparisons:
        parts += [
            "## Differences of win rates",
            about_comparisons(study),
            "\n".join(f"- {made.sentence}" for made in told(study)),
        ]
    if unfinished := unfinished_rows(study):
        parts += [
            "## Runs that do not count",
            _table(["run", "folder", "state", "why"], [list(row) for row in unfinished]),
        ]
    same, differs = provenance_of_all(study)
    sources = [[study.name(run), run.name, *(provenance(run)[name] for name in differs)] for run in study.runs]
    parts += ["## Provenance", "\n".join(f"- {name}: {value}" for name, value in same.items())]
    parts.append(_table(["run", "folder", *differs], sources))
    return "\n\n".join(filter(None, parts)) + "\n"


def told(study: Study) -> list[Comparison]:
    """The comparisons that are told in words: all of a few methods, of many those with the best."""
    return study.comparisons if len(study.methods) <= 6 else [c for c in study.comparisons if c.a is study.methods[0]]


def about_comparisons(study: Study) -> str:
    """What the words rest on."""
    prompts = sorted({one.made.prompts for one in study.comparisons})
    over = sorted({one.made.over for one in study.comparisons})
    pairs = len(study.comparisons)
    correction = f", after Holm's correction for {pairs} comparisons" if pairs > 1 else ""
    return (
        f"Win rates against the start model at the same {span(prompts)} prompts, paired; 95% intervals over "
        f"{' or '.join(over)}. Significant: p at most 0.05{correction}; the intervals are not corrected."
    )


def results_csv(study: Study) -> str:
    """results.csv: a row for each run, complete or not, with all its results at full precision."""
    trained, start = (sorted({name for run in study.runs for name in getattr(run, of)}) for of in ("trained", "start"))
    varied = [key for key in study.varied if key not in ("seed", "objective.name", "run_dir")]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    fixed = ["run", "state", "method", "objective", "seed", "steps"]
    outcome = ["wins", "ties", "losses"]
    writer.writerow([*fixed, *varied, *outcome, *trained, *(f"start/{name}" for name in start)])
    for run in study.runs:
        wins, ties = ([getattr(answers, name) for answers in run.answers] for name in ("wins", "ties"))
        parts: list[Any] = ["", "", ""]
        if wins:
            parts = [sum(wins) / len(wins), sum(ties) / len(ties)]
            parts.append(1 - parts[0] - parts[1])
        writer.writerow(
            [run.name, run.state.value, study.labels[run.dir], run.objective, run.seed, run.last_step]
            + [value_text(run.config[key]) if key in run.config else "" for key in varied]
            + parts
            + [run.trained.get(name, "") for name in trained]
            + [run.start.get(name, "") for name in start]
        )
    return file.getvalue()


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|').replace(chr(10), ' ') for cell in cells)} |"

    return "\n".join([line(heads), line(["---"] * len(heads)), *map(line, rows)])
