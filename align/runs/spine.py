"""From a configuration to a run: check, prepare, plan, and start who trains. Typing the command again goes on or is done.

What can be wrong with the words, the data, the cluster and the run folder is found here, in the process that was typed,
before a model is loaded or a process started. Left out: the training itself (train.py).
"""

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from align.choices import Launcher, Strategy
from align.config import RunConfig
from align.data.pairs import show_pair
from align.evaluation import card
from align.launch import slurm
from align.launch.local import start_processes
from align.launch.rank import inside, join
from align.runs.folder import T, in_its_group, link_to_group, open_folder, own_folder
from align.runs.prepare import as_resolved, prepare_training
from align.say import UserError, closest, is_first, quieten, say
from align.tracking.trackers import Tracker
from align.train import sentinel
from align.train.checkpoint import check_checkpoint
from align.train.job import Job
from align.train.train import train_in_process


def run(cfg: RunConfig) -> float | None:
    """Run `cfg` to its end, or print its plan, or submit it. Returns the win rate against the start model where there is
    a judge, else the held-out accuracy by mean_logp; None where nothing was trained.

    Raises:
        UserError: anything the user can put right.
        Stopped: it was asked to stop.
    """
    quieten()
    slurm.take_place()
    return carry_out(prepare_training(cfg), run, begin)


def carry_out(made: T, command: Callable[[RunConfig], object], start: Callable[[T], None]) -> float | None:
    """What `run` does with what it has prepared; `command` is `run` itself, for a job that SLURM starts elsewhere."""
    cfg = made.cfg
    if cfg.plan:
        say(made.plan)
        return None
    if not made.is_done:
        sentinel.refuse(made.dir)
        if cfg.cluster.launcher is Launcher.slurm and not inside():
            given = replace(
                cfg, run_dir=str(made.dir.resolve()), cache_dir=str(Path(cfg.cache_dir).expanduser().resolve())
            )
            slurm.enqueue(
                command,
                replace(given, cluster=as_resolved(cfg.cluster, made.cluster)),
                made.cluster.per_node,
                made.cluster.device == "cuda",
            )
            return None
        with in_its_group(made):
            start(made)
    else:
        link_to_group(made)
        say(f"This run is complete: {made.dir}. To train it anew, delete that folder or give another run_dir=")
    results = json.loads(made.results.read_text()) if is_first() else None
    if results is None:
        return None
    say(card.text_table(results["start"], results["trained"]))
    say(f"cost     {card.cost_line(results['cost'])}")
    say(f"model    {made.policy}\nmetrics  {made.metrics}")
    trained: dict[str, float] = results["trained"]
    metric = cfg.optimized_metric or ("win_rate" if "win_rate" in trained else "accuracy/mean_logp")
    if metric not in trained:
        raise UserError(
            f"optimized_metric={metric} is none of this run's results{closest(metric, list(trained))}: "
            f"{', '.join(trained)}"
        )
    return trained[metric]


def begin(job: Job, tracker: Tracker | None = None) -> None:
    """Train in this process, in processes of ours, or as one of several that were started from outside."""
    with contextlib.ExitStack() as held:

        def open_() -> None:
            held.enter_context(own_folder(job.dir))
            check_checkpoint(job)
            open_folder(job, show_pair(job.pairs.train[0], job.start.tokenizer))

        if inside() or job.cluster.strategy is Strategy.single:
            rank = join(job.cluster)
            rank.from_first(open_)
            train_in_process(job, rank, tracker)
        else:
            open_()
            start_processes(job.cluster, job.dir / "logs", train_in_process, job)
