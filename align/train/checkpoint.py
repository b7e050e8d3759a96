"""Checkpoints: written whole or not at all, read again by the strategy that wrote them; the trained policy as a model.

    checkpoint-<steps>/model.safetensors, optimizer.pt   trained weights and optimizer of one process, or of ddp's first
                      /sharded/                          the same of fsdp, by torch's distributed checkpoints
                      /global_step*/                     the same of zero2 and zero3, by DeepSpeed
                      /scheduler.bin, random_states_*    schedule, and the random states of each process
                      /metrics_so_far.jsonl, cost.json   so that a run that goes on adds to them
                      /made_by.json                      last: strategy and number of processes

Weights that are not trained are not written: they are the start model's.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed import checkpoint as sharded
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint import state_dict as states

from align.choices import Strategy
from align.files import write_json
from align.launch import strategy
from align.launch.rank import Cluster
from align.say import UserError
from align.train.loop import Loop
from align.train.metrics import SO_FAR, Cost

MADE_BY = "made_by.json"  # the file of a checkpoint that says by which strategy, on how many processes, it was written
COST = "cost.json"  # what the steps up to it have cost
_ZERO = (Strategy.zero2, Strategy.zero3)
_TRAINED = states.StateDictOptions(ignore_frozen_params=True, strict=False)


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
    by_rank = before in _ZERO  # DeepSpeed's shards are those of its ranks
    if not same or (by_rank and made["processes"] != cluster.world):
        other = f"cluster.strategy={before.value}" + (f" cluster.processes={made['processes']}" if by_rank else "")
        raise UserError(
            f"{checkpoint} was written by {before.value} on {made['processes']} process(es), and this is {now.value} on "
            f"{cluster.world}: go on with {other}, or begin anew with another run_dir="
        )


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint, or None. One that is there is whole."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{MADE_BY}")]
    return max(whole, key=step_of, default=None)


def step_of(checkpoint: Path | None) -> int:
    """Return the number of steps that a checkpoint holds; 0 where there is none."""
    return int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0


def save_checkpoint(loop: Loop, folder: Path, cost: Cost, keep: int) -> None:
    """Write beside its place, and rename once every process has written its part; only then may older ones go."""
    whole = folder / "unfinished" / f"checkpoint-{loop.done}"
    with saying_what_to_do(folder):
        if loop.rank.is_first:
            shutil.rmtree(whole.parent, ignore_errors=True)
            whole.mkdir(parents=True)
        loop.accelerator.wait_for_everyone()
        _write_state(loop, whole)
        loop.accelerator.wait_for_everyone()
        if loop.rank.is_first:
            shutil.copy(folder.parent / "metrics.jsonl", whole / SO_FAR)
            write_json(whole / COST, asdict(cost))
            write_json(whole / MADE_BY, {"strategy": loop.rank.strategy.value, "processes": loop.rank.world})
            whole.replace(folder / whole.name)
            for older in sorted(folder.glob("checkpoint-*"), key=step_of)[:-keep]:
                shutil.rmtree(older, ignore_errors=True)
        loop.accelerator.wait_for_everyone()  # no process ends before it is in its place


def _write_state(loop: Loop, folder: Path) -> None:
    if loop.rank.strategy in _ZERO:
        loop.model.save_checkpoint(str(folder), exclude_frozen_parameters=True)
    elif loop.rank.strategy is Strategy.fsdp:
        sharded.save(_shards(loop), checkpoint_id=folder / "sharded")
    elif loop.rank.is_first:
        save_file(_trained_weights(loop), folder / "model.safetensors")
        torch.save(loop.optimizer.state_dict(), folder / "optimizer.pt")
    save_accelerator_state(str(folder), [], [], [loop.schedule], [], loop.rank.number, loop.done)


def load_checkpoint(loop: Loop, folder: Path) -> None:
    """Put a loop at step 0 where the one that wrote a checkpoint was."""
    if loop.rank.strategy in _ZERO:
        loaded, _ = loop.model.load_checkpoint(str(folder), load_module_strict=False)  # frozen weights are not there
        assert loaded is not None, f"DeepSpeed finds nothing in {folder}"
    elif loop.rank.strategy is Strategy.fsdp:
        shards = _shards(loop)
        sharded.load(shards, checkpoint_id=folder / "sharded")
        states.set_model_state_dict(loop.model, shards["model"], options=_TRAINED)
        states.set_optimizer_state_dict(loop.model, loop.optimizer, shards["optimizer"], options=_TRAINED)
    else:
        saved = load_file(folder / "model.safetensors")
        for name, weight in _trained_weights(loop).items():
            weight.copy_(saved[name])
        on_gpu = loop.rank.device.type == "cuda"  # where it is copied; processes of a node then read it once
        loop.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu", mmap=on_gpu))
    load_accelerator_state(str(folder), [], [], [loop.schedule], [], loop.rank.number)
    loop.done = step_of(folder)


def _trained_weights(loop: Loop) -> dict[str, torch.Tensor]:
    model: nn.Module = loop.accelerator.unwrap_model(loop.model)
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def _shards(loop: Loop) -> dict[str, Any]:
    """This process's part of weights and optimizer."""
    return {
        "model": states.get_model_state_dict(loop.model, options=_TRAINED),
        "optimizer": states.get_optimizer_state_dict(loop.model, loop.optimizer, options=_TRAINED),
    }


def save_policy(loop: Loop, folder: Path, checkpoints: Path) -> None:
    """Write the policy as a Hugging Face model that one process can load, in float32. Every process calls it.

    DeepSpeed's float32 weights are those of the last step's checkpoint, which is among `checkpoints`.
    """
    in_deepspeed = loop.rank.strategy in _ZERO
    weights = {} if in_deepspeed else loop.accelerator.get_state_dict(loop.model)
    if loop.rank.is_first:
        with saying_what_to_do(folder.parent):
            if in_deepspeed:
                weights = strategy.float32_weights(checkpoints / f"checkpoint-{loop.done}")
            policy = loop.accelerator.unwrap_model(loop.model)
            tied = getattr(policy, "all_tied_weights_keys", {})  # gathered apart, they no longer look like one
            policy.save_pretrained(folder, state_dict={k: v for k, v in weights.items() if k not in tied})


@contextlib.contextmanager
def saying_what_to_do(folder: Path) -> Iterator[None]:
    """Turn a disk that is full or refuses into one line; other errors pass."""
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
