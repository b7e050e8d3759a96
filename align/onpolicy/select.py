"""The third stage of an iteration: of each prompt's K scored responses a pair, in files that training reads.

    <folder>/manifest.json       what the pairs depend on, and how many prompts were dropped for which reason
    <folder>/train.jsonl         a pair a line, in the format of any preference file (data/rows.py)
    <folder>/held_out.jsonl

The rules:

- chosen: the highest score. Rejected: the lowest score, or, in WPO's first version, any of the others at random
  (Zhou et al. 2024, https://arxiv.org/abs/2406.11827).
- ties: the shortest of the best; of the worst, the one closest in length to the chosen (WPO's second version,
  https://github.com/wzhouad/WPO). SPPO's code takes the first of both.
- win_prob: the mean over all K of P(it beats j), itself included as 1/2, where P(i beats j) is the sigmoid of the
  difference of scores (SPPO: Wu et al. 2024, https://arxiv.org/abs/2405.00675, and scripts/compute_prob.py of
  https://github.com/uclaml/SPPO); or P(chosen beats rejected), the `chosen_probs` of the same file.
- prompts whose samples are all identical are dropped (SimPO: on_policy_data_gen/post_process.py of
  https://github.com/princeton-nlp/SimPO).

Ours: a pair of equal scores is dropped too, as it prefers nothing; and candidates of further sources are no opponents
where the policy has samples of its own, as `win_prob` is against a fresh sample of the policy.
Left out: tokens, and empty responses, which data/pairs.py drops.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any

from align.choices import Rejected, WinProb
from align.config import SelectionConfig
from align.data.prompts import POLICY
from align.files import MANIFEST, as_json, build_once, check_manifest, fingerprint, write_json
from align.onpolicy.sample import ResponseRow, read_samples
from align.onpolicy.score import read_scores
from align.onpolicy.scorers.base import Matrix, check_preferences
from align.say import UserError

_VERSION = 1  # of what is written: raise it when the same inputs would give others
SPLITS = ("train", "held_out")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A response that may enter the pair."""

    text: str
    length: int  # tokens
    score: float | None = None  # higher is better, in the scorer's unit; None: only who beats whom is known
    origin: str = POLICY  # or the name of a further source: hybrid data have answers that the policy did not sample


