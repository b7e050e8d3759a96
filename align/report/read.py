"""Run folders -> typed rows. Reads only what a run has written of itself, and trusts none of it to be whole.

A folder counts as a run where it holds identity.json, config.yaml beside plan.txt, or a traceback; a link to one counts
as that run. The iterations of a self-play run belong to it and are no runs. A run without results.json is read as far as
it got. Jobs of a sweep that failed before they had a folder are those of failed.json. Left out: checkpoints, weights and
tracker files.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any, TypeVar

import yaml
from filelock import FileLock, Timeout

from align.files import flat
from align.report.run import Answers, Run, State, Values
from align.say import UserError
from align.stats.length_control import length_controlled_win_rate

Parsed = TypeVar("Parsed", dict[str, Any], list[Any])

_NOT_RUNS = ("checkpoints", "model", "policy", "wandb", "logs", "tensorboard")
_OF_SUITES = "evaluation/*/results.json"
_CALL = re.compile(r"^python -m align (--config-dir=\S+ )*")  # before the words of a command
_PLANNED = re.compile(r"^steps\s+([\d,]+) of ", re.MULTILINE)  # in plan.txt
_VERSIONS = re.compile(r"^- Made with (.*)$", re.MULTILINE)  # in a model card


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """Read all runs in and below the folders, each once, in the order of their paths; then jobs that left no folder.

    Raises:
        UserError: a folder is not there, or neither a run nor a failed job is in any of them.
    """
    folders = list(folders)
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"no folder {folder}: give folders of runs, e.g. python -m align report runs")
    found = sorted({path.resolve() for folder in folders for path in find_runs(folder)})
    above = Path(os.path.commonpath([path.parent for path in found])) if found else Path()
    runs = [read_run(path, str(path.relative_to(above))) for path in found]
    runs += _failed_jobs(folders, {_CALL.sub("", run.command) for run in runs})
    if not runs:
        raise UserError(
            f"no runs in {', '.join(map(str, folders))}: train first, e.g. python -m align -m objective=dpo,simpo"
        )
    return runs


def find_runs(folder: Path) -> Iterator[Path]:
    """Find run folders in and below a folder, links included."""
    return (path for path, is_run in _walk(folder) if is_run)


def _walk(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Yield each folder with True where it is a run's; what is below a run's is left out."""
    seen: set[Path] = set()  # links may lead in a circle
    for path, inner, files in os.walk(folder, followlinks=True):
        own = Path(path)
        if own.resolve() in seen:
            inner.clear()
            continue
        seen.add(own.resolve())
        is_run = "identity.json" in files or {"config.yaml", "plan.txt"} <= set(files) or bool(_tracebacks(own))
        kept = [] if is_run else sorted(name for name in inner if name not in _NOT_RUNS and not name.startswith("."))
        inner[:] = kept
        yield own, is_run


def _failed_jobs(folders: Iterable[Path], ran: Set[str]) -> list[Run]:
    """Read failed.json in the folders of sweeps; jobs whose words are a run after all, in `ran`, are left out."""
    jobs: dict[str, Run] = {}
    for own in (path for folder in folders for path, is_run in _walk(folder) if not is_run):
        for job in _parsed(own / "failed.json", json.loads, list):
            if not isinstance(job, dict):
                continue
            words, why = (" ".join(str(job.get(key, "")).split()) for key in ("job", "why"))
            if words and words not in ran:
                file = own.resolve() / "failed.json"
                jobs.setdefault(words, Run(dir=file / words, name=words, state=State.failed, note=why or "no message"))
    return [*jobs.values()]


def read_run(folder: Path, name: str) -> Run:
    """Read one run folder, whatever of it is there."""
    results = _json(folder / "results.json")
    config = _parsed(folder / "config.yaml", yaml.safe_load, dict)
    curves = _curves(folder)
    rows = results.get("iterations")
    iterations = [_numbers(row) for row in rows] if isinstance(rows, list) else []
    planned = _PLANNED.search(_text(folder / "plan.txt"))
    steps = int(planned[1].replace(",", "")) if planned else None
    if iterations:
        steps = int(sum(row.get("steps", 0) for row in iterations))
    state, note = _state(folder, bool(results), curves, steps)
    answers, problem = _answers(folder)
    start, trained = _results(folder, results)
    if answers and "win_rate" in trained:
        trained.setdefault("lc_win_rate", _length_controlled(answers))
        start.setdefault("lc_win_rate", 0.5)
    saved = [folder / "model", folder / "policy", *(own / "policy" for own in reversed(_iterations(folder)))]
    card = next(filter(None, (_text(own / "README.md") for own in saved)), "")
    made_with = _VERSIONS.search(card)
    return Run(
        dir=folder,
        name=name,
        state=state,
        note="; ".join(filter(None, (note, problem))),
        config={key: value for key, value in flat(config).items() if key != "command"},
        identity=flat(_json(folder / "identity.json")),
        start=start,
        trained=trained,
        held_out=_held_out(folder),
        suites={
            file.parent.name: str(_json(file.with_name("settings.json")).get("note", ""))
            for file in sorted(folder.glob(_OF_SUITES))
        },
        curves=curves,
        answers=answers,
        iterations=iterations,
        steps=steps,
        made_with=made_with[1] if made_with else "",
        command=str(config.get("command", "")),
    )


# Parts of a run -------------------------------------------------------------------------------------------------------


