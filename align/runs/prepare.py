"""Everything that can be wrong with a run, found before a model is loaded or a process started."""

import math
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from align import config, metrics
from align.choices import Launcher, Precision, Source, Strategy
from align.config import RunConfig, ScorerConfig
from align.data.pairs import Pairs, check_bos, prepare_pairs
from align.data.prompts import Prompts, load_prompts
from align.evaluation import judging
from align.files import fingerprint
from align.launch import slurm, strategy
from align.launch.rank import Cluster, Rank, cluster_of, inside
from align.model.load import NotHereError, Start, start_model
from align.onpolicy.sample import answering_cluster
from align.onpolicy.scorers import registry
from align.onpolicy.scorers.base import Identity
from align.runs import plan
from align.runs.folder import Run, identify, recognise
from align.say import UserError, closest, resolve, say
from align.tracking import trackers
from align.train import memory
from align.train.job import build_objective, check_batch
from align.train.memory import longest_pair, too_large
from align.train.optim import check_optimizer, high_learning_rate
from objectives import Objective


def prepare(cfg: RunConfig) -> Run:
    """Check everything, and make what the processes need: data, start model, plan, the run folder's name."""
    objective = check_settings(cfg)
    is_selfplay = cfg.source.name is Source.selfplay
    scorer = registry.scorer_of(cfg) if is_selfplay else judging.scorer_of(cfg)
    who = who_scores(cfg, scorer) if scorer is not None else None
    cluster = answering_cluster(cfg) if is_selfplay else cluster_of(cfg.cluster, cfg.plan)
    cache = Path(cfg.cache_dir).expanduser()
    start = start_model(cfg, cache)
    source: Pairs | Prompts
    if is_selfplay:
        source, longest = _prompts(cfg, start, cluster)
    else:
        source = prepare_pairs(cfg.dataset, cfg.train, cfg.model.system_message, start, cache)
        check_data(cfg, objective, start, source, cluster)
        longest = longest_pair(cfg, source)
    if cluster.strategy is Strategy.auto:
        needs = memory.setup(cfg, start, cluster)
        cluster = replace(cluster, strategy=memory.choose(needs, cluster.memory, longest))
    _check_machine(cfg, start, cluster, longest)
    known = who if is_selfplay or cfg.scorer.name is not None else None  # else dataset.judge is there
    identity = identify(cfg, objective, start, source.fingerprint, cluster, known)
    names = f"{cfg.model.name}-{cfg.dataset.name}-{cfg.objective['name']}{'-selfplay' if is_selfplay else ''}"
    folder = Path(cfg.run_dir or f"runs/{names}-{fingerprint(identity)[:6]}").expanduser()
    if isinstance(source, Prompts):
        assert who is not None
        text = plan.describe_selfplay(cfg, start, source, who, objective, cluster, longest)
        folder = folder.resolve()  # as the trainings of the iterations remember where their policies and pairs are
    else:
        text = plan.describe(cfg, start, source, objective, cluster)
    run = Run(cfg=cfg, start=start, source=source, cluster=cluster, identity=identity, dir=folder, plan=text)
    recognise(run)
    return run


def _prompts(cfg: RunConfig, start: Start, cluster: Cluster) -> tuple[Prompts, int]:
    """Return the prompts of self-play, checked, and the tokens of the longest pair that can come of them."""
    prompts = load_prompts(cfg, start, Path(cfg.cache_dir).expanduser())
    asked = plan.asked_by(cfg, prompts)
    if asked < cfg.train.pairs_per_step:
        shared = f" shared out over {cfg.iterations} iterations (source.split_prompts),"
        raise UserError(
            f"an iteration trains on {asked} prompts: of {cfg.dataset.name}'s {len(prompts.all)},"
            f"{shared if cfg.source.split_prompts else ''} {len(prompts.held_out)} are held out (dataset.eval_fraction); "
            f"train.pairs_per_step={cfg.train.pairs_per_step} needs that many pairs: give more prompts, or a smaller step"
        )
    check_batch(cfg, asked, cluster.world)
    return prompts, max(prompts.tokens.values()) + 2 * min(cfg.sampling.max_new_tokens, cfg.train.max_length)


