"""report.html: one file that asks nobody for anything. Its style is page.css, its few choices are page.js.

Text of runs, which may be anything, reaches the page escaped, or as JSON that the script sets as text.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from align.report import figures, text
from align.report.figures import Series
from align.report.methods import (
    CURVES,
    Column,
    Comparison,
    Method,
    Study,
    Sweep,
    p_value,
    short_name,
    signed,
    value_text,
)
from align.report.read import Answers
from align.report.stats import Estimate

_SHOWN_ANSWERS = 1_000_000  # characters of answers on the page, at most
_MATRIX = 8  # methods, at most, of which every two are in a table
_ROWS = 8  # methods in the first figures, at most
_GLANCE = {
    "win_rate": "win rate against the start model",
    "sample_length": "length of an answer, tokens",
    "kl_policy_start": "KL(policy, start model), nats per answer",
}
_POINTS = 150  # of a curve, at most
_SWEPT = ("win_rate", "lc_win_rate", "judge_score", "accuracy/mean_logp", "sample_length", "kl_policy_start")

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(study: Study, made: str) -> str:
    """The whole page; `made` says when and by what."""
    answers = _answers(study)
    sections = {
        "methods": ("Methods", _methods(study)),
        "differences": ("Differences", _differences(study)),
        "sweeps": ("Sweeps", _sweeps(study)),
        "curves": ("Curves", _curves(study)),
        "iterations": ("Iterations", _iterations(study)),
        "answers-section": ("Answers", _answers_section(answers)),
        "runs": ("Runs that do not count", _unfinished(study)),
        "settings": ("Settings", _settings(study)),
        "provenance": ("Provenance", _provenance(study)),
    }
    there = {key: section for key, section in sections.items() if section[1]}
    title = text.subject(study)
    links = "".join(f'<a href="#{key}">{_text(name)}</a>' for key, (name, _) in there.items())
    body = "".join(
        f'<section id="{key}"><h2>{_text(name)}</h2>{html}</section>\n' for key, (name, html) in there.items()
    )
    findings = "".join(f"<li>{_text(line)}</li>" for line in text.findings(study))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<link rel="icon" href="data:,">
<title>{_text(title)}</title>
<style>
{_beside("page.css")}</style>
</head>
<body>
<header><h1>{_text(title)}</h1>
<p class="note">{_text(text.size(study))}. {_text(made)}</p></header>
<nav aria-label="Sections">{links}</nav>
<main>
{f'<ul class="findings">{findings}</ul>' if findings else ""}
{body}</main>
<script type="application/json" id="data">{_json(_data(study, answers))}</script>
<script>
{_beside("page.js")}</script>
</body>
</html>
"""


# Sections: HTML, or nothing where there is nothing to show ------------------------------------------------------------


def _methods(study: Study) -> str:
    columns, rows = text.method_rows(study)
    if not rows:
        return "<p>No run is complete.</p>"
    judged = any(method.shares() for method in study.methods)
    heads = ["method", "seeds"] + [column.heading for column in columns]
    where = heads.index("win rate") + 1 if "win rate" in heads else len(heads)
    if judged:
        heads.insert(where, _unbroken("win / tie / loss, %"))
    made = []
    for method, cells in rows:
        row = [_named(method), str(len(method.runs)), *(f"{mean}<small>{over}</small>" for mean, over in cells)]
        if judged:
            row.insert(where, _unbroken(text.shares(method)))
        made.append((row, ""))
    name = "start models, mean" if "start model" in study.unequal else "start model"
    start = [name, "", *(text.number(study.start(column.name), column.digits) for column in columns)]
    if judged:
        start.insert(where, "–")
    made.append((start, "start"))
    explained = "".join(f"<li><b>{_text(c.heading)}</b>: {_text(c.explanation)}</li>" for c in columns)
    return (
        f"{_at_a_glance(study)}{_table(heads, made)}"
        '<p class="note">Mean over seeds; below it the 95% interval of that mean, where there are two seeds or more.</p>'
        f"<details><summary>What the columns are</summary><ul>{explained}</ul></details>{_other_results(study)}"
    )


