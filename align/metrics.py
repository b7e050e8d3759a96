"""The table of metrics: what each number is called, which way is better, how it is written and where it is shown.

A name is that of results.json. In metrics.jsonl it stands behind train/ or eval/, in a tracker behind result/ too, and a
suite puts its own name in front. A name that ends in * is a family whose members depend on the objective, the data or the
suite. Every list of metrics in align is a selection from this one, in this order.
"""

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

#: Terminal, model card and self-play's line; the report's tables, further results, sweeps, curves and iterations; the
#: dashboard's panels of result/, eval/ and train/; held_out.jsonl.
Where = Literal[
    "terminal", "card", "line", "column", "further", "sweep", "curve", "iteration", "result", "eval", "train", "held_out"
]  # fmt: skip
Goal = Literal["maximize", "minimize"]


@dataclass(frozen=True)
class Metric:
    """One number of a run, or a family of them."""

    name: str
    of: Literal["answers", "pairs", "iteration", "cost", "step", "suite", "report"]  # answers: only with a judge
    words: str  # a * stands for the member of a family
    shown: str = ""  # words of Where
    _: KW_ONLY
    unit: str = ""  # "share" lies in [0, 1], "percent" is a share that is written times 100, "any" is unknown
    digits: int = 3
    goal: Goal | None = None  # None: neither more nor less is better by itself
    heading: str = ""  # of its column in the report, which is explained then; else the title
    explanation: str = ""  # of its column; else the title

    @property
    def title(self) -> str:
        """Words and unit, as a chart or a table is labelled."""
        return self.words + (f", {self.unit}" if self.unit not in ("", "share", "percent", "count", "any") else "")

    def label(self, pairs: str = "held-out") -> str:
        """Return the title; of a metric of pairs behind the word for which pairs they are."""
        return f"{pairs} {self.title}" if self.of == "pairs" else self.title


