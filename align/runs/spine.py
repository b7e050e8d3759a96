"""A run from its configuration to its results. Typing the command again goes on where it stopped, or says complete.

    carry_out(cfg)      prepare, then plan, submit, or start a process for each device
    iterate(run)        each process: for every iteration its pairs, a training, an evaluation

What can be wrong with the words, the data, the cluster and the run folder is found by `prepare`, before a model is loaded
or a process started. The stages meet in files of the run folder, so what is there is not made again. Left out: servers of
the openai backend, which whoever started them has to start again with the next policy.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from align.choices import Launcher
from align.config import RunConfig
from align.evaluation import card
from align.launch import slurm
from align.launch.local import each
from align.launch.rank import Rank, alone, free, inside
from align.model.load import trained_from
from align.runs import stages
from align.runs.folder import Iteration, Run, link_to_group, owned
from align.runs.prepare import as_resolved, prepare
from align.say import UserError, closest, is_first, quieten, say
from align.tracking import trackers
from align.tracking.trackers import Stretch, Tracker
from align.train import sentinel
from align.train.sentinel import CollapsedError
from align.train.train import train


def carry_out(cfg: RunConfig) -> float | None:
    """Run `cfg` to its end, or print its plan, or submit it.

    Returns:
        `optimized_metric` of the trained policy: by default the win rate against the start model where there is a judge,
        else the held-out accuracy by mean_logp. None where nothing was trained, and on other processes than the first.
    """
    quieten()
    slurm.take_place()
    run = prepare(cfg)
    if cfg.plan:
        say(run.plan)
        return None
    if run.is_complete:
        link_to_group(run)
        if run.done > cfg.iterations:
            say(f"{run.dir} holds {run.done} iterations already, which are more than the {cfg.iterations} asked for")
        say(f"This run is complete: {run.dir}. To train it anew, delete that folder or give another run_dir=")
        return report(run)
    sentinel.refuse(run.dir)
    if cfg.cluster.launcher is Launcher.slurm and not inside():
        slurm.enqueue(carry_out, as_resolved(run), run.cluster.per_node, run.cluster.device == "cuda")
        return None
    with owned(run):
        each(run.cluster, run.dir / "logs", iterate, run)
    return report(run)


def iterate(run: Run) -> None:
    """Do every iteration of a run, as each of its processes does. Offline there is one, whose pairs are given."""
    quieten()
    rank = alone(run.cluster)
    tracker = trackers.start(run.cfg, run.dir, rank.number)
    policy = run.start_policy
    with _reported(run, tracker, rank) as made:
        for iteration in run.iterations:
            if iteration.number > 1:
                policy = trained_from(policy, run.iterations[iteration.number - 2].policy, run.cache)
            stages.begin(iteration, rank)
            if iteration.summary.exists():
                made.append(stages.complete(iteration, rank))
                continue
            pairs, counts = stages.pairs_of(iteration, policy, rank)
            job = stages.training(iteration, policy, pairs)
            if not iteration.trained.exists():
                stages.open_training(iteration, job, rank)
                train(job, Stretch(tracker, _steps(made)))
                free()
            made.append({"steps": job.steps, **stages.evaluate(iteration, job, policy, counts, rank)})
            stages.tell(iteration, made, tracker)
        if rank.is_first:
            stages.finish(run, made)


@contextlib.contextmanager
def _reported(run: Run, tracker: Tracker, rank: Rank) -> Iterator[list[dict[str, Any]]]:
    """Tell the tracker how the run ended, and mark a collapse.

    Yields the list in which the block puts the figures of each iteration; on processes but the first, its steps only.
    """
    made: list[dict[str, Any]] = []
    failed = True
    try:
        yield made
        failed = False
    except KeyboardInterrupt:
        failed = False
        raise
    except CollapsedError as error:
        end = error
        if run.is_selfplay:  # its steps are counted over the whole run
            end = CollapsedError(_steps(made) + error.step, f"iteration {len(made) + 1}: {error.why}")
        if rank.is_first:
            sentinel.mark(run.dir, end)
        raise sentinel.with_remedy(end, run.dir) from error
    finally:
        results = stages.results_of(run, made) if made and rank.is_first else {}
        tracker.finish(card.summary(results), failed)


def _steps(made: Sequence[Mapping[str, Any]]) -> int:
    return sum(figures["steps"] for figures in made)


def report(run: Run) -> float | None:
    """Print the table, the cost and where the policy lies. Returns the metric that a search maximises."""
    if not is_first():
        return None
    results = json.loads(run.results.read_text())
    trained: dict[str, float] = results["trained"]
    say(card.text_table(results["start"], trained))
    say(f"cost     {card.cost_line(results['cost'])}")
    last = Iteration(run=run, number=max(run.done, run.cfg.iterations))
    say(f"model    {last.policy}\nmetrics  {run.dir / ('iter_*' if run.is_selfplay else '') / 'metrics.jsonl'}")
    metric = run.cfg.optimized_metric or ("win_rate" if "win_rate" in trained else "accuracy/mean_logp")
    if metric not in trained:
        near, names = closest(metric, list(trained)), ", ".join(trained)
        raise UserError(f"optimized_metric={metric} is none of this run's results{near}: {names}")
    return trained[metric]
