"""The model card: made from the resolved configuration and the results, nothing typed by hand."""

import json
from collections.abc import Mapping
from typing import Any

import datasets
import torch
import transformers

import align
from align.config import RunConfig
from align.data.pairs import Pairs
from align.model.load import Start

LABELS = {
    "rewards/accuracies": "held-out accuracy, the objective's reward",
    "accuracy/mean_logp": "held-out accuracy by mean_logp",
    "accuracy/log_ratio": "held-out accuracy by log_ratio",
    "mean_logp/chosen": "mean_logp of chosen, nats per token",
    "mean_logp/rejected": "mean_logp of rejected, nats per token",
    "win_rate": "win rate against the start model",
    "ties": "ties among the answers compared",
    "judge_score": "judge's score",
    "sample_length": "length of an answer, tokens",
    "kl_policy_start": "KL(policy, start), nats per answer",
    "repetition": "repeated 4-grams of an answer",
    "sample_entropy": "entropy of an answer, nats per token",
    "distinct": "different answers to a prompt",
    "unfinished": "answers cut at the longest length",
}


_CARD_ONLY = ("ties", "sample_entropy", "distinct", "unfinished")  # the terminal shows what one looks at first


def table(before: Mapping[str, float], after: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """(what, at the start, after training) for every result there is; groups follow."""
    groups = [name for name in after if name.startswith("accuracy/") and name not in LABELS]
    labels = {**LABELS, **{name: f"held-out accuracy, {name.removeprefix('accuracy/')}" for name in groups}}
    return [(label, f"{before[n]:.3f}", f"{after[n]:.3f}") for n, label in labels.items() if n in before and n in after]


def text_table(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """The table as the terminal shows it."""
    shown = {name: value for name, value in after.items() if name not in _CARD_ONLY}
    rows = [("", "start", "trained"), *table(before, shown)]
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{what:<{width}}  {before:>8}  {after:>8}" for what, before, after in rows)


def cost_line(cost: Mapping[str, float]) -> str:
    """What training took, as people read it."""
    seconds = round(cost["seconds"])
    hours, minutes = divmod(seconds // 60, 60)
    time = f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"
    processes = f" on {cost['processes']} processes" if cost["processes"] > 1 else ""
    return (
        f"{time} of training{processes}, {cost['tokens']:,} tokens, {cost['peak_memory_gib']:.1f} GiB of memory at most"
    )


def summary(results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Of a run, for trackers: the trained policy's results, and what they have cost."""
    cost = {f"cost/{name}": value for name, value in results.get("cost", {}).items()}
    return {f"result/{name}": value for name, value in {**results.get("trained", {}), **cost}.items()}


def model_card(
    cfg: RunConfig,
    config: Mapping[str, Any],
    start: Start,
    pairs: Pairs,
    measured: Mapping[str, Mapping[str, float]],
) -> str:
    """README.md of the trained model. `config` is the resolved configuration, `measured` what becomes results.json."""
    rows = table(measured["start"], measured["trained"])
    base = start.path if not cfg.model.init else "built in, see `model.init` below"
    header = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if not cfg.model.init:
        header.append(f"base_model: {start.path}")
    header += ["tags:", "- align", f"- {cfg.objective['name']}", "---"]
    results = ["| | start | trained |", "| --- | ---: | ---: |", *(f"| {' | '.join(row)} |" for row in rows)]
    versions = {m.__name__: m.__version__ for m in (align, torch, transformers, datasets)}
    hyper = ", ".join(f"`{name}={value}`" for name, value in cfg.objective.items() if name != "name")
    return "\n".join(
        [
            *header,
            "",
            f"# {cfg.model.name} trained with {cfg.objective['name']}",
            "",
            f"- Objective: **{cfg.objective['name']}**, {hyper}",
            f"- Start model: {base}" + (f" at revision {cfg.model.revision}" if cfg.model.revision else ""),
            f"- Data: {cfg.dataset.name}, {cfg.dataset.path or cfg.dataset.rows or 'a mix'}; {pairs.counts['train']['pairs']} pairs, "
            f"fingerprint `{pairs.fingerprint}`",
            f"- Batch: {cfg.train.pairs_per_step} pairs a step; learning rate {cfg.optimizer.get('learning_rate')}; seed {cfg.seed}",
            f"- Made with {', '.join(f'{name} {version}' for name, version in versions.items())}",
            f"- Cost: {cost_line(measured['cost'])}",
            "",
            "## Results",
            "",
            *results,
            "",
            "## Configuration",
            "",
            "```json",
            json.dumps(config, indent=2, default=str),
            "```",
            "",
        ]
    )
