"""Optimizers and schedules are those that transformers.Trainer makes of the same settings."""

from dataclasses import asdict

import pytest
import torch
from conftest import make_tiny
from transformers import Trainer, TrainingArguments

from align.config import OptimizerConfig
from align.train.optim import build_optimizer, build_schedule

CFG = {"learning_rate": 1e-3, "weight_decay": 0.1, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "warmup_steps": 0.25}


def trainer(tmp_path, model, cfg: OptimizerConfig) -> Trainer:
    return Trainer(
        model,
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, **asdict(cfg)),
    )


def test_the_defaults_are_those_of_training_arguments(tmp_path):
    theirs = TrainingArguments(output_dir=str(tmp_path))
    ours = asdict(OptimizerConfig())
    assert ours == {name: ours[name] if name == "lr_scheduler_kwargs" else getattr(theirs, name) for name in ours}


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])  # RMSNorm, norms of another name, LayerNorm and biases
@pytest.mark.parametrize(
    "optim, options",
    [
        ("adamw_torch", None),
        ("adamw_torch_fused", None),
        ("sgd", "momentum=0.9,nesterov=true"),
        ("adagrad", "lr_decay=0.1"),
        ("rmsprop", "alpha=0.9,centered=true"),
        ("adafactor", None),
    ],
)
def test_an_optimizer_is_the_trainers(tmp_path, kind, optim, options):
    model, cfg = make_tiny(kind, vocab_size=64), OptimizerConfig(**CFG, optim=optim, optim_args=options)
    next(model.parameters()).requires_grad = False
    ours, theirs = build_optimizer(cfg, model, steps=8), trainer(tmp_path, model, cfg).create_optimizer()
    assert type(ours) is type(theirs)
    for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        pairs = zip(group.pop("params"), other.pop("params"), strict=True)
        assert all(weight is theirs for weight, theirs in pairs)
        assert group == other
    assert [group["weight_decay"] for group in ours.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize(
    "kind, arguments",
    [
        ("linear", {}),
        ("cosine", {"num_cycles": 1.0}),
        ("constant", {}),
        ("constant_with_warmup", {}),
        ("polynomial", {"power": 2.0}),
        ("warmup_stable_decay", {"num_decay_steps": 3}),
    ],
)
@pytest.mark.parametrize("warmup", [0, 0.3, 4])  # 0.3 of 9 steps are 3
def test_a_schedule_is_the_trainers(tmp_path, kind, arguments, warmup):
    model = torch.nn.Linear(1, 1)
    cfg = OptimizerConfig(lr_scheduler_type=kind, lr_scheduler_kwargs=arguments, warmup_steps=warmup, optim="sgd")
    optimizer = build_optimizer(cfg, model, steps=9)
    ours, theirs = build_schedule(cfg, optimizer, steps=9), trainer(tmp_path, model, cfg)
    theirs.create_optimizer_and_scheduler(num_training_steps=9)
    for _ in range(9):
        assert ours.get_last_lr() == theirs.lr_scheduler.get_last_lr()
        optimizer.step(), theirs.optimizer.step()
        ours.step(), theirs.lr_scheduler.step()
