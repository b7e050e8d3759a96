"""The findings of a study in words, which report.html and report.md share; results.csv."""

import csv
import io

from align.report.methods import Method, shares
from align.report.naming import value_text
from align.report.run import Run, State
from align.report.study import Comparison, Comparisons, Study
from align.report.tables import number, span

_LONGER = 1.15  # answers that are so many times as long as the start model's are pointed out
_MANY = 6  # methods: of more the best owes something to being picked
_NAMED = 5  # methods in a sentence, at most


def size(study: Study) -> str:
    """Say in a line how many runs and methods there are."""
    complete = len(study.runs) - len(study.unfinished)
    parts = [f"{complete} complete run{'' if complete == 1 else 's'}"]
    if len(study.methods) > 1:
        seeds = sorted({len(method.runs) for method in study.methods})
        parts[0] += f" of {len(study.methods)} methods, {span(seeds)} {'seed' if seeds == [1] else 'seeds'} each"
    parts += [
        f"{number_of} {state.value}"
        for state in State
        if state is not State.complete and (number_of := sum(run.state is state for run in study.runs))
    ]
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
    ranked = [method for method in study.methods if method.figure(study.main.name)]
    if ranked:
        said += _about_the_best(study, ranked)
    start = study.start("sample_length")
    lengths = [(method.label, method.figure("sample_length")) for method in study.methods]
    longer = [
        f"{label} ({v.mean / start:.2f} times)" for label, v in lengths if start and v and v.mean > _LONGER * start
    ]
    if longer:
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
    value = best.figure(main.name)
    assert value is not None
    what = "win rate against the start model" if study.judged else main.quantity
    bounds = f"{number(max(0.0, value.low))} to {number(min(1.0, value.high))}"  # of a share, as in the tables
    over = "" if value.over == "nothing" else f" (95%: {bounds})"
    if len(ranked) == 1:
        half = study.judged and over
        tells = "differs significantly" if not value.low <= 0.5 <= value.high else "does not differ significantly"
        return [f"{best.label}: {what} {number(value.mean)}{over}{f': it {tells} from one half' if half else ''}."]
    luck = f" The highest of {len(ranked)} is partly luck: train it with other seeds." if len(ranked) > _MANY else ""
    said = [f"Highest {what}: {best.label}, {number(value.mean)}{over}.{luck}"]
    against = [(method, main.between(best, method)) for method in ranked[1:]]
    if apart := [method.label for method, one in against if one is None]:
        which = (
            "the others are" if len(apart) == len(against) else f"{_few(apart)} {'is' if len(apart) == 1 else 'are'}"
        )
        said.append(f"Whether {which} below it cannot be told: they have no {main.items} in common.")
    same = [method.label for method, one in against if one and not one.result.significant]
    below = [method.label for method, one in against if one and one.result.significant]
    if same and not below and not apart:
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


def unfinished_rows(study: Study) -> list[tuple[str, str, str, str]]:
    """Return (run, folder, state, why) of runs that have no results, and of those that count as another's twin."""
    rows = []
    for run in study.unfinished:
        folder = run.name if run.has_settings else ""  # else the name is all there is of it
        rows.append((study.name(run), folder, run.state.value, run.note))
    left_out = [(run, f"same settings and seed as {kept.name}") for run, kept in study.twins]
    return rows + [(study.name(run), run.name, "left out", why) for run, why in left_out]


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
    """Return (what is the same for all runs, the names of what is not)."""
    all_of = [provenance(run) for run in study.known]
    if not all_of:
        return {}, []
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