@dataclass(frozen=True, kw_only=True)
class ScoredPrompt:
    """A prompt's K candidates with their scores, or with P(i beats j)."""

    id: str
    candidates: Sequence[Candidate]
    preferences: Matrix | None = None  # None: from the scores


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A pair. Where candidates have no scores, theirs are their mean wins over all K."""

    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float
    chosen_win_prob: float  # in [0, 1]
    rejected_win_prob: float  # in [0, 1]
    chosen_origin: str
    rejected_origin: str


class Dropped(Enum):
    """The reason why a prompt has no pair, in the order of the checks; the value is for people to read."""

    too_few = "fewer than two candidates"
    not_finite = "a score is not a finite number"
    identical = "all samples are identical"
    equal_texts = "chosen and rejected are identical"
    equal_scores = "chosen and rejected score the same"
    small_gap = "scores closer than min_gap"


def write_pairs(
    responses: Path, scores: Path, settings: SelectionConfig, folder: Path, *, seed: int
) -> dict[str, dict[str, Any]]:
    """Choose the pairs of all prompts in `responses` by `scores`, or see that `folder` holds just these.

    Returns for each split `prompts`, `pairs`, and `dropped`, the number of prompts without a pair for each reason.
    """
    manifests = {"responses": responses / MANIFEST, "scores": scores / MANIFEST}  # missing where a stage has not begun
    made_of = {name: fingerprint(file.read_text()) if file.is_file() else None for name, file in manifests.items()}
    inputs = {**made_of, "selection": asdict(settings), "seed": seed, "version": _VERSION}

    def build(into: Path) -> None:
        rows, counts = choose(read_samples(responses), read_scores(scores), settings, seed)
        for split in SPLITS:
            with (into / f"{split}.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[split])
        write_json(into / MANIFEST, {**as_json(inputs), "counts": counts})

    build_once(folder, build, "name another folder")
    counts: dict[str, dict[str, Any]] = check_manifest(folder, inputs, "pairs")["counts"]
    return counts


def describe_counts(counts: dict[str, dict[str, Any]]) -> str:
    """Return in a line what became of the prompts of each split."""
    lines = []
    for split, known in counts.items():
        dropped = ", ".join(f"{count} {reason}" for reason, count in known["dropped"].items()) or "none dropped"
        lines.append(f"{split} pairs {known['pairs']} of {known['prompts']} prompts ({dropped})")
    return "; ".join(lines)


def choose(
    responses: Sequence[ResponseRow], scores: Sequence[Mapping[str, Any]], settings: SelectionConfig, seed: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, Any]]]:
    """Return rows of pairs by split, and what `write_pairs` returns."""
    rows: dict[str, list[dict[str, Any]]] = {}
    counts = {}
    for split in SPLITS:
        of_split = [row for row in responses if row.split == split]
        prompts = {row.prompt_id: row for row in of_split}
        pairs, dropped = select(scored_prompts(of_split, scores), settings, seed)
        rows[split] = [
            {"id": name, "iteration": prompts[name].iteration, "prompt": prompts[name].prompt, **asdict(pair)}
            for name, pair in pairs.items()
        ]
        counts[split] = {"prompts": len(prompts), "pairs": len(pairs), "dropped": dropped}
    return rows, counts


def scored_prompts(responses: Sequence[ResponseRow], scores: Sequence[Mapping[str, Any]]) -> Iterator[ScoredPrompt]:
    """Yield each prompt's responses with their scores, in the order of the responses."""
    by_key = {(row["iteration"], row["prompt_id"], row["k"]): row for row in scores}
    for prompt_id, own in groupby(responses, key=lambda row: row.prompt_id):
        rows = list(own)
        try:
            scored = [by_key[row.iteration, prompt_id, row.k] for row in rows]
        except KeyError as error:
            raise UserError(
                f"the scores lack response {error.args[0][2]} to prompt {prompt_id!r}: they are of other responses; delete them"
            ) from error
        yield ScoredPrompt(
            id=prompt_id,
            candidates=[
                Candidate(text=row.response, length=len(row.response_ids), score=score.get("score"), origin=row.origin)
                for row, score in zip(rows, scored, strict=True)
            ],
            preferences=[score["wins"] for score in scored] if "wins" in scored[0] else None,
        )


def select(
    prompts: Iterable[ScoredPrompt], config: SelectionConfig, seed: int
) -> tuple[dict[str, Selection], dict[str, int]]:
    """Return pairs by prompt id, in the order of the prompts, and how many prompts were dropped for which reason.

    A prompt's pair depends on the seed and its id, not on the other prompts; iterations give seeds of their own.
    """
    pairs: dict[str, Selection] = {}
    dropped: Counter[Dropped] = Counter()
    for prompt in prompts:
        try:
            matrix = matrix_of(prompt, config.temperature)
            made = select_pair(prompt.candidates, matrix, config, Random(f"{seed} {prompt.id}"))
        except UserError as error:
            raise UserError(f"prompt {prompt.id!r}: {error}") from error
        if isinstance(made, Dropped):
            dropped[made] += 1
        else:
            pairs[prompt.id] = made
    return pairs, {reason.value: dropped[reason] for reason in Dropped if dropped[reason]}


