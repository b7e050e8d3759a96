"""The third stage of an iteration: scored responses in, the pairs to train on out, as files that training reads.

    <folder>/manifest.json       what the pairs depend on, and how many prompts were dropped for which reason
    <folder>/train.jsonl         a pair a line, in the format of any preference file (data/rows.py)
    <folder>/held_out.jsonl

The choice itself is select.py's. Left out: tokens (data/pairs.py).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from align.config import SelectionConfig
from align.files import MANIFEST, as_json, build_once, check_manifest, fingerprint, write_json
from align.onpolicy.sample import ResponseRow, read_samples
from align.onpolicy.score import read_scores
from align.onpolicy.select import Candidate, ScoredPrompt, select
from align.say import UserError

_VERSION = 1  # of what is written: raise it when the same inputs would give others
SPLITS = ("train", "held_out")


def write_pairs(
    responses: Path, scores: Path, settings: SelectionConfig, folder: Path, *, seed: int
) -> dict[str, dict[str, Any]]:
    """Choose the pairs of all prompts in `responses` by `scores`, or see that `folder` holds just these.

    Returns:
        For each split: `prompts`, `pairs`, and `dropped`, the number of prompts without a pair for each reason.
    """
    inputs = {
        "responses": _manifest_of(responses),
        "scores": _manifest_of(scores),
        "selection": asdict(settings),
        "seed": seed,
        "version": _VERSION,
    }

    def build(into: Path) -> None:
        rows, counts = choose(read_samples(responses), read_scores(scores), settings, seed)
        for split in SPLITS:
            with (into / f"{split}.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[split])
        write_json(into / MANIFEST, {**as_json(inputs), "counts": counts})

    build_once(folder, build, "name another folder")
    counts: dict[str, dict[str, Any]] = check_manifest(folder, inputs, "pairs")["counts"]
    return counts


def _manifest_of(folder: Path) -> str | None:
    """Return a fingerprint of what the rows of a folder depend on; None where it has not begun."""
    file = folder / MANIFEST
    return fingerprint(file.read_text()) if file.is_file() else None


def choose(
    responses: Sequence[ResponseRow], scores: Sequence[Mapping[str, Any]], settings: SelectionConfig, seed: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, Any]]]:
    """Return rows of pairs by split, and what `write_pairs` returns. Pure."""
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


def describe_counts(counts: dict[str, dict[str, Any]]) -> str:
    """Return in a line what became of the prompts of each split."""
    lines = []
    for split, known in counts.items():
        dropped = ", ".join(f"{count} {reason}" for reason, count in known["dropped"].items()) or "none dropped"
        lines.append(f"{split} pairs {known['pairs']} of {known['prompts']} prompts ({dropped})")
    return "; ".join(lines)