def _state(folder: Path, done: bool, curves: Mapping[str, Any], steps: int | None) -> tuple[State, str]:
    if done:
        return State.complete, ""
    last = max((points[-1][0] for points in curves.values()), default=0)
    reached = f"at step {last}" + (f" of {steps}" if steps else "") if last else "before the first step"
    if _is_held(folder / ".lock"):
        return State.running, reached
    for own in (folder, *_iterations(folder)):
        if collapsed := _json(own / "collapsed.json"):
            return State.collapsed, f"at step {collapsed.get('step')}: {' '.join(str(collapsed.get('why')).split())}"
    for file in _tracebacks(folder):
        lines = [line for line in _text(file).splitlines() if line.strip()]
        return State.failed, f"{reached}: {lines[-1].strip()[:300] if lines else 'no message'} ({file.name})"
    return State.incomplete, f"stopped {reached}; the same command goes on"


def _tracebacks(folder: Path) -> list[Path]:
    return sorted(folder.glob("logs/*.traceback"))


def _is_held(lock: Path) -> bool:
    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # not ours to lock
        return False


def _curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read metrics.jsonl; of self-play all iterations in a row, as in a tracker."""
    curves: dict[str, list[tuple[int, float]]] = {}
    before = 0
    for own in _iterations(folder) or [folder]:
        rows = [row for row in _lines(own / "metrics.jsonl") if isinstance(row.get("step"), int)]
        for row in rows:
            if row["step"] or not before:
                for name, value in _numbers(row).items():
                    if name != "step":
                        curves.setdefault(name, []).append((before + row["step"], value))
        before += max((row["step"] for row in rows), default=0)
    return curves


def _results(folder: Path, results: Values) -> tuple[dict[str, float], dict[str, float]]:
    """Return results of start model and policy. A suite's are "alpaca_eval/win_rate", "lm_eval/start/gsm8k"."""
    at_start = {name.removeprefix("eval/"): value for name, value in _json(folder / "start.json").items()}
    start, trained = _numbers(results.get("start") or at_start), _numbers(results.get("trained"))
    trained |= {f"cost/{name}": value for name, value in _numbers(results.get("cost")).items()}
    for file in sorted(folder.glob(_OF_SUITES)):
        for name, value in _numbers(_json(file)).items():
            if "/start/" in name:
                start[name.replace("/start/", "/", 1)] = value
            else:
                trained[name] = value
    return start, trained


def _answers(folder: Path) -> tuple[list[Answers], str]:
    """Read samples.jsonl: answers, and a line on why they cannot be read."""
    try:
        return [answers for row in _lines(folder / "samples.jsonl") if (answers := _answers_of(row))], ""
    except (ValueError, KeyError, TypeError) as error:
        return [], f"its answers cannot be read: {' '.join(str(error).split())[:200]}"


def _answers_of(row: Values) -> Answers | None:
    """Parse the answers to one prompt; None where the judge has no number for one, as in the win rate."""
    scores = row.get("scores") or {"start": [], "policy": []}  # none where the scorer only compares
    certain = [[(a > b) + 0.5 * (a == b) for b in scores["start"]] for a in scores["policy"]]
    chances = row.get("chances", certain)
    if [len(of) for of in chances] != [len(row["start"])] * len(row["policy"]) or not any(chances):
        raise ValueError(f"samples.jsonl lacks scores of answers to {row['prompt']!r}")
    numbers = all(map(math.isfinite, scores["start"] + scores["policy"]))
    if not numbers or not all(0 <= chance <= 1 for of in chances for chance in of):
        return None
    return Answers(
        prompt=row["prompt"],
        start=row["start"],
        policy=row["policy"],
        start_scores=scores["start"],
        policy_scores=scores["policy"],
        chances=chances,
    )


def _held_out(folder: Path) -> dict[str, dict[str, float]]:
    """Read held_out.jsonl: by each accuracy, whether the policy ranks each held-out pair rightly."""
    outcomes: dict[str, dict[str, float]] = {}
    for row in _lines(folder / "held_out.jsonl"):
        for name, outcome in _numbers(row).items():
            if name != "pair" and 0 <= outcome <= 1:
                outcomes.setdefault(name, {})[str(row.get("pair"))] = outcome
    return outcomes


def _length_controlled(answers: list[Answers]) -> float:
    """Compute the length-controlled win rate by pairs of answers, without AlpacaEval's difficulties of its prompts."""
    rows = [
        (chance, len(ours), len(theirs))
        for one in answers
        for ours, row in zip(one.policy, one.chances, strict=True)
        for theirs, chance in zip(one.start, row, strict=True)
    ]
    return length_controlled_win_rate(*zip(*rows, strict=True)).rate


def _iterations(folder: Path) -> list[Path]:
    """List the folders of self-play's trainings, in order."""
    own = [path for path in folder.glob("iter_*") if path.name[5:].isdigit() and path.name != "iter_0"]
    return sorted(own, key=lambda path: int(path.name[5:]))


# Files ----------------------------------------------------------------------------------------------------------------


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def _parsed(file: Path, parse: Callable[[str], Any], kind: type[Parsed]) -> Parsed:
    """Read what a file holds; an empty one of its kind where it is absent, damaged or of another kind."""
    try:
        content = parse(_text(file))
    except (ValueError, yaml.YAMLError):
        return kind()
    return content if isinstance(content, kind) else kind()


def _json(file: Path) -> dict[str, Any]:
    return _parsed(file, json.loads, dict)


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """Read a JSONL file; a last line that was cut off by a kill is left out."""
    for line in _text(file).splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def _numbers(node: Any) -> dict[str, float]:
    pairs = node.items() if isinstance(node, Mapping) else ()
    return {name: float(value) for name, value in pairs if isinstance(value, int | float)}
