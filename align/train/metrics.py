"""Metrics of a training: of pairs and their means, as they come and as they are reported; and its cost."""

import contextlib
import json
import resource
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from align.files import write_text
from align.launch.rank import Rank
from align.metrics import shown
from align.tracking.trackers import Tracker
from align.train.job import PairBatch, summed
from objectives import Objective, PairLoss, Response

BY_PAIR = tuple(metric.name for metric in shown("held_out"))  # what evaluation keeps of each held-out pair
SO_FAR = "metrics_so_far.jsonl"  # the file of a checkpoint with the lines of metrics.jsonl up to it


class Report:
    """Write metrics as they come: a line of metrics.jsonl, the tracker, the progress bar. Does nothing but on rank 0.

    A run that goes on begins its file with the lines of its checkpoint, which are an uninterrupted run's.
    """

    def __init__(
        self, file: Path, tracker: Tracker, rank: Rank, steps: int, checkpoint: Path | None, done: int
    ) -> None:
        self._file, self._tracker, self._rank = file, tracker, rank
        self.bar = tqdm(
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
            self.bar.update(step - self.bar.n)
            told = {"loss": metrics["train/loss"], "accuracy": metrics["train/rewards/accuracies"]}
            self.bar.set_postfix({name: f"{value:.3f}" for name, value in told.items()})


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


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of the steps that a policy is made of, in all stretches of a run that was stopped.

    Checkpoints between the steps count; evaluation, the reference pass, start-up and steps lost to a kill do not.
    """

    seconds: float = 0.0
    tokens: int = 0  # fed by all processes, padding left out
    peak_memory_gib: float = 0.0  # of the process that needed most: torch's on a GPU, resident on a CPU
    processes: int = 1

    def __add__(self, later: "Cost") -> "Cost":
        return Cost(
            seconds=self.seconds + later.seconds,
            tokens=self.tokens + later.tokens,
            peak_memory_gib=max(self.peak_memory_gib, later.peak_memory_gib),
            processes=max(self.processes, later.processes),
        )


class Meter:
    """Count the cost of a training from here on, after earlier stretches of the run; time in `paused` does not count."""

    def __init__(self, rank: Rank, before: Cost) -> None:
        self._rank, self._before = rank, before
        self.tokens = 0  # of this process
        self._began = self._lap_began = time.perf_counter()
        if rank.device.type == "cuda":  # memory that an earlier run of this process has used does not count
            torch.cuda.reset_peak_memory_stats(rank.device)
        else:
            with contextlib.suppress(OSError):  # no Linux, or a system that does not let us
                Path("/proc/self/clear_refs").write_text("5")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is done meanwhile."""
        at = time.perf_counter()
        yield
        seconds = time.perf_counter() - at
        self._began, self._lap_began = self._began + seconds, self._lap_began + seconds

    def lap(self) -> float:
        """Return the seconds since this was last asked."""
        began, self._lap_began = self._lap_began, time.perf_counter()
        return self._lap_began - began

    def cost(self) -> Cost:
        """Return the cost up to now. Every process calls it."""
        seconds = time.perf_counter() - self._began
        peaks, tokens = zip(*self._rank.gathered([(_peak_memory(self._rank.device), self.tokens)]), strict=True)
        now = Cost(seconds=seconds, tokens=sum(tokens), peak_memory_gib=max(peaks) / 2**30)
        return replace(self._before + now, processes=self._rank.world)


def _peak_memory(device: torch.device) -> int:
    """Return the bytes since the meter began; where a CPU's system cannot forget, since the process did."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
