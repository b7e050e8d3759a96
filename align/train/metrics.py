"""The metrics of pairs, their means, and the metrics of a training as they come."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from align.files import write_text
from align.launch.rank import Rank
from align.metrics import shown
from align.tracking.trackers import Tracker
from align.train.batches import PairBatch
from objectives import Objective, PairLoss, Response

#: What evaluation keeps of each held-out pair.
BY_PAIR = tuple(metric.name for metric in shown("held_out"))
#: The file of a checkpoint that holds the lines of metrics.jsonl up to it.
SO_FAR = "metrics_so_far.jsonl"


class Report:
    """Write metrics as they come: a line of metrics.jsonl, the tracker, the progress bar. Does nothing but on rank 0.

    Args:
        file: metrics.jsonl. A run that goes on begins with the lines of its checkpoint, an uninterrupted run's.
    """

    def __init__(
        self, file: Path, tracker: Tracker, rank: Rank, steps: int, checkpoint: Path | None, done: int
    ) -> None:
        self._file, self._tracker, self._rank = file, tracker, rank
        self._bar = tqdm(
            total=steps, initial=done, desc="training", unit="step", disable=None if rank.is_first else True
        )
        if rank.is_first:
            write_text(file, (checkpoint / SO_FAR).read_text() if checkpoint else "")

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of a step."""
        if not self._rank.is_first:
            return
        with self._file.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._tracker.log(step, metrics)
        if "train/loss" in metrics:
            self._bar.update(step - self._bar.n)
            told = {"loss": metrics["train/loss"], "accuracy": metrics["train/rewards/accuracies"]}
            self._bar.set_postfix({name: f"{value:.3f}" for name, value in told.items()})

    def close(self) -> None:
        """Leave the progress bar as it stands."""
        self._bar.close()


class Tally:
    """Sums over the pairs of this process, kept on its device: adding waits for nothing."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._tokens = 0

    def add(self, metrics: Mapping[str, Tensor], batch: PairBatch) -> None:
        """Add the metrics `[b]` of a micro-batch."""
        counted = batch.counted.double()
        for name, values in {**metrics, "pairs": batch.counted}.items():
            self._sums[name] = self._sums.get(name, 0.0) + (values.double() * counted).sum()
        self._tokens += batch.responses.fed_tokens

    def means(self, objective: Objective, rank: Rank) -> tuple[dict[str, float], float, float]:
        """Return (means over pairs, pairs, tokens) of all processes, which all call it."""
        sums = torch.stack(list(self._sums.values()))
        *totals, tokens = summed(torch.cat([sums, sums.new_tensor([self._tokens])]), rank).tolist()
        totals_by_name = dict(zip(self._sums, totals, strict=True))
        pairs = totals_by_name.pop("pairs")
        means = {name: total / pairs for name, total in totals_by_name.items()}
        of_objective = {name.removeprefix("objective/"): value for name, value in means.items()}
        summary = {f"objective/{name}": value for name, value in objective.summary(of_objective).items()}
        return {**means, **summary}, pairs, tokens


def summed(values: Tensor, rank: Rank) -> Tensor:
    """Return the sum of every process's tensor; all of them call it."""
    if rank.world > 1:
        torch.distributed.all_reduce(values)
    return values


def sides(statistics: Mapping[str, Tensor], names: Collection[str]) -> tuple[Response, Response]:
    """Return the chosen and the rejected responses of `[b, 2]` statistics, with those statistics only."""
    chosen, rejected = ({name: statistics[name][:, side] for name in names} for side in (0, 1))
    return Response(**chosen), Response(**rejected)


def pair_metrics(result: PairLoss, statistics: Mapping[str, Tensor], truncated: Tensor) -> dict[str, Tensor]:
    """Return the metrics of each pair, `[b]` and detached, under the same names for every objective.

    Rewards are the objective's own (SimPO's are beta * mean_logp, DPO's beta * log_ratio) and not comparable between
    objectives; the rest is. An accuracy counts a tie as half. `kl_start_policy` is the mean of -log_ratio over both
    responses, in nats per response: the definition of KL(start || policy) where responses are samples of the start
    policy, and only a sign of drift where they are not.
    """
    chosen, rejected = sides(statistics, statistics.keys() - {"entropy"})

    def accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
        return (chosen > rejected).float() + 0.5 * (chosen == rejected).float()

    metrics = {
        "loss": result.loss.detach(),
        "rewards/chosen": result.chosen_reward,
        "rewards/rejected": result.rejected_reward,
        "rewards/margins": result.chosen_reward - result.rejected_reward,
        "rewards/accuracies": accuracy(result.chosen_reward, result.rejected_reward),
        "mean_logp/chosen": chosen.mean_logp,
        "mean_logp/rejected": rejected.mean_logp,
        "accuracy/mean_logp": accuracy(chosen.mean_logp, rejected.mean_logp),
        "length/chosen": chosen.length,
        "length/rejected": rejected.length,
        **{f"objective/{name}": values for name, values in result.metrics.items()},
    }
    if "ref_logp" in statistics:
        metrics["log_ratio/chosen"] = chosen.log_ratio
        metrics["log_ratio/rejected"] = rejected.log_ratio
        metrics["accuracy/log_ratio"] = accuracy(chosen.log_ratio, rejected.log_ratio)
        metrics["kl_start_policy"] = -(chosen.log_ratio + rejected.log_ratio) / 2
    metrics["entropy"] = (statistics["entropy"] / statistics["length"]).mean(1)
    metrics["truncated"] = truncated
    return {name: values.detach() for name, values in metrics.items()}
