"""report.html: one file that asks nobody for anything. Its style is page.css, its few choices are page.js.

Text of runs, which may be anything, reaches the page escaped, or as JSON that the script sets as text.
"""

import itertools
from collections.abc import Mapping
from typing import Any

from align.report import charts, text
from align.report.html import file_beside, named, select, shortened, table, text_of, to_json
from align.report.methods import Comparison, Method, Study, p_value, signed
from align.report.naming import value_text
from align.report.read import Answers
from align.report.tables import Table, tables

_SHOWN_ANSWERS = 1_000_000  # characters of answers on the page, at most


_MATRIX = 8  # methods, at most, of which every two are in a table


_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(study: Study, made: str) -> str:
    """The whole page; `made` says when and by what."""
    answers = _answers(study)
    sections = {
        "sweeps": ("Sweeps", charts.sweeps(study)),
        "methods": ("Methods", _methods(study)),
        "differences": ("Differences", _differences(study)),
        "curves": ("Curves", charts.curves(study)),
        "iterations": ("Iterations", charts.iterations(study)),
        "answers-section": ("Answers", _answers_section(answers)),
        "runs": ("Runs that do not count", _unfinished(study)),
        "settings": ("Settings", _settings(study)),
        "provenance": ("Provenance", _provenance(study)),
    }
    there = {key: section for key, section in sections.items() if section[1]}
    title = text.subject(study)
    links = "".join(f'<a href="#{key}">{text_of(name)}</a>' for key, (name, _) in there.items())
    body = "".join(
        f'<section id="{key}"><h2>{text_of(name)}</h2>{html}</section>\n' for key, (name, html) in there.items()
    )
    findings = "".join(f"<li>{text_of(line)}</li>" for line in text.findings(study))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<link rel="icon" href="data:,">
