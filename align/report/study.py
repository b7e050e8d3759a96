"""Runs -> methods: what is the same but for the seed is one method. Its figures over seeds, and any two item by item.

    figure of a method    mean over its seeds; of win rates and accuracies with an interval over seeds and items
    a against b           a's win rate minus b's, both against the start model and at the same prompts; where there is
                          no judge a's accuracy by mean_logp minus b's, at the same held-out pairs; paired
    significant           p at most 0.05 after Holm's correction for all comparisons that are made of that quantity

Pure: no files. A run that is there twice, with the same settings and seed, counts once. Left out: held-out pairs of one
prompt are taken as independent, since a run does not say whose prompt a pair has.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import numpy as np

from align.metrics import Metric
from align.report.methods import Method, Sweep, labels, settings_of, shared, sweeps, value_text, varied
from align.report.read import Run, State
from align.stats import intervals

#: Two methods are compared by the first of these that any method has -> its words, and those of its items.
COMPARED = {"win_rate": ("win rate", "prompts"), "accuracy/mean_logp": ("accuracy by mean_logp", "held-out pairs")}
_OF_A_WIN_RATE = ("start model", "judge", "evaluation")  # terms that make two win rates one quantity
_FEWEST = 6  # prompts of a comparison: where five all agree, a sign test has p = 2^-4


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Method `a` minus method `b`, at the prompts or pairs that both have."""

    a: Method
    b: Method
    result: intervals.Comparison
    corrected: bool  # its p, by Holm for several comparisons; its interval never is

    @property
    def sentence(self) -> str:
        """The comparison in words."""
        a, b, result = self.a.label, self.b.label, self.result
        between = f"{signed(result.low)} to {signed(result.high)}"
        p = "p after Holm" if self.corrected else "p"
        figures = f"{signed(result.mean)} (95%: {between}; {p}\N{NO-BREAK SPACE}{p_value(result)})"
        if not result.significant:
            return f"{a} and {b}: not significant, {figures}"
        return f"{a} is {'above' if result.mean > 0 else 'below'} {b}: significant, {figures}"


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """Every two methods by one quantity."""

    name: str  # of COMPARED
    quantity: str  # the same in words
    items: str  # the word for what is paired
    pairs: list[Comparison]

    def between(self, a: Method, b: Method) -> Comparison | None:
        """Find the comparison of two, in that order."""
        for one in self.pairs:
            if one.a is a and one.b is b:
                return one
            if one.a is b and one.b is a:
                was = one.result
                return replace(one, a=a, b=b, result=replace(was, mean=-was.mean, low=-was.high, high=-was.low))
        return None


@dataclass(frozen=True, kw_only=True)
class Study:
    """All that a report shows."""

    runs: list[Run]  # those that count first, in the order of the methods
    known: list[Run]  # those whose settings are known
    labels: Mapping[Path, str]  # folder of a run -> label of its method
    methods: list[Method]  # the best by the main quantity first
    twins: list[tuple[Run, Run]]  # (left out, the one that counts)
    main: Comparisons  # by win rate, or where there is no judge by accuracy
    beside: Comparisons | None  # where there is a judge: by accuracy
    sweeps: list[Sweep]
    varied: list[str]  # settings that differ between runs, the seed among them
    shared: dict[str, dict[str, list[str]]]  # what ought to be the same -> its values -> labels of methods

    @property
    def judged(self) -> bool:
        """True where any method has a win rate."""
        return self.main.name == "win_rate"

    @property
    def against_best(self) -> list[Comparison]:
        """The others minus the first, where they can be compared with it."""
        return [one for other in self.methods[1:] if (one := self.main.between(other, self.methods[0]))]

    def columns(self, among: Sequence[Metric]) -> list[Metric]:
        """Select the metrics that any method has."""
        return [metric for metric in among if any(method.of_suite(metric.name) for method in self.methods)]

    def start(self, name: str) -> float | None:
        """Return the start model's figure, the mean over runs."""
        values = [run.start[name] for method in self.methods for run in method.runs if name in run.start]
        return fmean(values) if values else None

    def name(self, run: Run) -> str:
        """Name a run where its method is not enough."""
        return f"{self.labels[run.dir]}, seed {value_text(run.seed)}" if run.has_settings else run.name


def study(runs: Sequence[Run]) -> Study:
    """Group runs into methods, and compare them."""
    known = [run for run in runs if run.has_settings]
    groups: dict[str, list[Run]] = {}
    for run in known:
        groups.setdefault(json.dumps(settings_of(run), sort_keys=True, default=str), []).append(run)
    names = labels([run for run, *_ in groups.values()])
    label_of = {run.dir: run.name for run in runs}
    found, twins = [], []
    for label, group in zip(names, groups.values(), strict=True):
        label_of |= {run.dir: label for run in group}
        counted: dict[int | None, Run] = {}  # by seed, the first of those that are alike
        complete = [run for run in group if run.state is State.complete]
        twins += [(run, first) for run in complete if (first := counted.setdefault(run.seed, run)) is not run]
        if counted:
            seeds = sorted(counted.values(), key=lambda run: run.seed or 0)
            found.append(Method(number=0, label=label, runs=seeds, settings=settings_of(seeds[0])))
    main, *others = [name for name in COMPARED if any(method.figures.get(name) for method in found)] or [*COMPARED][:1]
    found.sort(key=lambda method: (-value.mean if (value := method.figures.get(main)) else 0.0, method.label))
    methods = [replace(method, number=number) for number, method in enumerate(found)]
    of_methods = {run.dir: run for method in methods for run in method.runs}
    in_order = [*(of_methods | {run.dir: run for run in runs}).values()]
    decides = {key for run in runs for key in run.identity}
    return Study(
        runs=in_order,
        known=[run for run in in_order if run.has_settings],
        labels=label_of,
        methods=methods,
        twins=twins,
        main=_comparisons(methods, main),
        beside=_comparisons(methods, others[0]) if others else None,
        sweeps=sweeps(methods),
        varied=sorted(varied([run.config for run in known]), key=lambda key: key not in decides),
        shared=shared(methods),
    )


def signed(value: float) -> str:
    """Return +0.031, with a real minus."""
    return f"{value:+.3f}".replace("-", "−")


def p_value(result: intervals.Comparison) -> str:
    """Return a p-value as it is read, behind "p"."""
    p = "below 0.001" if result.p_adjusted < 0.001 else f"= {result.p_adjusted:.3f}"
    return p.replace(" ", "\N{NO-BREAK SPACE}")


def _comparisons(methods: Sequence[Method], name: str) -> Comparisons:
    """Compare every two methods that share enough items, by figures that are one quantity."""
    raw = []
    by_item = [(method, method.by_item(name)) for method in methods]
    for (a, its), (b, others) in itertools.combinations(by_item, 2):
        both = [item for item in its if item in others]
        alike = name != "win_rate" or all(a.terms[of] == b.terms[of] for of in _OF_A_WIN_RATE)
        if alike and len(both) >= _FEWEST:
            tables = (np.transpose([values[item] for item in both]) for values in (its, others))
            raw.append((a, b, intervals.compare(*tables)))
    adjusted = intervals.holm([result.p_value for *_, result in raw])
    pairs = [
        Comparison(a=a, b=b, result=replace(result, p_adjusted=p), corrected=len(raw) > 1)
        for (a, b, result), p in zip(raw, adjusted, strict=True)
    ]
    quantity, items = COMPARED[name]
    return Comparisons(name=name, quantity=quantity, items=items, pairs=pairs)
