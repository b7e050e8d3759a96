"""A policy against its start model on held-out prompts, by the dataset's own judge.

Accuracy on held-out pairs says that the policy ranks given answers rightly; this says whether its own answers got
better. Length stands beside it, because judges like long answers, and KL(policy || start), estimated the same way for
every objective: the mean of log pi - log pi_start over the policy's own samples. Left out: judges that are models.
"""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from transformers import PreTrainedModel

from align.batching import FORWARD_ONLY, plan_micro_batches
from align.config import EvaluationConfig, Layout
from align.engine import collate, evaluating, response_statistics
from align.launch import Place
from align.model import Start
from align.onpolicy.samplers import Prompt, Sample, hf_sampler, prompt_ids, seeds

Judge = Callable[[str, str], float]


def compare_with_start(
    policy: PreTrainedModel,
    start_policy: PreTrainedModel,
    start: Start,
    conversations: list[list[dict[str, str]] | str],
    judge: Judge,
    cfg: EvaluationConfig,
    where: Place,
    *,
    seed: int,
    layout: Layout,
    budget: int,
    tokens_per_batch: int,
    samples_file: Path,
) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics of the start policy and of the trained one: win rate, judge's score, length in tokens, KL in nats.

    The judge is given the last user turn of each conversation (or the plain prompt) and an answer. The responses are
    written to `samples_file`.

    Args:
        policy, start_policy: `engine.attach`ed in `layout` and on the device.
        budget: tokens of a training micro-batch.
        tokens_per_batch: that are sampled at once.
    """
    questions = [c if isinstance(c, str) else c[-1]["content"] for c in conversations]
    ids = [prompt_ids(conversation, start.tokenizer) for conversation in conversations]
    drawn = {}
    for number, (name, model) in enumerate((("start", start_policy), ("policy", policy))):
        prompts = [  # of each policy random numbers of its own: answers that share them are no independent samples
            Prompt(token_ids=own, seeds=seeds(seed, number, json.dumps(conversation), cfg.samples_per_prompt))
            for own, conversation in zip(ids, conversations, strict=True)
        ]
        with where.autocast():  # one block each: it keeps a copy of the weights to its end
            drawn[name] = hf_sampler(model, start.tokenizer, tokens_per_batch)(
                prompts, temperature=cfg.temperature, top_p=cfg.top_p, max_new_tokens=cfg.max_new_tokens
            )
    scores = {
        name: [[judge(question, s.text) for s in own] for question, own in zip(questions, samples, strict=True)]
        for name, samples in drawn.items()
    }
    with samples_file.open("w") as file:
        for i, prompt in enumerate(questions):
            answers = {name: [s.text for s in drawn[name][i]] for name in drawn}
            file.write(json.dumps({"prompt": prompt, **answers, "scores": {n: scores[n][i] for n in scores}}) + "\n")
    metrics = {}
    for name, model in (("start", start_policy), ("policy", policy)):
        flat = [s for own in drawn[name] for s in own]
        pad = int(start.tokenizer.pad_token_id)
        metrics[name] = {
            "win_rate": win_rate(scores[name], scores["start"]),
            "judge_score": fmean(score for own in scores[name] for score in own),
            "sample_length": fmean(len(s.response_ids) for s in flat),
            "kl_policy_start": fmean(
                a - b
                for a, b in zip(
                    *(_logps(m, ids, drawn[name], where, layout, budget, pad) for m in (model, start_policy)),
                    strict=True,
                )
            ),
        }
    return metrics["start"], metrics["policy"]


def win_rate(ours: list[list[float]], theirs: list[list[float]]) -> float:
    """P(a sample of ours scores above one of theirs), over all pairs of samples of the same prompt; a tie is half."""
    return fmean(
        (a > b) + 0.5 * (a == b) for mine, others in zip(ours, theirs, strict=True) for a in mine for b in others
    )


def _logps(
    model: PreTrainedModel,
    ids: list[list[int]],
    samples: list[list[Sample]],
    where: Place,
    layout: Layout,
    budget: int,
    pad_token_id: int,
) -> list[float]:
    """log pi of each sample, in nats; `ids` and `samples` are those of each prompt, and the result is in their order."""
    logps: list[list[float]] = [[] for _ in samples]
    groups = [(prompt, [s.response_ids for s in own]) for prompt, own in zip(ids, samples, strict=True)]
    lengths = [(len(prompt), *map(len, responses)) for prompt, responses in groups]
    with evaluating(model), where.autocast():
        for some in plan_micro_batches(lengths, layout, FORWARD_ONLY * budget):
            batch = collate([groups[i] for i in some], layout, pad_token_id).to(where.device)
            values = iter(response_statistics(model, batch, ())["logp"].tolist())
            for i in some:
                logps[i] = [next(values) for _ in samples[i]]
    return [logp for own in logps for logp in own]
