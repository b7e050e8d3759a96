"""The plan of a run, a page of text: data, lengths, steps, micro-batches, memory, the first loss. Starts nothing."""

from itertools import islice
from statistics import fmean

import torch

from align.choices import Layout, Strategy
from align.config import RunConfig
from align.data.pairs import Pairs, pair_lengths, token_counts
from align.data.prompts import Prompts, prompts_of
from align.engine.batching import StepSampler, fed_tokens
from align.launch.rank import Cluster
from align.model.load import Start
from align.onpolicy.scorers.base import Identity, Kind
from align.train import memory
from align.train.job import total_steps
from align.train.memory import GIB, longest_pair, micro_batch_that_fits
from objectives import Objective, Response


def describe(cfg: RunConfig, start: Start, pairs: Pairs, objective: Objective, cluster: Cluster) -> str:
    """Return the plan of a run, as it is printed and saved."""
    step, layout, lengths = cfg.train.pairs_per_step, cfg.engine.layout, pair_lengths(pairs.train)
    longest = longest_pair(cfg, pairs)
    budget = micro_batch_that_fits(cfg, start, cluster, longest)
    samplers = {kind: StepSampler(lengths, kind, step, cluster.world, 0, budget, cfg.seed) for kind in Layout}
    shares = {kind: list(islice(sampler.epoch(0), 50)) for kind, sampler in samplers.items()}
    micro = [len(share) for share in shares[layout]]

    def tokens_of(kind: Layout) -> str:
        batches = [batch.pairs for share in shares[kind] for batch in share]
        return f"{sum(fed_tokens([lengths[i] for i in b], kind) for b in batches) / sum(map(len, batches)):,.0f}"

    others = ", ".join(f"{kind.name} {tokens_of(kind)}" for kind in Layout if kind is not layout)
    automatic = cfg.engine.tokens_per_micro_batch == "auto" and cluster.device == "cuda"
    measured = automatic and cluster.strategy in (Strategy.single, Strategy.ddp)
    lines = [
        *_subject(cfg, start, objective),
        f"data        {cfg.dataset.name}: {_counts(pairs, 'train')}",
        f"held out    {_counts(pairs, 'held_out')}",
        *(f"lengths     {name}: {_quantiles(pairs, f'{name}_ids')}" for name in ("prompt", "chosen", "rejected")),
        f"steps       {total_steps(cfg, len(lengths))} of {step} pairs ({len(samplers[layout])} an epoch)",
        f"processes   {_processes(cluster)}",
        f"a step      {step // cluster.world} pairs a process, in {fmean(micro):.1f} micro-batches (at most "
        f"{max(micro)}) of up to {budget:,} tokens{', or what the GPU turns out to hold' if measured else ''}",
        f"layout      {layout.name}: {tokens_of(layout)} tokens a pair go through the model ({others})",
        *_memory(cfg, start, cluster, longest),
        f"first loss  {first_loss(objective, pairs)}",
    ]
    return "\n".join(lines)


def describe_selfplay(
    cfg: RunConfig,
    start: Start,
    prompts: Prompts,
    scorer: Identity,
    objective: Objective,
    cluster: Cluster,
    longest: int,
) -> str:
    """Return the plan of self-play; `longest` is the tokens of the longest pair that can come out."""
    sampling, evaluation = cfg.sampling, cfg.evaluation
    held_out, mean_prompt = len(prompts.held_out), fmean(prompts.tokens.values())
    of_iteration = asked_by(cfg, prompts)
    asked = of_iteration + held_out
    plain = sum(isinstance(prompt.text, str) for prompt in prompts.all) if start.tokenizer.chat_template else 0
    responses, longest_response = asked * sampling.samples, sampling.max_new_tokens
    compared = min(evaluation.prompts, held_out)
    scored, read, what = responses, mean_prompt + longest_response, "responses"
    if scorer.kind is Kind.pairwise:
        scored, read, what = responses * (sampling.samples - 1), read + longest_response, "ordered pairs"
    others = "".join(f"; {name} answers {count:,} prompts" for name, count in prompts.answered().items())
    lines = [
        *_subject(cfg, start, objective),
        f"self-play   {cfg.iterations} iterations of {of_iteration:,} training prompts"
        + (" each, none twice" if cfg.source.split_prompts else ", the same ones each time"),
        f"prompts     {cfg.dataset.name}: {mean_prompt:,.0f} tokens on average; {held_out:,} held out; "
        f"dropped: {prompts.describe_dropped()}"
        + (f"; {plain:,} are plain texts, asked without a chat template (dataset.wrap_plain)" if plain else ""),
        f"sample      {responses:,} responses an iteration by {sampling.backend.name}: {sampling.samples} to a prompt, "
        f"temperature {sampling.temperature:g}, top_p {sampling.top_p:g}; {asked * mean_prompt:,.0f} tokens of prompts, up to "
        f"{responses * longest_response:,} to sample{others}",
        f"score       {scorer.name}: {scored:,} {what}, up to {scored * read:,.0f} tokens an iteration",
        f"train       at most {total_steps(cfg, of_iteration)} steps of {cfg.train.pairs_per_step} pairs an iteration",
        f"compare     {compared} held-out prompts, {evaluation.samples_per_prompt} responses of each policy, up to "
        f"{compared * evaluation.samples_per_prompt * evaluation.max_new_tokens:,} tokens an iteration",
        f"processes   {_processes(cluster)}",
        *_memory(cfg, start, cluster, longest),
    ]
    return "\n".join(lines)


