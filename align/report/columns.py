"""Which figures are comparable between objectives, what they are called and how they are written."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Column:
    """A figure that can be compared between objectives."""

    name: str  # in results.json
    heading: str
    explanation: str
    digits: int = 3
    share: bool = True  # it lies in [0, 1]
    unit: Literal["", "percent", "seconds", "tokens", "GiB", "any"] = ""  # how it is written


#: Of a policy's own answers, beside each other: what a judge says, and what judges are fooled by.
OF_ANSWERS = (
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
    Column(
        name="kl_policy_start",
        heading="KL",
        explanation="KL(policy, start model), nats per answer, estimated on its answers",
        digits=2,
        share=False,
    ),
    Column(
        name="repetition",
        heading="repetition",
        explanation="share of an answer's 4-grams of tokens that were in it before (Welleck et al. 2019)",
    ),
    Column(
        name="sample_entropy", heading="entropy", explanation="nats per token of its answers", digits=2, share=False
    ),
    Column(name="judge_score", heading="judge's score", explanation="mean score of its answers", share=False),
)


#: Of the held-out pairs, and what the training has cost.
OF_PAIRS = (
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
    Column(
        name="entropy",
        heading="entropy, pairs",
        explanation="nats per token of held-out responses",
        digits=2,
        share=False,
    ),
    Column(name="cost/seconds", heading="time", explanation="of training, without evaluation", unit="seconds"),
    Column(name="cost/tokens", heading="tokens", explanation="fed in training", unit="tokens"),
    Column(
        name="cost/peak_memory_gib",
        heading="peak memory",
        explanation="of the process that needs most: of its GPU, or of the machine's where there is none",
        unit="GiB",
    ),
)


#: Less often asked for; they stand with what suites say.
OTHERS = (
    Column(name="distinct", heading="distinct", explanation="share of different answers to a prompt"),
    Column(name="unfinished", heading="unfinished", explanation="share of answers that were cut at max_new_tokens"),
    Column(
        name="score_spread",
        heading="score_spread",
        explanation="best minus worst score of a prompt's answers",
        share=False,
    ),
)


#: What the papers print, where `align evaluate` has measured it.
OF_PAPERS = (
    Column(
        name="alpaca_eval/lc_win_rate",
        heading="AE2 LC",
        explanation="AlpacaEval 2, length-controlled win rate, percent",
        unit="percent",
    ),
    Column(
        name="alpaca_eval/win_rate", heading="AE2 WR", explanation="AlpacaEval 2, win rate, percent", unit="percent"
    ),
    Column(
        name="alpaca_eval/length", heading="AE2 length", explanation="characters of an answer", digits=0, share=False
    ),
    Column(
        name="arena_hard/win_rate", heading="Arena-Hard", explanation="Arena-Hard, win rate, percent", unit="percent"
    ),
    Column(name="lm_eval/gsm8k", heading="GSM8K", explanation="GSM8K, percent", unit="percent"),
    Column(name="lm_eval/mmlu", heading="MMLU", explanation="MMLU, percent", unit="percent"),
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
