"""Suite `pairs`: which response of a preference pair a policy finds more likely, on any file of pairs.

    accuracy/mean_logp = mean of [mean_logp(chosen) > mean_logp(rejected)], half where they are equal
    accuracy/log_ratio = likewise of logp - logp under the start model

as in training (trainer.py), by the same engine. `start/...` are the start model's; its log_ratio is 0 everywhere. Lengths
are scored tokens. Log-probabilities are cached as the reference's are, so processes and commands share them.
"""

from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from align import engine
from align.config import DatasetConfig
from align.data.pairs import Pairs, as_group, pair_lengths, prepare_pairs, token_counts
from align.engine.batching import CPU_TOKENS
from align.evaluation.base import Evaluation, Outcome, check_place, in_words_of
from align.evaluation.settings import PairsConfig
from align.files import whole, writing
from align.launch.rank import Rank, free
from align.model.load import load_policy
from align.model.policy import Policy
from align.train import reference

_SIDES = ("chosen", "rejected")


_COLUMNS = "logp.safetensors"


def made_of(given: Evaluation) -> dict[str, Any]:
    """The pairs as they are fed."""
    made = {"pairs": _pairs(given).fingerprint}
    suite = {**vars(given.suite), "path": None}  # wherever they lie
    return {**made, "suite": suite}


def work(given: Evaluation, rank: Rank) -> None:
    """Log-probabilities under the policy and the start model, into a file; each process takes some shards."""
    pairs = _pairs(given)
    sides = {"policy": given.policy, "start": given.run.start(given.cache)}
    columns = {name: _logps(policy, pairs, given, rank) for name, policy in sides.items()}
    if rank.is_first:
        file = given.folder / _COLUMNS
        with writing(f"cannot write {given.folder}", ""):
            file.parent.mkdir(parents=True, exist_ok=True)
            with whole(file) as unfinished:
                save_file(columns, str(unfinished))


def measure(given: Evaluation) -> Outcome:
    """Both accuracies with what they are made of, overall and by group, and those of the start model."""
    pairs = _pairs(given).held_out
    logps = load_file(str(given.folder / _COLUMNS))
    lengths = torch.tensor([token_counts(pairs, f"{side}_ids") for side in _SIDES]).T
    groups = list(pairs["group"])
    results = figures(logps["policy"], logps["start"], lengths, groups)
    start = figures(logps["start"], None, lengths, groups)
    results |= {f"start/{name}": value for name, value in start.items() if not name.startswith("length/")}
    assert isinstance(given.suite, PairsConfig)
    of = given.suite.path or "the run's held-out pairs"
    return Outcome(results={**results, "pairs": len(pairs)}, note=f"accuracies on {len(pairs):,} pairs of {of}")


def figures(logp: Tensor, ref_logp: Tensor | None, length: Tensor, groups: list[str]) -> dict[str, float]:
    """Metrics of a policy. Pure.

    Args:
        logp, ref_logp, length: `[N, 2]` chosen and rejected: nats, nats, scored tokens.
        groups: `[N]` names; the empty one is none.
    """
    compared = {"mean_logp": logp / length} | ({} if ref_logp is None else {"log_ratio": logp - ref_logp})
    made: dict[str, float] = {}
    for name, values in compared.items():
        right = (values[:, 0] > values[:, 1]).double() + 0.5 * (values[:, 0] == values[:, 1])
        made[f"accuracy/{name}"] = right.mean().item()
        for group in sorted(set(groups) - {""}):
            made[f"accuracy/{name}/{group}"] = right[[own == group for own in groups]].mean().item()
    for name, values in {**compared, "length": length}.items():
        made |= {f"{name}/{side}": values[:, at].double().mean().item() for at, side in enumerate(_SIDES)}
    return made


def _pairs(given: Evaluation) -> Pairs:
    """As training reads and cuts them; they are its `held_out`."""
    suite, cfg = given.suite, given.cfg
    assert isinstance(suite, PairsConfig)
    dataset: DatasetConfig = cfg.dataset
    if suite.path is not None:
        check_place("suite.path", suite.path)
        dataset = DatasetConfig(
            name=suite.name,
            path=suite.path,
            eval_path=suite.path,
            split=suite.split,
            eval_split=suite.split,
            columns=suite.columns,
            wrap_plain=suite.wrap_plain,
            limit=1,
        )
    elif given.run.iterations:
        pairs = given.run.saved.parent / "pairs"
        dataset = DatasetConfig(
            name=suite.name, path=str(pairs / "train.jsonl"), eval_path=str(pairs / "held_out.jsonl"), limit=1
        )
    dataset = replace(
        dataset,
        eval_limit=suite.limit or (None if dataset is not cfg.dataset else dataset.eval_limit),
        group_by=suite.group_by,
    )
    start = given.run.start(given.cache).start  # whom the built-in task's pairs come from
    with in_words_of("suite.path"):
        return prepare_pairs(dataset, cfg.train, cfg.model.system_message, start, given.cache)


def _logps(policy: Policy, pairs: Pairs, given: Evaluation, rank: Rank) -> Tensor:
    """`[N, 2]` float32 nats."""
    cfg = replace(policy.cfg, lora={})
    loaded = load_policy(cfg, policy.start, seed=0).to(rank.device)
    held_out = pairs.held_out
    some = [as_group(pair) for pair in held_out.select(range(min(2, len(held_out))))]
    groups = [(prompt[-32:], [chosen[:32], rejected[:24]]) for prompt, (chosen, rejected) in some]
    with rank.autocast():
        layout, attention, _ = engine.settle(loaded, groups, given.cfg.engine.layout, cfg.attn_implementation)
    engine.attach(loaded, layout, attention)
    budget = given.cfg.engine.tokens_per_micro_batch
    made = reference.reference_logps(
        loaded,
        policy.fingerprint,
        held_out,
        pairs.fingerprint,
        pair_lengths(held_out),
        rank,
        layout=layout,
        budget=budget if isinstance(budget, int) else CPU_TOKENS,
        pad_token_id=int(policy.start.tokenizer.pad_token_id),
        cache=given.cache,
        name="held_out",
    )
    del loaded
    free()
    return made
