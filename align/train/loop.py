"""The training step, in full: statistics from the engine, a loss from the objective, backward; clip, optimizer, schedule.

    loss = sum over the pairs of the step / number of pairs in the GLOBAL batch

whatever the processes and the micro-batches: a share of the step is this rank's micro-batches, of which every rank has
as many. Left out: what happens between steps (train.py), and how weights and gradients are divided (launch/strategy.py).
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from statistics import fmean

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.choices import Strategy
from align.config import OptimizerConfig
from align.engine import COMPUTED, evaluating, response_statistics
from align.engine.batching import MicroBatch, plan_micro_batches
from align.launch.rank import Rank
from align.say import UserError
from align.train.job import PairBatch, PairData
from align.train.metrics import BY_PAIR, Tally, pair_metrics, sides
from align.train.optim import build_optimizer, build_schedule
from align.train.sentinel import CollapsedError
from objectives import Objective

Losses = list[tuple[tuple[str, ...], Tensor]]  # row_ids of a micro-batch, and the loss of each of its pairs

#: Largest mean |log_ratio| per token at step 0, in nats: what rounding leaves, and a wrong reference exceeds.
_STEP_ZERO_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}


class Loop:
    """A policy in training, with its optimizer and schedule: what a step changes and a checkpoint holds.

    Args:
        policy: `engine.attach`ed, at step 0.
        steps: of the whole training, for the schedule.
        budget: tokens of a micro-batch, padding included.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        objective: Objective,
        optimizer: OptimizerConfig,
        steps: int,
        budget: int,
        accelerator: Accelerator,
        rank: Rank,
    ) -> None:
        made = build_optimizer(optimizer, policy, steps)
        self.model, self.optimizer = accelerator.prepare(policy, made)
        self.schedule = build_schedule(optimizer, self.optimizer, steps)
        self.objective, self.budget, self.accelerator, self.rank = objective, budget, accelerator, rank
        self.max_grad_norm = optimizer.max_grad_norm or math.inf
        self.done = 0  # steps
        self.tally = Tally()  # of the pairs since the last log

    def step(self, share: Sequence[PairBatch]) -> dict[str, float]:
        """Train on this rank's share of a step. Returns the gradient's norm before clipping, and the learning rate."""
        self.model.train()
        self.optimizer.train()
        losses: Losses = []
        for batch in share:
            with self._accumulating(last=batch is share[-1]):
                statistics = pair_statistics(self.model, batch, self.objective.needs, self.rank)
                result = self.objective(*sides(statistics, self.objective.needs))
                # Wrappers average gradients over ranks, hence `world`: the mean is over pairs, not over ranks.
                loss = (result.loss * batch.counted).sum() * (self.rank.world / batch.pairs_in_step)
                self.accelerator.backward(loss)
            self.tally.add(pair_metrics(result, statistics, batch.truncated), batch)
            losses.append((batch.row_ids, result.loss.detach()))
        return self.update(losses)

    @contextlib.contextmanager
    def _accumulating(self, last: bool) -> Iterator[None]:
        """Sum gradients up, over ranks with the last micro-batch. DeepSpeed also takes its step there."""
        self.accelerator.gradient_state._set_sync_gradients(last)
        can_wait = self.rank.strategy is Strategy.ddp  # the others would keep whole gradients
        with self.accelerator.no_sync(self.model) if can_wait and not last else contextlib.nullcontext():
            yield

    def update(self, losses: Losses) -> dict[str, float]:
        """Change the weights by the gradients that are there, if all is finite."""
        if self.done == 0:
            check_gradients(self.model, self.rank)
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm))
        self._check_finite(losses, norm)
        self.optimizer.step()
        rate = float(self.schedule.get_last_lr()[0])
        self.schedule.step()
        self.model.zero_grad()
        self.done += 1
        return {"grad_norm": norm, "learning_rate": rate}

    def _check_finite(self, losses: Losses, norm: float) -> None:
        """Stop all processes, before anything of the step is kept, where a loss or the gradient is not finite."""
        finite = math.isfinite(norm) and bool(torch.cat([loss for _, loss in losses]).isfinite().all())
        if self.rank.least(int(finite)):
            return
        bad = [row for rows, loss in losses for row, ok in zip(rows, loss.isfinite().tolist(), strict=True) if not ok]
        bad = list(dict.fromkeys(self.rank.gathered(bad)))
        what = f"the loss is not finite for pairs {', '.join(bad[:8])}" if bad else "the gradient is not finite"
        raise CollapsedError(self.done + 1, f"{what}. Nothing of this step is kept")