<title>{text_of(title)}</title>
<style>
{file_beside("page.css")}</style>
</head>
<body>
<header><h1>{text_of(title)}</h1>
<p class="note">{text_of(text.size(study))}. {text_of(made)}</p></header>
<nav aria-label="Sections">{links}</nav>
<main>
{f'<ul class="findings">{findings}</ul>' if findings else ""}
{body}</main>
<script type="application/json" id="data">{to_json(_data(study, answers))}</script>
<script>
{file_beside("page.js")}</script>
</body>
</html>
"""


# Sections: HTML, or nothing where there is nothing to show ------------------------------------------------------------


def _methods(study: Study) -> str:
    if not study.methods:
        return "<p>No run is complete.</p>"
    start = "start models, mean" if "start model" in study.unequal else "start model"
    made = [_table_of_methods(one, start) for one in tables(study)]
    explained = "".join(
        f"<li><b>{text_of(c.heading)}</b>: {text_of(c.explanation or c.title)}</li>"
        for one in tables(study)
        for c in one.columns
    )
    details = f'<details class="paper"><summary>What the columns are</summary><ul>{explained}</ul></details>'
    return f"{charts.at_a_glance(study)}{''.join(made)}{details}"


def _table_of_methods(one: Table, start: str) -> str:
    rows = [
        (
            [named(method) if method else start, *(f"{of}<small>{text_of(small)}</small>" for of, small in cells)],
            "" if method else "start",
        )
        for method, cells in one.rows
    ]
    notes = "".join(f'<p class="note">{text_of(note)}</p>' for note in one.told("small"))
    return f"<h3>{text_of(one.title)}</h3>{table(['method', *one.heads], rows)}{notes}"


def _differences(study: Study) -> str:
    if not study.main.made:
        return ""
    best = study.methods[0]
    parts = [
        f'<p class="note">{text_of(text.about_comparisons(study.main))}</p>',
        f'<div class="choose">{select("method-a", "method", [m.label for m in study.methods], 0)}'
        f"{select('method-b', 'against', [m.label for m in study.methods], 1)}</div>"
        '<div class="said" id="said" aria-live="polite"></div>',
    ]
    if len(study.methods) <= _MATRIX:
        heads = ["row minus column", *(method.label for method in study.methods)]
        rows = [([named(a), *(_difference(study, a, b) for b in study.methods)], "") for a in study.methods]
        parts.append(table(heads, rows))
    else:
        parts.append(f"<h3>Each against {text_of(best.label)}, the highest</h3>")
        rows = [
            ([named(one.a), *_told(one)], "yes" if one.made.significant else "no")
            for method in study.methods[1:]
            if (one := study.main.between(method, best))
        ]
        parts.append(table(["method", "difference", "95%", "p after Holm"], rows))
    return "".join(parts)


def _told(one: Comparison) -> list[str]:
    made = one.made
    verdict = "significant" if made.significant else "not significant"
    p = p_value(made).removeprefix("=\N{NO-BREAK SPACE}")
    between = f"{signed(made.low)} to {signed(made.high)}".replace(" ", "\N{NO-BREAK SPACE}")
    return [f"{signed(made.difference)}<small>{verdict}</small>", between, p]


def _difference(study: Study, a: Method, b: Method) -> str:
    made = study.main.between(a, b)
    if made is None:
        return "" if a is b else "–"
    of = made.made
    return (
        f'<span class="{"yes" if of.significant else "no"}">{signed(of.difference)}</span>'
        f"<small>{signed(of.low)} to {signed(of.high)}</small>"
        f"<small>{'significant' if of.significant else 'not significant'}</small><small>p {p_value(of)}</small>"
    )


def _answers_section(answers: dict[str, Any]) -> str:
    if not answers["prompts"]:
        return ""
    left_out = f" {len(answers['prompts'])} of {answers['of']} prompts, evenly spread." if answers["cut"] else ""
    seeds = any(not run["first"] for run in answers["runs"])
    which = ["one seed of each method", "all seeds"] if seeds else ["one seed of each method"]
    return (
        f'<p class="note">Sampled answers to held-out prompts, with their scores.{left_out}</p>'
        f'<div class="choose">{select("prompt", "prompt", [shortened(p) for p in answers["prompts"]], 0)}'
        f"{select('which', 'runs', which, 0, ['first', 'all'])}"
        '<button type="button" id="before">Previous</button><button type="button" id="after">Next</button></div>'
        '<blockquote id="asked"></blockquote><div class="answers" id="answers"></div>'
    )


def _unfinished(study: Study) -> str:
    items = []
    for name, folder, state, why in text.unfinished_rows(study):
        where = f' <code class="of">{text_of(folder)}</code>' if folder else ""
        items.append(f"<li><b>{text_of(name)}</b>: {text_of(state)}, {text_of(why)}{where}</li>")
    return f'<ul class="plain">{"".join(items)}</ul>' if items else ""


def _settings(study: Study) -> str:
    parts, runs = [], study.told
    if not runs:
        return ""
    if len(runs) > 1:
        names = [f"{study.name(run)} ({run.name})" for run in runs]
        first = study.labels[runs[0].dir]
        other = next((i for i, run in enumerate(runs) if study.labels[run.dir] != first), 1)  # not a seed of the same
        parts.append(
            '<p class="note">What differs between two runs. Grey: cannot change the result.</p>'
            f'<div class="choose">{select("run-a", "run", names, 0)}{select("run-b", "against", names, other)}</div>'
            '<div class="scroll words" tabindex="0"><table><thead><tr><th>setting</th><th>run</th><th>against</th></tr></thead>'
            '<tbody id="settings-rows"></tbody></table></div><p id="alike" class="note" hidden>No setting differs.</p>'
        )
    same = {key: value for key, value in runs[0].config.items() if key not in study.varied}
    rows = [([f"<code>{text_of(key)}</code>", text_of(value_text(value))], "") for key, value in same.items()]
    title = "The same in all runs" if len(runs) > 1 else "All settings"
    parts.append(
        f"<details><summary>{title}: {len(rows)} settings</summary>{table(['setting', 'value'], rows, kind='words')}</details>"
    )
    return "".join(parts)


def _provenance(study: Study) -> str:
    same, differs = text.provenance_of_all(study)
    heads = ["run", "folder", *differs]
    rows = [
        ([text_of(study.name(run)), text_of(run.name), *(text_of(text.provenance(run)[name]) for name in differs)], "")
        for run in study.told
    ]
    if not rows:
        return ""
    shared = "".join(f"<dt>{text_of(name)}</dt><dd>{text_of(value)}</dd>" for name, value in same.items())
    return f"<dl>{shared}</dl>{table(heads, rows, kind='words mono')}"


# Data for the script --------------------------------------------------------------------------------------------------


def _data(study: Study, answers: dict[str, Any]) -> dict[str, Any]:
    decides = {key for run in study.runs for key in run.identity} | {"iterations"}
    return {
        "comparisons": {
            f"{a.number},{b.number}": _sentences(study, a, b) for a, b in itertools.combinations(study.methods, 2)
        },
        "varied": study.varied,
        "decides": [key for key in study.varied if key in decides],
        "settings": [
            [value_text(run.config[key]) if key in run.config else "–" for key in study.varied] for run in study.told
        ],
        "answers": answers,
    }


def _sentences(study: Study, a: Method, b: Method) -> list[str]:
    """What can be said of two, by each quantity."""
    said = [(of, one) for of in (study.main, study.beside) if of and (one := of.between(a, b))]
    return [f"{of.quantity[0].upper()}{of.quantity[1:]}: {one.sentence}" for of, one in said]


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
    return {"start": answers.start, "policy": answers.policy, "win_rate": answers.win_rate, **scores}
