"""Methods: runs that differ by their seeds only. Figures over seeds, what a comparison keeps the same, and names."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np

from align.report.read import Run, Values
from align.stats import intervals

Item = tuple[Any, ...]  # a prompt or a held-out pair, that which two runs have in common

_PROMINENT = ("objective.", "model.name", "dataset.name", "optimizer.learning_rate", "optimizer.", "train.")
_FINGERPRINTS = ("start", "pairs", "device", "bf16")
_EVERYWHERE = ("model.name", "dataset.name")  # named in every label where they differ, also where the objective does


@dataclass(frozen=True, kw_only=True)
class Method:
    """Runs that differ by their seeds only."""

    number: int  # in the order of the report
    label: str
    runs: list[Run]  # complete ones, a seed each
    settings: Mapping[str, Any]  # "objective.beta": 2.0, ...: all that decides a result, but the seed

    @cached_property
    def figures(self) -> dict[str, intervals.Estimate]:
        """The mean over seeds of each result that all of them have."""
        values = {name: self.of_suite(name) for name in self.runs[0].trained}
        return {name: self._estimate(name, own) for name, own in values.items() if len(own) == len(self.runs)}

    def _estimate(self, name: str, values: Sequence[float]) -> intervals.Estimate:
        over_seeds = intervals.mean_over_seeds(values)
        if len(items := self.by_item(name)) < 2:
            return over_seeds
        within, mean = intervals.estimate(np.transpose([*items.values()])), over_seeds.mean
        return replace(over_seeds, low=mean - within.margin, high=mean + within.margin, over=within.over)

    @cached_property
    def terms(self) -> dict[str, str]:
        """In words, all that a fair comparison keeps the same or tells."""
        its, config = self.settings, self.runs[0].config
        evaluation = [f"{key[11:]}={value_text(value)}" for key, value in its.items() if key.startswith("evaluation.")]
        scorer = [config.get(f"scorer.{key}") for key in ("name", "path", "judge.served_model")]
        return {
            "start model": value_text(its.get("start")),
            "training pairs": value_text(its.get("pairs")),
            "steps": ", ".join(dict.fromkeys(value_text(run.steps) for run in self.runs)),
            "learning rate": value_text(its.get("optimizer.learning_rate")),
            "evaluation": ", ".join(evaluation),
            "judge": ", ".join(map(str, filter(None, scorer))) or value_text(config.get("dataset.judge")),
            "seeds": ", ".join(value_text(run.seed) for run in self.runs),
            "precision": f"{its.get('device')}, {'bf16' if its.get('bf16') else 'fp32'}",
        }

    def of_suite(self, name: str) -> list[float]:
        """List the values of the seeds that have one: a suite may have been run on some of them."""
        return [value for run in self.runs if math.isfinite(value := run.trained.get(name, math.nan))]

    def by_item(self, name: str) -> dict[Item, list[float]]:
        """Return `name` at each prompt or pair that all seeds have, one value per seed."""
        values: dict[Item, list[float]] = {}
        for run in self.runs:
            for item, value in _outcomes(run, name):
                values.setdefault(item, []).append(value)
        return {item: of_seeds for item, of_seeds in values.items() if len(of_seeds) == len(self.runs)}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Methods of one objective over one or two numbers, all else the same."""

    title: str
    x: str  # "objective.beta"
    y: str | None  # "objective.gamma_beta_ratio"; None: one number only
    methods: list[Method]


def shares(runs: Sequence[Run]) -> tuple[float, float, float] | None:
    """Return (wins, ties, losses) against the start model, the mean over runs; None without a judge."""
    if not all(run.answers for run in runs):
        return None
    ties = fmean(fmean(one.ties for one in run.answers) for run in runs)
    wins = fmean(fmean(one.win_rate - one.ties / 2 for one in run.answers) for run in runs)
    return wins, ties, 1 - wins - ties


def _outcomes(run: Run, name: str) -> Iterable[tuple[Item, float]]:
    """Yield (prompt or pair, `name` there); a prompt that is asked twice is two."""
    if name == "win_rate":
        times: Counter[str] = Counter()
        for answers in run.answers:
            yield (answers.prompt, times[answers.prompt]), answers.win_rate
            times[answers.prompt] += 1
    for pair, outcome in run.held_out.get(name, {}).items():
        yield (run.identity.get("pairs"), pair), outcome  # a pair's name may be its place in the data only


