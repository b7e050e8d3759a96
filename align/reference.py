"""The reference as a data column: log pi_ref of every response, computed once from the start policy and cached.

Training then holds one model, and a sweep over beta and gamma pays for the reference once. The reference is the
policy as it is at step 0, adapter included, so a log-ratio starts at exactly what the engine's rounding leaves.
The key covers the weights themselves, the pairs (data, tokenizer, template, truncation, mask), the precision and the
layout: what differs by rounding alone would still decide a tie, and an accuracy starts at 0.5 where nothing has moved.

The pass runs over pairs in order of length, in shards of a file each. Whoever needs the column (a rank, another run of
the sweep, a run that was killed and goes on) computes the shards that no one has, so it is shared out by itself.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from align.batching import FORWARD_ONLY, Lengths, fed_tokens, plan_micro_batches
from align.config import Layout, UserError, fingerprint
from align.data import as_group
from align.engine import collate, evaluating, response_statistics
from align.launch import Place

_SHARD_PAIRS = 256  # what a killed pass loses at most
_BAR_SHARDS = 4  # below it, a progress bar is noise
_VERSION = 1  # of what a shard holds and in what order: raise it when that changes


def reference_logps(
    policy: PreTrainedModel,
    weights: str,
    pairs: datasets.Dataset,
    pairs_fingerprint: str,
    lengths: Sequence[Lengths],
    where: Place,
    *,
    layout: Layout,
    budget: int,
    pad_token_id: int,
    cache: Path,
    name: str,
) -> Tensor:
    """`[N, 2]` float32 nats: ref_logp of the chosen and of the rejected response of each pair. Cached.

    Args:
        policy: `engine.attach`ed in `layout`, at step 0, on its device; `weights` is its fingerprint.
        lengths: `(prompt, chosen, rejected)` tokens of each pair; `budget` is a training micro-batch's.
        name: of the split, for the progress bar and the file.

    Raises:
        UserError: the cache cannot be written.
    """
    key = fingerprint(_VERSION, _SHARD_PAIRS, weights, pairs_fingerprint, name, where.bf16, layout.name)
    folder = cache / "reference" / key
    by_length = sorted(range(len(pairs)), key=lambda i: (-fed_tokens([lengths[i]], Layout.shared), i))
    shards = [by_length[at : at + _SHARD_PAIRS] for at in range(0, len(pairs), _SHARD_PAIRS)]
    files = [folder / f"{number:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]

    def compute(shard: list[int]) -> Tensor:
        logps = torch.empty(len(shard), 2)
        with evaluating(policy), where.autocast():
            for group in plan_micro_batches([lengths[i] for i in shard], layout, FORWARD_ONLY * budget):
                rows = pairs.select([shard[i] for i in group]).to_list()
                batch = collate([as_group(row) for row in rows], layout, pad_token_id).to(where.device)
                logps[group] = response_statistics(policy, batch, ())["logp"].view(-1, 2).cpu()
        return logps

    def make(number: int, wait: bool) -> None:
        """Compute a shard, unless someone has or, where we are not to `wait`, someone is about it."""
        try:
            with _writing(folder), FileLock(f"{files[number]}.lock", timeout=-1 if wait else 0):
                if not files[number].exists():
                    unfinished = files[number].with_suffix(".unfinished")
                    save_file({"logp": compute(shards[number])}, str(unfinished))
                    unfinished.replace(files[number])
        except Timeout:
            pass

    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    missing = [number for number, file in enumerate(files) if not file.exists()]
    order = list(dict.fromkeys([*missing[where.rank :: where.world], *missing]))  # one's own share, then the others'
    with tqdm(
        total=len(missing),
        desc=f"reference log-probabilities, {name}",
        unit="shard",
        disable=where.rank > 0 or len(missing) < _BAR_SHARDS,
    ) as bar:
        for wait in (False, True):
            for number in order:
                if not files[number].exists():
                    make(number, wait)
                bar.update(sum(files[i].exists() for i in missing) - bar.n)
    logps = torch.empty(len(pairs), 2)
    for file, shard in zip(files, shards, strict=True):
        try:
            logps[shard] = load_file(str(file))["logp"]
        except SafetensorError as error:
            raise UserError(f"{file} is damaged ({error}): delete it and start again") from error
    return logps


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Say what to do where the cache cannot be written."""
    try:
        yield
    except Timeout:  # which is an OSError
        raise
    except (OSError, SafetensorError) as error:
        raise UserError(f"cache_dir: cannot write {folder} ({error}); set cache_dir= or ALIGN_CACHE") from error
