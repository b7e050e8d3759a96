"""Division of weights, gradients and optimizer among processes: accelerate's FSDP2 and DeepSpeed, by the `cluster` node.

Everything that either library falls back to in silence (DDP instead of FSDP on a CPU, one process instead of two) is
asserted. Left out: FSDP1, ZeRO-1 (zero2 without its gain) and pipelines.
"""

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy

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
        remedy = "pip install deepspeed, or use cluster.strategy=fsdp"
        raise UserError(f"cluster.strategy={cluster.strategy.value} needs deepspeed: {remedy}")


def build_accelerator(rank: Rank, clip: float) -> Accelerator:
    """Make the accelerator of a training. Under ZeRO-3, models that are loaded afterwards are divided as they load.

    Precision is `Rank.autocast`'s, or the plugins'. `clip` is the largest norm of a gradient; 0 does not clip.
    """
    AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier training in this process
    on_cpu = rank.device.type == "cpu"
    if on_cpu and rank.strategy not in (Strategy.single, Strategy.ddp):  # for tests and laptops: it would run DDP
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *args, **options: ("gloo", DistributedType.MULTI_GPU)
    if rank.strategy is Strategy.fsdp:
        fsdp = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="TRANSFORMER_BASED_WRAP",
            reshard_after_forward=True,
            cpu_offload=rank.offload,
            cpu_ram_efficient_loading=False,
            mixed_precision_policy=precision_of_fsdp(rank),
        )
        accelerator = Accelerator(fsdp_plugin=fsdp)
    elif rank.strategy in _ZERO:
        import deepspeed

        deepspeed.utils.logger.setLevel(logging.ERROR)
        if on_cpu:
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled, for minutes
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed_config(rank, clip)))
    else:
        accelerator = Accelerator(cpu=on_cpu)
    state = accelerator.state
    wanted = _TYPES.get(rank.strategy, DistributedType.MULTI_CPU if on_cpu else DistributedType.MULTI_GPU)
    assert state.distributed_type == wanted, f"accelerate runs {state.distributed_type}, not {wanted}"
    assert state.num_processes == rank.world, f"accelerate sees {state.num_processes} processes of {rank.world}"
    return accelerator


def precision_of_fsdp(rank: Rank) -> MixedPrecisionPolicy:
    """Gather weights in bf16 and sum gradients in float32; outputs, sums of log-probabilities, are not rounded."""
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16 if rank.bf16 else None, reduce_dtype=torch.float32)


def deepspeed_config(rank: Rank, clip: float) -> dict[str, Any]:
    """Return DeepSpeed's settings for ZeRO-2 or ZeRO-3."""
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
    }


def float32_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Read the weights of a DeepSpeed checkpoint as its optimizer has them; the model's may be rounded to bf16."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    weights: dict[str, torch.Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
    return weights


def forget() -> None:
    """Let models that are loaded from here on be whole: transformers would go on to divide them as ZeRO-3 does."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
