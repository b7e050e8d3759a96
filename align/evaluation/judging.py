"""The judge: policies answer the same held-out prompts, and a scorer says which answers are better.

Accuracy on held-out pairs says that the policy ranks given answers rightly; this says whether its own answers got
better. Beside the win rate stand what judges are fooled by and what goes first when a policy collapses: ties, length,
repetition, entropy, and KL(policy || start), estimated the same way for every objective: the mean of
log pi - log pi_start over the policy's own samples. The scorer sees all answers to a prompt together, of which it gives
numbers or says who beats whom.

A run calls `judge` after its training, self-play after every iteration, and `align evaluate suite=judge` on what is
trained. Every process calls it: answers, weights and scores are shards of files, which whoever is free makes, and what
is there is read again. One model at a time is on the device, and none while the scorer is.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
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
from align.model.policy import Policy
from align.onpolicy import figures
from align.onpolicy.pairs import scored_prompts
from align.onpolicy.sample import ResponseRow, read_samples, sample_from
from align.onpolicy.score import read_scores, score_responses
from align.onpolicy.scorers import registry
from align.onpolicy.scorers.base import last_turn
from align.onpolicy.select import ScoredPrompt
from align.say import UserError

START, POLICY = "start", "policy"  # the two sides of samples.jsonl
_SHARD = 16  # prompts: few, so that many processes share them
_VERSION = 1  # of a shard of weights


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A policy whose answers are compared.

    Attributes:
        name: the origin of its answers.
        stream: of random numbers. Answers that share them are no independent samples, so no two policies do.
        folder: of its answers.
    """

    name: str
    policy: Policy
    stream: int
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Weight:
    """An answer under a policy: sums over its tokens, in nats."""

    logp: float
    entropy: float
    length: int  # tokens, the stop token included


def scorer_of(cfg: RunConfig) -> ScorerConfig | None:
    """The scorer that judges a run, else the dataset's judge; None where there is neither."""
    return registry.scorer_of(cfg) if cfg.scorer.name is not None or cfg.dataset.judge is not None else None


def prompts_of_pairs(pairs: Pairs, limit: int) -> list[PromptRow]:
    """The first `limit` prompts of the held-out pairs, each once."""
    texts = list(dict.fromkeys(pairs.held_out["conversation"]))[:limit]
    return [PromptRow(id=text, text=json.loads(text), split="held_out") for text in texts]


def sampling_of(evaluation: EvaluationConfig, tokens_per_batch: int) -> SamplingConfig:
    """How a run's own evaluation samples."""
    return SamplingConfig(
        samples=evaluation.samples_per_prompt,
        temperature=evaluation.temperature,
        top_p=evaluation.top_p,
        max_new_tokens=evaluation.max_new_tokens,
        prompts_per_shard=_SHARD,
        tokens_per_batch=tokens_per_batch,
    )


def contestants_of(run_dir: Path, policies: Sequence[Policy], is_selfplay: bool) -> list[Contestant]:
    """The contestants of a run's own judge: its trained policy, the one before it, and the start model, each once."""

    def contestant(policy: Policy) -> Contestant:
        number = policy.iteration
        if is_selfplay:
            folder = run_dir / f"iter_{number}" / "evaluation" / "responses"
            return Contestant(name=policy.name, policy=policy, stream=number, folder=folder)
        folder = run_dir / "evaluation" / ("responses" if number else "responses_of_start")
        return Contestant(name=POLICY if number else START, policy=policy, stream=number, folder=folder)

    return list({policy.iteration: contestant(policy) for policy in policies}.values())


