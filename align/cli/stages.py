"""`align sample`, `align annotate`, `align select`: the stages of self-play alone, on a folder."""

from collections.abc import Sequence
from pathlib import Path

from align import config
from align.choices import Launcher
from align.config import RunConfig
from align.data.prompts import PromptRow, prompts_of
from align.launch import slurm
from align.launch.local import each, logs_of
from align.launch.rank import Cluster, alone, cluster_of
from align.model.load import Policy
from align.onpolicy.sample import read_samples, sample_from
from align.onpolicy.score import score_responses
from align.onpolicy.select import describe_counts, write_pairs
from align.runs.prepare import prepare_answers
from align.say import UserError, quieten, say


def annotate(cfg: RunConfig) -> None:
    """Score all responses.

    Raises:
        UserError: anything the user can put right.
    """
    quieten()
    folder = folder_of(cfg)
    read_samples(folder / "responses")
    cluster = cluster_of(cfg.cluster)
    each(cluster, logs_of(folder), _annotate, cfg, folder, cluster)
    say(f"scores  {folder / 'scores'}")


def _annotate(cfg: RunConfig, folder: Path, cluster: Cluster) -> None:
    score_responses(read_samples(folder / "responses"), cfg, folder / "scores", alone(cluster))


def sample(cfg: RunConfig) -> None:
    """Answer all prompts of the first iteration.

    Raises:
        UserError: anything the user can put right.
    """
    quieten()
    folder = folder_of(cfg)
    start, prompts, cluster = prepare_answers(cfg)
    policy = Policy(iteration=0, cfg=cfg.model, start=start)
    each(cluster, logs_of(folder), _sample, cfg, policy, prompts_of(cfg, prompts, 1), folder, cluster)
    say(f"responses  {folder / 'responses'}")


def _sample(cfg: RunConfig, policy: Policy, asked: Sequence[PromptRow], folder: Path, cluster: Cluster) -> None:
    sample_from(policy, asked, cfg, cfg.sampling, folder / "responses", 1, "responses", alone(cluster))


def select(cfg: RunConfig) -> None:
    """Choose the pair of each prompt.

    Raises:
        UserError: anything the user can put right.
    """
    folder = folder_of(cfg)
    pairs = folder / "pairs"
    counts = write_pairs(folder / "responses", folder / "scores", cfg.selection, pairs, seed=cfg.seed + 1)
    say(f"{describe_counts(counts)}\npairs  {pairs}")
    say(f"to train: dataset=local dataset.path={pairs / 'train.jsonl'} dataset.eval_path={pairs / 'held_out.jsonl'}")


def folder_of(cfg: RunConfig) -> Path:
    """Check the words of a stage alone, which has no plan and runs where it is typed, and return its folder."""
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
