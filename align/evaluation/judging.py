"""A policy against its start model on held-out prompts, by the run's judge: any scorer of onpolicy/scorers.

Accuracy on held-out pairs says that the policy ranks given answers rightly; this says whether its own answers got
better. Beside the win rate stand what judges are fooled by and what goes first when a policy collapses: ties, length,
repetition, entropy, and KL(policy || start), estimated the same way for every objective: the mean of
log pi - log pi_start over the policy's own samples. The judge sees all answers to a prompt together, of which it gives
numbers or says who beats whom.

In three steps, so that one model at a time is on the device: `answer` and `weigh` with each policy, `compare` with the
judge. Left out: sharing the work among processes (stages.py).
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align.choices import Layout
from align.config import EvaluationConfig, RunConfig, ScorerConfig
from align.data.prompts import Conversation
from align.engine import collate, evaluating, response_statistics
from align.engine.batching import FORWARD_ONLY, plan_micro_batches
from align.files import fingerprint, write_text
from align.launch.rank import Rank
from align.model.chat import prompt_ids
from align.onpolicy import figures
from align.onpolicy.pairs import scored_prompts
from align.onpolicy.sample import ResponseRow
from align.onpolicy.samplers import Prompt, hf_sampler, seeds
from align.onpolicy.score import annotate, read_scores
from align.onpolicy.scorers import registry
from align.onpolicy.scorers.base import Scorer, last_turn
from align.say import UserError

START, POLICY = "start", "policy"  # whose answers they are, in samples.jsonl too


OTHERS = 2  # what stands for other answers than these in the seeds of a run


@dataclass(frozen=True, kw_only=True)
class Weight:
    """Of an answer, under some policy: sums over its tokens, in nats."""

    logp: float
    entropy: float
    length: int  # tokens, the stop token included


def judge_of(cfg: RunConfig) -> ScorerConfig | None:
    """Who judges an ordinary run: the scorer, else the dataset's judge; None where there is neither."""
    return registry.scorer_of(cfg) if cfg.scorer.name is not None or cfg.dataset.judge is not None else None


def answer(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation | str],
    cfg: EvaluationConfig,
    rank: Rank,
    *,
    name: str,
    seed: int,
    tokens_per_batch: int,
) -> list[ResponseRow]:
    """The answers of the policy that is called `name`, START or POLICY, to every prompt; `tokens_per_batch` at once."""
    # Of each policy random numbers of its own: answers that share them are no independent samples.
    ids = [json.dumps(conversation) for conversation in conversations]
    prompts = [
        Prompt(
            token_ids=prompt_ids(conversation, tokenizer),
            seeds=seeds(seed, (START, POLICY).index(name), prompt_id, cfg.samples_per_prompt),
        )
        for prompt_id, conversation in zip(ids, conversations, strict=True)
    ]
    with rank.autocast():  # one block each: it keeps a copy of the weights to its end
        drawn = hf_sampler(policy, tokenizer, tokens_per_batch)(
            prompts, temperature=cfg.temperature, top_p=cfg.top_p, max_new_tokens=cfg.max_new_tokens
        )
    return [
        ResponseRow(
            iteration=0,
            prompt_id=prompt_id,
            k=k,
            prompt=conversation,
            response=sample.text,
            response_ids=sample.response_ids,
            finished=sample.finished,
            split="held_out",
            origin=name,
        )
        for prompt_id, conversation, samples in zip(ids, conversations, drawn, strict=True)
        for k, sample in enumerate(samples)
    ]


def weigh(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    answers: Sequence[ResponseRow],
    rank: Rank,
    *,
    layout: Layout,
    budget: int,
) -> list[Weight]:
    """What a policy makes of answers, its own or another's, in their order.

    Args:
        policy: `engine.attach`ed in `layout` and on the device.
        budget: tokens of a training micro-batch.
    """
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
    """KL(policy || start) in nats per answer: `own` is what the policy makes of its own samples."""
    return fmean(ours.logp - theirs.logp for ours, theirs in zip(own, by_start, strict=True))


def compare(
    answers: Mapping[str, Sequence[ResponseRow]], judge: Scorer, scores: Path, samples_file: Path
) -> tuple[dict[str, float], dict[str, float]]:
    """What the judge says of the START policy's answers and of the trained POLICY's.

    The answers go into `samples_file` with their scores, or with P(the policy's i-th beats the start's j-th) where the judge only
    compares. What was judged is kept in the folder `scores` until then, so a judge that fails is not asked twice.

    Raises:
        UserError: the judge fails, or has no word on any prompt.
    """
    rows = figures.side_by_side({name: answers[name] for name in (START, POLICY)}, 0)
    own = scores / fingerprint(
        [(row.prompt_id, row.response) for row in rows], judge.identity.name
    )  # none's but theirs
    if counts := annotate(rows, judge, own):
        print(", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items()), flush=True)
    scored = list(scored_prompts(rows, read_scores(own)))
    known = figures.usable(scored)
    if not known:
        raise UserError(f"{judge.identity.name} has no finite score for any of the {len(scored)} prompts: see {own}")
    if len(known) < len(scored):
        print(f"{judge.identity.name} could not judge {len(scored) - len(known)} of {len(scored)} prompts", flush=True)
    asked = {row.prompt_id: row.prompt for row in rows}
    lines = []
    for prompt in known:
        candidates = {name: [c for c in prompt.candidates if c.origin == name] for name in (START, POLICY)}
        texts = {name: [c.text for c in of_one] for name, of_one in candidates.items()}
        line: dict[str, Any] = {"prompt": last_turn(asked[prompt.id]), **texts}
        if prompt.preferences is None:
            line["scores"] = {name: [c.score for c in of_one] for name, of_one in candidates.items()}
        else:
            line["chances"] = figures.chances(prompt, POLICY, START)
        lines.append(json.dumps(line) + "\n")
    write_text(samples_file, "".join(lines))
    shutil.rmtree(scores, ignore_errors=True)
    even = {name: figures.ties(scored, name, START) for name in (START, POLICY)}
    made = {
        name: {
            "win_rate": figures.win_rate(scored, name, START) if name == POLICY else 0.5,
            **({} if math.isnan(even[name]) else {"ties": even[name]}),  # of one answer, none with another
            **figures.figures(rows, scored, name),
        }
        for name in (START, POLICY)
    }
    return made[START], made[POLICY]