def _at_a_glance(study: Study) -> str:
    """Win rate, length and KL of the first methods beside each other, the start model dashed."""
    methods = study.methods[:_ROWS]
    drawn = []
    for name, title in _GLANCE.items():
        values = [_best_known(method, name) for method in methods]
        rows = [(m.number, m.label, value) for m, value in zip(methods, values, strict=True) if value]
        if rows:
            over = " or ".join(sorted({value.over for *_, value in rows} - {"nothing"}))
            told = f"95% interval over {over}" if over else "no interval of one seed"
            drawn.append(_figure(title, figures.whiskers(rows, title, study.start(name)), told))
    most = f" The first {len(methods)} of {len(study.methods)} methods." if len(methods) < len(study.methods) else ""
    return (
        f'<div class="figures">{"".join(drawn)}</div><p class="note">Dashed: the start model.{most}</p>'
        if drawn
        else ""
    )


def _best_known(method: Method, name: str) -> Estimate | None:
    """With the interval that says most: of the win rate over prompts too."""
    return (method.over_prompts() if name == "win_rate" else None) or method.figure(name)


def _other_results(study: Study) -> str:
    names = study.other_results
    if not names:
        return ""
    rows = []
    for method in study.methods:
        values = [method.figure(name) for name in names]
        cells = [f"{text.number(v.mean if v else None)}<small>{text.bounds(v)}</small>" for v in values]
        rows.append(([_named(method), *cells], ""))
    return f"<h3>Further results</h3>{_table(['method', *names], rows)}"


def _differences(study: Study) -> str:
    if not study.comparisons:
        return ""
    best = study.methods[0]
    parts = [f'<p class="note">{_text(text.about_comparisons(study))}</p>']
    parts.append(
        f'<div class="choose">{_select("method-a", "method", [m.label for m in study.methods], 0)}'
        f"{_select('method-b', 'against', [m.label for m in study.methods], 1)}</div>"
        '<p class="said" id="said" aria-live="polite"></p>'
    )
    if len(study.methods) <= _MATRIX:
        heads = ["row minus column", *(_text(method.label) for method in study.methods)]
        rows = [([_named(a), *(_difference(study, a, b) for b in study.methods)], "") for a in study.methods]
        parts.append(_table(heads, rows, escaped=True))
    else:
        parts.append(f"<h3>Each against {_text(best.label)}, the highest</h3>")
        rows = [
            ([_named(one.a), *_told(one)], "yes" if one.made.significant else "no")
            for method in study.methods[1:]
            for one in [study.between(method, best)]
            if one
        ]
        parts.append(_table(["method", "difference", "95%", "p"], rows))
    return "".join(parts)


def _told(one: Comparison) -> list[str]:
    made = one.made
    verdict = "significant" if made.significant else "not significant"
    p = p_value(made).removeprefix("=\N{NO-BREAK SPACE}")
    return [
        f"{signed(made.difference)}<small>{verdict}</small>",
        _unbroken(f"{signed(made.low)} to {signed(made.high)}"),
        p,
    ]


def _difference(study: Study, a: Method, b: Method) -> str:
    made = study.between(a, b)
    if made is None:
        return "" if a is b else "–"
    of = made.made
    return (
        f'<span class="{"yes" if of.significant else "no"}">{signed(of.difference)}</span>'
        f"<small>{signed(of.low)} to {signed(of.high)}</small>"
        f"<small>{'significant' if of.significant else 'not significant'}</small><small>p {p_value(of)}</small>"
    )


def _sweeps(study: Study) -> str:
    return "".join(_sweep(study, sweep) for sweep in study.sweeps)


def _sweep(study: Study, sweep: Sweep) -> str:
    columns = [column for column in study.columns if column.name in _SWEPT]
    maps = {column.heading: _map(sweep, column) if sweep.y else _line(sweep, column) for column in columns}
    note = (
        "Mean over seeds. Deeper is higher; framed: the highest. A dash: no complete run."
        if sweep.y
        else "Mean over seeds and its 95% interval, which for the win rate counts prompts too."
    )
    shown = "".join(_figure(title, svg) for title, svg in maps.items() if svg)
    kind = "maps" if sweep.y else "figures"
    return f'<h3>{_text(sweep.title)}</h3><p class="note">{note}</p><div class="{kind}">{shown}</div>' if shown else ""


