"""The stages of an iteration around its training, pairs before it and evaluation behind it; three of them run alone too.

    pairs       given, or sample -> score -> select (onpolicy/), by the policy that is then trained on them
    training    what train() is handed
    evaluate    the judge, where there is one; the model card; the figures that mark the iteration as complete
    sample, annotate, select    verbs of the command line: the stages of `pairs`, each on a folder

What is there is kept, so the same command goes on after a kill at any moment. Every process calls these functions;
sampling, scoring and weighing share the work by files, and only training connects the processes. The reference of an
iteration is the policy that sampled its pairs (SPPO: https://arxiv.org/abs/2405.00675, algorithm 1).
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from align import config
from align.choices import Launcher
from align.config import DatasetConfig, PairSourceConfig, RunConfig, ScorerConfig
from align.data.pairs import Pairs, prepare_pairs
from align.data.prompts import PromptRow, Prompts, load_prompts, prompts_of
from align.evaluation import card, judging
from align.files import write_json, write_text
from align.launch import slurm
from align.launch.local import each, logs_of
from align.launch.rank import Cluster, Rank, alone, cluster_of, free
from align.model.load import Policy, start_model, trained_from
from align.onpolicy import figures
from align.onpolicy.sample import answering_cluster, read_samples, sample_from
from align.onpolicy.score import score_responses
from align.onpolicy.scorers import registry
from align.onpolicy.scorers.base import Item
from align.onpolicy.select import SPLITS, describe_counts, write_pairs
from align.runs import plan
from align.runs.folder import Iteration, Run, identify, open_folder, recognise
from align.runs.prepare import check_data
from align.say import UserError, quieten, say
from align.tracking.trackers import Tracker
from align.train.job import Job, build_objective
from align.train.metrics import Cost


def begin(iteration: Iteration, rank: Rank) -> None:
    """Announce an iteration of self-play. The scorer is tried on two answers first: a missing server shows now."""
    run = iteration.run
    if not (run.is_selfplay and rank.is_first):
        return
    print(f"\niteration {iteration.number} of {run.cfg.iterations}", flush=True)
    if iteration.number == 1 and not (iteration.folder / "scores").exists():
        prompt = run.source.held_out[0]
        registry.build(registry.scorer_of(run.cfg), rank)([Item(prompt=prompt.text, responses=["yes", "no"])])
        free()


def pairs_of(iteration: Iteration, policy: Policy, rank: Rank) -> tuple[Pairs, dict[str, Any]]:
    """Return the pairs to train on, and the counts by split of the prompts that they are made of."""
    run, cfg, folder = iteration.run, iteration.run.cfg, iteration.folder
    if isinstance(run.source, Pairs):
        return run.source, {}
    responses, scores, pairs = (folder / name for name in ("responses", "scores", "pairs"))
    asked = prompts_of(cfg, run.source, iteration.number)
    sample_from(policy, asked, cfg, cfg.sampling, responses, iteration.number, "responses", rank)
    score_responses(read_samples(responses), cfg, scores, rank)
    counts = write_pairs(responses, scores, cfg.selection, pairs, seed=cfg.seed + iteration.number)
    if rank.is_first:
        print(describe_counts(counts), flush=True)
    for split, least in (("train", cfg.train.pairs_per_step), ("held_out", 1)):
        if counts[split]["pairs"] < least:
            raise UserError(
                f"iteration {iteration.number} needs {least} {split} pairs at least: {describe_counts(counts)}. Samples "
                "that are all alike want another sampling.temperature, close scores another selection.min_gap, few pairs "
                "a smaller train.pairs_per_step; give another run_dir= then"
            )
    dataset = _training_config(iteration, policy).dataset
    return prepare_pairs(dataset, cfg.train, cfg.model.system_message, policy.start, run.cache), counts


def training(iteration: Iteration, policy: Policy, pairs: Pairs) -> Job:
    """Return the training of `policy` on `pairs`, checked as that of a dataset is."""
    run, cfg = iteration.run, iteration.run.cfg
    if run.is_selfplay:
        cfg = _training_config(iteration, policy)
        check_data(cfg, build_objective(cfg), policy.start, pairs, run.cluster)
    return Job(
        cfg=cfg,
        start=policy.start,
        pairs=pairs,
        cluster=run.cluster,
        dir=iteration.folder,
        policy=iteration.policy,
        figures=iteration.trained,
    )


def _training_config(iteration: Iteration, policy: Policy) -> RunConfig:
    """Return the configuration of an ordinary training: of the policy that has sampled, on the pairs of its answers."""
    cfg = iteration.run.cfg
    train, held_out = (str(iteration.folder / "pairs" / f"{split}.jsonl") for split in SPLITS)
    dataset = DatasetConfig(name=cfg.dataset.name, path=train, eval_path=held_out, eval_limit=None)
    return replace(
        cfg,
        model=policy.cfg,
        dataset=dataset,
        cluster=replace(cfg.cluster, strategy=iteration.run.cluster.strategy),
        source=PairSourceConfig(),
        scorer=ScorerConfig(),
        iterations=1,
        optimized_metric=None,
        run_dir=str(iteration.folder),
    )


def open_training(iteration: Iteration, job: Job, rank: Rank) -> None:
    """Write down a training of self-play as the run that it is; that of given pairs is written down already."""
    if not (iteration.run.is_selfplay and rank.is_first):
        return
    cfg, start, pairs, cluster, objective = job.cfg, job.start, job.pairs, job.cluster, build_objective(job.cfg)
    identity = identify(cfg, objective, start, pairs.fingerprint, cluster, None)
    text = plan.describe(cfg, start, pairs, objective, cluster)
    run = Run(cfg=cfg, start=start, source=pairs, cluster=cluster, identity=identity, dir=job.dir, plan=text)
    recognise(run)
    job.dir.mkdir(parents=True, exist_ok=True)
    open_folder(run)


def evaluate(iteration: Iteration, job: Job, before: Policy, counts: Mapping[str, Any], rank: Rank) -> dict[str, Any]:
    """Ask the judge, where there is one, and write the card and the figures, which mark the iteration as complete.

    `before` is the policy before this iteration, `counts` of the prompts that the pairs are made of, by split. Returns
    the figures; where the pairs are given, the results of the run; {} on other processes than the first.
    """
    run, judged = iteration.run, None
    if judging.scorer_of(run.cfg) is not None:
        policies = (trained_from(before, iteration.policy, run.cache), before, run.start_policy)
        contestants = judging.contestants_of(run.dir, policies, run.is_selfplay)
        number = iteration.number if run.is_selfplay else 0
        judged = judging.judge(run.cfg, contestants, _asked(run), number, rank)
    if not rank.is_first:
        return {}
    training: dict[str, Any] = json.loads(iteration.trained.read_text())
    sides = judged or {"start": {}, "trained": {}}
    results = training | {side: training[side] | metrics for side, metrics in sides.items()}
    text = card.model_card(job.cfg, config.plain(job.cfg), job.start, job.pairs, results)
    write_text(iteration.policy / "README.md", text)
    if run.is_selfplay:
        shared = {name: training["trained"][name] for name in ("accuracy/mean_logp", "rewards/accuracies")}
        named = {"iteration": iteration.number, "steps": job.steps, "data": counts}
        results = {**named, **sides["trained"], **shared, "start": sides["start"]}
    write_json(iteration.summary, results)
    if run.is_selfplay:
        _end(iteration, results)
    return results


def complete(iteration: Iteration, rank: Rank) -> dict[str, Any]:
    """Return the figures of an iteration that was complete before."""
    made: dict[str, Any] = json.loads(iteration.summary.read_text())
    if rank.is_first:
        print(f"is complete: {iteration.folder}", flush=True)
        _end(iteration, made)
    return made


def _end(iteration: Iteration, made: Mapping[str, Any]) -> None:
    """Print the figures, and remove the checkpoints of an iteration, which are several times the policy's size."""
    print(figures.line(made), flush=True)
    shutil.rmtree(iteration.folder / "checkpoints", ignore_errors=True)


