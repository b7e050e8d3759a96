"""Suite `pairs`: accuracies on preference pairs: how often a policy finds the chosen response more likely.

    accuracy/mean_logp = mean of [mean_logp(chosen) > mean_logp(rejected)], half where they are equal
    accuracy/log_ratio = likewise of logp - logp under the start model

as in training, by the same engine. `start/...` are the start model's; its log_ratio is 0 everywhere. Lengths are scored
tokens. Log-probabilities are cached as the reference's are, so processes and commands share them.
"""

from dataclasses import asdict, replace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from align import engine
from align.config import DatasetConfig
from align.data.pairs import Pairs, as_group, prepare_pairs, token_counts
from align.engine.batching import CPU_TOKENS
from align.evaluation.base import Evaluation, in_place_of_dataset
from align.evaluation.settings import PairsConfig
from align.files import whole, writing
from align.launch.rank import Rank, free
from align.model.load import Policy, load_policy
from align.train import reference
from align.train.job import PairData

_SIDES = ("chosen", "rejected")
_COLUMNS = "logp.safetensors"


def inputs(evaluation: Evaluation[PairsConfig]) -> dict[str, Any]:
    """Return a fingerprint of the pairs as they are fed, wherever they lie."""
    return {"pairs": _pairs(evaluation).fingerprint, "suite": {**asdict(evaluation.suite), "path": None}}


def work(evaluation: Evaluation[PairsConfig], rank: Rank) -> None:
    """Write log-probabilities under the policy and the start model; each process takes some shards."""
    pairs = _pairs(evaluation)
    sides = {"policy": evaluation.policy, "start": evaluation.run.start()}
    columns = {name: _logps(policy, pairs, evaluation, rank) for name, policy in sides.items()}
    if rank.is_first:
        file = evaluation.folder / _COLUMNS
        with writing(f"cannot write {file}", ""), whole(file) as unfinished:
            save_file(columns, str(unfinished))


def measure(evaluation: Evaluation[PairsConfig]) -> tuple[dict[str, float], str]:
    """Return both accuracies with their parts, overall and by group, and those of the start model."""
    pairs = _pairs(evaluation).held_out
    logps = load_file(str(evaluation.folder / _COLUMNS))
    lengths = torch.tensor([token_counts(pairs, f"{side}_ids") for side in _SIDES]).T
    groups = list(pairs["group"])
    results = figures(logps["policy"], logps["start"], lengths, groups)
    start = figures(logps["start"], None, lengths, groups)
    results |= {f"start/{name}": value for name, value in start.items() if not name.startswith("length/")}
    source = evaluation.suite.path or "the run's held-out pairs"
    return {**results, "pairs": len(pairs)}, f"accuracies on {len(pairs):,} pairs of {source}"


def figures(logp: Tensor, ref_logp: Tensor | None, length: Tensor, groups: list[str]) -> dict[str, float]:
    """Return the metrics of a policy. Pure.

    `[N, 2]` chosen and rejected: nats, nats, scored tokens; `[N]` names of groups, the empty one is none.
    """
    compared = {"mean_logp": logp / length} | ({} if ref_logp is None else {"log_ratio": logp - ref_logp})
    results: dict[str, float] = {}
    for name, values in compared.items():
        right = (values[:, 0] > values[:, 1]).double() + 0.5 * (values[:, 0] == values[:, 1])
        results[f"accuracy/{name}"] = right.mean().item()
        for group in sorted(set(groups) - {""}):
            results[f"accuracy/{name}/{group}"] = right[[other == group for other in groups]].mean().item()
    for name, values in {**compared, "length": length}.items():
        results |= {f"{name}/{side}": values[:, at].double().mean().item() for at, side in enumerate(_SIDES)}
    return results


def _pairs(evaluation: Evaluation[PairsConfig]) -> Pairs:
    """Return the pairs as training reads and cuts them; they are its `held_out`."""
    suite, cfg, run = evaluation.suite, evaluation.cfg, evaluation.run
    dataset, limit = cfg.dataset, cfg.dataset.eval_limit
    if suite.path is not None:
        source = {"path": suite.path, "eval_path": suite.path, "split": suite.split, "eval_split": suite.split}
        shape: dict[str, Any] = {**source, "columns": suite.columns, "wrap_plain": suite.wrap_plain}
        dataset, limit = DatasetConfig(name=suite.name, limit=1, **shape), None
    elif run.iterations:
        train, held_out = (str(run.last / "pairs" / f"{split}.jsonl") for split in ("train", "held_out"))
        dataset, limit = DatasetConfig(name=suite.name, limit=1, path=train, eval_path=held_out), None
    dataset = replace(dataset, eval_limit=suite.limit or limit, group_by=suite.group_by)
    start = run.start().start  # whom the built-in task's pairs come from
    with in_place_of_dataset("suite.path", suite.path):
        return prepare_pairs(dataset, cfg.train, cfg.model.system_message, start, evaluation.run.cache)


def _logps(policy: Policy, pairs: Pairs, evaluation: Evaluation[PairsConfig], rank: Rank) -> Tensor:
    """Return the log-probabilities of the pairs under a policy, `[N, 2]` float32 nats."""
    cfg = replace(policy.cfg, lora={})
    model = load_policy(cfg, policy.start, seed=0).to(rank.device)
    held_out = pairs.held_out
    some = [as_group(pair) for pair in held_out.select(range(min(2, len(held_out))))]
    with rank.autocast():
        layout, _, _ = engine.settle(model, some, evaluation.cfg.engine.layout, cfg.attn_implementation)
    budget = evaluation.cfg.engine.tokens_per_micro_batch
    logps = reference.reference_logps(
        model,
        policy.fingerprint,
        PairData(held_out, layout, int(policy.start.tokenizer.pad_token_id)),
        pairs.fingerprint,
        rank,
        budget=budget if isinstance(budget, int) else CPU_TOKENS,
        cache=evaluation.run.cache,
        name="held_out",
    )
    del model
    free()
    return logps
