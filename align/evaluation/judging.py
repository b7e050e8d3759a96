"""The judge: policies answer the same held-out prompts, and a scorer says which answers are better.

Accuracy on held-out pairs says that the policy ranks given answers rightly; this says whether its own answers got
better. Beside the win rate stand what judges are fooled by and what goes first when a policy collapses: ties, length,
repetition, entropy, and KL(policy || start) = mean of log pi - log pi_start over the policy's own samples.

A run calls `judge` after each of its trainings; `align evaluate` reads the same files, or compares other answers by the
same parts. Answers, weights and scores are shards, which whichever process is free makes, and what is there is read
again. One model at a time is on the device, and none while the scorer is.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align import engine
from align.choices import Layout
from align.config import EvaluationConfig, RunConfig, SamplingConfig, ScorerConfig
from align.data.pairs import Pairs
from align.data.prompts import PromptRow
from align.engine import collate, evaluating, response_statistics
from align.engine.batching import CPU_TOKENS, FORWARD_ONLY, plan_micro_batches
from align.files import Shards, fingerprint, write_text, writing
from align.launch.rank import Rank, free
from align.model.chat import prompt_ids
from align.model.load import Policy
from align.onpolicy import figures
from align.onpolicy.sample import ResponseRow, read_samples, sample_from
from align.onpolicy.score import read_scores, score_responses
from align.onpolicy.scorers import registry
from align.onpolicy.scorers.base import last_turn
from align.onpolicy.select import ScoredPrompt, scored_prompts
from align.say import UserError, say

START, POLICY = "start", "policy"  # the two sides of samples.jsonl
_SHARD = 16  # prompts: few, so that many processes share them
_VERSION = 1  # of a shard of weights


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A policy whose answers are compared."""

    name: str  # the origin of its answers
    policy: Policy
    stream: int  # of random numbers, its own: answers that share them are no independent samples
    folder: Path  # of its answers

    @property
    def scores(self) -> Path:
        """The folder of scores of its answers and of those that they are compared with."""
        return self.folder.with_name("scores")


@dataclass(frozen=True, kw_only=True)
class Weight:
    """An answer under a policy: sums over its tokens, in nats."""

    logp: float
    entropy: float
    length: int  # tokens, the stop token included


def scorer_of(cfg: RunConfig) -> ScorerConfig | None:
    """Return the scorer that judges a run, else the dataset's judge; None where there is neither."""
    return registry.scorer_of(cfg) if cfg.scorer.name is not None or cfg.dataset.judge is not None else None


def prompts_of_pairs(pairs: Pairs, limit: int) -> list[PromptRow]:
    """Return the first `limit` prompts of the held-out pairs, each once."""
    texts = list(dict.fromkeys(pairs.held_out["conversation"]))[:limit]
    return [PromptRow(id=text, text=json.loads(text), split="held_out") for text in texts]


def sampling_of(evaluation: EvaluationConfig, tokens_per_batch: int) -> SamplingConfig:
    """Return the sampling of a run's own evaluation."""
    return SamplingConfig(
        samples=evaluation.samples_per_prompt,
        temperature=evaluation.temperature,
        top_p=evaluation.top_p,
        max_new_tokens=evaluation.max_new_tokens,
        prompts_per_shard=_SHARD,
        tokens_per_batch=tokens_per_batch,
    )


def contestants_of(run_dir: Path, policies: Sequence[Policy], is_selfplay: bool) -> list[Contestant]:
    """Return the contestants of a run's own judge: its trained policy, the one before it, the start model, each once."""
    found = {}
    for policy in policies:
        number = policy.iteration
        name = policy.name if is_selfplay else POLICY if number else START
        folder = (run_dir / f"iter_{number}" if is_selfplay else run_dir) / "evaluation"
        folder /= "responses" if is_selfplay or number else "responses_of_start"
        found[number] = Contestant(name=name, policy=policy, stream=number, folder=folder)
    return list(found.values())


