"""Runs -> methods: what is the same but for the seed is one method. Its figures over seeds, and any two item by item.

    figure of a method    mean over its seeds, with the 95% interval of that mean: over seeds, and of win rates and accuracies
                          over seeds and prompts (or held-out pairs), so that one seed is enough
    a against b           a's win rate minus b's, both against the start model and at the same prompts; where there is
                          no judge a's accuracy by mean_logp minus b's, at the same held-out pairs; paired
    significant           p at most 0.05 after Holm's correction for all comparisons that are made of that quantity

The statistics are those of stats.py. Pure: no files. A run that is there twice, with the same settings and seed, counts
once. Left out: held-out pairs of one prompt are taken as independent, since a run does not say whose prompt a pair has.
"""

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from align.metrics import Metric, row
from align.report.naming import is_fingerprint, kind, labels, prominence, settings_of, short_name, value_text, varied
from align.report.read import Run, State
from align.stats import intervals

Item = tuple[Any, ...]  # a prompt or a held-out pair, that which two runs have in common


#: What two methods are compared by: the first of these that any method has. What it is, and of what.
COMPARED = {
    "win_rate": ("win rate", "prompts"),
    "accuracy/mean_logp": ("accuracy by mean_logp", "held-out pairs"),
}


_FEWEST = 6  # prompts of a comparison: where five all agree, a sign test has p = 2^-4


@dataclass(frozen=True, kw_only=True)
class Method:
    """Runs that differ by their seeds only."""

    number: int  # in the order of the report
    label: str
    runs: list[Run]  # complete ones, a seed each
    settings: Mapping[str, Any]  # "objective.beta": 2.0, ...: all that decides a result, but the seed

    def figure(self, name: str) -> intervals.Estimate | None:
        """The mean over seeds; None where a run lacks it."""
        return self._figures.get(name)

    @cached_property
    def _figures(self) -> dict[str, intervals.Estimate]:
        return {name: made for name in self.runs[0].trained if (made := self._estimate(name))}

    def _estimate(self, name: str) -> intervals.Estimate | None:
        values = [run.trained.get(name, math.nan) for run in self.runs]
        if not all(map(math.isfinite, values)):
            return None
        over_seeds = intervals.mean_over_seeds(values)
        if len(items := self.by_item(name)) < 2:
            return over_seeds
        margin = intervals.estimate(table_of(items, list(items))).margin
        over: intervals.Over = "seeds and prompts" if len(self.runs) > 1 else "prompts"
        return replace(over_seeds, low=over_seeds.mean - margin, high=over_seeds.mean + margin, over=over)

    def of_suite(self, name: str) -> list[float]:
        """Of the seeds that a suite was run on."""
        return [value for run in self.runs if math.isfinite(value := run.trained.get(name, math.nan))]

    def shares(self) -> tuple[float, float, float] | None:
        """(wins, ties, losses) against the start model; None without a judge."""
        if not all(run.answers for run in self.runs):
            return None
        wins = fmean(fmean(answers.wins for answers in run.answers) for run in self.runs)
        ties = fmean(fmean(answers.ties for answers in run.answers) for run in self.runs)
        return wins, ties, 1 - wins - ties

    def by_item(self, name: str) -> dict[Item, list[float]]:
        """What `name` is at each prompt or pair that all seeds have, one value per seed."""
        values: dict[Item, list[float]] = {}
        for run in self.runs:
            for item, value in _outcomes(run, name):
                values.setdefault(item, []).append(value)
        return {item: of_seeds for item, of_seeds in values.items() if len(of_seeds) == len(self.runs)}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What method `a` has minus what method `b` has, at the prompts or pairs that both have."""

    a: Method
    b: Method
    made: intervals.Comparison
    corrected: bool  # its p, by Holm for several comparisons; its interval never is

    @property
    def sentence(self) -> str:
        """In words."""
        a, b, made = self.a.label, self.b.label, self.made
        between = f"{signed(made.low)} to {signed(made.high)}"
        p = "p after Holm" if self.corrected else "p"
        figures = f"{signed(made.difference)} (95%: {between}; {p}\N{NO-BREAK SPACE}{p_value(made)})"
        if not made.significant:
            return f"{a} and {b}: not significant, {figures}"
        return f"{a} is {'above' if made.difference > 0 else 'below'} {b}: significant, {figures}"


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """Every two methods by one quantity."""

    name: str  # of COMPARED
    made: list[Comparison]

    @property
    def quantity(self) -> str:
        """In words."""
        return COMPARED[self.name][0]

    @property
    def items(self) -> str:
        """What is paired."""
        return COMPARED[self.name][1]

    def between(self, a: Method, b: Method) -> Comparison | None:
        """The comparison of two, in that order."""
        for one in self.made:
            if one.a is a and one.b is b:
                return one
            if one.a is b and one.b is a:
                return _turned(one)
        return None


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Methods of one objective over one or two numbers, all else the same."""

    title: str
    x: str  # "objective.beta"
    y: str | None  # "objective.gamma_beta_ratio"; None: one number only
    methods: list[Method]


