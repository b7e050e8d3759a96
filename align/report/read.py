"""Run folders -> typed rows. Reads only what a run has written of itself, and nothing of it is trusted to be whole.

A folder counts as a run where it holds identity.json, config.yaml beside plan.txt, or a traceback; a link to one counts
as that run. The iterations of a self-play run belong to it and are no runs. A run without results.json is read as far as
it got. Jobs of a sweep that failed before they had a folder are those of failed.json. Left out: checkpoints, weights and
tracker files.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from filelock import FileLock, Timeout

from align.files import flat
from align.say import UserError
from align.stats.length_control import length_controlled_win_rate

Values = Mapping[str, Any]


_NOT_RUNS = ("checkpoints", "model", "policy", "wandb", "logs", "tensorboard")


_OF_SUITES = "evaluation/*/results.json"


_CALL = re.compile(r"^python -m align (--config-dir=\S+ )*")  # before the words of a command


class State(Enum):
    """How far a run got."""

    complete = "complete"
    failed = "failed"  # it left a traceback
    collapsed = "collapsed"  # ended early, as it had nothing to hope for
    running = "running"  # a process holds its folder
    incomplete = "incomplete"  # stopped or killed: the same command goes on


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What start model and policy said to one prompt, K answers each, and what the judge makes of it."""

    prompt: str
    start: list[str]
    policy: list[str]
    start_scores: list[float]  # empty where the scorer only compares
    policy_scores: list[float]
    chances: list[list[float]]  # [K][K] P(the policy's i-th answer beats the start model's j-th); a tie is one half

    @property
    def win_rate(self) -> float:
        """A tie is half a win."""
        return fmean(chance for row in self.chances for chance in row)

    @property
    def ties(self) -> float:
        """The share of pairs of answers that are equally good."""
        return fmean(chance == 0.5 for row in self.chances for chance in row)

    @property
    def wins(self) -> float:
        """The share of pairs in which the policy's answer is the better one."""
        return self.win_rate - self.ties / 2


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder."""

    dir: Path
    name: str  # what the report calls it: its folder, without what all folders have in common
    state: State
    note: str = ""  # why it is not complete, in a line
    config: Values = field(default_factory=dict)  # "objective.beta": 2.0, ... all of config.yaml
    identity: Values = field(default_factory=dict)  # likewise, of identity.json: what decides the result
    start: Mapping[str, float] = field(default_factory=dict)  # results of the start model
    trained: Mapping[str, float] = field(default_factory=dict)  # of the policy; "cost/..." and what suites say, too
    held_out: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # accuracy: pair: 0, 0.5 or 1
    suites: Mapping[str, str] = field(default_factory=dict)  # what `align evaluate` has measured, a line each
    curves: Mapping[str, list[tuple[int, float]]] = field(default_factory=dict)  # metric: (step, value), in order
    answers: list[Answers] = field(default_factory=list)
    iterations: Sequence[Mapping[str, float]] = field(default_factory=list)  # of self-play
    steps: int | None = None  # planned; of self-play those of all iterations that are done
    made_with: str = ""  # versions
    command: str = ""

    @property
    def told(self) -> bool:
        """Whether it says what its settings are; what failed early does not."""
        return bool(self.config or self.identity) or self.state is State.complete

    @property
    def objective(self) -> str:
        """Its name."""
        return str(self.config.get("objective.name", "unknown"))

    @property
    def seed(self) -> int | None:
        """The seed of data order, new weights and sampling."""
        return self.config.get("seed")

    @property
    def last_step(self) -> int:
        """The last step that is in metrics.jsonl."""
        return max((points[-1][0] for points in self.curves.values()), default=0)


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """All runs in and below the folders, each once, in the order of their paths; then jobs that failed without a folder.

    Raises:
        UserError: a folder is not there, or neither a run nor a failed job is in any of them.
    """
    folders = list(folders)
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"no folder {folder}: give folders of runs, e.g. python -m align report runs")
    found = sorted({path.resolve() for folder in folders for path in find_runs(folder)})
    above = common_folder(found) if found else Path()
    runs = [read_run(path, str(path.relative_to(above)) if path != above else path.name) for path in found]
    runs += _failed_jobs(folders, {_CALL.sub("", run.command) for run in runs})
    if not runs:
        raise UserError(
            f"no runs in {', '.join(map(str, folders))}: train first, e.g. python -m align -m objective=dpo,simpo"
        )
    return runs


def common_folder(paths: Iterable[Path]) -> Path:
    """The deepest folder that holds all of them; of one run, the folder it is in."""
    return Path(os.path.commonpath([path.resolve().parent for path in paths]))


def find_runs(folder: Path) -> Iterator[Path]:
    """Run folders in and below a folder, links included."""
    return (path for path, is_run in _walk(folder) if is_run)


def _walk(folder: Path) -> Iterator[tuple[Path, bool]]:
    """(folder, whether it is a run's); what is below a run's is left out."""
    seen: set[Path] = set()  # links may lead in a circle
    for path, inner, files in os.walk(folder, followlinks=True):
        own = Path(path)
        if own.resolve() in seen:
            inner.clear()
            continue
        seen.add(own.resolve())
        if "identity.json" in files or {"config.yaml", "plan.txt"} <= set(files) or any(_tracebacks(own)):
            inner.clear()
            yield own, True
        else:
            inner[:] = sorted(name for name in inner if name not in _NOT_RUNS and not name.startswith("."))
            yield own, False


def _failed_jobs(folders: Iterable[Path], ran: Set[str]) -> list[Run]:
    """Of failed.json in the folders of sweeps; those whose words made a run after all, `ran`, are told as that run."""
    made: dict[str, Run] = {}
    for own in (path for folder in folders for path, is_run in _walk(folder) if not is_run):
        for job in _list(own / "failed.json"):
            words, why = (" ".join(str(job.get(key, "")).split()) for key in ("job", "why"))
            if words and words not in ran:
                file = own.resolve() / "failed.json"
                made.setdefault(words, Run(dir=file / words, name=words, state=State.failed, note=why or "no message"))
    return [*made.values()]


def read_run(folder: Path, name: str) -> Run:
    """One run folder, whatever of it is there."""
    results = _json(folder / "results.json")
    plan = _text(folder / "plan.txt")
    planned = re.search(r"^steps\s+([\d,]+) of ", plan, re.MULTILINE)
    config = _yaml(folder / "config.yaml")
    curves = _curves(folder)
    told = results.get("iterations")
    iterations = [_numbers(made) for made in told] if isinstance(told, list) else []
    steps = int(planned[1].replace(",", "")) if planned else None
    if iterations:
        steps = int(sum(made.get("steps", 0) for made in iterations))
    state, note = _state(folder, bool(results), curves, steps)
    card = next((text for place in ("model", "policy") for text in [_text(folder / place / "README.md")] if text), "")
    if not card and (last := _last_iteration(folder)):
        card = _text(last / "policy" / "README.md")
    made_with = re.search(r"^- Made with (.*)$", card, re.MULTILINE)
    problem = ""
    answers: list[Answers] = []
    try:
        answers = _answers(folder)
    except (ValueError, KeyError, TypeError, OSError) as error:
        problem = f"its answers cannot be read: {' '.join(str(error).split())[:200]}"
    measured = _suites(folder)
    of_start = {name.replace("/start/", "/", 1): value for name, value in measured.items() if "/start/" in name}
    of_policy = {name: value for name, value in measured.items() if "/start/" not in name}
    sides = {
        "start": _numbers(results.get("start", {}) or _unprefixed(_json(folder / "start.json"))) | of_start,
        "trained": _numbers(results.get("trained", {})) | _cost(results) | of_policy,
    }
    if answers and "win_rate" in sides["trained"]:
        sides["trained"].setdefault("lc_win_rate", _length_controlled(answers))
        sides["start"].setdefault("lc_win_rate", 0.5)
    return Run(
        dir=folder,
        name=name,
        state=state,
        note="; ".join(filter(None, (note, problem))),
        config={key: value for key, value in flat(config).items() if key != "command"},
        identity=flat(_json(folder / "identity.json")),
        start=sides["start"],
        trained=sides["trained"],
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


def _tracebacks(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob("logs/*.traceback"))


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
    """Of metrics.jsonl; of self-play all iterations in a row, as in a tracker."""
    curves: dict[str, list[tuple[int, float]]] = {}
    before = 0
    for own in _iterations(folder) or [folder]:
        rows = [row for row in _lines(own / "metrics.jsonl") if isinstance(row.get("step"), int)]
        rows = [row for row in rows if row["step"] or not before]
        for row in rows:
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    curves.setdefault(name, []).append((before + row["step"], float(value)))
        before += max((row["step"] for row in rows), default=0)
    return curves


def _answers(folder: Path) -> list[Answers]:
    """Of samples.jsonl, or of the last complete iteration of self-play."""
    made = []
    for row in _lines(folder / "samples.jsonl"):
        scores = row.get("scores") or {"start": [], "policy": []}  # none where the scorer only compares
        certain = [[(a > b) + 0.5 * (a == b) for b in scores["start"]] for a in scores["policy"]]
        chances = row.get("chances", certain)
        if [len(of) for of in chances] != [len(row["start"])] * len(row["policy"]) or not any(chances):
            raise ValueError(f"samples.jsonl lacks scores of answers to {row['prompt']!r}")
        scored = all(map(math.isfinite, scores["start"] + scores["policy"]))
        if not scored or not all(0 <= chance <= 1 for of in chances for chance in of):
            continue  # as in the win rate
        made.append(
            Answers(
                prompt=row["prompt"],
                start=row["start"],
                policy=row["policy"],
                start_scores=scores["start"],
                policy_scores=scores["policy"],
                chances=chances,
            )
        )
    last = _last_iteration(folder)
    return _selfplay_answers(folder, last) if last else made


def _held_out(folder: Path) -> dict[str, dict[str, float]]:
    """Of held_out.jsonl: whether the policy ranks each held-out pair rightly, by each of its accuracies."""
    made: dict[str, dict[str, float]] = {}
    for row in _lines(folder / "held_out.jsonl"):
        for name, outcome in _numbers(row).items():
            if name != "pair" and 0 <= outcome <= 1:
                made.setdefault(name, {})[str(row.get("pair"))] = outcome
    return made


def _cost(results: Values) -> dict[str, float]:
    return {f"cost/{name}": value for name, value in _numbers(results.get("cost")).items()}


def _suites(folder: Path) -> dict[str, float]:
    """What `align evaluate` has found, by names that carry the suite: "alpaca_eval/win_rate", "lm_eval/start/gsm8k"."""
    made: dict[str, float] = {}
    for file in sorted(folder.glob(_OF_SUITES)):
        made |= _numbers(_json(file))
    return made


def _length_controlled(answers: list[Answers]) -> float:
    """The length-controlled win rate by pairs of answers, without AlpacaEval's difficulties: these are other prompts."""
    rows = [
        (chance, len(ours), len(theirs))
        for one in answers
        for ours, row in zip(one.policy, one.chances, strict=True)
        for theirs, chance in zip(one.start, row, strict=True)
    ]
    return length_controlled_win_rate(*zip(*rows, strict=True)).rate


def _selfplay_answers(folder: Path, last: Path) -> list[Answers]:
    from align.onpolicy.figures import side_by_side, usable
    from align.onpolicy.pairs import scored_prompts
    from align.onpolicy.sample import read_samples
    from align.onpolicy.score import read_scores
    from align.onpolicy.select import preferences

    number = int(last.name.removeprefix("iter_"))
    told = {"policy": number, "before": number - 1, "start": 0}  # in the order in which selfplay.py compares
    if number == 1:
        del told["before"]
    rows = side_by_side(
        {name: read_samples(folder / f"iter_{of}" / "evaluation" / "responses") for name, of in told.items()}, number
    )
    prompts = {row.prompt_id: row.prompt for row in rows}
    made = []
    for scored in usable([*scored_prompts(rows, read_scores(last / "evaluation" / "scores"))]):
        ours, theirs = (
            [i for i, candidate in enumerate(scored.candidates) if candidate.origin == side]
            for side in ("policy", "start")
        )
        scores = [candidate.score for candidate in scored.candidates]
        numbers = [score for score in scores if score is not None]
        matrix = scored.preferences or preferences(numbers, temperature=0.0)
        chances = [[matrix[i][j] for j in theirs] for i in ours]
        asked = prompts[scored.id]
        made.append(
            Answers(
                prompt=asked if isinstance(asked, str) else asked[-1]["content"],
                start=[scored.candidates[j].text for j in theirs],
                policy=[scored.candidates[i].text for i in ours],
                start_scores=[numbers[j] for j in theirs] if len(numbers) == len(scores) else [],
                policy_scores=[numbers[i] for i in ours] if len(numbers) == len(scores) else [],
                chances=chances,
            )
        )
    return made


def _iterations(folder: Path) -> list[Path]:
    """The folders of self-play's trainings, in order."""
    own = [path for path in folder.glob("iter_*") if path.name[5:].isdigit() and path.name != "iter_0"]
    return sorted(own, key=lambda path: int(path.name[5:]))


def _last_iteration(folder: Path) -> Path | None:
    """The newest iteration that is complete."""
    return next((path for path in reversed(_iterations(folder)) if (path / "summary.json").exists()), None)


# Files ----------------------------------------------------------------------------------------------------------------


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def _json(file: Path) -> dict[str, Any]:
    try:
        made = json.loads(_text(file) or "{}")
    except ValueError:
        return {}
    return made if isinstance(made, dict) else {}


def _list(file: Path) -> list[dict[str, Any]]:
    try:
        made = json.loads(_text(file) or "[]")
    except ValueError:
        return []
    return [one for one in made if isinstance(one, dict)] if isinstance(made, list) else []


def _yaml(file: Path) -> dict[str, Any]:
    try:
        made = yaml.safe_load(_text(file)) or {}
    except yaml.YAMLError:
        return {}
    return made if isinstance(made, dict) else {}


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """Of a JSONL file; a last line that was cut off by a kill is left out."""
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


def _unprefixed(metrics: Values) -> dict[str, Any]:
    return {name.removeprefix("eval/"): value for name, value in metrics.items()}
