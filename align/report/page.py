"""`python -m align report [folder ...] [out=folder]`: compare the runs in some folders; without a folder, those in runs/.

A folder of links to runs, as a sweep leaves one in runs/groups/, is a report on these. Writes report.html, report.md and
results.csv into `out`; without it, into the folder, or into what several have in common. The page is one file that asks
nobody for anything. Text of runs, which may be anything, reaches it escaped, or as JSON that its script sets as text.
"""

import itertools
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import align
from align.report import charts, text
from align.report.methods import value_text
from align.report.read import Answers, read_runs
from align.report.study import Study, p_value, signed, study
from align.say import UserError

_HERE = Path(__file__).parent
_SHOWN_ANSWERS = 1_000_000  # characters of answers on the page, at most


def report(words: Sequence[str]) -> Path:
    """Read the folders that the words name and write the three files. Returns the page."""
    options = dict(word.split("=", 1) for word in words if "=" in word and not Path(word).exists())
    if unknown := ", ".join(sorted(options.keys() - {"out"})):
        raise UserError(f"unknown option {unknown}: python -m align report [folder ...] [out=folder]")
    folders = [Path(word).expanduser() for word in words if "=" not in word or Path(word).exists()] or [Path("runs")]
    made = study(read_runs(folders))
    common = Path(os.path.commonpath([folder.resolve() for folder in folders]))
    out = Path(options["out"]).expanduser() if "out" in options else common
    when = f"Made by align {align.__version__} on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."
    files = {"report.html": page(made, when), "report.md": markdown(made, when), "results.csv": text.results_csv(made)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (out / name).write_text(content, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror}): give another out=") from error
    print(text.size(made), *(out / name for name in files), sep="\n")
    return out / "report.html"


def page(study: Study, made_by: str) -> str:
    """Write report.html; `made_by` says when and by what."""
    known = study.known
    first = study.labels[known[0].dir] if known else ""
    return _written(
        "page.html.j2",
        study,
        made_by,
        sweeps=[drawn for sweep in study.sweeps if (drawn := charts.of_sweep(study, sweep))],
        names=[f"{study.name(run)} ({run.name})" for run in known],
        other=next((i for i, run in enumerate(known) if study.labels[run.dir] != first), 1),  # not a seed of the same
        same={key: value for key, value in known[0].config.items() if key not in study.varied} if known else {},
        data=_data(study),
        file_beside=lambda name: (_HERE / name).read_text(encoding="utf-8"),
        p_value=p_value,
        signed=signed,
        charts=charts,
    )


def markdown(study: Study, made_by: str) -> str:
    """Write report.md: the tables of the page, without its charts."""
    return re.sub(r"\n{3,}", "\n\n", _written("report.md.j2", study, made_by)).rstrip() + "\n"


def _written(template: str, study: Study, made_by: str, **more: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=lambda name: name != "report.md.j2",
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    environment.filters["line"] = _line
    environment.filters["cell"] = lambda words: words.replace("|", "\\|").replace("\n", " ")
    return environment.get_template(template).render(
        study=study, made_by=made_by, tables=text.tables(study), text=text, **more
    )


def _data(study: Study) -> dict[str, Any]:
    """Return what the script shows."""
    decides = {key for run in study.runs for key in run.identity} | {"iterations"}
    return {
        "comparisons": {
            f"{a.number},{b.number}": [
                f"{of.quantity[0].upper()}{of.quantity[1:]}: {one.sentence}"
                for of in (study.main, study.beside)
                if of and (one := of.between(a, b))
            ]
            for a, b in itertools.combinations(study.methods, 2)
        },
        "varied": study.varied,
        "decides": [key for key in study.varied if key in decides],
        "settings": [
            [value_text(run.config[key]) if key in run.config else "–" for key in study.varied] for run in study.known
        ],
        "answers": _answers(study),
    }


def _answers(study: Study) -> dict[str, Any]:
    """Return prompts and the answers to them, no more than a page can carry."""
    runs = [(method, run) for method in study.methods for run in method.runs if run.answers]
    by_prompt = [{answers.prompt: answers for answers in run.answers} for _, run in runs]
    prompts = list(dict.fromkeys(prompt for of_run in by_prompt for prompt in of_run))
    total = sum(len(text) for of_run in by_prompt for one in of_run.values() for text in one.start + one.policy)
    many = max(1, int(len(prompts) * _SHOWN_ANSWERS / total)) if total > _SHOWN_ANSWERS else len(prompts)
    kept = [prompts[i * len(prompts) // many] for i in range(many)]
    return {
        "prompts": kept,
        "of": len(prompts),
        "runs": [
            {
                "label": method.label,
                "seed": run.seed,
                "first": run is method.runs[0],
                "said": [_as_data(of_run.get(prompt)) for prompt in kept],
            }
            for (method, run), of_run in zip(runs, by_prompt, strict=True)
        ],
    }


def _as_data(answers: Answers | None) -> dict[str, Any] | None:
    names = ("start", "policy", "scores", "win_rate")
    return {name: getattr(answers, name) for name in names} if answers else None


def _line(prompt: str) -> str:
    """Return a line of at most 70 characters."""
    line = " ".join(prompt.split())
    return line if len(line) <= 70 else f"{line[:69]}…"