@dataclass(frozen=True, kw_only=True)
class Study:
    """All that a report shows."""

    runs: list[Run]  # those that count first, in the order of the methods
    labels: Mapping[Path, str]  # of every run's folder what its method is called
    methods: list[Method]  # the best by the main quantity first
    twins: list[tuple[Run, Run]]  # (left out, the one that counts)
    main: Comparisons  # by win rate, or where there is no judge by accuracy
    beside: Comparisons | None  # where there is a judge: by accuracy
    sweeps: list[Sweep]
    varied: list[str]  # settings that differ between runs, the seed among them
    unequal: dict[str, dict[str, list[str]]]  # what ought to be the same and is not: value: labels of methods
    equal: list[str]  # what ought to be the same and is

    @property
    def judged(self) -> bool:
        """Whether any method has a win rate."""
        return self.main.name == "win_rate"

    @property
    def unfinished(self) -> list[Run]:
        """Runs without results."""
        return [run for run in self.runs if run.state is not State.complete]

    def columns(self, among: Sequence[Metric]) -> list[Metric]:
        """Those that any method has."""
        return [column for column in among if any(method.of_suite(column.name) for method in self.methods)]

    @property
    def other_results(self) -> list[str]:
        """Further results that runs have, of suites and groups."""
        names = sorted({name for method in self.methods for run in method.runs for name in run.trained})
        known = {name: row(name) for name in names if not name.endswith("standard_error")}
        return [name for name, metric in known.items() if metric is None or "further" in metric.shown.split()]

    def start(self, name: str) -> float | None:
        """Of the start model, the mean over runs."""
        values = [run.start[name] for method in self.methods for run in method.runs if name in run.start]
        return fmean(values) if values else None

    @property
    def told(self) -> list[Run]:
        """Runs whose settings are known."""
        return [run for run in self.runs if run.told]

    def name(self, run: Run) -> str:
        """What a run is called where its method is not enough."""
        if not run.told:
            return run.name
        return f"{self.labels[run.dir]}, seed {value_text(run.seed)}"


def study(runs: Sequence[Run]) -> Study:
    """Methods, comparisons and sweeps of these runs."""
    twins = _twins(run for run in runs if run.state is State.complete)
    left_out = {run.dir for run, _ in twins}
    groups: dict[str, list[Run]] = {}
    told = [run for run in runs if run.told]
    for run in told:
        groups.setdefault(json.dumps(settings_of(run), sort_keys=True, default=str), []).append(run)
    names = labels([(kind(run), settings_of(run)) for run, *_ in groups.values()])
    label_of = {run.dir: run.name for run in runs}
    label_of |= {run.dir: label for label, group in zip(names, groups.values(), strict=True) for run in group}
    made = []
    for group in groups.values():
        members = sorted(
            (run for run in group if run.state is State.complete and run.dir not in left_out),
            key=lambda run: run.seed or 0,
        )
        if members:
            label = label_of[members[0].dir]
            made.append(Method(number=0, label=label, runs=members, settings=settings_of(members[0])))
    main, *others = [name for name in COMPARED if any(method.figure(name) for method in made)] or [*COMPARED][:1]
    made.sort(key=lambda method: _rank(method, main))
    methods = [replace(method, number=number) for number, method in enumerate(made)]
    counted = [run for method in methods for run in method.runs]
    dirs = {run.dir for run in counted}
    decides = {key for run in runs for key in run.identity}
    shared = _shared(methods)
    return Study(
        runs=counted + [run for run in runs if run.dir not in dirs],
        labels=label_of,
        methods=methods,
        twins=twins,
        main=_comparisons(methods, main),
        beside=_comparisons(methods, others[0]) if others else None,
        sweeps=_sweeps(methods),
        varied=sorted(varied([run.config for run in told]), key=lambda key: (key not in decides, prominence(key))),
        unequal={what: values for what, values in shared.items() if len(values) > 1},
        equal=[what for what, values in shared.items() if len(values) == 1],
    )


def signed(value: float) -> str:
    """+0.031, with a real minus."""
    return f"{value:+.3f}".replace("-", "−")


def p_value(made: intervals.Comparison) -> str:
    """As it is read, behind "p"."""
    p = "below 0.001" if made.p_adjusted < 0.001 else f"= {made.p_adjusted:.3f}"
    return p.replace(" ", "\N{NO-BREAK SPACE}")


# Parts ----------------------------------------------------------------------------------------------------------------


def _twins(runs: Iterable[Run]) -> list[tuple[Run, Run]]:
    """(a run, the one before it that has the same settings and seed)."""
    seen: dict[str, Run] = {}
    twins = []
    for run in runs:
        first = seen.setdefault(json.dumps([settings_of(run), run.seed], sort_keys=True, default=str), run)
        if first is not run:
            twins.append((run, first))
    return twins


def _rank(method: Method, name: str) -> tuple[float, str]:
    value = method.figure(name)
    return (-value.mean if value else 0.0, method.label)


