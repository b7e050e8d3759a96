"""Runs -> methods: what is the same but for the seed is one method. Its figures over seeds, and any two by prompts.

    figure of a method    mean over its seeds, with the 95% interval of that mean
    a against b           win rate of a minus that of b, both against the start model and at the same prompts; its 95%
                          interval is over prompts and seeds, and one seed is enough
    significant           p at most 0.05 after Holm's correction for all comparisons that are made

The statistics are those of stats.py. Pure: no files. A run that is there twice, with the same settings and seed, counts
once.
"""

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from align.report import stats
from align.report.read import Run, State


@dataclass(frozen=True, kw_only=True)
class Column:
    """A figure that can be compared between objectives."""

    name: str  # in results.json
    heading: str
    explanation: str
    digits: int = 3
    share: bool = True  # it lies in [0, 1]


COLUMNS = (
    Column(
        name="win_rate", heading="win rate", explanation="against the start model, by the judge; a tie is half a win"
    ),
    Column(
        name="lc_win_rate",
        heading="LC win rate",
        explanation="length-controlled: predicted for answers as long as the start model's, by AlpacaEval's formula "
        "without its difficulties of instructions",
    ),
    Column(
        name="sample_length", heading="length", explanation="mean length of an answer, in tokens", digits=1, share=False
    ),
    Column(name="judge_score", heading="judge's score", explanation="mean score of its answers", share=False),
    Column(
        name="kl_policy_start",
        heading="KL",
        explanation="KL(policy, start model), nats per answer, estimated on its answers",
        digits=2,
        share=False,
    ),
    Column(name="repetition", heading="repetition", explanation="share of repeated text in its answers"),
    Column(name="distinct", heading="distinct", explanation="share of different answers to a prompt"),
    Column(name="unfinished", heading="unfinished", explanation="share of answers that were cut at max_new_tokens"),
    Column(
        name="accuracy/mean_logp",
        heading="accuracy, mean_logp",
        explanation="held-out pairs whose chosen response has the higher log-probability per token",
    ),
    Column(
        name="accuracy/log_ratio",
        heading="accuracy, log_ratio",
        explanation="held-out pairs whose chosen response gained more log-probability over the start model",
    ),
    Column(name="entropy", heading="entropy", explanation="nats per token, held-out pairs", digits=2, share=False),
)

#: Curves that can be compared between objectives, by their names in metrics.jsonl without train/ or eval/.
CURVES = {
    "accuracy/mean_logp": "accuracy by mean_logp",
    "accuracy/log_ratio": "accuracy by log_ratio",
    "mean_logp/chosen": "mean_logp of chosen, nats per token",
    "mean_logp/rejected": "mean_logp of rejected, nats per token",
    "kl_start_policy": "kl_start_policy, nats per response",
    "entropy": "entropy, nats per token",
}

_PROMINENT = ("objective.", "model.name", "dataset.name", "optimizer.learning_rate", "optimizer.", "train.")
_FINGERPRINTS = ("start", "pairs", "device", "bf16")
_NOT_COMPARABLE = ("loss", "grad_norm", "rewards/", "objective/", "length/", "log_ratio/", "truncated", "mean_logp/")


