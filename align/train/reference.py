"""The reference as a data column: log pi_ref of every response, computed once from the start policy and cached.

Training then holds one model, and a sweep over beta and gamma pays for the reference once. The reference is the
policy as it is at step 0, adapter included, so a log-ratio starts at exactly what the engine's rounding leaves.
The key covers the weights themselves, the pairs (data, tokenizer, template, truncation, mask), the precision and the
layout: what differs by rounding alone would still decide a tie, and an accuracy starts at 0.5 where nothing has moved.

The pass runs over pairs in order of length, in shards (files.py). All processes of a run work on one shard in step,
since weights may be divided among them. Another run of a sweep takes the shards that no one works on, and a run that
was killed goes on.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from align.choices import Layout
from align.engine import evaluating, response_statistics
from align.engine.batching import fed_tokens
from align.files import Shards, fingerprint, say_made
from align.launch.rank import Rank
from align.train.job import PairBatch, PairData

_SHARD_PAIRS = 256  # what a killed pass loses at most
_VERSION = 3  # of what a shard holds and in what order: raise it when that changes


def reference_logps(
    policy: PreTrainedModel,
    weights: str,
    data: PairData,
    pairs_fingerprint: str,
    rank: Rank,
    *,
    budget: int,
    cache: Path,
    name: str,
    between: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return the `[N, 2]` float32 log-probabilities of each pair's chosen and rejected response, in nats. Cached.

    Collective: every process of the run calls it. Raises `UserError` if the cache cannot be written.

    Args:
        policy: `engine.attach`ed in the layout of `data`, at step 0, wrapped as in training; `weights` tells it from
            others.
        budget: tokens of a training micro-batch.
        name: of the split, for the progress bar and the file.
        between: called by every process before each shard; it may raise to stop.
    """
    lengths, count = data.lengths, len(data.pairs)
    inputs = {
        "version": _VERSION,
        "pairs_per_shard": _SHARD_PAIRS,
        "weights": weights,
        "pairs": pairs_fingerprint,
        "split": name,
        "numerics": rank.numerics,
        "layout": data.layout.name,
    }
    by_length = sorted(range(count), key=lambda i: (-fed_tokens([lengths[i]], Layout.shared), i))
    chunks = [by_length[at : at + _SHARD_PAIRS] for at in range(0, count, _SHARD_PAIRS)]
    shards = Shards(
        folder=cache / "reference" / fingerprint(inputs),
        what="reference log-probabilities",
        count=len(chunks),
        rows=count,
        remedy="; set cache_dir= or ALIGN_CACHE",
    )

    def logps_of(batch: PairBatch) -> Tensor:
        return response_statistics(policy, batch.responses, ())["logp"].view(-1, 2)

    rank.from_first(lambda: shards.begin(inputs))
    began, made = time.perf_counter(), 0
    for number in shards.claim(f"reference log-probabilities, {name}" if rank.is_first else "", rank.from_first):
        between()
        with evaluating(policy), rank.autocast():
            logps = data.column(chunks[number], logps_of, budget, rank)
        made += len(logps)
        if rank.is_first:
            shards.write(number, [{"chosen": chosen, "rejected": rejected} for chosen, rejected in logps.tolist()])
    if made and rank.is_first:
        say_made(f"reference log-probabilities of {made:,} {name} pairs", began, shards.folder)
    column = torch.empty(count, 2)
    column[by_length] = rank.from_first(lambda: torch.tensor(shards.read(lambda row: (row["chosen"], row["rejected"]))))
    return column