def judge(
    cfg: RunConfig,
    contestants: Sequence[Contestant],
    prompts: Sequence[PromptRow],
    folder: Path,
    iteration: int,
    rank: Rank,
) -> dict[str, dict[str, float]] | None:
    """Compare the first contestant, a trained policy, with the others, the last of which is the start model.

    Args:
        iteration: of self-play, whose second contestant is the policy before; 0 where there is none.

    Returns:
        {"start": figures, "trained": figures} on the first process, None on others. The answers of both are then in
        `folder`/../samples.jsonl.

    Raises:
        UserError: the scorer fails, or has no finite score for any prompt.
    """
    if rank.is_first:
        who = registry.build(registry.scorer_of(cfg), rank).identity.name
        print(
            f"{cfg.evaluation.samples_per_prompt} answers each of {', '.join(c.name for c in contestants)} to "
            f"{len(prompts)} held-out prompts, judged by {who}",
            flush=True,
        )
    settings = sampling_of(cfg.evaluation, cfg.sampling.tokens_per_batch)
    answers = {side.name: answer(side, prompts, cfg, settings, rank) for side in contestants}
    rows = figures.side_by_side(answers, iteration)
    ours, start = contestants[0], contestants[-1]
    by_ours = weigh(ours.policy, [row for row in rows if row.origin == ours.name], cfg, folder / "weights", rank)
    both = [row for row in rows if row.origin in (ours.name, start.name)]
    by_start = weigh(start.policy, both, cfg, folder / "weights_of_start", rank)
    score_responses(rows, cfg, folder / "scores", rank)
    if not rank.is_first:
        return None
    scored = list(scored_prompts(rows, read_scores(folder / "scores")))
    usable = figures.usable(scored)
    if not usable:
        raise UserError(f"{who} has no finite score for any of the {len(scored)} prompts: see {folder / 'scores'}")
    if len(usable) < len(scored):
        print(f"{who} could not judge {len(scored) - len(usable)} of {len(scored)} prompts", flush=True)
    write_samples(folder.parent / "samples.jsonl", rows, scored, {START: start.name, POLICY: ours.name})
    of_ours, of_start = (
        [weight for row, weight in zip(both, by_start, strict=True) if row.origin == side.name]
        for side in (ours, start)
    )
    trained = {
        "win_rate": figures.win_rate(scored, ours.name, start.name),
        **_ties(scored, ours.name, start.name),
        **figures.figures(rows, scored, ours.name),
        "sample_entropy": sample_entropy(by_ours),
        "kl_policy_start": kl(by_ours, of_ours),
    }
    if iteration:
        trained["win_rate/previous"] = figures.win_rate(scored, ours.name, contestants[1].name)
    at_start = {
        "win_rate": 0.5,
        **_ties(scored, start.name, start.name),
        **figures.figures(rows, scored, start.name),
        "sample_entropy": sample_entropy(of_start),
        "kl_policy_start": 0.0,
    }
    return {"start": at_start, "trained": trained}


def answer(
    contestant: Contestant, prompts: Sequence[PromptRow], cfg: RunConfig, settings: SamplingConfig, rank: Rank
) -> list[ResponseRow]:
    """The answers of a policy to every prompt; those that are in its folder are not drawn again."""
    what = f"answers of the {contestant.name} policy"
    sample_from(contestant.policy, prompts, cfg, settings, contestant.folder, contestant.stream, what, rank)
    return read_samples(contestant.folder)


def weigh(policy: Policy, answers: Sequence[ResponseRow], cfg: RunConfig, folder: Path, rank: Rank) -> list[Weight]:
    """Return the weight of each answer under a policy, its own or another's, in their order, by shards of `folder`.

    Answers to a prompt stand together, as `figures.side_by_side` leaves them.
    """
    groups = [list(own) for _, own in groupby(answers, key=lambda row: row.prompt_id)]
    chunks = [[row for own in groups[at : at + _SHARD] for row in own] for at in range(0, len(groups), _SHARD)]
    shards = Shards(folder=folder, what="weights", count=len(chunks), rows=len(answers))
    inputs = {"policy": policy.fingerprint, "numerics": rank.numerics, "layout": cfg.engine.layout, "version": _VERSION}
    shards.begin({**inputs, "answers": fingerprint([[row.prompt_id, list(row.response_ids)] for row in answers])})
    loaded: PreTrainedModel | None = None
    for number in shards.claim():
        if loaded is None:
            loaded, layout = _loaded(policy, answers, cfg, rank)
        made = weights(loaded, policy.start.tokenizer, chunks[number], rank, layout=layout)
        shards.write(number, map(asdict, made))
    del loaded
    free()
    return shards.read(lambda row: Weight(**row))


