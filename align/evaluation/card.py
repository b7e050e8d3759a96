"""The model card and the table of results, made from the resolved configuration and results.json."""

import json
from collections.abc import Mapping
from typing import Any

import datasets
import torch
import transformers

import align
from align.config import RunConfig
from align.data.pairs import Pairs
from align.metrics import Where, among
from align.model.load import Start


def table(before: Mapping[str, float], after: Mapping[str, float], where: Where) -> list[tuple[str, str, str]]:
    """Return (metric, at the start, after training) for what is shown in a place: held-out pairs, then answers."""
    rows = sorted(among(before.keys() & after.keys(), where), key=lambda metric: metric.of != "pairs")
    return [(metric.label(), f"{before[metric.name]:.3f}", f"{after[metric.name]:.3f}") for metric in rows]


def text_table(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Return the table as the terminal shows it: what one looks at first."""
    rows = [("", "start", "trained"), *table(before, after, "terminal")]
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{what:<{width}}  {before:>8}  {after:>8}" for what, before, after in rows)


def cost_line(cost: Mapping[str, float]) -> str:
    """Say what a training has taken: time, tokens, memory."""
    seconds = round(cost["seconds"])
    hours, minutes = divmod(seconds // 60, 60)
    time = f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"
    processes = f" on {cost['processes']} processes" if cost["processes"] > 1 else ""
    return (
        f"{time} of training{processes}, {cost['tokens']:,} tokens, {cost['peak_memory_gib']:.1f} GiB of memory at most"
    )


def summary(results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return what a tracker's summary holds: the trained policy's results and what they have cost, behind result/."""
    cost = {f"cost/{name}": value for name, value in results.get("cost", {}).items()}
    return {f"result/{name}": value for name, value in {**results.get("trained", {}), **cost}.items()}


def model_card(
    cfg: RunConfig, config: Mapping[str, Any], start: Start, pairs: Pairs, measured: Mapping[str, Mapping[str, float]]
) -> str:
    """Return README.md of the trained model; `config` is resolved, `measured` becomes results.json."""
    base = "built in, see `model.init` below" if cfg.model.init else start.path
    base_model = "" if cfg.model.init else f"base_model: {start.path}\n"
    revision = f" at revision {cfg.model.revision}" if cfg.model.revision else ""
    hyper = ", ".join(f"`{name}={value}`" for name, value in cfg.objective.items() if name != "name")
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (align, torch, transformers, datasets))
    rows = "\n".join(f"| {' | '.join(row)} |" for row in table(measured["start"], measured["trained"], "card"))
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{base_model}tags:
- align
- {cfg.objective["name"]}
---

# {cfg.model.name} trained with {cfg.objective["name"]}

- Objective: **{cfg.objective["name"]}**, {hyper}
- Start model: {base}{revision}
- Data: {cfg.dataset.name}, {cfg.dataset.path or cfg.dataset.rows or "a mix"}; {pairs.counts["train"]["pairs"]} pairs, fingerprint `{pairs.fingerprint}`
- Batch: {cfg.train.pairs_per_step} pairs a step; learning rate {cfg.optimizer.learning_rate}; seed {cfg.seed}
- Made with {versions}
- Cost: {cost_line(measured["cost"])}

## Results

| | start | trained |
| --- | ---: | ---: |
{rows}

## Configuration

```json
{json.dumps(config, indent=2, default=str)}
```
"""
