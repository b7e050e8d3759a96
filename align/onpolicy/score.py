"""The second stage of an iteration: responses in, a score or wins for each of them out, as rows in shards (files.py).

    {"iteration", "prompt_id", "k", "score": s or "wins": [K], "scorer", "revision", "template": fingerprint, and what
     the scorer counts, such as "cut_tokens"}

`score` is the scorer's number for response k; `wins` are P(response k beats response j), j in the order of the k.
null is a number that is not finite. The manifest names the responses and the scorer, with its template in full, so
scores of two scorers never mix.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from align.config import RunConfig
from align.files import Shards, fingerprint
from align.launch.rank import Rank, free
from align.onpolicy.sample import ResponseRow
from align.onpolicy.scorers import registry
from align.onpolicy.scorers.base import Item, Kind, Scorer, Scores, check_preferences
from align.say import UserError

_SHARD_PROMPTS = 32  # what a killed run loses at most, and pays a judge for twice
_VERSION = 2  # of what a shard holds: raise it when that changes
_COLUMNS = ("iteration", "prompt_id", "k", "score", "wins", "scorer", "revision", "template")


def score_responses(rows: Sequence[ResponseRow], cfg: RunConfig, folder: Path, rank: Rank) -> None:
    """Score responses into a folder by the scorer of the configuration, and print what it counts."""
    counts = annotate(rows, registry.build(registry.scorer_of(cfg), rank), folder, silent=not rank.is_first)
    if counts and rank.is_first:
        print(", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items()), flush=True)
    free()


def annotate(responses: Sequence[ResponseRow], scorer: Scorer, folder: Path, *, silent: bool = False) -> Counter[str]:
    """Score responses into `folder`; what is there is kept. Any number of processes may do so at once, in one order.

    Returns what the scorer counts, over all rows: tokens that were cut, tokens that a judge was paid for.
    """
    groups = _by_prompt(responses)
    chunks = [groups[at : at + _SHARD_PROMPTS] for at in range(0, len(groups), _SHARD_PROMPTS)]
    digest = hashlib.sha256()
    for group in groups:
        rows = [[row.iteration, row.prompt_id, row.k, row.prompt, row.response] for row in group]
        digest.update(json.dumps(rows).encode())
    shards = Shards(folder=folder, what="scores", count=len(chunks), rows=len(responses))
    inputs = {"version": _VERSION, "responses": digest.hexdigest()[:16], "scorer": asdict(scorer.identity)}
    shards.begin({**inputs, "prompts": len(groups)})
    for number in shards.claim("" if silent else f"scores by {scorer.identity.name}"):
        shards.write(number, _score(chunks[number], scorer))
    counts: Counter[str] = Counter()
    for row in read_scores(folder):
        counts.update({name: value for name, value in row.items() if name not in _COLUMNS})
    return counts


def read_scores(folder: Path) -> list[dict[str, Any]]:
    """Return the rows that `annotate` wrote, in the order of the responses' prompts and of k; a null is NaN."""
    remedy = f"type align annotate run_dir={folder.parent} scorer=... first"
    return Shards.open(folder, "scores", remedy).read(_parse)


def _parse(row: dict[str, Any]) -> dict[str, Any]:
    def number(value: float | None) -> float:
        return math.nan if value is None else value

    return row | ({"score": number(row["score"])} if "score" in row else {"wins": [number(p) for p in row["wins"]]})


def _by_prompt(responses: Sequence[ResponseRow]) -> list[list[ResponseRow]]:
    """Return the responses of each prompt together, by k, the prompts in the order of their first response."""
    found: dict[tuple[int, str], dict[int, ResponseRow]] = {}
    for row in responses:
        own = found.setdefault((row.iteration, row.prompt_id), {})
        if row.k in own:
            raise UserError(f"response {row.k} to prompt {row.prompt_id!r} of iteration {row.iteration} comes twice")
        own[row.k] = row
    if not found:
        raise UserError("there are no responses to score")
    return [[own[k] for k in sorted(own)] for own in found.values()]


def _score(groups: list[list[ResponseRow]], scorer: Scorer) -> list[dict[str, Any]]:
    """Return the rows of a shard."""
    identity = scorer.identity
    scored = scorer([Item(prompt=group[0].prompt, responses=[row.response for row in group]) for group in groups])
    if len(scored) != len(groups):
        raise UserError(f"scorer {identity.name} answered {len(scored)} of {len(groups)} prompts")
    signature = {"scorer": identity.name, "revision": identity.revision, "template": fingerprint(identity.template)}
    rows = []
    for group, scores in zip(groups, scored, strict=True):
        try:
            values = _values(scores, identity.kind, len(group))
        except (TypeError, ValueError) as error:
            raise UserError(f"scorer {identity.name}, prompt {group[0].prompt_id!r}: {error}") from error
        for row, value, counted in zip(group, values, scores.counts or [{}] * len(group), strict=True):
            key = {"iteration": row.iteration, "prompt_id": row.prompt_id, "k": row.k}
            rows.append({**key, **value, **signature, **counted})
    return rows


def _values(scores: Scores, kind: Kind, count: int) -> list[dict[str, Any]]:
    """Return the score or the wins of each of `count` responses; `ValueError` or `TypeError` for what cannot be."""
    values: Any = scores.values
    if len(values) != count or len(scores.counts) not in (0, count):
        raise ValueError(f"{len(values)} values and {len(scores.counts)} counts for {count} responses")
    if kind is Kind.pointwise:
        return [{"score": _finite(value)} for value in values]
    check_preferences(values, count)
    return [{"wins": [_finite(p) for p in row]} for row in values]


def _finite(value: float) -> float | None:
    """Return None for NaN and infinity, which JSON does not have."""
    return float(value) if math.isfinite(value) else None
