"""Checkpoints: which one a run goes on from, who may read it, and what is said where the disk refuses."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException

from align.choices import Strategy
from align.launch.rank import Cluster
from align.say import UserError

#: The file of a checkpoint that says by which strategy, on how many processes, it was written.
MADE_BY = "made_by.json"
#: The file of a checkpoint that says what the steps up to it have cost.
COST = "cost.json"


def check_checkpoint(folder: Path, cluster: Cluster) -> None:
    """Raise `UserError` for a newest checkpoint in `folder` that these processes cannot read by their strategy."""
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        return
    try:
        made = json.loads((checkpoint / MADE_BY).read_text())
    except ValueError as error:
        raise UserError(
            f"{checkpoint / MADE_BY} is damaged: delete {checkpoint}, and the run goes on from the one before"
        ) from error
    before, now = Strategy(made["strategy"]), cluster.strategy
    whole = {Strategy.single, Strategy.ddp}  # both write weights and optimizer in one piece
    same = before is now or {before, now} <= whole
    by_rank = before in (Strategy.zero2, Strategy.zero3)  # DeepSpeed's shards are those of its ranks
    if not same or (by_rank and made["processes"] != cluster.world):
        other = f"cluster.strategy={before.value}" + (f" cluster.processes={made['processes']}" if by_rank else "")
        raise UserError(
            f"{checkpoint} was written by {before.value} on {made['processes']} process(es), and this is {now.value} on "
            f"{cluster.world}: go on with {other}, or begin anew with another run_dir="
        )


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint: one that is there is whole (`PairTrainer._save_checkpoint`)."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{MADE_BY}")]
    return max(whole, key=step_of, default=None)


def step_of(checkpoint: Path | None) -> int:
    """The steps that a checkpoint holds; 0 where there is none."""
    return int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0


@contextlib.contextmanager
def saying_what_to_do(folder: Path) -> Iterator[None]:
    """One line where the disk is full or refuses; other errors pass."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, CheckpointException) as error:
        text = " ".join(str(error).split())
        there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
        full = shutil.disk_usage(there).free < 2**20
        if not (full or isinstance(error, OSError | SafetensorError) or "PytorchStreamWriter" in text):
            raise
        shutil.rmtree(folder / "unfinished", ignore_errors=True)  # what is left of it only takes up room
        why = "the disk is full" if full or "No space left" in text else text[:200]
        raise UserError(
            f"cannot write {folder}: {why}. What was saved before is whole: free some space, and the same command goes on"
        ) from error
