"""`align sample`, `align annotate`, `align select`: the stages of self-play alone, on a folder.

Each raises `UserError` for anything that the user can put right.
"""

from collections.abc import Sequence
from pathlib import Path

from align import config
from align.choices import Launcher
from align.config import RunConfig
from align.data.prompts import PromptRow, load_prompts, prompts_of
from align.launch import slurm
from align.launch.local import each, logs_of
from align.launch.rank import Cluster, alone, cluster_of
from align.model.load import Policy, start_model
from align.onpolicy.sample import answering_cluster, read_samples, sample_from
from align.onpolicy.score import score_responses
from align.onpolicy.select import describe_counts, write_pairs
from align.say import UserError, quieten, say


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