def shared(methods: Sequence[Method]) -> dict[str, dict[str, list[str]]]:
    """Return the values of all `Method.terms` and whose they are, but for learning rates that all were swept over."""
    found: dict[str, dict[str, list[str]]] = {}
    rates: dict[str, set[str]] = {}  # of each objective
    for method in methods:
        rates.setdefault(method.runs[0].objective, set()).add(method.terms["learning rate"])
        for words, value in method.terms.items():
            found.setdefault(words, {}).setdefault(value, []).append(method.label)
    if len(found.get("learning rate", ())) > 1 and len({*map(frozenset, rates.values())}) == 1:
        del found["learning rate"]
    return found


def sweeps(methods: Sequence[Method]) -> list[Sweep]:
    """Find methods of an objective that differ by numbers: of two the first are the axes, the rest makes several maps."""
    found = []
    for of_kind in dict.fromkeys(kind(method.runs[0]) for method in methods):
        own = [method for method in methods if kind(method.runs[0]) == of_kind]
        differ = [key for key in varied([method.settings for method in own]) if not _is_fingerprint(key)]
        axes = [key for key in differ if all(type(method.settings.get(key)) in (int, float) for method in own)][:2]
        if not axes:
            continue
        maps: dict[str, list[Method]] = {}
        for method in own:
            rest = [f"{short_name(key)}={value_text(method.settings.get(key))}" for key in differ if key not in axes]
            maps.setdefault(" ".join([of_kind, *rest]), []).append(method)
        for title, members in maps.items():
            if len(members) >= 3 and all(len({m.settings[axis] for m in members}) > 1 for axis in axes):
                found.append(Sweep(title=title, x=axes[0], y=axes[1] if len(axes) > 1 else None, methods=members))
    return found


def settings_of(run: Run) -> dict[str, Any]:
    """Return what decides a run's result, but the seed."""
    known = run.identity or run.config
    whole = {key: int(value) for key, value in known.items() if isinstance(value, float) and value.is_integer()}
    settings = {key: value for key, value in {**known, **whole}.items() if key != "seed"}  # 2 and 2.0 are one setting
    if kind(run) != run.objective:
        settings["iterations"] = len(run.iterations) or run.config.get("iterations")
    return settings


def kind(run: Run) -> str:
    """Return "dpo", or "dpo self-play"."""
    is_selfplay = run.iterations or run.config.get("source.name") == "selfplay"
    return f"{run.objective} self-play" if is_selfplay else run.objective


def labels(runs: Sequence[Run]) -> list[str]:
    """Name the method of each run: its kind, its hyperparameters that vary, and what else tells it from the others."""
    methods = [(kind(run), settings_of(run)) for run in runs]
    everywhere = [key for key in _EVERYWHERE if key in varied([settings for _, settings in methods])]
    found = []
    for name, settings in methods:
        group = [other for its, other in methods if its == name]
        named = list(everywhere)
        for key in varied(group):
            tells_more = len(_classes(group, [*named, key])) > len(_classes(group, named))
            if key not in named and (key.startswith("objective.") or tells_more):
                named.append(key)
        short = [short_name(key) for key in named]
        words = [word if short.count(word) == 1 else key for word, key in zip(short, named, strict=True)]
        pairs = [f"{word}={value_text(settings.get(key))}" for word, key in zip(words, named, strict=True)]
        found.append(" ".join([name, *pairs]))
    return found


def varied(settings: Sequence[Values]) -> list[str]:
    """List the keys whose values differ: what people tell runs apart by comes first, fingerprints last."""
    keys = {key for one in settings for key in one}
    return sorted((key for key in keys if len(_classes(settings, [key])) > 1), key=_prominence)


def _prominence(key: str) -> tuple[int, str]:
    at = next((number for number, start in enumerate(_PROMINENT) if key.startswith(start)), len(_PROMINENT))
    return (at + _is_fingerprint(key), key)


def _is_fingerprint(key: str) -> bool:
    """True for a key that says what something is, and is no setting."""
    return key in _FINGERPRINTS or key.startswith("objective_code")


def short_name(key: str) -> str:
    """Return beta of objective.beta, model of model.name."""
    return key.removesuffix(".name").rpartition(".")[2]


def value_text(value: Any) -> str:
    """Return a setting as it is typed."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _classes(group: Sequence[Values], keys: Sequence[str]) -> set[str]:
    return {json.dumps([settings.get(key) for key in keys], default=str) for settings in group}