def results_of(run: Run, made: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the results after some iterations: figures of the start model and of the last policy, cost of all trainings."""
    if not run.is_selfplay:
        return {name: made[0][name] for name in ("start", "trained", "cost")}
    trained = {name: value for name, value in made[-1].items() if isinstance(value, float)}
    costs = [Cost(**json.loads(iteration.trained.read_text())["cost"]) for iteration in run.iterations[: len(made)]]
    return {"start": made[0]["start"], "trained": trained, "cost": asdict(sum(costs, Cost()))}


def tell(iteration: Iteration, made: Sequence[Mapping[str, Any]], tracker: Tracker) -> None:
    """Log the figures of an iteration of self-play."""
    if iteration.run.is_selfplay:
        told = {f"selfplay/{name}": value for name, value in made[-1].items() if isinstance(value, float)}
        tracker.log(sum(of_one["steps"] for of_one in made), {**told, "selfplay/iteration": iteration.number})


def finish(run: Run, made: Sequence[Mapping[str, Any]]) -> None:
    """Write the run's own files of self-play: results.json, and the answers and held-out pairs of the last iteration."""
    if not run.is_selfplay:
        return
    for name in ("samples.jsonl", "held_out.jsonl"):
        write_text(run.dir / name, (run.iterations[-1].folder / name).read_text(encoding="utf-8"))
    write_json(run.results, {**results_of(run, made), "iterations": made})


def _asked(run: Run) -> list[PromptRow]:
    """Return the held-out prompts whose answers are compared."""
    limit = run.cfg.evaluation.prompts
    if isinstance(run.source, Prompts):
        return [replace(prompt, candidates=()) for prompt in run.source.held_out[:limit]]
    return judging.prompts_of_pairs(run.source, limit)


def sample(cfg: RunConfig) -> None:
    """Answer all prompts of the first iteration."""
    folder, cache = folder_of(cfg), Path(cfg.cache_dir).expanduser()
    cluster, start = answering_cluster(cfg), start_model(cfg, cache)
    asked = prompts_of(cfg, load_prompts(cfg, start, cache), 1)
    policy = Policy(iteration=0, cfg=cfg.model, start=start)
    each(cluster, logs_of(folder), _sample, cfg, policy, asked, folder / "responses", cluster)
    say(f"responses  {folder / 'responses'}")


def _sample(cfg: RunConfig, policy: Policy, asked: Sequence[PromptRow], responses: Path, cluster: Cluster) -> None:
    sample_from(policy, asked, cfg, cfg.sampling, responses, 1, "responses", alone(cluster))


def annotate(cfg: RunConfig) -> None:
    """Score all responses."""
    folder = folder_of(cfg)
    read_samples(folder / "responses")
    cluster = cluster_of(cfg.cluster)
    each(cluster, logs_of(folder), _annotate, cfg, folder, cluster)
    say(f"scores  {folder / 'scores'}")


def _annotate(cfg: RunConfig, folder: Path, cluster: Cluster) -> None:
    score_responses(read_samples(folder / "responses"), cfg, folder / "scores", alone(cluster))


def select(cfg: RunConfig) -> None:
    """Choose the pair of each prompt."""
    folder = folder_of(cfg)
    pairs = folder / "pairs"
    counts = write_pairs(folder / "responses", folder / "scores", cfg.selection, pairs, seed=cfg.seed + 1)
    say(f"{describe_counts(counts)}\npairs  {pairs}")
    say(f"to train: dataset=local dataset.path={pairs / 'train.jsonl'} dataset.eval_path={pairs / 'held_out.jsonl'}")


def folder_of(cfg: RunConfig) -> Path:
    """Check the words of a stage alone, which has no plan and runs where it is typed, and return its folder."""
    quieten()
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