def _map(sweep: Sweep, column: Column) -> str:
    assert sweep.y is not None
    cells = {
        (method.settings[sweep.x], method.settings[sweep.y]): value.mean
        for method in sweep.methods
        for value in [method.figure(column.name)]
        if value
    }
    if not cells:
        return ""
    best = max(cells, key=lambda cell: cells[cell]) if column.name in _SWEPT[:4] else None
    return figures.heat_map(column.heading, short_name(sweep.x), short_name(sweep.y), cells, column.digits, best)


def _line(sweep: Sweep, column: Column) -> str:
    points = [(m.settings[sweep.x], value) for m in sweep.methods for value in [_best_known(m, column.name)] if value]
    return figures.sweep_line(column.heading, short_name(sweep.x), points) if points else ""


def _curves(study: Study) -> str:
    drawn = []
    methods = study.methods[: figures.SERIES]
    for name, title in CURVES.items():
        split = _split(methods, name)
        series = [one for method in methods for one in [_series(method, f"{split}/{name}")] if one]
        if series:
            words = "held-out pairs" if split == "eval" else "training pairs"
            drawn.append(_figure(title, figures.curves(f"{title}, {words}", series, "step"), words))
    if not drawn:
        return ""
    buttons = "".join(
        f'<button type="button" data-series="series-{m.number}" aria-pressed="false">{_named(m)}</button>'
        for m in methods
    )
    left_out = len(study.methods) - len(methods)
    most = (
        f" The {len(methods)} methods of the highest win rate; {left_out} others are in results.csv."
        if left_out
        else ""
    )
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


def _iterations(study: Study) -> str:
    drawn = []
    methods = [method for method in study.methods if len(method.runs[0].iterations) > 1][: figures.SERIES]
    for name, title in {
        "win_rate": "win rate against the start model",
        "win_rate/previous": "win rate against the policy before",
        "judge_score": "judge's score",
        "sample_length": "length of an answer, tokens",
        "distinct": "share of different answers",
    }.items():
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
            drawn.append(_figure(title, figures.curves(title, series, "iteration of self-play")))
    if not drawn:
        return ""
    legend = "".join(_named(method) for method in methods)
    return f'<div class="legend">{legend}</div><div class="figures">{"".join(drawn)}</div>'


def _answers_section(answers: dict[str, Any]) -> str:
    if not answers["prompts"]:
        return ""
    left_out = f" {len(answers['prompts'])} of {answers['of']} prompts, evenly spread." if answers["cut"] else ""
    seeds = any(not run["first"] for run in answers["runs"])
    which = ["one seed of each method", "all seeds"] if seeds else ["one seed of each method"]
    return (
        f'<p class="note">Sampled answers to held-out prompts, with their scores.{left_out}</p>'
        f'<div class="choose">{_select("prompt", "prompt", [_shortened(p) for p in answers["prompts"]], 0)}'
        f"{_select('which', 'runs', which, 0, ['first', 'all'])}"
        '<button type="button" id="before">Previous</button><button type="button" id="after">Next</button></div>'
        '<blockquote id="asked"></blockquote><div class="answers" id="answers"></div>'
    )


def _unfinished(study: Study) -> str:
    items = [
        f'<li><b>{_text(name)}</b>: {_text(state)}, {_text(why)} <code class="of">{_text(folder)}</code></li>'
        for name, folder, state, why in text.unfinished_rows(study)
    ]
    return f'<ul class="plain">{"".join(items)}</ul>' if items else ""


def _settings(study: Study) -> str:
    parts = []
    if len(study.runs) > 1:
        names = [f"{study.name(run)} ({run.name})" for run in study.runs]
        parts.append(
            '<p class="note">What differs between two runs. Grey: cannot change the result.</p>'
            f'<div class="choose">{_select("run-a", "run", names, 0)}{_select("run-b", "against", names, 1)}</div>'
            '<div class="scroll words" tabindex="0"><table><thead><tr><th>setting</th><th>run</th><th>against</th></tr></thead>'
            '<tbody id="settings-rows"></tbody></table></div><p id="alike" class="note" hidden>No setting differs.</p>'
        )
    same = {key: value for key, value in study.runs[0].config.items() if key not in study.varied}
    rows = [([f"<code>{_text(key)}</code>", _text(value_text(value))], "") for key, value in same.items()]
    title = "The same in all runs" if len(study.runs) > 1 else "All settings"
    parts.append(
        f"<details><summary>{title}: {len(rows)} settings</summary>{_table(['setting', 'value'], rows, kind='words')}</details>"
    )
    return "".join(parts)