def _loaded(
    policy: Policy, answers: Sequence[ResponseRow], cfg: RunConfig, rank: Rank
) -> tuple[PreTrainedModel, Layout]:
    """Return a policy on its device, attached in a layout in which it computes what its own logits say."""
    loaded = policy.load(rank)
    groups = [
        (prompt_ids(row.prompt, policy.start.tokenizer)[-32:], [list(row.response_ids[:n]) for n in (32, 24)])
        for row in answers[:2]
    ]
    with rank.autocast():
        return loaded, engine.settle(loaded, groups, cfg.engine.layout, cfg.model.attn_implementation)[0]


def weights(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    answers: Sequence[ResponseRow],
    rank: Rank,
    *,
    layout: Layout,
    budget: int = CPU_TOKENS,
) -> list[Weight]:
    """The weights of answers under a policy that is `engine.attach`ed in `layout`, in their order."""
    at: dict[str, list[int]] = {}  # of each prompt, where its answers are
    for i, row in enumerate(answers):
        at.setdefault(row.prompt_id, []).append(i)
    members = list(at.values())
    groups = [
        (prompt_ids(answers[own[0]].prompt, tokenizer), [list(answers[i].response_ids) for i in own]) for own in members
    ]
    lengths = [(len(prompt), *map(len, responses)) for prompt, responses in groups]
    pad = int(tokenizer.pad_token_id)
    made: dict[int, Weight] = {}
    with evaluating(policy), rank.autocast():
        for some in plan_micro_batches(lengths, layout, FORWARD_ONLY * budget):
            batch = collate([groups[i] for i in some], layout, pad).to(rank.device)
            of_batch = response_statistics(policy, batch, ("entropy",))
            values = zip(*(of_batch[name].tolist() for name in ("logp", "entropy", "length")), strict=True)
            for i in (i for group in some for i in members[group]):
                logp, entropy, length = next(values)
                made[i] = Weight(logp=logp, entropy=entropy, length=int(length))
    return [made[i] for i in range(len(answers))]


def sample_entropy(own: Sequence[Weight]) -> float:
    """Nats per token: the mean over all tokens of the policy's own answers, at temperature 1."""
    return math.fsum(weight.entropy for weight in own) / sum(weight.length for weight in own)


def kl(own: Sequence[Weight], by_start: Sequence[Weight]) -> float:
    """KL(policy || start) in nats per answer: `own` are the policy's weights of its own samples."""
    return fmean(ours.logp - theirs.logp for ours, theirs in zip(own, by_start, strict=True))


def _ties(scored: Sequence[ScoredPrompt], ours: str, theirs: str) -> dict[str, float]:
    share = figures.ties(scored, ours, theirs)
    return {} if math.isnan(share) else {"ties": share}  # one answer has no tie with another


def write_samples(
    file: Path, rows: Sequence[ResponseRow], scored: Sequence[ScoredPrompt], sides: Mapping[str, str]
) -> None:
    """Write what a person reads: a line for each judged prompt, with the answers of two sides, {name: origin}.

    Beside them their scores, or `chances`, P(the i-th of the second side beats the j-th of the first), where the scorer
    only compares.
    """
    asked = {row.prompt_id: row.prompt for row in rows}
    theirs, ours = sides.values()
    lines = []
    for prompt in figures.usable(scored):
        candidates = {name: [c for c in prompt.candidates if c.origin == origin] for name, origin in sides.items()}
        line: dict[str, Any] = {"prompt": last_turn(asked[prompt.id])}
        line |= {name: [c.text for c in of_one] for name, of_one in candidates.items()}
        if prompt.preferences is None:
            line["scores"] = {name: [c.score for c in of_one] for name, of_one in candidates.items()}
        else:
            line["chances"] = figures.chances(prompt, ours, theirs)
        lines.append(json.dumps(line) + "\n")
    with writing(f"cannot write {file}", ": free some space, and the same command goes on"):
        write_text(file, "".join(lines))
