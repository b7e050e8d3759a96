"""Everything that can be wrong with a run, found before a model is loaded or a process started."""

import math
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from align import config, metrics
from align.choices import Launcher, Precision, Source, Strategy
from align.config import ClusterConfig, RunConfig, ScorerConfig
from align.data.pairs import Pairs, check_bos, prepare_pairs
from align.data.prompts import Prompts, load_prompts
from align.evaluation import judging
from align.files import fingerprint
from align.launch import slurm, strategy
from align.launch.cluster import cluster_of
from align.launch.rank import Cluster, Rank, inside
from align.model.load import NotHereError, Start, start_model
from align.onpolicy.sample import answering_cluster
from align.onpolicy.scorers import registry
from align.onpolicy.scorers.base import Identity
from align.runs import plan
from align.runs.folder import identify, recognise
from align.say import UserError, closest, resolve, say
from align.tracking import trackers
from align.train import memory
from align.train.job import Job, build_objective, check_batch
from align.train.memory import longest_pair, settle_strategy, too_large
from align.train.optim import check_optimizer, high_learning_rate
from objectives import Objective


def prepare_training(cfg: RunConfig) -> Job:
    """Check everything, and make what the processes need: data, start model, plan, the run folder's name."""
    objective = check_settings(cfg)
    judge = judging.judge_of(cfg)
    scorer = who_scores(cfg, judge) if judge is not None else None
    cluster = cluster_of(cfg.cluster, cfg.plan)
    cache = Path(cfg.cache_dir).expanduser()
    start = start_model(cfg, cache)
    pairs = prepare_pairs(cfg.dataset, cfg.train, cfg.model.system_message, start, cache)
    check_data(cfg, objective, start, pairs, cluster)
    longest = longest_pair(cfg, pairs)
    cluster = settle_strategy(cfg, start, cluster, longest)
    check_sentinel(cfg, cluster)
    if not cfg.plan:
        strategy.check(cluster)
        if cfg.cluster.launcher is Launcher.slurm and not inside():
            slurm.check()
    if warning := high_learning_rate(cfg.optimizer, memory.shape(cfg.model, start).parameters):
        warnings.warn(warning, UserWarning, stacklevel=2)
    if warning := too_large(cfg, start, cluster, longest):
        warnings.warn(warning, UserWarning, stacklevel=2)
    identity = identify(config.plain(cfg), objective, start, pairs.fingerprint, cluster)
    if scorer is not None and cfg.scorer.name is not None:  # else dataset.judge is there
        identity |= scored_by(cfg, scorer)
    names = f"{cfg.model.name}-{cfg.dataset.name}-{cfg.objective['name']}"
    folder = Path(cfg.run_dir or f"runs/{names}-{fingerprint(identity)[:6]}").expanduser()
    text = plan.describe(cfg, start, pairs, objective, cluster)
    job = Job(
        cfg=cfg,
        start=start,
        pairs=pairs,
        cluster=cluster,
        identity=identity,
        dir=folder,
        policy=folder / "model",
        plan=text,
    )
    recognise(job)
    return job


def check_metric(cfg: RunConfig) -> None:
    """Refuse what a search could not maximise, as far as that can be known before the first training ends."""
    metric = cfg.optimized_metric
    if metric is None:
        return
    wanted = metrics.row(metric)
    if wanted and wanted.of == "answers" and judging.judge_of(cfg) is None:
        raise UserError(
            f"optimized_metric={metric} needs a judge, and there is none: give scorer=..., or "
            "optimized_metric=accuracy/mean_logp"
        )
    kinds = ("pairs", "answers", *(["iteration"] if cfg.source.name is Source.selfplay else []))
    known = [one.name for kind in kinds for one in metrics.METRICS if one.of == kind and not one.name.endswith("*")]
    near = closest(metric, known)
    if metric not in known and (near or wanted is None or wanted.of not in kinds):
        raise UserError(f"optimized_metric={metric} is no metric of results.json{near}; there are {', '.join(known)}")


def who_scores(cfg: RunConfig, scorer: ScorerConfig) -> Identity:
    """The scorer's identity, before anything is sampled or trained; a plan does without its files."""
    try:
        return registry.build(scorer, Rank(device=torch.device("cpu"), bf16=False, number=0, world=1)).identity
    except NotHereError as error:
        if not cfg.plan:
            raise
        say(f"align: {error}")
        return registry.stand_in(scorer)


def scored_by(cfg: RunConfig, scorer: Identity) -> dict[str, Any]:
    """What of the scorer decides a result: its settings but those of how fast, and what it is made of."""
    node = config.plain(cfg)["scorer"]
    judge = {key: node["judge"][key] for key in ("served_model", "request")}
    settings = {key: value for key, value in node.items() if key not in ("tokens_per_batch", "judge")}
    return {"scorer": settings, "judge": judge, "scored_by": fingerprint(asdict(scorer))}


def as_resolved(asked: ClusterConfig, cluster: Cluster) -> ClusterConfig:
    """What compute nodes must not decide anew: the precision is part of what a run is."""
    return replace(asked, precision=Precision.bf16 if cluster.bf16 else Precision.fp32)


def check_settings(cfg: RunConfig) -> Objective:
    """Everything that can be wrong with the configuration alone; builds the objective."""
    config.check(cfg)
    check_optimizer(cfg.optimizer)
    trackers.check(cfg)
    if cfg.dataset.judge is not None:
        resolve(cfg.dataset.judge, "dataset.judge")
    check_metric(cfg)
    return build_objective(cfg)


def check_data(cfg: RunConfig, objective: Objective, start: Start, pairs: Pairs, cluster: Cluster) -> None:
    """What the objective and the batch ask of the data."""
    check_bos(pairs, start.tokenizer)
    check_batch(cfg, len(pairs.train), cluster.world)
    for name, split in (("training", pairs.train), ("held-out", pairs.held_out)):
        sides = zip(split["chosen_win_prob"], split["rejected_win_prob"], strict=True)
        without = sum(math.isnan(chosen) or math.isnan(rejected) for chosen, rejected in sides)
        if "win_prob" in objective.needs and without:
            raise UserError(
                f"{cfg.objective['name']} needs win_prob, which {without} of {len(split)} {name} pairs of dataset "
                f"{cfg.dataset.name} lack: give rows chosen_win_prob and rejected_win_prob (dataset.columns renames), or "
                "for sppo take the labels as certain with objective.target=hard"
            )


def check_sentinel(cfg: RunConfig, cluster: Cluster) -> None:
    """Raise where nobody could sample the policy in training."""
    if cfg.sentinel.sample_every_steps is not None and cluster.strategy in (Strategy.fsdp, Strategy.zero3):
        raise UserError(
            f"sentinel.sample_every_steps={cfg.sentinel.sample_every_steps} samples with one process, and cluster.strategy="
            f"{cluster.strategy.value} divides the weights among all: set it to null, or use ddp or zero2"
        )


def prepare_answers(cfg: RunConfig) -> tuple[Start, Prompts, Cluster]:
    """What sampling alone needs: who answers, what is asked, and the processes."""
    cluster = answering_cluster(cfg)
    cache = Path(cfg.cache_dir).expanduser()
    start = start_model(cfg, cache)
    return start, load_prompts(cfg, start, cache), cluster