def _provenance(study: Study) -> str:
    same, differs = text.provenance_of_all(study)
    heads = ["run", "folder", *differs]
    rows = [
        ([_text(study.name(run)), _text(run.name), *(_text(text.provenance(run)[name]) for name in differs)], "")
        for run in study.runs
    ]
    shared = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in same.items())
    return f"<dl>{shared}</dl>{_table(heads, rows, kind='words mono')}"


# Data for the script --------------------------------------------------------------------------------------------------


def _data(study: Study, answers: dict[str, Any]) -> dict[str, Any]:
    decides = {key for run in study.runs for key in run.identity} | {"iterations"}
    return {
        "comparisons": {f"{made.a.number},{made.b.number}": made.sentence for made in study.comparisons},
        "varied": study.varied,
        "decides": [key for key in study.varied if key in decides],
        "settings": [
            [value_text(run.config[key]) if key in run.config else "–" for key in study.varied] for run in study.runs
        ],
        "answers": answers,
    }


def _answers(study: Study) -> dict[str, Any]:
    """Prompts and what was answered to them, no more than a page can carry."""
    runs = [(method, run) for method in study.methods for run in method.runs if run.answers]
    said = [{answers.prompt: answers for answers in run.answers} for _, run in runs]
    prompts = list(dict.fromkeys(prompt for of_run in said for prompt in of_run))
    total = sum(_characters(answers) for of_run in said for answers in of_run.values())
    kept = prompts
    if total > _SHOWN_ANSWERS:
        many = max(1, int(len(prompts) * _SHOWN_ANSWERS / total))
        kept = [prompts[i * len(prompts) // many] for i in range(many)]
    return {
        "prompts": kept,
        "of": len(prompts),
        "cut": len(kept) < len(prompts),
        "runs": [
            {
                "label": method.label,
                "seed": run.seed,
                "first": run is method.runs[0],
                "said": [_said(of_run.get(prompt)) for prompt in kept],
            }
            for (method, run), of_run in zip(runs, said, strict=True)
        ],
    }


def _characters(answers: Answers) -> int:
    return sum(map(len, answers.start + answers.policy))


def _said(answers: Answers | None) -> Mapping[str, Any] | None:
    if answers is None:
        return None
    scores = {name: getattr(answers, name) for name in ("start_scores", "policy_scores")}
    finite = {name: [score if math.isfinite(score) else None for score in of] for name, of in scores.items()}
    return {"start": answers.start, "policy": answers.policy, "win_rate": answers.win_rate, **finite}


# HTML -----------------------------------------------------------------------------------------------------------------


def _table(heads: Iterable[str], rows: Iterable[tuple[list[str], str]], kind: str = "", escaped: bool = False) -> str:
    """`rows` are cells of HTML and a class."""
    head = "".join(f'<th scope="col">{name if escaped else _text(name)}</th>' for name in heads)
    body = "".join(
        f"<tr{f' class={of}' if of else ''}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n"
        for cells, of in rows
    )
    return f'<div class="scroll {kind}" tabindex="0"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _select(id_: str, label: str, options: Sequence[str], chosen: int, values: Sequence[str] | None = None) -> str:
    made = "".join(
        f'<option value="{values[i] if values else i}"{" selected" if i == chosen else ""}>{_text(option)}</option>'
        for i, option in enumerate(options)
    )
    return f'<label>{label}<select id="{id_}">{made}</select></label>'


def _figure(title: str, svg: str, note: str = "") -> str:
    of = f"<small>{_text(note)}</small>" if note else ""
    return f"<figure><figcaption>{_text(title)}{of}</figcaption>{svg}</figure>"


def _named(method: Method) -> str:
    return f'<span class="method">{figures.key_of(method.number)}<span>{_text(method.label)}</span></span>'


def _shortened(prompt: str) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= 70 else f"{line[:69]}…"


def _unbroken(words: str) -> str:
    return words.replace(" ", "\N{NO-BREAK SPACE}")


def _text(words: str) -> str:
    return escape(words, quote=True)


def _json(node: Any) -> str:
    """In a script element: no tag may end it."""
    return json.dumps(node, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
