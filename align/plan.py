"""What would run, in a page of text: data, lengths, steps, micro-batches, memory, the first loss. Starts nothing."""

from dataclasses import replace
from statistics import fmean

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from align.batching import MicroBatch, StepSampler, fed_tokens, steps_per_epoch
from align.config import Layout, ModelConfig, RunConfig, Strategy, UserError
from align.data import Pairs, pair_lengths, token_counts
from align.engine import CPU_TOKENS
from align.launch import Fleet
from align.model import Start
from objectives import Objective, Response

_STATE_BYTES = {"adamw": 8, "adam": 8, "rmsprop": 4, "adagrad": 4, "lion": 4, "sgd": 0}  # per trained weight, float32
_LAYER_BYTES = 34  # per token and hidden unit of a layer in 16 bit, without attention maps: arXiv 2205.05198, section 4


def check_batch(cfg: RunConfig, pairs: int, world: int) -> None:
    """Raise `UserError` for a global batch that the processes or the data cannot fill."""
    size = cfg.train.pairs_per_step
    if size % world:
        fits = size + world - size % world
        raise UserError(f"train.pairs_per_step={size} cannot be divided among {world} processes; {fits} can")
    if pairs < size:
        raise UserError(
            f"train.pairs_per_step={size} is more than the {pairs} training pairs: give more data or train.pairs_per_step={pairs}"
        )


def settle_strategy(cfg: RunConfig, start: Start, pairs: Pairs, fleet: Fleet) -> Fleet:
    if fleet.strategy is Strategy.auto:
        fleet = replace(fleet, strategy=Strategy.ddp)
    return fleet