@dataclass(frozen=True, kw_only=True)
class Method:
    """Runs that differ by their seeds only."""

    number: int  # in the order of the report
    label: str
    runs: list[Run]  # complete ones, a seed each
    settings: Mapping[str, Any]  # "objective.beta": 2.0, ...: all that decides a result, but the seed

    def figure(self, name: str) -> stats.Estimate | None:
        """Over seeds; None where a run lacks it."""
        values = [run.trained.get(name, math.nan) for run in self.runs]
        return None if not all(map(math.isfinite, values)) else stats.mean_over_seeds(values)

    def shares(self) -> tuple[float, float, float] | None:
        """(wins, ties, losses) against the start model; None without a judge."""
        if not all(run.answers for run in self.runs):
            return None
        wins = fmean(fmean(answers.wins for answers in run.answers) for run in self.runs)
        ties = fmean(fmean(answers.ties for answers in run.answers) for run in self.runs)
        return wins, ties, 1 - wins - ties

    def by_prompt(self) -> dict[tuple[str, int], list[float]]:
        """Win rates at each prompt that all seeds have answered, one per seed; a prompt that is asked twice is two."""
        values: dict[tuple[str, int], list[float]] = {}
        for run in self.runs:
            times: Counter[str] = Counter()
            for answers in run.answers:
                values.setdefault((answers.prompt, times[answers.prompt]), []).append(answers.win_rate)
                times[answers.prompt] += 1
        return {prompt: rates for prompt, rates in values.items() if len(rates) == len(self.runs)}

    def over_prompts(self) -> stats.Estimate | None:
        """The win rate with its interval over prompts and seeds; None where fewer than two prompts were judged."""
        rates = self.by_prompt()
        return stats.estimate(_table(rates, list(rates))) if len(rates) > 1 else None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Win rate of method `a` minus that of method `b`, at the prompts that both have answered."""

    a: Method
    b: Method
    made: stats.Comparison

    @property
    def sentence(self) -> str:
        """In words."""
        a, b, made = self.a.label, self.b.label, self.made
        between = f"{signed(made.low)} to {signed(made.high)}"
        figures = f"{signed(made.difference)} (95%: {between}; p\N{NO-BREAK SPACE}{p_value(made)})"
        if not made.significant:
            return f"{a} and {b}: not significant, {figures}"
        return f"{a} is {'above' if made.difference > 0 else 'below'} {b}: significant, {figures}"


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
    methods: list[Method]  # in the order of their win rates, or of their labels
    twins: list[tuple[Run, Run]]  # (left out, the one that counts)
    comparisons: list[Comparison]
    sweeps: list[Sweep]
    varied: list[str]  # settings that differ between runs, the seed among them
    unequal: dict[str, dict[str, list[str]]]  # what ought to be the same and is not: value: labels of methods

    @property
    def unfinished(self) -> list[Run]:
        """Runs without results."""
        return [run for run in self.runs if run.state is not State.complete]

    @property
    def columns(self) -> list[Column]:
        """Those that any method has."""
        return [column for column in COLUMNS if any(method.figure(column.name) for method in self.methods)]

    @property
    def other_results(self) -> list[str]:
        """Further results that runs have, of suites and groups."""
        known = {*(column.name for column in COLUMNS), *CURVES}
        names = {name for method in self.methods for run in method.runs for name in run.trained}
        return sorted(name for name in names - known if not name.startswith(_NOT_COMPARABLE))

    def start(self, name: str) -> float | None:
        """Of the start model, the mean over runs."""
        values = [run.start[name] for method in self.methods for run in method.runs if name in run.start]
        return fmean(values) if values else None

    def name(self, run: Run) -> str:
        """What a run is called where its method is not enough."""
        return f"{self.labels[run.dir]}, seed {value_text(run.seed)}"

    def between(self, a: Method, b: Method) -> Comparison | None:
        """The comparison of two, in that order."""
        for made in self.comparisons:
            if made.a is a and made.b is b:
                return made
            if made.a is b and made.b is a:
                return _turned(made)
        return None


def study(runs: Sequence[Run]) -> Study:
    """Methods, comparisons and sweeps of these runs."""
    twins = _twins(run for run in runs if run.state is State.complete)
    left_out = {run.dir for run, _ in twins}
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(settings_of(run), sort_keys=True, default=str), []).append(run)
    names = _labels([(_kind(run), settings_of(run)) for run, *_ in groups.values()])
    labels = {run.dir: label for label, group in zip(names, groups.values(), strict=True) for run in group}
    made = []
    for group in groups.values():
        members = sorted(
            (run for run in group if run.state is State.complete and run.dir not in left_out),
            key=lambda run: run.seed or 0,
        )
        if members:
            made.append(Method(number=0, label=labels[members[0].dir], runs=members, settings=settings_of(members[0])))
    made.sort(key=_rank)
    methods = [replace(method, number=number) for number, method in enumerate(made)]
    counted = [run for method in methods for run in method.runs]
    dirs = {run.dir for run in counted}
    decides = {key for run in runs for key in run.identity}
    return Study(
        runs=counted + [run for run in runs if run.dir not in dirs],
        labels=labels,
        methods=methods,
        twins=twins,
        comparisons=_comparisons(methods),
        sweeps=_sweeps(methods),
        varied=sorted(_varied([run.config for run in runs]), key=lambda key: (key not in decides, _prominence(key))),
        unequal=_unequal(methods),
    )


def settings_of(run: Run) -> dict[str, Any]:
    """What decides a run's result, but the seed."""
    known = run.identity or run.config
    settings = {key: _whole(value) for key, value in known.items() if key != "seed"}
    if _plays(run):
        settings["iterations"] = len(run.iterations) or run.config.get("iterations")
    return settings


def _whole(value: Any) -> Any:
    """beta=2 is beta=2.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def signed(value: float) -> str:
    """+0.031, with a real minus."""
    return f"{value:+.3f}".replace("-", "−")


def p_value(made: stats.Comparison) -> str:
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


def _rank(method: Method) -> tuple[float, str]:
    win_rate = method.figure("win_rate")
    return (-win_rate.mean if win_rate else 0.0, method.label)


def _plays(run: Run) -> bool:
    return bool(run.iterations) or run.config.get("source.name") == "selfplay"


def _kind(run: Run) -> str:
    return f"{run.objective} self-play" if _plays(run) else run.objective


def _labels(methods: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Of each (kind, settings): the kind, its hyperparameters that vary, and what else tells it from the others."""
    everywhere = [key for key in ("model.name", "dataset.name") if len({str(s.get(key)) for _, s in methods}) > 1]
    labels = []
    for kind, settings in methods:
        group = [other for name, other in methods if name == kind]
        named = list(everywhere)
        for key in sorted(_varied(group), key=_prominence):
            tells_more = len(_classes(group, [*named, key])) > len(_classes(group, named))
            if key not in named and (key.startswith("objective.") or tells_more):
                named.append(key)
        short = [short_name(key) for key in named]
        words = [name if short.count(name) == 1 else key for name, key in zip(short, named, strict=True)]
        told = [f"{word}={value_text(settings.get(key))}" for word, key in zip(words, named, strict=True)]
        labels.append(" ".join([kind, *told]))
    return labels