def judge(
    cfg: RunConfig, contestants: Sequence[Contestant], prompts: Sequence[PromptRow], iteration: int, rank: Rank
) -> dict[str, dict[str, float]] | None:
    """Compare the first contestant, a trained policy, with the others, the last of which is the start model.

    Args:
        iteration: of self-play, whose second contestant is the policy before; 0 where there is none.

    Returns:
        {"start": figures, "trained": figures} on the first process, None on others. The answers of both are then in
        samples.jsonl, beside the folder of the first contestant's files.
    """
    who = registry.build(registry.scorer_of(cfg), rank).identity.name
    names, each = ", ".join(contestant.name for contestant in contestants), cfg.evaluation.samples_per_prompt
    say(f"{each} answers each of {names} to {len(prompts)} held-out prompts, judged by {who}")
    settings = sampling_of(cfg.evaluation, cfg.sampling.tokens_per_batch)
    rows = figures.side_by_side({c.name: answer(c, prompts, cfg, settings, rank) for c in contestants}, iteration)
    ours, start = contestants[0], contestants[-1]
    folder = ours.folder.parent
    of_ours = [row for row in rows if row.origin == ours.name]
    of_both = [row for row in rows if row.origin in (ours.name, start.name)]
    weights = weigh(ours.policy, of_ours, cfg, folder / "weights", rank)
    by_start: dict[str, list[Weight]] = {ours.name: [], start.name: []}
    for row, weight in zip(of_both, weigh(start.policy, of_both, cfg, folder / "weights_of_start", rank), strict=True):
        by_start[row.origin].append(weight)
    score_responses(rows, cfg, ours.scores, rank)
    if not rank.is_first:
        return None
    scored = judged_prompts(rows, ours.scores, who)
    write_samples(folder.parent / "samples.jsonl", rows, scored, {START: start.name, POLICY: ours.name})
    made = {}
    for side, name, own in (("start", start.name, by_start[start.name]), ("trained", ours.name, weights)):
        ties = figures.ties(scored, name, start.name)
        made[side] = {
            "win_rate": 0.5 if name == start.name else fmean(figures.win_rates(scored, name, start.name)),
            **({} if math.isnan(ties) else {"ties": ties}),  # one answer has no tie with another
            **figures.figures(rows, scored, name),
            "sample_entropy": sample_entropy(own),
            "kl_policy_start": kl(own, by_start[name]),
        }
    if iteration:
        made["trained"]["win_rate/previous"] = fmean(figures.win_rates(scored, ours.name, contestants[1].name))
    return made


def answer(
    contestant: Contestant, prompts: Sequence[PromptRow], cfg: RunConfig, settings: SamplingConfig, rank: Rank
) -> list[ResponseRow]:
    """Return the answers of a policy to every prompt; those that are in its folder are not drawn again."""
    what = f"answers of {contestant.name}"
    sample_from(contestant.policy, prompts, cfg, settings, contestant.folder, contestant.stream, what, rank)
    return read_samples(contestant.folder)


def judged_prompts(rows: Sequence[ResponseRow], scores: Path, who: str) -> list[ScoredPrompt]:
    """Return the prompts whose answers all have finite scores, by the scorer `who`; `UserError` if there are none."""
    scored = list(scored_prompts(rows, read_scores(scores)))
    usable = figures.usable(scored)
    if not usable:
        raise UserError(f"{who} has no finite score for any of the {len(scored)} prompts: see {scores}")
    if len(usable) < len(scored):
        say(f"{who} could not judge {len(scored) - len(usable)} of {len(scored)} prompts")
    return usable