def _outcomes(run: Run, name: str) -> Iterable[tuple[Item, float]]:
    """(prompt or pair, what `name` is there); a prompt that is asked twice is two."""
    if name == "win_rate":
        times: Counter[str] = Counter()
        for answers in run.answers:
            yield (answers.prompt, times[answers.prompt]), answers.win_rate
            times[answers.prompt] += 1
    for pair, outcome in run.held_out.get(name, {}).items():
        yield (run.identity.get("pairs"), pair), outcome  # a pair's name may be its place in the data only


def _comparisons(methods: Sequence[Method], name: str) -> Comparisons:
    values = {method.number: method.by_item(name) for method in methods}
    raw = []
    for a, b in itertools.combinations(methods, 2):
        shared = [item for item in values[a.number] if item in values[b.number]]
        if len(shared) >= _FEWEST and _measured_alike(a, b, name):
            raw.append((a, b, intervals.compare(*(table_of(values[method.number], shared) for method in (a, b)))))
    adjusted = intervals.holm([made.p_value for *_, made in raw])
    return Comparisons(
        name=name,
        made=[
            Comparison(a=a, b=b, made=replace(made, p_adjusted=p), corrected=len(raw) > 1)
            for (a, b, made), p in zip(raw, adjusted, strict=True)
        ],
    )


def _measured_alike(a: Method, b: Method, name: str) -> bool:
    """Win rates are against a start model, by a judge, of answers drawn in some way: else they are different things."""
    return name != "win_rate" or all(
        _fairness(a, what) == _fairness(b, what) for what in ("start", "judge", "evaluation")
    )


def table_of(values: Mapping[Item, list[float]], items: Sequence[Item]) -> list[list[float]]:
    """[seeds][items]."""
    return [list(of_seed) for of_seed in zip(*(values[item] for item in items), strict=True)]


def _turned(one: Comparison) -> Comparison:
    made = replace(
        one.made,
        difference=-one.made.difference,
        low=-one.made.high,
        high=-one.made.low,
        seeds=one.made.seeds[::-1],
    )
    return replace(one, a=one.b, b=one.a, made=made)


def _sweeps(methods: Sequence[Method]) -> list[Sweep]:
    """Where methods of an objective differ by numbers: of two the first are the axes, and the rest makes several maps."""
    made = []
    for of_kind in dict.fromkeys(kind(method.runs[0]) for method in methods):
        own = [method for method in methods if kind(method.runs[0]) == of_kind]
        differ = sorted(varied([method.settings for method in own]), key=prominence)
        differ = [key for key in differ if not is_fingerprint(key)]
        axes = [key for key in differ if all(_is_number(method.settings.get(key)) for method in own)][:2]
        if not axes:
            continue
        rest = [key for key in differ if key not in axes]
        maps: dict[str, list[Method]] = {}
        for method in own:
            where = " ".join(f"{short_name(key)}={value_text(method.settings.get(key))}" for key in rest)
            maps.setdefault(" ".join(filter(None, (of_kind, where))), []).append(method)
        for title, members in maps.items():
            if len(members) >= 3 and all(len({m.settings[axis] for m in members}) > 1 for axis in axes):
                made.append(Sweep(title=title, x=axes[0], y=axes[1] if len(axes) > 1 else None, methods=members))
    return made


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shared(methods: Sequence[Method]) -> dict[str, dict[str, list[str]]]:
    """What a fair comparison keeps the same or tells: its values, and which methods have them.

    Learning rates that every objective was swept over are neither: the methods' names tell them.
    """
    words_of = {
        "start": "start model",
        "pairs": "training pairs",
        "steps": "steps",
        "optimizer.learning_rate": "learning rate",
        "evaluation": "evaluation",
        "judge": "judge",
        "seeds": "seeds",
        "precision": "precision",
    }
    found: dict[str, dict[str, list[str]]] = {}
    for name, words in words_of.items():
        values: dict[str, list[str]] = {}
        for method in methods:
            values.setdefault(_fairness(method, name), []).append(method.label)
        if name != "optimizer.learning_rate" or len(values) == 1 or not _in_all_objectives(methods, name):
            found[words] = values
    return found


def _in_all_objectives(methods: Sequence[Method], name: str) -> bool:
    """Whether each objective has the same values of it."""
    values: dict[str, set[str]] = {}
    for method in methods:
        values.setdefault(method.runs[0].objective, set()).add(_fairness(method, name))
    return len({*map(frozenset, values.values())}) == 1


def _fairness(method: Method, name: str) -> str:
    settings = method.settings
    if name == "steps":
        return ", ".join(dict.fromkeys(value_text(run.steps) for run in method.runs))
    if name == "seeds":
        return ", ".join(value_text(run.seed) for run in method.runs)
    if name == "precision":
        return f"{settings.get('device')}, {'bf16' if settings.get('bf16') else 'fp32'}"
    if name == "judge":
        config = method.runs[0].config
        told = [config.get(f"scorer.{key}") for key in ("name", "path", "judge.served_model")]
        return ", ".join(map(str, filter(None, told))) or value_text(config.get("dataset.judge"))
    if name == "evaluation":
        return ", ".join(f"{k[11:]}={value_text(v)}" for k, v in settings.items() if k.startswith("evaluation."))
    return value_text(settings.get(name))