def asked_by(cfg: RunConfig, prompts: Prompts) -> int:
    """Return the number of training prompts of the last iteration, whose share is the smallest."""
    return len(prompts_of(cfg, prompts, cfg.iterations)) - len(prompts.held_out)


def _subject(cfg: RunConfig, start: Start, objective: Objective) -> tuple[str, str]:
    adapter = f", LoRA {cfg.model.lora}" if cfg.model.lora else ""
    return f"objective   {objective}", f"model       {cfg.model.name}: {start.path}{adapter}"


def _processes(cluster: Cluster) -> str:
    nodes = f"{cluster.nodes} nodes x " if cluster.nodes > 1 else ""
    offload = ", offload" if cluster.offload else ""
    precision = "bf16" if cluster.bf16 else "fp32"
    return f"{nodes}{cluster.per_node} on {cluster.device}, {cluster.strategy.value}{offload}, {precision}"


def _counts(pairs: Pairs, split: str) -> str:
    counts = pairs.counts[split]
    dropped = ", ".join(f"{count} {reason}" for reason, count in counts["dropped"].items())
    cut = []
    if counts["cut_pairs"]:
        cut.append(f"{counts['cut_pairs']} with responses cut, {counts['cut_tokens']} tokens lost")
    if counts["cut_prompts"]:
        cut.append(f"{counts['cut_prompts']} with prompts cut")
    return f"{counts['pairs']} pairs; {', '.join(cut) or 'none cut'}; dropped: {dropped or 'none'}"


def _quantiles(pairs: Pairs, column: str) -> str:
    lengths = sorted(token_counts(pairs.train, column))
    half, most, nearly_all = (lengths[min(len(lengths) - 1, int(q * len(lengths)))] for q in (0.5, 0.9, 0.99))
    return f"half at most {half}, 90% at most {most}, 99% at most {nearly_all}, longest {lengths[-1]} tokens"


def _memory(cfg: RunConfig, start: Start, cluster: Cluster, longest: int) -> list[str]:
    """Estimate the memory of a process, and name the strategies that fit; `longest` is the longest pair's tokens."""
    made = memory.setup(cfg, start, cluster)
    need = memory.need(made, cluster.strategy, max(micro_batch_that_fits(cfg, start, cluster, longest), longest))
    parts = {
        "weights": need.weights, "gradients": need.gradients, made.optimizer: need.optimizer, "buckets": need.buckets,
        "gathered": need.passing, "head": need.head, "activations about": need.activations, "the step": need.step,
    }  # fmt: skip
    text = ", ".join(f"{part} {size / GIB:.1f}" for part, size in parts.items() if size >= GIB / 20)
    of = f" of {cluster.memory / GIB:.0f}" if cluster.memory else ""
    host = f"; {need.host / GIB:.1f} GiB in host memory" if need.host else ""
    if cluster.world > 1 and cluster.strategy is not Strategy.zero3:  # which divides the weights as it reads them
        host += f"; {4 * made.shape.parameters / GIB:.1f} GiB of host memory while the model loads"
    weights = f"{made.shape.parameters / 1e6:,.1f}M weights"
    lines = [f"memory      {need.total / GIB:.2f} GiB{of} a process: {text or 'little of each'}{host} ({weights})"]
    if cluster.memory is not None:
        fitting = memory.which_fit(made, cluster.memory, longest)
        lines.append(f"would fit   {', '.join(s.value for s in fitting) or 'no strategy'}")
    return lines


def first_loss(objective: Objective, pairs: Pairs) -> str:
    """Return the mean loss at step 0, where the policy is the reference, if it does not depend on the policy's logp."""
    columns = {side: torch.tensor(pairs.train[f"{side}_win_prob"][:]) for side in ("chosen", "rejected")}
    sizes = {side: torch.tensor(token_counts(pairs.train, f"{side}_ids")).float() for side in columns}

    def loss(per_token: dict[str, float]) -> float:
        made = {}
        for side, length in sizes.items():
            logp = length * per_token[side]
            # log_sum_sq and log_max lie between logp and 0 for a likely response: any value shows a dependence
            values = {"logp": logp, "ref_logp": logp, "length": length, "win_prob": columns[side]}
            values |= {"log_sum_sq": logp / 2, "log_max": logp / 3}
            made[side] = Response(**{name: values[name] for name in objective.needs})
        return float(objective(made["chosen"], made["rejected"]).loss.mean())

    one, other = loss({"chosen": -1.0, "rejected": -2.0}), loss({"chosen": -0.5, "rejected": -0.3})
    if abs(one - other) < 1e-6 * max(1.0, abs(one)):
        return f"{one:.6g}, as the log-ratio to the start model is 0"
    return "depends on the start model's log-probabilities"
