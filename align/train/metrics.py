"""The metrics of pairs, and the metrics of a training as they come."""

import json
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from align.metrics import shown
from align.tracking import trackers
from objectives import PairLoss, Response

#: What evaluation keeps of each held-out pair.
BY_PAIR = tuple(metric.name for metric in shown("held_out"))


class Report:
    """Metrics of rank 0 as they come: a line of metrics.jsonl, the tracker, the progress bar.

    A run that goes on drops the lines behind its checkpoint, so that the file is that of an uninterrupted run.
    """

    def __init__(
        self, file: Path, tracker: trackers.Tracker, steps: int, resumed_at: int, eval_every: int | None
    ) -> None:
        self._file, self._tracker = file, tracker
        lines = (
            [line for line in file.read_text().splitlines() if line.endswith("}")]
            if file.exists() and resumed_at
            else []
        )
        before = [line for line in lines if json.loads(line)["step"] < resumed_at]
        at = [line for line in lines if json.loads(line)["step"] == resumed_at]
        # What was evaluated at that step was written before it was saved, behind its metrics.
        evaluated = eval_every is not None and resumed_at % eval_every == 0 and resumed_at < steps
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text("".join(f"{line}\n" for line in before + at[: 1 + evaluated]))
        unfinished.replace(file)
        self._bar = tqdm(total=steps, initial=resumed_at, desc="training", unit="step", disable=None)

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of a step."""
        with self._file.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._tracker.log(step, metrics)
        if "train/loss" in metrics:
            self._bar.update(step - self._bar.n)
            shown = {"loss": metrics["train/loss"], "accuracy": metrics["train/rewards/accuracies"]}
            self._bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()})

    def close(self) -> None:
        """Leave the progress bar as it stands."""
        self._bar.close()


def pair_metrics(result: PairLoss, chosen: Response, rejected: Response, has_reference: bool) -> dict[str, Tensor]:
    """The metrics of each pair, `[B]`, under the same names for every objective.

    Rewards are the objective's own (SimPO's are beta * mean_logp, DPO's beta * log_ratio) and not comparable between
    objectives; the rest is. An accuracy counts a tie as half. `kl_start_policy` is the mean of -log_ratio over both
    responses, in nats per response: the definition of KL(start || policy) where responses are samples of the start
    policy, and only a sign of drift where they are not.
    """

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
    if has_reference:
        metrics["log_ratio/chosen"] = chosen.log_ratio
        metrics["log_ratio/rejected"] = rejected.log_ratio
        metrics["accuracy/log_ratio"] = accuracy(chosen.log_ratio, rejected.log_ratio)
        metrics["kl_start_policy"] = -(chosen.log_ratio + rejected.log_ratio) / 2
    return {name: values.detach() for name, values in metrics.items()}