def total_steps(cfg: RunConfig, pairs: int) -> int:
    """Optimizer steps of the whole run."""
    limit = int(cfg.optimizer.get("max_steps", -1))
    epochs = float(cfg.optimizer.get("num_train_epochs", 3.0))
    return limit if limit > 0 else -int(-epochs * steps_per_epoch(pairs, cfg.train.pairs_per_step) // 1)


def describe(cfg: RunConfig, start: Start, pairs: Pairs, objective: Objective, where: Fleet) -> str:
    """The plan of a run, as it is printed and saved."""
    train, lengths = cfg.train, pair_lengths(pairs.train)
    wanted, layout = cfg.engine.tokens_per_micro_batch, cfg.engine.layout
    budget = wanted if isinstance(wanted, int) else CPU_TOKENS

    def sampler(layout: Layout) -> StepSampler:
        return StepSampler(
            lengths,
            layout,
            pairs_per_step=train.pairs_per_step,
            world=where.world,
            rank=0,
            budget=budget,
            seed=cfg.seed,
        )

    def first_shares(layout: Layout) -> list[list[MicroBatch]]:
        return [share for _, share in zip(range(50), sampler(layout), strict=False)]

    def tokens_per_pair(layout: Layout) -> float:
        batches = [batch.pairs for share in first_shares(layout) for batch in share]
        return sum(fed_tokens([lengths[i] for i in b], layout) for b in batches) / sum(map(len, batches))

    micro = [len(share) for share in first_shares(layout)]
    by_memory = ", more where a GPU has the memory" if wanted == "auto" and where.device == "cuda" else ""
    tokens = {kind: tokens_per_pair(kind) for kind in dict.fromkeys([layout, *Layout])}
    others = ", ".join(f"{kind.name} {count:,.0f}" for kind, count in tokens.items() if kind is not layout)
    lines = [
        f"objective   {objective}",
        f"model       {cfg.model.name}: {start.path}" + (f", LoRA {cfg.model.lora}" if cfg.model.lora else ""),
        f"data        {cfg.dataset.name}: {_counts(pairs, 'train')}",
        f"held out    {_counts(pairs, 'held_out')}",
        *(f"lengths     {name}: {_quantiles(pairs, column)}" for name, column in _COLUMNS.items()),
        f"steps       {total_steps(cfg, len(lengths))} of {train.pairs_per_step} pairs "
        f"({len(sampler(layout))} an epoch), on {where.world} {where.device} process(es), {'bf16' if where.bf16 else 'fp32'}",
        f"a step      {fmean(micro):.1f} micro-batches a process (at most {max(micro)}) of up to {budget} tokens{by_memory}",
        f"layout      {layout.name}: {tokens[layout]:,.0f} tokens a pair go through the model ({others})",
        f"memory      {_memory(cfg, start, max(budget, *(fed_tokens([pair], layout) for pair in lengths)))}",
        f"first loss  {first_loss(objective, pairs)}",
    ]
    return "\n".join(lines)


_COLUMNS = {"prompt": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids"}


def _counts(pairs: Pairs, split: str) -> str:
    counts = pairs.counts[split]
    dropped = ", ".join(f"{count} {reason}" for reason, count in counts["dropped"].items())
    responses = (
        f"{counts['cut_pairs']} with responses cut, {counts['cut_tokens']} tokens lost" if counts["cut_pairs"] else ""
    )
    prompts = f"{counts['cut_prompts']} with prompts cut" if counts["cut_prompts"] else ""
    cut = ", ".join(part for part in (responses, prompts) if part) or "none cut"
    return f"{counts['pairs']} pairs; {cut}; dropped: {dropped or 'none'}"


def _quantiles(pairs: Pairs, column: str) -> str:
    lengths = sorted(token_counts(pairs.train, column))
    at = {
        name: lengths[min(len(lengths) - 1, int(q * len(lengths)))]
        for name, q in (("half", 0.5), ("90%", 0.9), ("99%", 0.99))
    }
    return ", ".join(f"{name} at most {value}" for name, value in at.items()) + f", longest {lengths[-1]} tokens"


def _memory(cfg: RunConfig, start: Start, tokens: int) -> str:
    """An estimate for one process that holds everything: weights, gradients, optimizer, activations."""
    config, total = shape(cfg.model, start)
    trained = total // 100 if cfg.model.lora else total  # an adapter is about a hundredth
    name = str(cfg.optimizer.get("optim", "adamw_torch"))
    state = next((size for family, size in _STATE_BYTES.items() if name.startswith(family)), 8)
    layers, hidden = config.num_hidden_layers, config.hidden_size
    checkpointing = cfg.engine.gradient_checkpointing
    live = 1 if checkpointing else layers
    activations = tokens * hidden * (_LAYER_BYTES * live + (4 * layers if checkpointing else 0))
    parts = {"weights": 4 * total, "gradients": 4 * trained, name: state * trained, "activations about": activations}
    text = ", ".join(f"{part} {size / 2**30:.2f}" for part, size in parts.items())
    return f"{sum(parts.values()) / 2**30:.2f} GiB a process: {text} ({total / 1e6:,.1f}M weights in float32)"


def shape(cfg: ModelConfig, start: Start) -> tuple[AutoConfig, int]:
    """The model's configuration, and how many weights it has, without loading any."""
    try:
        config = AutoConfig.from_pretrained(start.path, revision=cfg.revision, trust_remote_code=cfg.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path={start.path} has no usable config.json: {str(error).splitlines()[0]}") from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=cfg.trust_remote_code)
    return config.get_text_config(), sum(p.numel() for p in model.parameters())


def first_loss(objective: Objective, pairs: Pairs) -> str:
    """The mean loss at step 0, where the policy is the reference, if it does not depend on the policy's own logp."""
    columns = {side: torch.tensor(pairs.train[f"{side}_win_prob"][:]) for side in ("chosen", "rejected")}
    sizes = {side: torch.tensor(token_counts(pairs.train, f"{side}_ids")).float() for side in columns}

    def loss(per_token: dict[str, float]) -> float:
        made = {}
        for side, length in sizes.items():
            logp = length * per_token[side]
            # log_sum_sq and log_max lie between logp and 0 for a likely response: any value shows a dependence
            values = {
                "logp": logp,
                "ref_logp": logp,
                "length": length,
                "log_sum_sq": logp / 2,
                "log_max": logp / 3,
                "win_prob": columns[side],
            }
            made[side] = Response(**{name: values[name] for name in objective.needs})
        return float(objective(made["chosen"], made["rejected"]).loss.mean())

    one, other = loss({"chosen": -1.0, "rejected": -2.0}), loss({"chosen": -0.5, "rejected": -0.3})
    if abs(one - other) < 1e-6 * max(1.0, abs(one)):
        return f"{one:.6g}, as the log-ratio to the start model is 0"
    return "depends on the start model's log-probabilities"
