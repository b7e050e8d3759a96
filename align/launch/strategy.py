"""How weights, gradients and optimizer are shared out: accelerate's FSDP2 and DeepSpeed, from the `cluster` node alone.

Both are told by TrainingArguments, so there is no second file of settings. Everything that either library falls back
to in silence (DDP instead of FSDP on a CPU, one process instead of two) is asserted once the Trainer stands.
Left out: FSDP1, ZeRO-1 (zero2 without its gain) and pipelines.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate.utils import DistributedType
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from align.choices import Strategy
from align.launch.rank import Cluster, Rank
from align.say import UserError

_TYPES = {
    Strategy.single: DistributedType.NO,
    Strategy.fsdp: DistributedType.FSDP,
    Strategy.zero2: DistributedType.DEEPSPEED,
    Strategy.zero3: DistributedType.DEEPSPEED,
}


_ZERO = {Strategy.zero2: 2, Strategy.zero3: 3}


def check(cluster: Cluster) -> None:
    """Raise `UserError` for a strategy that cannot work here."""
    if cluster.strategy in _ZERO and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"cluster.strategy={cluster.strategy.value} needs deepspeed: pip install deepspeed, or use cluster.strategy=fsdp"
        )


def prepare(rank: Rank) -> None:
    """What the libraries must find before TrainingArguments are made."""
    if rank.device.type != "cpu" or rank.strategy in (Strategy.single, Strategy.ddp):
        return
    # accelerate takes sharding for a matter of GPUs, and would run DDP here: tests and laptops need the real one.
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    accelerate.PartialState._prepare_backend = lambda *args, **options: ("gloo", DistributedType.MULTI_GPU)
    if rank.strategy in _ZERO:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled, for minutes


def precision_of_fsdp(rank: Rank) -> MixedPrecisionPolicy:
    """Weights are gathered in bf16 and gradients summed over ranks in float32.

    Outputs stay as they are: accelerate's own policy would round every sum of log-probabilities to bf16.
    """
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16 if rank.bf16 else None, reduce_dtype=torch.float32)


def arguments(rank: Rank, clip: float) -> dict[str, Any]:
    """Fields of TrainingArguments. `clip` is the largest gradient norm."""
    if rank.strategy is Strategy.fsdp:
        return {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "reshard_after_forward": True,
                "state_dict_type": "SHARDED_STATE_DICT",
                "cpu_offload": rank.offload,
            },
        }
    if rank.strategy in _ZERO:
        return {"deepspeed": _deepspeed(rank, clip)}
    return {"use_cpu": rank.device.type == "cpu", "ddp_find_unused_parameters": False}


def _deepspeed(rank: Rank, clip: float) -> dict[str, Any]:
    stage = _ZERO[rank.strategy]
    on_gpu = rank.device.type == "cuda"
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": on_gpu}
    if not on_gpu:
        zero["reduce_bucket_size"] = 10**6  # the default of 5e8 takes gigabytes, whatever the model
    if rank.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": rank.bf16},
        "data_types": {"grad_accum_dtype": "fp32"},  # else micro-batches are summed up in bf16,
        "communication_data_type": "fp32",  # and so are processes
        "gradient_clipping": clip,
        "train_micro_batch_size_per_gpu": 1,  # what one batch holds is the plan's of a step, and so is accumulation
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,  # SPPO's RMSprop; the steps are compared with one process's in tests
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def float32_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights of a DeepSpeed checkpoint as its optimizer has them; what the model holds may be rounded to bf16."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    weights: dict[str, torch.Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
    return weights


def forget() -> None:
    """Models that are loaded from here on are whole: transformers would go on to divide them as ZeRO-3 does."""
    unset_hf_deepspeed_config()


def check_built(trainer: Trainer, rank: Rank) -> None:
    """Assert that the Trainer runs what was asked for: both libraries fall back in silence."""
    state = trainer.accelerator.state
    ddp = DistributedType.MULTI_CPU if rank.device.type == "cpu" else DistributedType.MULTI_GPU
    wanted = _TYPES.get(rank.strategy, ddp)
    assert state.distributed_type == wanted, f"accelerate runs {state.distributed_type}, not {wanted}"
    assert state.num_processes == rank.world, f"accelerate sees {state.num_processes} processes of {rank.world}"
