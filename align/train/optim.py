"""The optimizer and its schedule, by the names that transformers.TrainingArguments gives them, as the Trainer makes them.

Left out: optimizers that change weights inside the backward pass (LOMO, layer-wise ones), as a step here has several
micro-batches and keeps nothing where a loss is not finite; schedules that follow an evaluation.
"""

import math
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer, get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from align.config import OptimizerConfig
from align.say import UserError

#: Fields of TrainingArguments that people may type under `optimizer.` -> the knob that decides them.
OWNED = {
    "seed": "seed",
    "output_dir": "run_dir",
    "resume_from_checkpoint": "run_dir",
    "per_device_train_batch_size": "train.pairs_per_step and engine.tokens_per_micro_batch",
    "gradient_accumulation_steps": "train.pairs_per_step and engine.tokens_per_micro_batch",
    "gradient_checkpointing": "engine.gradient_checkpointing",
    "activation_checkpointing": "engine.gradient_checkpointing",
    "bf16": "cluster.precision",
    "fsdp": "cluster.strategy",
    "deepspeed": "cluster.strategy",
    "logging_steps": "train.log_every_steps",
    "eval_steps": "train.eval_every_steps",
    "save_steps": "train.save_every_steps",
    "save_total_limit": "train.keep_checkpoints",
    "report_to": "tracker",
    "warmup_ratio": "optimizer.warmup_steps",
    "label_smoothing_factor": "objective.label_smoothing",
}
_OPTIMIZERS = [name.value for name in OptimizerNames if "lomo" not in name.value and "_layerwise" not in name.value]
_SCHEDULES = [kind.value for kind in SchedulerType if kind.value not in ("reduce_lr_on_plateau", "greedy")]
#: Options that `optim_args` may set, for the optimizers of which the Trainer passes over any other.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "adamw_torch": (),
    "adamw_torch_fused": (),
    "sgd": ("momentum", "dampening", "nesterov"),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
}
_BIG = 1e9  # weights
_HIGH_LEARNING_RATE = 1e-5


def check_optimizer(cfg: OptimizerConfig) -> None:
    """Raise `UserError` for a key that is another knob's, or a value that no optimizer or schedule takes."""
    for name in vars(cfg).keys() & OWNED.keys():
        raise UserError(f"optimizer.{name} is decided by {OWNED[name]}: set that")
    for name in ("learning_rate", "num_train_epochs"):
        if not 0 < getattr(cfg, name) < float("inf"):
            raise UserError(f"optimizer.{name} must be above 0, not {getattr(cfg, name)}")
    for name in ("max_grad_norm", "weight_decay", "warmup_steps"):
        if not 0 <= getattr(cfg, name) < float("inf"):
            raise UserError(f"optimizer.{name} must be 0 or more, not {getattr(cfg, name)}")
    for name, allowed in {"optim": _OPTIMIZERS, "lr_scheduler_type": _SCHEDULES}.items():
        if getattr(cfg, name) not in allowed:
            raise UserError(f"optimizer.{name} must be one of {', '.join(allowed)}, not {getattr(cfg, name)!r}")
    if cfg.optim_target_modules is None:  # on one weight, so that an absent package or a wrong beta shows at once
        build_schedule(cfg, build_optimizer(cfg, nn.Linear(1, 1), steps=100), steps=100)


def high_learning_rate(cfg: OptimizerConfig, parameters: int) -> str | None:
    """Return a warning, if this learning rate is one that large models do not survive."""
    if parameters < _BIG or cfg.learning_rate <= _HIGH_LEARNING_RATE:
        return None
    return (
        f"optimizer.learning_rate={cfg.learning_rate:g} is far above the published 3e-7 to 1e-6 for a model of "
        f"{parameters / 1e9:.1f}B weights: from 1e-5 on such models collapse to repetition (an adapter bears more)"
    )


def build_optimizer(cfg: OptimizerConfig, model: nn.Module, steps: int) -> torch.optim.Optimizer:
    """Make the optimizer of a model's trainable weights, or raise `UserError`. Norms and biases are not decayed."""
    known = _OPTIONS.get(cfg.optim)
    typed = [pair.partition("=")[0].strip() for pair in (cfg.optim_args or "").split(",") if pair]
    if known is not None and not {*typed} <= {*known}:
        takes = ", ".join(known) or "none"
        raise UserError(f"optimizer.optim={cfg.optim}: optimizer.optim_args={cfg.optim_args}, but it takes {takes}")
    arguments = {field.name: getattr(cfg, field.name) for field in fields(cfg)}
    arguments |= {"optim": OptimizerNames(cfg.optim), "warmup_steps": warmup_steps(cfg, steps)}
    trainer: Any = Trainer.__new__(Trainer)  # its own way to an optimizer, without the rest of it
    vars(trainer).update(model=model, args=SimpleNamespace(**arguments), optimizer=None, optimizer_cls_and_kwargs=None)
    try:
        made: torch.optim.Optimizer = trainer.create_optimizer()
    except (ImportError, TypeError, ValueError) as error:
        raise UserError(f"optimizer.optim={cfg.optim}: {' '.join(str(error).split())}") from error
    return made


def build_schedule(cfg: OptimizerConfig, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Make the schedule of a training of so many steps, or raise `UserError` for arguments that it does not take."""
    try:
        made: LRScheduler = get_scheduler(
            cfg.lr_scheduler_type, optimizer, warmup_steps(cfg, steps), steps, dict(cfg.lr_scheduler_kwargs)
        )
    except (TypeError, ValueError) as error:
        raise UserError(
            f"optimizer.lr_scheduler_type={cfg.lr_scheduler_type}: {' '.join(str(error).split())}"
        ) from error
    return made


def warmup_steps(cfg: OptimizerConfig, steps: int) -> int:
    """Return the steps of the warm-up: below 1, `optimizer.warmup_steps` is a share of all."""
    return int(cfg.warmup_steps) if cfg.warmup_steps >= 1 else math.ceil(steps * cfg.warmup_steps)