# fmt: off
METRICS = (
    Metric("win_rate", "answers", "win rate against the start model", "terminal card line column sweep iteration result",
           unit="share", goal="maximize", heading="win rate",
           explanation="against the start model, by the judge; a tie is half a win"),
    Metric("win_rate/previous", "iteration", "win rate against the policy before", "line further iteration",
           unit="share", goal="maximize"),
    Metric("ties", "answers", "ties among the answers compared", "card result", unit="share"),
    Metric("judge_score", "answers", "judge's score", "terminal card line column sweep iteration result",
           goal="maximize", heading="judge's score", explanation="mean score of its answers"),
    Metric("score_spread", "answers", "best minus worst score of a prompt's answers", "line further",
           heading="score_spread"),
    Metric("lc_win_rate", "report", "length-controlled win rate", "column sweep", unit="share", goal="maximize",
           heading="LC win rate",
           explanation="length-controlled: predicted for answers as long as the start model's, by AlpacaEval's formula "
           "without its difficulties of instructions"),
    Metric("sample_length", "answers", "length of an answer", "terminal card line column sweep iteration result",
           unit="tokens", digits=1, heading="length"),
    Metric("kl_policy_start", "answers", "KL(policy, start)", "terminal card column sweep result",
           unit="nats per answer", digits=2, heading="KL",
           explanation="KL(policy, start model), nats per answer, estimated on its answers"),
    Metric("repetition", "answers", "repeated 4-grams of an answer", "terminal card column sweep result", unit="share",
           goal="minimize", heading="repetition",
           explanation="share of an answer's 4-grams of tokens that were in it before (Welleck et al. 2019)"),
    Metric("sample_entropy", "answers", "entropy of an answer", "card column result", unit="nats per token", digits=2,
           heading="entropy", explanation="nats per token of its answers"),
    Metric("distinct", "answers", "share of different answers to a prompt", "card line further iteration", unit="share",
           heading="distinct"),
    Metric("unfinished", "answers", "share of answers cut at max_new_tokens", "card further", unit="share",
           heading="unfinished"),
    Metric("rewards/accuracies", "pairs", "accuracy, the objective's reward", "terminal card held_out", unit="share"),
    Metric("accuracy/mean_logp", "pairs", "accuracy by mean_logp",
           "terminal card line column sweep curve result eval train held_out", unit="share", goal="maximize",
           heading="accuracy, mean_logp",
           explanation="held-out pairs whose chosen response has the higher log-probability per token"),
    Metric("accuracy/log_ratio", "pairs", "accuracy by log_ratio", "terminal card column curve result eval held_out",
           unit="share", goal="maximize", heading="accuracy, log_ratio",
           explanation="held-out pairs whose chosen response gained more log-probability over the start model"),
    Metric("accuracy/*", "pairs", "accuracy, *", "terminal card further", unit="share"),
    Metric("mean_logp/chosen", "pairs", "mean_logp of chosen", "terminal card curve train", unit="nats per token"),
    Metric("mean_logp/rejected", "pairs", "mean_logp of rejected", "terminal card curve train", unit="nats per token"),
    Metric("kl_start_policy", "pairs", "KL(start, policy)", "curve eval", unit="nats per response"),
    Metric("entropy", "pairs", "entropy", "column curve train", unit="nats per token", digits=2,
           heading="entropy, pairs", explanation="nats per token of held-out responses"),
    Metric("loss", "pairs", "loss", goal="minimize"),  # of one objective; two are not comparable
    Metric("truncated", "pairs", "share of pairs that were cut", unit="share"),
    Metric("rewards/chosen", "pairs", "the objective's reward of chosen"),
    Metric("rewards/rejected", "pairs", "the objective's reward of rejected"),
    Metric("rewards/margins", "pairs", "the objective's reward of chosen minus that of rejected"),
    Metric("log_ratio/chosen", "pairs", "log_ratio of chosen", unit="nats"),
    Metric("log_ratio/rejected", "pairs", "log_ratio of rejected", unit="nats"),
    Metric("length/chosen", "pairs", "length of chosen", unit="scored tokens"),
    Metric("length/rejected", "pairs", "length of rejected", unit="scored tokens"),
    Metric("objective/*", "pairs", "the objective's *"),
    Metric("cost/seconds", "cost", "training", "column result", unit="seconds", heading="time",
           explanation="of training, without evaluation"),
    Metric("cost/tokens", "cost", "tokens fed", "column result", unit="count", heading="tokens",
           explanation="fed in training"),
    Metric("cost/peak_memory_gib", "cost", "peak memory of a process", "column result", unit="GiB", heading="peak memory",
           explanation="of the process that needs most: of its GPU, or of the machine's where there is none"),
    Metric("cost/processes", "cost", "processes", unit="count"),
    Metric("grad_norm", "step", "norm of the gradient, before it is clipped"),
    Metric("learning_rate", "step", "learning rate"),
    Metric("epoch", "step", "epochs so far"),
    Metric("pairs_per_second", "step", "pairs per second"),
    Metric("tokens_per_second", "step", "tokens per second"),
    Metric("iteration", "step", "iteration of self-play", unit="count"),
    Metric("steps", "step", "steps of an iteration", unit="count"),
    Metric("alpaca_eval/lc_win_rate", "suite", "AlpacaEval 2, length-controlled win rate, percent", "column",
           unit="percent", goal="maximize", heading="AE2 LC"),
    Metric("alpaca_eval/win_rate", "suite", "AlpacaEval 2, win rate, percent", "column", unit="percent",
           goal="maximize", heading="AE2 WR"),
    Metric("alpaca_eval/length", "suite", "characters of an answer", "column", digits=0, heading="AE2 length"),
    Metric("arena_hard/win_rate", "suite", "Arena-Hard, win rate, percent", "column", unit="percent", goal="maximize",
           heading="Arena-Hard"),
    Metric("lm_eval/gsm8k", "suite", "GSM8K, percent", "column", unit="percent", goal="maximize", heading="GSM8K"),
    Metric("lm_eval/mmlu", "suite", "MMLU, percent", "column", unit="percent", goal="maximize", heading="MMLU"),
    Metric("lm_eval/*", "suite", "*", "further", unit="any"),
)
# fmt: on


def shown(where: Where, *of: str) -> list[Metric]:
    """Select the rows that are shown in a place; with `of`, those of answers, pairs, ... only."""
    return [metric for metric in METRICS if where in metric.shown.split() and (not of or metric.of in of)]


def row(name: str) -> Metric | None:
    """Find the row of a metric by its name in results.json; of a family the one with that member's name and words."""
    found = next((metric for metric in METRICS if fnmatchcase(name, metric.name)), None)
    return found and replace(found, name=name, words=found.words.replace("*", name.partition("/")[2]))


def find(name: str) -> Metric | None:
    """Find the row of a metric also by a name with a place or a suite in front: train/loss, judge/win_rate."""
    return row(name) or row(name.partition("/")[2])


def among(names: Iterable[str], where: Where) -> list[Metric]:
    """Select, of these metrics, the rows that are shown in a place, in the order of the table."""
    known = dict.fromkeys(name for metric in shown(where) for name in sorted(names) if fnmatchcase(name, metric.name))
    return [metric for name in known if (metric := row(name)) and where in metric.shown.split()]