def _classes(group: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> set[str]:
    return {json.dumps([settings.get(key) for key in keys], default=str) for settings in group}


def _prominence(key: str) -> tuple[int, str]:
    """What people tell runs apart by comes first, fingerprints last."""
    told = [number for number, start in enumerate(_PROMINENT) if key.startswith(start)]
    last = key in _FINGERPRINTS or key.startswith("objective_code")
    return (told[0] if told else len(_PROMINENT) + last, key)


def _varied(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for one in settings for key in one)
    return [key for key in keys if len({json.dumps(one.get(key), default=str) for one in settings}) > 1]


def short_name(key: str) -> str:
    """beta of objective.beta, model of model.name."""
    return key.removesuffix(".name").rpartition(".")[2]


def value_text(value: Any) -> str:
    """A setting as it is typed."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value) if isinstance(value, list | dict) else str(value)


def _sweeps(methods: Sequence[Method]) -> list[Sweep]:
    """Where methods of an objective differ by numbers: of two the first are the axes, and the rest makes several maps."""
    made = []
    for kind in dict.fromkeys(_kind(method.runs[0]) for method in methods):
        own = [method for method in methods if _kind(method.runs[0]) == kind]
        varied = sorted(_varied([method.settings for method in own]), key=_prominence)
        varied = [key for key in varied if _prominence(key)[0] <= len(_PROMINENT)]  # without fingerprints
        axes = [key for key in varied if all(_is_number(method.settings.get(key)) for method in own)][:2]
        if not axes:
            continue
        rest = [key for key in varied if key not in axes]
        maps: dict[str, list[Method]] = {}
        for method in own:
            where = " ".join(f"{short_name(key)}={value_text(method.settings.get(key))}" for key in rest)
            maps.setdefault(" ".join(filter(None, (kind, where))), []).append(method)
        for title, members in maps.items():
            if len(members) >= 3 and all(len({m.settings[axis] for m in members}) > 1 for axis in axes):
                made.append(Sweep(title=title, x=axes[0], y=axes[1] if len(axes) > 1 else None, methods=members))
    return made


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _unequal(methods: Sequence[Method]) -> dict[str, dict[str, list[str]]]:
    """What a fair comparison keeps the same, where it is not: its values, and which methods have them."""
    shared = {
        "start": "start model",
        "pairs": "training pairs",
        "steps": "steps",
        "evaluation": "evaluation",
        "seeds": "seeds",
        "precision": "precision",
    }
    found: dict[str, dict[str, list[str]]] = {}
    for name, words in shared.items():
        values: dict[str, list[str]] = {}
        for method in methods:
            values.setdefault(_fairness(method, name), []).append(method.label)
        if len(values) > 1:
            found[words] = values
    return found


def _fairness(method: Method, name: str) -> str:
    settings = method.settings
    if name == "steps":
        return value_text(method.runs[0].steps)
    if name == "seeds":
        return ", ".join(value_text(run.seed) for run in method.runs)
    if name == "precision":
        return f"{settings.get('device')}, {'bf16' if settings.get('bf16') else 'fp32'}"
    if name == "evaluation":
        return ", ".join(f"{k[11:]}={value_text(v)}" for k, v in settings.items() if k.startswith("evaluation."))
    return value_text(settings.get(name))


def _comparisons(methods: Sequence[Method]) -> list[Comparison]:
    rates = {method.number: method.by_prompt() for method in methods}
    raw = []
    for a, b in itertools.combinations(methods, 2):
        shared = [prompt for prompt in rates[a.number] if prompt in rates[b.number]]
        if len(shared) > 1:
            raw.append((a, b, stats.compare(*(_table(rates[method.number], shared) for method in (a, b)))))
    adjusted = stats.holm([made.p_value for *_, made in raw])
    return [
        Comparison(a=a, b=b, made=replace(made, p_adjusted=p)) for (a, b, made), p in zip(raw, adjusted, strict=True)
    ]


def _table(rates: Mapping[tuple[str, int], list[float]], prompts: Sequence[tuple[str, int]]) -> list[list[float]]:
    """[seeds][prompts]."""
    return [list(of_seed) for of_seed in zip(*(rates[prompt] for prompt in prompts), strict=True)]


def _turned(one: Comparison) -> Comparison:
    made = replace(
        one.made,
        difference=-one.made.difference,
        low=-one.made.high,
        high=-one.made.low,
        seeds=one.made.seeds[::-1],
    )
    return Comparison(a=one.b, b=one.a, made=made)