def _check_machine(cfg: RunConfig, start: Start, cluster: Cluster, longest: int) -> None:
    """Refuse what this machine cannot do, and warn of what will probably fail; `longest` is the longest pair's tokens."""
    every, divided = cfg.sentinel.sample_every_steps, cluster.strategy in (Strategy.fsdp, Strategy.zero3)
    if every is not None and divided:
        raise UserError(
            f"sentinel.sample_every_steps={every} samples with one process, and cluster.strategy={cluster.strategy.value} "
            "divides the weights among all: set it to null, or use ddp or zero2"
        )
    if not cfg.plan:
        strategy.check(cluster)
        if cfg.cluster.launcher is Launcher.slurm and not inside():
            slurm.check()
    warned = high_learning_rate(cfg.optimizer, memory.shape(cfg.model, start).parameters)
    for warning in filter(None, (warned, too_large(cfg, start, cluster, longest))):
        warnings.warn(warning, UserWarning, stacklevel=3)


def check_metric(cfg: RunConfig) -> None:
    """Refuse what a search could not maximise, as far as that can be known before the first training ends."""
    metric = cfg.optimized_metric
    if metric is None:
        return
    wanted = metrics.row(metric)
    if wanted and wanted.of == "answers" and judging.scorer_of(cfg) is None:
        remedy = "give scorer=..., or optimized_metric=accuracy/mean_logp"
        raise UserError(f"optimized_metric={metric} needs a judge, and there is none: {remedy}")
    kinds = ("pairs", "answers", *(["iteration"] if cfg.source.name is Source.selfplay else []))
    known = [one.name for kind in kinds for one in metrics.METRICS if one.of == kind and not one.name.endswith("*")]
    near = closest(metric, known)
    if metric not in known and (near or wanted is None or wanted.of not in kinds):
        raise UserError(f"optimized_metric={metric} is no metric of results.json{near}; there are {', '.join(known)}")


def who_scores(cfg: RunConfig, scorer: ScorerConfig) -> Identity:
    """Return the scorer's identity, before anything is sampled or trained; a plan does without its files."""
    try:
        return registry.build(scorer, Rank(device=torch.device("cpu"), bf16=False, number=0, world=1)).identity
    except NotHereError as error:
        if not cfg.plan:
            raise
        say(f"align: {error}")
        return registry.stand_in(scorer)


def as_resolved(run: Run) -> RunConfig:
    """Return the configuration for compute nodes, which must not decide anew where files lie or what is computed in."""
    cluster = replace(run.cfg.cluster, precision=Precision.bf16 if run.cluster.bf16 else Precision.fp32)
    return replace(run.cfg, run_dir=str(run.dir.resolve()), cache_dir=str(run.cache.resolve()), cluster=cluster)


def check_settings(cfg: RunConfig) -> Objective:
    """Check everything that can be wrong with the configuration alone, and build the objective."""
    check_optimizer(cfg.optimizer)
    config.check(cfg)
    trackers.check(cfg)
    if cfg.dataset.judge is not None:
        resolve(cfg.dataset.judge, "dataset.judge")
    check_metric(cfg)
    objective = build_objective(cfg)
    if cfg.source.name is not Source.selfplay:
        return objective
    for name in ("temperature", "min_gap"):  # else found out only when all answers are sampled and scored
        if not getattr(cfg.selection, name) >= 0:
            raise UserError(f"selection.{name} must be 0 or above, not {getattr(cfg.selection, name)}")
    if cfg.sampling.samples == 1 and not cfg.source.candidates:
        raise UserError("sampling.samples=1 makes no pairs: give 2 or more, or source.candidates to pair the one with")
    return objective


def check_data(cfg: RunConfig, objective: Objective, start: Start, pairs: Pairs, cluster: Cluster) -> None:
    """Refuse data that the objective or the global batch cannot be fed with."""
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
