"""A run as the report knows it, and how its folder is read: only what a run has written of itself, and trusts none of it to be whole.

A folder counts as a run where it holds identity.json, config.yaml beside plan.txt, or a traceback; a link to one counts
as that run. The iterations of a self-play run belong to it and are no runs. A run without results.json is read as far as
it got. Jobs of a sweep that failed before they had a folder are those of failed.json. Left out: checkpoints, weights and
tracker files.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from filelock import FileLock, Timeout

from align.files import flat
from align.say import UserError
from align.stats.length_control import rate_by_answers

Values = Mapping[str, Any]

_NOT_RUNS = ("checkpoints", "model", "policy", "wandb", "logs", "tensorboard")
_CALL = re.compile(r"^python -m align (--config-dir=\S+ )*")  # before the words of a command
_PLANNED = re.compile(r"^steps\s+([\d,]+) of ", re.MULTILINE)  # in plan.txt
_VERSIONS = re.compile(r"^- Made with (.*)$", re.MULTILINE)  # in a model card


class State(Enum):
    """Progress of a run."""

    complete = "complete"
    failed = "failed"  # it left a traceback
    collapsed = "collapsed"  # ended early, as it had nothing to hope for
    running = "running"  # a process holds its folder
    incomplete = "incomplete"  # stopped or killed: the same command goes on


@dataclass(frozen=True, kw_only=True)
class Answers:
    """K answers of start model and policy to one prompt, with the judge's word on them."""

    prompt: str
    start: list[str]
    policy: list[str]
    scores: Mapping[str, list[float]]  # of "start" and "policy"; empty where the scorer only compares
    chances: list[list[float]]  # [K][K] P(the policy's i-th answer beats the start model's j-th); a tie is one half

    @property
    def win_rate(self) -> float:
        """The mean chance of the policy; a tie is half a win."""
        return fmean(chance for row in self.chances for chance in row)

    @property
    def ties(self) -> float:
        """The share of pairs of answers that are equally good."""
        return fmean(chance == 0.5 for row in self.chances for chance in row)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder."""

    dir: Path
    name: str  # what the report calls it: its folder, without what all folders have in common
    state: State
    note: str = ""  # why it is not complete, in a line
    objective: str = "unknown"
    seed: int | None = None  # of data order, new weights and sampling
    config: Values = field(default_factory=dict)  # "objective.beta": 2.0, ... all of config.yaml
    identity: Values = field(default_factory=dict)  # likewise, of identity.json: what decides the result
    start: Mapping[str, float] = field(default_factory=dict)  # results of the start model
    trained: Mapping[str, float] = field(default_factory=dict)  # of the policy; "cost/..." and what suites say, too
    held_out: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # accuracy: pair: 0, 0.5 or 1
    suites: Mapping[str, str] = field(default_factory=dict)  # what `align evaluate` has measured, a line each
    curves: Mapping[str, list[tuple[int, float]]] = field(default_factory=dict)  # metric: (step, value), in order
    answers: list[Answers] = field(default_factory=list)
    iterations: Sequence[Mapping[str, float]] = field(default_factory=list)  # of self-play
    last_step: int = 0  # in metrics.jsonl
    steps: int | None = None  # planned; of self-play those of all iterations that are done
    made_with: str = ""  # versions
    command: str = ""

    @property
    def has_settings(self) -> bool:
        """True where its settings are known; a run that failed early has left none."""
        return bool(self.config or self.identity) or self.state is State.complete


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """Read all runs in and below the folders, each once, in the order of their paths; then jobs that left no folder."""
    folders = list(folders)
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"no folder {folder}: give folders of runs, e.g. python -m align report runs")
    walked = [step for folder in folders for step in _walk(folder)]
    found = sorted({path.resolve() for path, is_run in walked if is_run})
    above = Path(os.path.commonpath([path.parent for path in found])) if found else Path()
    runs = [_read_run(path, str(path.relative_to(above))) for path in found]
    others = [path for path, is_run in walked if not is_run]
    runs += _failed_jobs(others, {_CALL.sub("", run.command) for run in runs})
    if not runs:
        raise UserError(
            f"no runs in {', '.join(map(str, folders))}: train first, e.g. python -m align -m objective=dpo,simpo"
        )
    return runs


def _walk(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Yield a folder and those below it, links followed, with True for a run's; what is in a run's is left out."""
    seen: set[Path] = set()  # links may lead in a circle
    for path, inner, files in os.walk(folder, followlinks=True):
        own = Path(path)
        if own.resolve() in seen:
            inner.clear()
            continue
        seen.add(own.resolve())
        is_run = "identity.json" in files or {"config.yaml", "plan.txt"} <= set(files) or bool(_tracebacks(own))
        below = [] if is_run else inner
        inner[:] = sorted(name for name in below if name not in _NOT_RUNS and not name.startswith("."))
        yield own, is_run


def _failed_jobs(folders: Iterable[Path], ran: Set[str]) -> Iterator[Run]:
    """Read failed.json in the folders of sweeps; jobs whose words are a run after all, in `ran`, are left out."""
    known = {*ran}
    for file in (folder / "failed.json" for folder in folders):
        for job in _parsed(file, list):
            told = job if isinstance(job, dict) else {}
            words, why = (" ".join(str(told.get(key, "")).split()) for key in ("job", "why"))
            if words and words not in known:
                known.add(words)
                yield Run(dir=file.resolve() / words, name=words, state=State.failed, note=why or "no message")


