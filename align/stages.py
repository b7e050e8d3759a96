"""The stages that self-play and the commands of their own share: who answers, sampling, scoring, and their processes.

A stage reads and writes files of a folder, and whoever works on the same folder shares the work: one process or many,
of one command or several. Left out: the iterations (selfplay.py), and what a stage does (onpolicy/).
"""

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from align import config, launch, model, run, slurm
from align.cache import build_once
from align.config import Backend, Launcher, ModelConfig, RunConfig, SamplingConfig, Strategy, UserError
from align.launch import Fleet, Place
from align.onpolicy.annotate import annotate
from align.onpolicy.prompts import PromptRow, Prompts, load_prompts
from align.onpolicy.sample import ResponseRow, check_sampling, open_sampler, sample_prompts
from align.onpolicy.scorers import registry


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The start model, or what an iteration made of the one before."""

    iteration: int  # that made it; 0: the start model
    cfg: ModelConfig
    start: model.Start

    def load(self, where: Place) -> PreTrainedModel:
        """As it samples: a new adapter, which changes nothing yet, is left out."""
        dtype = torch.bfloat16 if where.bf16 else torch.float32
        policy: Any = model.load_policy(replace(self.cfg, lora={}), self.start, seed=0, dtype=dtype)
        loaded: PreTrainedModel = policy.to(where.device)
        return loaded

    @property
    def name(self) -> str:
        """As people read it."""
        return f"iteration {self.iteration}" if self.iteration else "start"

    @property
    def fingerprint(self) -> str:
        """Changes when its weights do."""
        return model.policy_fingerprint(replace(self.cfg, lora={}), self.start, seed=0)


def trained_from(before: Policy, folder: Path, cache: Path) -> Policy:
    """What a training that began with `before` has left in `folder`; an adapter is merged, into `merged` beside it."""

    def merge(into: Path) -> None:
        adapted: Any = model.load_trained(before.cfg, before.start, folder)
        adapted.merge_and_unload().save_pretrained(into)
        before.start.tokenizer.save_pretrained(into)

    plain = build_once(folder.with_name("merged"), merge, "give another run_dir=") if before.cfg.lora else folder
    cfg = replace(before.cfg, path=str(plain), revision=None, tokenizer=None, chat_template=None, init={}, fit=None)
    return Policy(iteration=before.iteration + 1, cfg=cfg, start=model.prepare_start(cfg, cache))


def prepare_answers(cfg: RunConfig) -> tuple[model.Start, Prompts, Fleet]:
    """What sampling alone needs: who answers, what is asked, and the processes."""
    fleet = answering_fleet(cfg)
    cache = Path(cfg.cache_dir).expanduser()
    start = run.start_model(cfg, cache)
    return start, load_prompts(cfg, start, cache), fleet


def answering_fleet(cfg: RunConfig) -> Fleet:
    """The processes, checked for how answers are sampled."""
    check_sampling(cfg.sampling)
    fleet = launch.fleet(cfg.cluster, cfg.plan)
    if cfg.sampling.backend is Backend.vllm and fleet.world > 1:
        raise UserError(
            f"sampling.backend=vllm is one engine in one process, and there are {fleet.world}: start a vLLM server for each "
            "GPU and give sampling.backend=openai 'sampling.urls=[...]', or sampling.backend=hf"
        )
    return fleet


def folder_of(cfg: RunConfig) -> Path:
    """Where a stage alone reads and writes. It has no plan, and runs where it is typed."""
    slurm.take_place()
    config.check(cfg)
    if cfg.plan:
        raise UserError("a stage alone has no plan: leave out plan=true, or plan the whole with python -m align")
    if cfg.cluster.launcher is Launcher.slurm:
        raise UserError(
            "a stage alone runs where it is typed: put the command into a job of yours, with cluster=auto (sbatch, srun)"
        )
    if cfg.run_dir is None:
        raise UserError("a stage alone needs a folder: run_dir=<folder>")
    return Path(cfg.run_dir).expanduser()


def logs_of(folder: Path) -> Path:
    """Where the processes of a stage alone write: of each command its own, as several may share a folder."""
    return folder / "logs" / f"{socket.gethostname()}-{os.getpid()}"


def in_each_process(fleet: Fleet, logs: Path, function: Callable[..., None], *args: Any) -> None:
    """Call `function(*args)` here, in processes of ours, or as one of several that were started from outside."""
    alone = fleet.world == 1 and fleet.strategy in (Strategy.single, Strategy.auto)  # auto: nothing is trained
    if launch.inside() or alone:
        function(*args)
    else:
        launch.start(fleet, logs, function, *args)


def prompts_of(cfg: RunConfig, prompts: Prompts, iteration: int) -> list[PromptRow]:
    """What an iteration asks: its share of the training prompts, or all of them, and the held-out ones."""
    own = prompts.share(iteration, cfg.iterations) if cfg.source.split_prompts else prompts.train
    return [*own, *prompts.held_out]


def sample_from(
    policy: Policy,
    prompts: Sequence[PromptRow],
    cfg: RunConfig,
    settings: SamplingConfig,
    folder: Path,
    iteration: int,
    what: str,
    where: Place,
) -> None:
    """Answers of a policy, into a folder; what is there is kept, and other processes do their share."""
    opening = open_sampler(
        settings,
        policy.start.tokenizer,
        lambda: policy.load(where),
        policy.start.path,
        revision=policy.cfg.revision,
        bf16=where.bf16,
        served="/".join(Path(policy.start.path).parts[-2:]) if policy.iteration else None,
    )
    with where.autocast():
        sample_prompts(
            prompts,
            opening,
            settings,
            folder,
            tokenizer=policy.start.tokenizer,
            policy=policy.fingerprint,
            seed=cfg.seed,
            iteration=iteration,
            what=what,
            silent=where.rank > 0,
        )
    launch.free()


def score_responses(rows: Sequence[ResponseRow], cfg: RunConfig, folder: Path, where: Place) -> None:
    """Scores of responses, into a folder; what is there is kept, and other processes do their share."""
    counts = annotate(rows, registry.build(registry.scorer_of(cfg), where), folder, silent=where.rank > 0)
    if counts and where.rank == 0:
        print(", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items()), flush=True)
    launch.free()


def describe(counts: dict[str, dict[str, Any]]) -> str:
    """What became of the prompts of each split, in a line."""
    lines = []
    for split, of_split in counts.items():
        dropped = ", ".join(f"{count} {reason}" for reason, count in of_split["dropped"].items())
        lines.append(
            f"{split} pairs {of_split['pairs']} of {of_split['prompts']} prompts ({dropped or 'none dropped'})"
        )
    return "; ".join(lines)