def select_pair(
    candidates: Sequence[Candidate], preferences: Matrix, config: SelectionConfig, rng: Random
) -> Selection | Dropped:
    """Choose the pair of one prompt, or say why it has none. What ties leave open goes to the first candidate."""
    given = [candidate.score for candidate in candidates if candidate.score is not None]
    if len(given) not in (0, len(candidates)):
        raise UserError(f"{len(given)} of {len(candidates)} candidates have scores: score all of them, or none")
    check_preferences(preferences, len(candidates))
    if len(candidates) < 2:
        return Dropped.too_few
    if not all(math.isfinite(number) for numbers in (given, *preferences) for number in numbers):
        return Dropped.not_finite
    samples = [candidate.text for candidate in candidates if candidate.origin == POLICY]
    if config.drop_identical and len(samples) > 1 and len(set(samples)) == 1:
        return Dropped.identical

    scores = given or win_probs(preferences)
    i_w = min(range(len(candidates)), key=lambda i: (-scores[i], candidates[i].length))
    i_l = _rejected(i_w, candidates, scores, config, rng)
    chosen, rejected = candidates[i_w], candidates[i_l]
    if chosen.text == rejected.text:
        return Dropped.equal_texts
    if scores[i_w] == scores[i_l]:
        return Dropped.equal_scores
    if scores[i_w] - scores[i_l] < config.min_gap:
        return Dropped.small_gap

    win_w, win_l = preferences[i_w][i_l], 1 - preferences[i_w][i_l]
    if config.win_prob is WinProb.all:
        opponents = [float(candidate.origin == POLICY) for candidate in candidates]
        wins = win_probs(preferences, opponents if any(opponents) else None)
        win_w, win_l = wins[i_w], wins[i_l]
    return Selection(
        chosen=chosen.text,
        rejected=rejected.text,
        chosen_score=scores[i_w],
        rejected_score=scores[i_l],
        chosen_win_prob=win_w,
        rejected_win_prob=win_l,
        chosen_origin=chosen.origin,
        rejected_origin=rejected.origin,
    )


def _rejected(
    chosen: int, candidates: Sequence[Candidate], scores: Sequence[float], config: SelectionConfig, rng: Random
) -> int:
    """Return the index of the rejected candidate. Its text can be the chosen one's, where a scorer contradicts itself."""
    others = [i for i in range(len(candidates)) if i != chosen]
    if config.rejected is Rejected.random:
        # In the order of texts, not of candidates: the choice is then the same however they are listed.
        different = [i for i in others if candidates[i].text != candidates[chosen].text] or others
        different.sort(key=lambda i: (candidates[i].text, scores[i]))
        return different[int(rng.random() * len(different))]  # Python promises random() for all versions, not choice()
    return min(others, key=lambda i: (scores[i], abs(candidates[i].length - candidates[chosen].length)))


def matrix_of(prompt: ScoredPrompt, temperature: float) -> Matrix:
    """Return [K][K] P(i beats j): the scorer's, or that of its scores at this temperature."""
    if prompt.preferences is not None:
        return prompt.preferences
    scores = [candidate.score for candidate in prompt.candidates if candidate.score is not None]
    if len(scores) < len(prompt.candidates):
        raise UserError("it has neither a score for every candidate nor preferences")
    return preferences(scores, temperature)


def preferences(scores: Sequence[float], temperature: float) -> list[list[float]]:
    """Return [K][K] P(i beats j) = sigmoid((s_i - s_j) / temperature); at temperature 0 it is 1, 0, or 1/2 for a tie.

    A score that is not finite makes its row and column NaN or certain: `select_pair` drops such prompts.
    """
    if not temperature >= 0:
        raise UserError(f"the temperature of preferences must be 0 or above, not {temperature}")

    def wins(gap: float) -> float:
        steepness = gap / temperature if temperature else (gap * math.inf if gap else 0.0)
        return 0.5 * (1 + math.tanh(steepness / 2))  # the sigmoid, without its overflow

    return [[wins(s_i - s_j) for s_j in scores] for s_i in scores]


def win_probs(preferences: Matrix, weights: Sequence[float] | None = None) -> list[float]:
    """Return [K] P(i beats an opponent): the mean over all K, itself included, which makes their mean 1/2.

    `weights` [K] says how often each of the K is met as an opponent; None: equally often, as samples are.
    """
    weights = [1.0] * len(preferences) if weights is None else weights
    # fsum, as a plain sum depends on the order, which would decide ties.
    return [math.fsum(w * p for w, p in zip(weights, row, strict=True)) / math.fsum(weights) for row in preferences]
