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
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedModel

from align.choices import Layout
from align.data.pairs import as_group
from align.engine import collate, evaluating, response_statistics
from align.engine.batching import FORWARD_ONLY, Lengths, deal, fed_tokens
from align.files import Shards, fingerprint, say_made
from align.launch.rank import Rank

_SHARD_PAIRS = 256  # what a killed pass loses at most
_VERSION = 3  # of what a shard holds and in what order: raise it when that changes


def reference_logps(
    policy: PreTrainedModel,
    weights: str,
    pairs: datasets.Dataset,
    pairs_fingerprint: str,
    lengths: Sequence[Lengths],
    rank: Rank,
    *,
    layout: Layout,
    budget: int,
    pad_token_id: int,
    cache: Path,
    name: str,
    between: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return the `[N, 2]` float32 log-probabilities of each pair's chosen and rejected response, in nats. Cached.

    Collective: every process of the run calls it. Raises `UserError` if the cache cannot be written.

    Args:
        policy: `engine.attach`ed in `layout`, at step 0, wrapped as in training; `weights` tells it from others.
        lengths: `(prompt, chosen, rejected)` tokens of each pair; `budget` is a training micro-batch's.
        name: of the split, for the progress bar and the file.
        between: called by every process before each shard; it may raise to stop.
    """
    inputs = {
        "version": _VERSION,
        "pairs_per_shard": _SHARD_PAIRS,
        "weights": weights,
        "pairs": pairs_fingerprint,
        "split": name,
        "numerics": rank.numerics,
        "layout": layout.name,
    }
    by_length = sorted(range(len(pairs)), key=lambda i: (-fed_tokens([lengths[i]], Layout.shared), i))
    chunks = [by_length[at : at + _SHARD_PAIRS] for at in range(0, len(pairs), _SHARD_PAIRS)]
    shards = Shards(
        folder=cache / "reference" / fingerprint(inputs),
        what="reference log-probabilities",
        count=len(chunks),
        rows=len(pairs),
        remedy="; set cache_dir= or ALIGN_CACHE",
    )
    rank.from_first(lambda: shards.begin(inputs))
    began, made = time.perf_counter(), 0
    for number in shards.claim(f"reference log-probabilities, {name}" if rank.is_first else "", rank.from_first):
        between()
        logps = _compute(policy, pairs, chunks[number], lengths, rank, layout, budget, pad_token_id)
        made += len(logps)
        if rank.is_first:
            shards.write(number, [{"chosen": chosen, "rejected": rejected} for chosen, rejected in logps.tolist()])
    if made and rank.is_first:
        say_made(f"reference log-probabilities of {made:,} {name} pairs", began, shards.folder)
    column = torch.empty(len(pairs), 2)
    column[by_length] = rank.from_first(lambda: torch.tensor(shards.read(lambda row: (row["chosen"], row["rejected"]))))
    return column


def _compute(
    policy: PreTrainedModel,
    pairs: datasets.Dataset,
    chunk: Sequence[int],
    lengths: Sequence[Lengths],
    rank: Rank,
    layout: Layout,
    budget: int,
    pad_token_id: int,
) -> Tensor:
    """Return `[len(chunk), 2]` for the pairs whose numbers are in `chunk`, by all processes in step."""
    logps = torch.zeros(len(chunk), 2, device=rank.device)
    row = {pair: at for at, pair in enumerate(chunk)}
    with evaluating(policy), rank.autocast():
        for some in deal(chunk, lengths, rank.world, layout, FORWARD_ONLY * budget)[rank.number]:
            groups = [as_group(pair) for pair in pairs.select(list(some.pairs)).to_list()]
            batch = collate(groups, layout, pad_token_id).to(rank.device)
            values = response_statistics(policy, batch, ())["logp"].view(-1, 2)
            counted = [at for at, counts in enumerate(some.counted) if counts]
            logps[[row[some.pairs[at]] for at in counted]] = values[counted]
    if rank.world > 1:
        torch.distributed.all_reduce(logps)
    return logps.cpu()