def weigh(policy: Policy, answers: Sequence[ResponseRow], cfg: RunConfig, folder: Path, rank: Rank) -> list[Weight]:
    """Return the weight of each answer under a policy, in order, those to a prompt together; by shards of `folder`."""
    groups = [list(group) for _, group in groupby(answers, key=lambda row: row.prompt_id)]
    chunks = [[row for group in groups[at : at + _SHARD] for row in group] for at in range(0, len(groups), _SHARD)]
    shards = Shards(folder=folder, what="weights", count=len(chunks), rows=len(answers))
    inputs = {"policy": policy.fingerprint, "numerics": rank.numerics, "layout": cfg.engine.layout, "version": _VERSION}
    shards.begin({**inputs, "answers": fingerprint([[row.prompt_id, list(row.response_ids)] for row in answers])})
    model: PreTrainedModel | None = None
    for number in shards.claim():
        if model is None:
            model, tokenizer = policy.load(rank), policy.start.tokenizer
            some = [(prompt_ids(row.prompt, tokenizer), [list(row.response_ids)]) for row in answers[:2]]
            with rank.autocast():
                layout, _, _ = engine.settle(model, some, cfg.engine.layout, cfg.model.attn_implementation)
        shards.write(number, map(asdict, weights(model, tokenizer, chunks[number], rank, layout=layout)))
    del model
    free()
    return shards.read(lambda row: Weight(**row))


def weights(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    answers: Sequence[ResponseRow],
    rank: Rank,
    *,
    layout: Layout,
    budget: int = CPU_TOKENS,
) -> list[Weight]:
    """Return the weights of answers under a policy that is `engine.attach`ed in `layout`, in their order."""
    groups = [list(group) for _, group in groupby(answers, key=lambda row: row.prompt_id)]
    fed = [(prompt_ids(rows[0].prompt, tokenizer), [list(row.response_ids) for row in rows]) for rows in groups]
    lengths = [(len(prompt), *map(len, responses)) for prompt, responses in fed]
    found: dict[int, list[Weight]] = {}
    with evaluating(policy), rank.autocast():
        for some in plan_micro_batches(lengths, layout, FORWARD_ONLY * budget):
            batch = collate([fed[i] for i in some], layout, int(tokenizer.pad_token_id)).to(rank.device)
            sums = response_statistics(policy, batch, ("entropy",))
            rows = zip(*(sums[name].tolist() for name in ("logp", "entropy", "length")), strict=True)
            made = (Weight(logp=logp, entropy=entropy, length=int(length)) for logp, entropy, length in rows)
            found |= {i: list(islice(made, len(groups[i]))) for i in some}
    return [weight for i in range(len(groups)) for weight in found[i]]


def sample_entropy(weights: Sequence[Weight]) -> float:
    """Return the mean over all tokens of a policy's own answers, in nats per token, at temperature 1."""
    return math.fsum(weight.entropy for weight in weights) / sum(weight.length for weight in weights)


def kl(weights: Sequence[Weight], by_start: Sequence[Weight]) -> float:
    """Return KL(policy || start) in nats per answer: `weights` are the policy's own, of its own samples."""
    return fmean(ours.logp - theirs.logp for ours, theirs in zip(weights, by_start, strict=True))


def write_samples(
    file: Path, rows: Sequence[ResponseRow], scored: Sequence[ScoredPrompt], sides: Mapping[str, str]
) -> None:
    """Write a line for each judged prompt, for people: the answers of two sides, {name: origin}.

    Beside them their scores, or `chances`, P(the i-th of the second side beats the j-th of the first), where the scorer
    only compares.
    """
    asked = {row.prompt_id: row.prompt for row in rows}
    theirs, ours = sides.values()
    lines = []
    for prompt in scored:
        candidates = {name: [c for c in prompt.candidates if c.origin == origin] for name, origin in sides.items()}
        line: dict[str, Any] = {"prompt": last_turn(asked[prompt.id])}
        line |= {name: [c.text for c in of_side] for name, of_side in candidates.items()}
        if prompt.preferences is None:
            line["scores"] = {name: [c.score for c in of_side] for name, of_side in candidates.items()}
        else:
            line["chances"] = figures.chances(prompt, ours, theirs)
        lines.append(json.dumps(line) + "\n")
    with writing(f"cannot write {file}", ": free some space, and the same command goes on"):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, "".join(lines))
