"""Methods: runs that differ by their seeds only. Figures over seeds, and what a fair comparison keeps the same."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any

from align.report.naming import value_text
from align.report.run import Run
from align.stats import intervals

Item = tuple[Any, ...]  # a prompt or a held-out pair, that which two runs have in common


@dataclass(frozen=True, kw_only=True)
class Method:
    """Runs that differ by their seeds only."""

    number: int  # in the order of the report
    label: str
    runs: list[Run]  # complete ones, a seed each
    settings: Mapping[str, Any]  # "objective.beta": 2.0, ...: all that decides a result, but the seed

    def figure(self, name: str) -> intervals.Estimate | None:
        """Return the mean over seeds; None where a run lacks it."""
        return self._figures.get(name)

    @cached_property
    def _figures(self) -> dict[str, intervals.Estimate]:
        return {name: value for name in self.runs[0].trained if (value := self._estimate(name))}

    def _estimate(self, name: str) -> intervals.Estimate | None:
        values = [run.trained.get(name, math.nan) for run in self.runs]
        if not all(map(math.isfinite, values)):
            return None
        over_seeds = intervals.mean_over_seeds(values)
        if len(items := self.by_item(name)) < 2:
            return over_seeds
        margin = intervals.estimate(by_seed(items, list(items))).margin
        over: intervals.Over = "seeds and prompts" if len(self.runs) > 1 else "prompts"
        return replace(over_seeds, low=over_seeds.mean - margin, high=over_seeds.mean + margin, over=over)

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


def shares(runs: Sequence[Run]) -> tuple[float, float, float] | None:
    """Return (wins, ties, losses) against the start model, the mean over runs; None without a judge."""
    if not all(run.answers for run in runs):
        return None
    wins, ties = (fmean(fmean(getattr(one, of) for one in run.answers) for run in runs) for of in ("wins", "ties"))
    return wins, ties, 1 - wins - ties


def by_seed(values: Mapping[Item, list[float]], items: Sequence[Item]) -> list[list[float]]:
    """Return [seeds][items]."""
    return [list(of_seed) for of_seed in zip(*(values[item] for item in items), strict=True)]


def _outcomes(run: Run, name: str) -> Iterable[tuple[Item, float]]:
    """Yield (prompt or pair, `name` there); a prompt that is asked twice is two."""
    if name == "win_rate":
        times: Counter[str] = Counter()
        for answers in run.answers:
            yield (answers.prompt, times[answers.prompt]), answers.win_rate
            times[answers.prompt] += 1
    for pair, outcome in run.held_out.get(name, {}).items():
        yield (run.identity.get("pairs"), pair), outcome  # a pair's name may be its place in the data only


# Fairness -------------------------------------------------------------------------------------------------------------


def _judge(method: Method) -> str:
    config = method.runs[0].config
    named = [config.get(f"scorer.{key}") for key in ("name", "path", "judge.served_model")]
    return ", ".join(map(str, filter(None, named))) or value_text(config.get("dataset.judge"))


def _evaluation(method: Method) -> str:
    its = {k[11:]: value_text(v) for k, v in method.settings.items() if k.startswith("evaluation.")}
    return ", ".join(f"{name}={value}" for name, value in its.items())


def _precision(method: Method) -> str:
    return f"{method.settings.get('device')}, {'bf16' if method.settings.get('bf16') else 'fp32'}"


#: What a fair comparison keeps the same, or tells -> its value in words.
_FAIRNESS: dict[str, Callable[[Method], str]] = {
    "start model": lambda method: value_text(method.settings.get("start")),
    "training pairs": lambda method: value_text(method.settings.get("pairs")),
    "steps": lambda method: ", ".join(dict.fromkeys(value_text(run.steps) for run in method.runs)),
    "learning rate": lambda method: value_text(method.settings.get("optimizer.learning_rate")),
    "evaluation": _evaluation,
    "judge": _judge,
    "seeds": lambda method: ", ".join(value_text(run.seed) for run in method.runs),
    "precision": _precision,
}


def shared(methods: Sequence[Method]) -> dict[str, dict[str, list[str]]]:
    """Return, for all in `_FAIRNESS`, its values and which methods have them.

    Learning rates that every objective was swept over are left out: the methods' names tell them.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for words, value in _FAIRNESS.items():
        of_objective: dict[str, set[str]] = {}
        values: dict[str, list[str]] = {}
        for method in methods:
            values.setdefault(value(method), []).append(method.label)
            of_objective.setdefault(method.runs[0].objective, set()).add(value(method))
        swept = words == "learning rate" and len({*map(frozenset, of_objective.values())}) == 1
        if len(values) == 1 or not swept:
            found[words] = values
    return found


def measured_alike(a: Method, b: Method, name: str) -> bool:
    """True where two methods' figures are one quantity: win rates by one judge, against one start model, drawn alike."""
    same = (_FAIRNESS["start model"], _FAIRNESS["judge"], _FAIRNESS["evaluation"])
    return name != "win_rate" or all(value(a) == value(b) for value in same)
