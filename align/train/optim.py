"""From the typed configuration to transformers.TrainingArguments: what is passed through, and what is ours.

`optimizer.*` are fields of TrainingArguments under their own names. The fields that align owns have one knob each,
and setting them there is refused with that knob's name.
"""

import typing
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from align.choices import Strategy
from align.config import RunConfig
from align.launch import strategy
from align.launch.rank import Rank
from align.say import UserError

#: Fields of TrainingArguments that align decides -> where they are decided.
OWNED = {
    "output_dir": "run_dir",
    "seed": "seed",
    "data_seed": "seed",
    "per_device_train_batch_size": "train.pairs_per_step and engine.tokens_per_micro_batch",
    "gradient_accumulation_steps": "train.pairs_per_step and engine.tokens_per_micro_batch",
    "per_device_eval_batch_size": "engine.tokens_per_micro_batch",
    "auto_find_batch_size": "engine.tokens_per_micro_batch",
    "bf16": "cluster.precision",
    "fp16": "cluster.precision",
    "bf16_full_eval": "cluster.precision",
    "fp16_full_eval": "cluster.precision",
    "use_cpu": "cluster",
    "fsdp": "cluster.strategy",
    "fsdp_config": "cluster.strategy",
    "deepspeed": "cluster.strategy",
    "activation_checkpointing": "engine.gradient_checkpointing",
    "gradient_checkpointing": "engine.gradient_checkpointing",
    "logging_steps": "train.log_every_steps",
    "logging_strategy": "train.log_every_steps",
    "eval_steps": "train.eval_every_steps",
    "eval_strategy": "train.eval_every_steps",
    "save_steps": "train.save_every_steps",
    "save_strategy": "train.save_every_steps",
    "save_total_limit": "train.keep_checkpoints",
    "report_to": "tracker",
    "run_name": "run_dir",
    "label_smoothing_factor": "objective.label_smoothing",
    "resume_from_checkpoint": "run_dir",
}


_BIG = 1e9  # weights


_HIGH_LEARNING_RATE = 1e-5


#: Fields of TrainingArguments that `optimizer.*` passes on: what the optimizer and its schedule are.
PASSED = (
    "learning_rate", "optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon",
    "weight_decay", "max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "num_train_epochs",
    "max_steps",
)  # fmt: skip


def check_optimizer(optimizer: dict[str, Any]) -> None:
    """Raise `UserError` for a key that is ours or nobody's, or a value of the wrong type or range."""
    hints = typing.get_type_hints(TrainingArguments)
    for name, value in optimizer.items():
        if name in OWNED:
            raise UserError(f"optimizer.{name} is decided by {OWNED[name]}: set that")
        if name not in PASSED:
            raise UserError(f"unknown key optimizer.{name}; it takes {', '.join(PASSED)}")
        kinds = set(typing.get_args(hints[name]) or (hints[name],))
        numbers = tuple(kinds & {int, float}) + ((int,) if float in kinds else ())
        if numbers and not kinds & {str, dict} and not (isinstance(value, numbers) and not isinstance(value, bool)):
            what = "a number" if float in kinds else "a whole number"
            raise UserError(f"optimizer.{name} must be {what}, not {value!r}")
    for name, choices in {"optim": OptimizerNames, "lr_scheduler_type": SchedulerType}.items():
        allowed = [str(choice.value) for choice in choices]
        if name in optimizer and optimizer[name] not in allowed:
            raise UserError(f"optimizer.{name} must be one of {', '.join(allowed)}, not {optimizer[name]!r}")
    for name in ("learning_rate", "num_train_epochs"):
        if name in optimizer and not 0 < optimizer[name] < float("inf"):
            raise UserError(f"optimizer.{name} must be above 0, not {optimizer[name]}")
    for name in ("max_grad_norm", "weight_decay", "warmup_steps"):
        if name in optimizer and not 0 <= optimizer[name] < float("inf"):
            raise UserError(f"optimizer.{name} must be 0 or more, not {optimizer[name]}")


def high_learning_rate(optimizer: dict[str, Any], parameters: int) -> str | None:
    """A warning, if this learning rate is one that large models do not survive."""
    rate = optimizer.get("learning_rate", 5e-5)
    if parameters < _BIG or rate <= _HIGH_LEARNING_RATE:
        return None
    return (
        f"optimizer.learning_rate={rate:g} is far above the published 3e-7 to 1e-6 for a model of "
        f"{parameters / 1e9:.1f}B weights: from 1e-5 on such models collapse to repetition (an adapter bears more)"
    )


def training_arguments(cfg: RunConfig, checkpoints: Path, rank: Rank) -> TrainingArguments:
    """The Trainer's arguments. One batch of its loader is one rank's share of a step, so accumulation is always 1."""
    train = cfg.train
    every = train.eval_every_steps
    strategy.prepare(rank)
    try:
        arguments = TrainingArguments(
            **cfg.optimizer,
            output_dir=str(checkpoints),
            seed=cfg.seed,
            data_seed=cfg.seed,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
            bf16=rank.bf16,
            **strategy.arguments(rank, float(cfg.optimizer.get("max_grad_norm", 1.0))),
            activation_checkpointing=cfg.engine.gradient_checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False} if cfg.engine.gradient_checkpointing else None,
            logging_steps=train.log_every_steps,
            eval_strategy="no" if every is None else "steps",
            eval_steps=every,
            save_steps=train.save_every_steps,
            save_total_limit=train.keep_checkpoints,
            report_to="none",
            disable_tqdm=True,
            logging_nan_inf_filter=False,  # the default hides NaN, and syncs every micro-batch
            remove_unused_columns=False,
            ddp_backend="gloo" if rank.device.type == "cpu" and rank.world > 1 else None,
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer: {error}") from error
    try:  # on one weight, so that an absent package or a wrong beta shows before anything runs
        made, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        made([torch.nn.Parameter(torch.zeros(1))], **options)
    except (ImportError, TypeError, ValueError) as error:
        raise UserError(f"optimizer.optim={arguments.optim.value}: {' '.join(str(error).split())}") from error
    if rank.strategy is Strategy.fsdp:
        arguments.fsdp_plugin_args["mixed_precision_policy"] = strategy.precision_of_fsdp(rank)
    _ = arguments.device  # counts the GPUs, which the next line overrules: one process drives one
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
