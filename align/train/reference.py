"""The reference as a data column: log pi_ref of every response, computed once from the start policy and cached.

Training then holds one model, and a sweep over beta and gamma pays for the reference once. The reference is the
policy as it is at step 0, adapter included, so a log-ratio starts at exactly what the engine's rounding leaves.
The key covers the weights themselves, the pairs (data, tokenizer, template, truncation, mask), the precision and the
layout: what differs by rounding alone would still decide a tie, and an accuracy starts at 0.5 where nothing has moved.

The pass runs over pairs in order of length, in shards of a file each: all processes of a run work on one shard, since
weights may be divided among them. Another run of the sweep takes the shards that no one is about, and a run that was
killed goes on, so the work is shared out by itself.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from align.choices import Layout
from align.data.pairs import as_group
from align.engine import collate, evaluating, response_statistics
from align.engine.batching import FORWARD_ONLY, Lengths, deal, fed_tokens
from align.files import fingerprint, say_made, writing
from align.launch.rank import Rank
from align.say import UserError

_SHARD_PAIRS = 256  # what a killed pass loses at most


_BAR_SHARDS = 4  # below it, a progress bar is noise


_VERSION = 2  # of what a shard holds and in what order: raise it when that changes


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
    """`[N, 2]` float32 nats: ref_logp of the chosen and of the rejected response of each pair. Cached. Collective.

    Args:
        policy: `engine.attach`ed in `layout`, at step 0, wrapped as in training; `weights` tells it from others.
        lengths: `(prompt, chosen, rejected)` tokens of each pair; `budget` is a training micro-batch's.
        name: of the split, for the progress bar and the file.
        between: called by every process before each shard; it may raise to stop.

    Raises:
        UserError: the cache cannot be written.
    """
    key = fingerprint(_VERSION, _SHARD_PAIRS, weights, pairs_fingerprint, name, rank.numerics, layout.name)
    folder = cache / "reference" / key
    by_length = sorted(range(len(pairs)), key=lambda i: (-fed_tokens([lengths[i]], Layout.shared), i))
    shards = [by_length[at : at + _SHARD_PAIRS] for at in range(0, len(pairs), _SHARD_PAIRS)]
    files = [folder / f"{number:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]

    def compute(shard: list[int]) -> Tensor:
        """`[len(shard), 2]`, by all processes in step."""
        logps = torch.zeros(len(shard), 2, device=rank.device)
        row = {pair: at for at, pair in enumerate(shard)}
        with evaluating(policy), rank.autocast():
            for some in deal(shard, lengths, rank.world, layout, FORWARD_ONLY * budget)[rank.number]:
                groups = [as_group(pair) for pair in pairs.select(list(some.pairs)).to_list()]
                batch = collate(groups, layout, pad_token_id).to(rank.device)
                values = response_statistics(policy, batch, ())["logp"].view(-1, 2)
                counted = [at for at, counts in enumerate(some.counted) if counts]
                logps[[row[some.pairs[at]] for at in counted]] = values[counted]
        if rank.world > 1:
            torch.distributed.all_reduce(logps)
        return logps.cpu()

    def missing() -> list[int]:
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return [number for number, file in enumerate(files) if not file.exists()]

    to_do = rank.from_first(missing)
    silent = not rank.is_first or len(to_do) < _BAR_SHARDS
    began, made = time.perf_counter(), 0
    with tqdm(total=len(to_do), desc=f"reference log-probabilities, {name}", unit="shard", disable=silent) as bar:
        for wait in (False, True):  # first what no one is about, then what others have not finished
            for number in to_do if not wait else rank.from_first(missing):
                between()
                with _claimed(files[number], wait, rank) as ours:
                    if ours:
                        made += len(shards[number])
                        logps = compute(shards[number])
                        if rank.is_first:
                            _write(files[number], logps)
                bar.update(sum(files[i].exists() for i in to_do) - bar.n)
    if made and rank.is_first:
        say_made(f"reference log-probabilities of {made:,} {name} pairs", began, folder)
    column: Tensor = rank.from_first(lambda: _read(files, shards))
    return column


@contextlib.contextmanager
def _claimed(file: Path, wait: bool, rank: Rank) -> Iterator[bool]:
    """Whether this run is to compute a shard: it is missing, and rank 0 holds its lock."""
    lock = FileLock(f"{file}.lock", timeout=-1 if wait else 0)

    def claim() -> bool:
        try:
            with _writing(file.parent):
                lock.acquire()
        except Timeout:
            return False
        return not file.exists()

    try:
        yield rank.from_first(claim)
    finally:
        lock.release()


def _write(file: Path, logps: Tensor) -> None:
    with _writing(file.parent):
        unfinished = file.with_suffix(".unfinished")
        save_file({"logp": logps}, str(unfinished))
        unfinished.replace(file)


def _read(files: list[Path], shards: list[list[int]]) -> Tensor:
    """`[N, 2]`: the shards put together."""
    logps = torch.empty(sum(map(len, shards)), 2)
    for file, shard in zip(files, shards, strict=True):
        try:
            logps[shard] = load_file(str(file))["logp"]
        except SafetensorError as error:
            raise UserError(f"{file} is damaged ({error}): delete it and start again") from error
    return logps


def _writing(folder: Path) -> contextlib.AbstractContextManager[None]:
    return writing(f"cache_dir: cannot write {folder}", "; set cache_dir= or ALIGN_CACHE")
