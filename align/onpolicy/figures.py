"""Figures of answers: who wins, how good, long and varied they are. Pure: no files, no models.

All policies answer the same held-out prompts, each with random numbers of its own, since answers that share them are no
independent samples; and one scorer sees all answers to a prompt together, so a pairwise scorer can say who wins. Only
`usable` prompts enter; there is one at least.
Left out: what a training says of itself (accuracies, its results.json).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from align.metrics import shown
from align.onpolicy.sample import ResponseRow
from align.onpolicy.select import ScoredPrompt, matrix_of

_GRAM = 4  # tokens of what counts as repeated


def side_by_side(answers: Mapping[str, Sequence[ResponseRow]], iteration: int) -> list[ResponseRow]:
    """Return the answers of several policies as candidates for the same prompts, each policy's name as their origin."""
    rows: list[ResponseRow] = []
    for name, own in answers.items():
        offset = 1 + max((row.k for row in rows), default=-1)
        rows += [replace(row, iteration=iteration, k=offset + row.k, origin=name) for row in own]
    order = {row.prompt_id: at for at, row in reversed(list(enumerate(rows)))}
    return sorted(rows, key=lambda row: (order[row.prompt_id], row.k))


def figures(rows: Sequence[ResponseRow], scored: Sequence[ScoredPrompt], name: str) -> dict[str, float]:
    """Return the figures of a policy's own answers, means over answers or over prompts.

    `sample_length` in tokens; `distinct`, the share of different answers to a prompt; `unfinished`, the share that was
    cut at max_new_tokens; `repetition` within an answer; and where the scorer gives numbers `judge_score`, their mean,
    and `score_spread`, best minus worst.
    """
    own = [row for row in rows if row.origin == name]
    texts: dict[str, list[str]] = {}
    for row in own:
        texts.setdefault(row.prompt_id, []).append(row.response)
    made = {
        "sample_length": fmean(len(row.response_ids) for row in own),
        "distinct": fmean(len(set(said)) / len(said) for said in texts.values()),
        "unfinished": fmean(not row.finished for row in own),
        "repetition": fmean(repetition(row.response_ids) for row in own),
    }
    scores = [[c.score for c in prompt.candidates if c.origin == name and c.score is not None] for prompt in scored]
    if all(scores):
        made["judge_score"] = fmean(score for of_prompt in scores for score in of_prompt)
        made["score_spread"] = fmean(max(of_prompt) - min(of_prompt) for of_prompt in scores)
    return made


def repetition(token_ids: Sequence[int]) -> float:
    """Return seq-rep-4: the share of an answer's 4-grams that were there before; 0 where it has none.

    1 - distinct / all 4-grams, Welleck et al. 2019, https://arxiv.org/abs/1908.04319.
    """
    grams = [tuple(token_ids[at : at + _GRAM]) for at in range(len(token_ids) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def win_rates(scored: Sequence[ScoredPrompt], ours: str, theirs: str) -> list[float]:
    """Return of each prompt P(an answer of `ours` beats one of `theirs`), over all pairs of its answers.

    Of two scores the higher one wins surely, and equal ones are half a win each.
    """
    return [fmean(p for row in chances(prompt, ours, theirs) for p in row) for prompt in scored]


def ties(scored: Sequence[ScoredPrompt], ours: str, theirs: str) -> float:
    """Return the share of pairs of answers to a prompt that are equally good, then over prompts.

    An answer is no pair with itself. NaN where there is no pair.
    """
    shares = []
    for prompt in scored:
        of_prompt = chances(prompt, ours, theirs)
        even = [p == 0.5 for i, row in enumerate(of_prompt) for j, p in enumerate(row) if ours != theirs or i != j]
        shares += [fmean(even)] if even else []
    return fmean(shares) if shares else math.nan


def chances(prompt: ScoredPrompt, ours: str, theirs: str) -> list[list[float]]:
    """Return in row i, column j P(the i-th answer of `ours` beats the j-th of `theirs`)."""
    matrix = matrix_of(prompt, temperature=0.0)
    origins = [candidate.origin for candidate in prompt.candidates]
    rows, columns = ([i for i, origin in enumerate(origins) if origin == name] for name in (ours, theirs))
    return [[matrix[i][j] for j in columns] for i in rows]


def line(made: Mapping[str, Any]) -> str:
    """Return an iteration's figures as the terminal shows them."""
    return ", ".join(f"{metric.words} {made[metric.name]:.3g}" for metric in shown("line") if metric.name in made)


def usable(scored: Sequence[ScoredPrompt]) -> list[ScoredPrompt]:
    """Return the prompts whose answers all have finite scores."""
    return [
        prompt
        for prompt in scored
        if all(math.isfinite(p) for row in prompt.preferences or () for p in row)
        and all(c.score is None or math.isfinite(c.score) for c in prompt.candidates)
    ]