def pair_statistics(model: nn.Module, batch: PairBatch, needs: frozenset[str], rank: Rank) -> dict[str, Tensor]:
    """Return statistics of each pair, `[b, 2]`, chosen first: those of the data, those computed, and `entropy`."""
    with rank.autocast():
        computed = response_statistics(model, batch.responses, (needs & COMPUTED) - {"logp", "length"} | {"entropy"})
    return {name: values.view(-1, 2) for name, values in computed.items()} | batch.columns


def evaluate(loop: Loop, held_out: PairData) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Evaluate on the held-out pairs, which are dealt to the ranks.

    Returns:
        Exact means over the pairs, with `eval/accuracy/<group>` for each group, the reward accuracy of the objective's own
        implicit reward; and the accuracies of `BY_PAIR` of every pair.
    """
    rank, tally = loop.rank, Tally()

    def accuracies(batch: PairBatch) -> Tensor:
        statistics = pair_statistics(loop.model, batch, loop.objective.needs, rank)
        result = loop.objective(*sides(statistics, loop.objective.needs))
        metrics = pair_metrics(result, statistics, batch.truncated)
        tally.add(metrics, batch)
        return torch.stack([metrics[name] for name in BY_PAIR], 1)  # [b, len(BY_PAIR)]

    loop.optimizer.eval()
    with evaluating(loop.model):
        by_pair = held_out.column(range(len(held_out.pairs)), accuracies, loop.budget, rank)
    of_pairs = dict(zip(BY_PAIR, by_pair.T.tolist(), strict=True))
    means, _, _ = tally.means(loop.objective, rank)
    groups = list(held_out.pairs["group"])
    for group in sorted(set(groups) - {""}):
        right = zip(groups, of_pairs["rewards/accuracies"], strict=True)
        means[f"accuracy/{group}"] = fmean(value for name, value in right if name == group)
    return {f"eval/{name}": value for name, value in means.items()}, of_pairs


def check_step_zero(loop: Loop, train: PairData) -> None:
    """Raise `UserError` where the policy's log-ratio to the reference column is not 0 before step 1, within rounding."""
    if train.ref_logp is None:
        return
    rank = loop.rank
    some = plan_micro_batches(train.lengths[:32], train.layout, loop.budget)[0][:8]
    batch = train.batch(MicroBatch(tuple(some), (True,) * len(some), len(some)), rank.device)
    loop.model.train()
    with torch.no_grad(), rank.autocast():
        statistics = response_statistics(loop.model, batch.responses, ())
    ratios = statistics["logp"] - batch.columns["ref_logp"].flatten()
    worst = (ratios.abs() / statistics["length"]).mean().item()
    tolerance = _STEP_ZERO_TOLERANCE["bf16" if rank.bf16 else "fp32"]
    if not worst < tolerance:
        raise UserError(
            f"before step 1 the policy is {worst:.2g} nats per token from its reference, more than {tolerance:g}: "
            "the reference is not the start policy; remove the cached reference under cache_dir and start again"
        )


def check_gradients(model: nn.Module, rank: Rank) -> None:
    """Raise `UserError` for a trainable weight without a gradient."""
    if rank.strategy in (Strategy.zero2, Strategy.zero3):  # DeepSpeed keeps them elsewhere
        return
    without = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    if without:
        raise UserError(f"at step 1, {len(without)} trainable weights get no gradient: {', '.join(without[:3])}")