def _read_run(folder: Path, name: str) -> Run:
    """Read one run folder, whatever of it is there."""
    results = _parsed(folder / "results.json")
    config = flat(_parsed(folder / "config.yaml", parse=yaml.safe_load))
    command = str(config.pop("command", ""))
    curves = _curves(folder)
    rows = results.get("iterations")
    iterations = [_numbers(row) for row in rows] if isinstance(rows, list) else []
    steps = int(sum(row.get("steps", 0) for row in iterations)) or None
    if not steps and (planned := _PLANNED.search(_text(folder / "plan.txt"))):
        steps = int(planned[1].replace(",", ""))
    last_step = max((points[-1][0] for points in curves.values()), default=0)
    state, note = (State.complete, "") if results else _state(folder, last_step, steps)
    answers, problem = _answers(folder)
    start, trained, suites = _results(folder, results)
    if answers and "win_rate" in trained:
        games = ((one.chances, one.policy, one.start) for one in answers)
        trained.setdefault("lc_win_rate", rate_by_answers(games))
        start.setdefault("lc_win_rate", 0.5)
    saved = [folder / "model", folder / "policy", *(own / "policy" for own in reversed(_iterations(folder)))]
    card = next(filter(None, (_text(own / "README.md") for own in saved)), "")
    made_with = _VERSIONS.search(card)
    return Run(
        dir=folder,
        name=name,
        state=state,
        note="; ".join(filter(None, (note, problem))),
        objective=str(config.get("objective.name", "unknown")),
        seed=config.get("seed"),
        config=config,
        identity=flat(_parsed(folder / "identity.json")),
        start=start,
        trained=trained,
        held_out=_held_out(folder),
        suites=suites,
        curves=curves,
        answers=answers,
        iterations=iterations,
        last_step=last_step,
        steps=steps,
        made_with=made_with[1] if made_with else "",
        command=command,
    )


def _state(folder: Path, last_step: int, steps: int | None) -> tuple[State, str]:
    """Tell why a run has no results, and how far it got."""
    reached = f"at step {last_step}" + (f" of {steps}" if steps else "") if last_step else "before the first step"
    if _is_held(folder / ".lock"):
        return State.running, reached
    for own in (folder, *_iterations(folder)):
        if collapsed := _parsed(own / "collapsed.json"):
            return State.collapsed, f"at step {collapsed.get('step')}: {' '.join(str(collapsed.get('why')).split())}"
    for file in _tracebacks(folder):
        lines = [line for line in _text(file).splitlines() if line.strip()]
        return State.failed, f"{reached}: {lines[-1].strip()[:300] if lines else 'no message'} ({file.name})"
    return State.incomplete, f"stopped {reached}; the same command goes on"


def _tracebacks(folder: Path) -> list[Path]:
    return sorted(folder.glob("logs/*.traceback"))


def _is_held(lock: Path) -> bool:
    try:
        with FileLock(lock, timeout=0) if lock.exists() else nullcontext():
            return False
    except OSError as error:  # any other than Timeout: not ours to lock
        return isinstance(error, Timeout)


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


def _results(folder: Path, results: Values) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
    """Return results of start model and policy, and the suites' notes. A suite says "judge/ties", "lm_eval/start/mmlu"."""
    at_start = {name.removeprefix("eval/"): value for name, value in _parsed(folder / "start.json").items()}
    start, trained = _numbers(results.get("start") or at_start), _numbers(results.get("trained"))
    trained |= {f"cost/{name}": value for name, value in _numbers(results.get("cost")).items()}
    suites = {}
    for file in sorted(folder.glob("evaluation/*/results.json")):
        suites[file.parent.name] = str(_parsed(file.with_name("settings.json")).get("note", ""))
        for name, value in _numbers(_parsed(file)).items():
            if "/start/" in name:
                start[name.replace("/start/", "/", 1)] = value
            else:
                trained[name] = value
    return start, trained, suites


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
    return Answers(prompt=row["prompt"], start=row["start"], policy=row["policy"], scores=scores, chances=chances)


def _held_out(folder: Path) -> dict[str, dict[str, float]]:
    """Read held_out.jsonl: by each accuracy, whether the policy ranks each held-out pair rightly."""
    outcomes: dict[str, dict[str, float]] = {}
    for row in _lines(folder / "held_out.jsonl"):
        for name, outcome in _numbers(row).items():
            if name != "pair" and 0 <= outcome <= 1:
                outcomes.setdefault(name, {})[str(row.get("pair"))] = outcome
    return outcomes


def _iterations(folder: Path) -> list[Path]:
    """List the folders of self-play's trainings, in order."""
    own = [path for path in folder.glob("iter_*") if path.name[5:].isdigit() and path.name != "iter_0"]
    return sorted(own, key=lambda path: int(path.name[5:]))


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def _parsed(file: Path, kind: type = dict, parse: Callable[[str], Any] = json.loads) -> Any:
    """Read what a file holds; an empty one of its kind where it is absent, damaged or of another kind."""
    try:
        content = parse(_text(file))
    except (ValueError, yaml.YAMLError):
        return kind()
    return content if isinstance(content, kind) else kind()


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
