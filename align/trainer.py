"""The training step: micro-batches of a step, an objective, exact metrics, gates. A thin transformers.Trainer.

The Trainer keeps what it is good at: optimizer, schedule, clipping, checkpoints, wrapping, resuming. One batch of its
loader is this rank's share of a whole step, so gradient accumulation, and every question of how to scale it, is the
loop in `training_step`: a sum of pair losses over the pairs of the global batch.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from align.batching import FORWARD_ONLY, MicroBatch, StepSampler, plan_micro_batches
from align.config import Layout, UserError
from align.data import as_group, pair_lengths
from align.engine import COMPUTED, collate, evaluating, response_statistics, to_device
from align.launch import Place
from objectives import Objective, PairLoss, Response

PairBatch = dict[
    str, Any
]  # `responses`, the engine's batch; `pair`, `pairs_in_step`, and columns of the pairs, [b] or [b, 2]

#: Largest mean |log_ratio| per token at step 0, in nats: what rounding leaves, and a wrong reference exceeds.
_STEP_ZERO_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}


class PairData(Dataset[PairBatch]):
    """Prepared pairs and their reference column, collated a micro-batch at a time.

    Args:
        pairs: from `data.prepare`.
        ref_logp: `[N, 2]` nats from `reference.reference_logps`; None where no one reads it.
        layout: that the policy is attached in.
    """

    def __init__(self, pairs: datasets.Dataset, ref_logp: Tensor | None, layout: Layout, pad_token_id: int) -> None:
        self.pairs, self.ref_logp, self.layout, self.pad_token_id = pairs, ref_logp, layout, pad_token_id
        self.lengths = pair_lengths(pairs)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, micro_batch: MicroBatch) -> PairBatch:
        index = list(micro_batch.pairs)
        rows = self.pairs.select(index).to_list()
        responses = collate([as_group(row) for row in rows], self.layout, self.pad_token_id)
        batch: PairBatch = {
            "responses": responses,
            "pair": torch.tensor(index),
            "pairs_in_step": torch.tensor(micro_batch.pairs_in_step),
            "tokens": torch.tensor(float(responses.fed_tokens)),
            "truncated": torch.tensor([float(row["cut_tokens"] + row["cut_prompt_tokens"] > 0) for row in rows]),
            "win_prob": torch.tensor([[row["chosen_win_prob"], row["rejected_win_prob"]] for row in rows]),
        }
        if self.ref_logp is not None:
            batch["ref_logp"] = self.ref_logp[index]
        return batch


class _Steps(DataLoader[Any]):
    """A loader whose batches are lists of micro-batches; tells its sampler the epoch when the Trainer does."""

    def set_epoch(self, epoch: int) -> None:
        assert isinstance(self.batch_sampler, StepSampler)
        self.batch_sampler.set_epoch(epoch)


class PairTrainer(Trainer):
    """Trains a policy on pairs by any objective.

    Args:
        policy: `engine.attach`ed, at step 0.
        train_pairs, held_out: pairs with the reference column if the objective needs one.
        micro_batch_tokens: what one device holds at once, padding included.

    `on_metrics`, where it is set, is called with (step, metrics) for every logged step and evaluation.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        arguments: TrainingArguments,
        objective: Objective,
        train_pairs: PairData,
        held_out: PairData,
        tokenizer: PreTrainedTokenizerBase,
        where: Place,
        *,
        pairs_per_step: int,
        micro_batch_tokens: int,
    ) -> None:
        super().__init__(
            policy, arguments, train_dataset=train_pairs, eval_dataset=held_out, processing_class=tokenizer
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.objective, self.where = objective, where
        self.on_metrics: Callable[[int, dict[str, float]], None] | None = None
        self.pairs_per_step, self.micro_batch_tokens = pairs_per_step, micro_batch_tokens
        self._sums: dict[str, Tensor] = {}  # of the pairs since the last log, on the device
        self._window_began = time.perf_counter()
        self._losses: list[tuple[Tensor, Tensor]] = []  # (pair indices, their losses) of this rank's share of the step

    # Data ----------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This rank's share of each step, as a list of micro-batches. Not accelerate's to shard: it is sharded."""
        assert isinstance(self.train_dataset, PairData)
        sampler = StepSampler(
            self.train_dataset.lengths,
            self.train_dataset.layout,
            pairs_per_step=self.pairs_per_step,
            world=self.where.world,
            rank=self.where.rank,
            budget=self.micro_batch_tokens,
            seed=self.args.seed,
        )
        return _Steps(self.train_dataset, batch_sampler=sampler, collate_fn=list)

    def load_trained(self, checkpoint: Path) -> None:
        """Take the weights of a run that was stopped behind its last step: `train` would add a step to them."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Pairs of an epoch."""
        return len(dataloader.dataset)  # type: ignore[arg-type]

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted."""
        return 0  # the Trainer's estimate does not know our batches

    # A step --------------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of every micro-batch of this rank's share; the gradient is the mean over the step's pairs.

        Wrappers average gradients over ranks, hence the factor `world`: the mean is over pairs, not over ranks.
        """
        model.train()
        self._losses = []
        total = torch.zeros((), device=self.where.device)
        for i, batch in enumerate([self._on_device(batch) for batch in inputs]):
            last = i == len(inputs) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model=model):
                result, metrics = self._pair_loss(model, batch)
                loss = result.loss.sum() * (self.where.world / batch["pairs_in_step"])
                self.accelerator.backward(loss)
            self._add(metrics, batch)
            self._losses.append((batch["pair"], result.loss.detach()))
            total += loss.detach()
        if self.state.global_step == 0:
            self._check_gradients(model)
        return total

    def _on_device(self, batch: PairBatch) -> PairBatch:
        responses = batch["responses"].to(self.where.device)
        columns = {n: to_device(v, self.where.device) for n, v in batch.items() if n != "responses"}
        return {"responses": responses, **columns}

    def _pair_loss(self, model: nn.Module, batch: PairBatch) -> tuple[PairLoss, dict[str, Tensor]]:
        """The objective's verdict on a micro-batch, and the metrics of each of its pairs, `[b]` and detached."""
        with self.where.autocast():
            statistics = response_statistics(
                model, batch["responses"], (self.objective.needs & COMPUTED) - {"logp", "length"} | {"entropy"}
            )
        by_pair = {name: values.view(-1, 2) for name, values in statistics.items()}  # [b, 2], chosen first
        by_pair |= {name: batch[name] for name in ("ref_logp", "win_prob") if name in batch}
        entropy = by_pair.pop("entropy")
        sides = [{name: values[:, side] for name, values in by_pair.items()} for side in (0, 1)]
        needed = [Response(**{name: side[name] for name in self.objective.needs}) for side in sides]
        result = self.objective(*needed)
        with torch.no_grad():
            metrics = pair_metrics(result, Response(**sides[0]), Response(**sides[1]), "ref_logp" in batch)
            metrics["entropy"] = (entropy / by_pair["length"]).mean(1)
            metrics["truncated"] = batch["truncated"]
        return result, metrics

    def _add(self, metrics: Mapping[str, Tensor], batch: PairBatch) -> None:
        """Add a micro-batch to the sums of the window, without a sync."""
        counts = {"pairs": torch.ones_like(batch["truncated"]), "tokens": batch["tokens"]}
        for name, values in {**metrics, **counts}.items():
            self._sums[name] = self._sums.get(name, 0.0) + values.double().sum()

    def _means(self, sums: dict[str, Tensor]) -> tuple[dict[str, float], float, float]:
        """(means over pairs, pairs, tokens), summed over all ranks. One sync."""
        totals = self.accelerator.reduce(torch.stack(list(sums.values())), "sum").tolist()
        values = dict(zip(sums, totals, strict=True))
        pairs, tokens = values.pop("pairs"), values.pop("tokens")
        means = {name: value / pairs for name, value in values.items()}
        own = {name.removeprefix("objective/"): value for name, value in means.items()}
        summary = {f"objective/{name}": value for name, value in self.objective.summary(own).items()}
        return {**means, **summary}, pairs, tokens

    # Gates ---------------------------------------------------------------------------------------------------------

    def check_step_zero(self) -> None:
        """Before step 1: the policy's log-ratio to the reference column is 0 within rounding.

        Raises:
            UserError: it is not, so the reference is not the start policy.
        """
        data = self.train_dataset
        assert isinstance(data, PairData)
        if data.ref_logp is None:
            return
        some = plan_micro_batches(data.lengths[:32], data.layout, self.micro_batch_tokens)[0][:8]
        batch = self._on_device(data[MicroBatch(tuple(some), len(some))])
        self.model.train()
        with torch.no_grad(), self.where.autocast():
            statistics = response_statistics(self.model, batch["responses"], ())
        worst = ((statistics["logp"] - batch["ref_logp"].flatten()).abs() / statistics["length"]).mean().item()
        tolerance = _STEP_ZERO_TOLERANCE["bf16" if self.where.bf16 else "fp32"]
        if not worst < tolerance:
            raise UserError(
                f"before step 1 the policy is {worst:.2g} nats per token from its reference, more than {tolerance:g}: "
                "the reference is not the start policy; remove the cached reference under cache_dir and start again"
            )

    def _check_gradients(self, model: nn.Module) -> None:
        without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        if without:
            raise UserError(f"at step 1, {len(without)} trainable weights get no gradient: {', '.join(without[:3])}")

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm before clipping; stops the run, before the optimizer's step, where it or a loss is not finite."""
        norm = super()._get_grad_norm(model, grad_norm)
        losses = torch.cat([losses for _, losses in self._losses])
        if not (losses.isfinite().all() & torch.as_tensor(norm, device=losses.device).isfinite()):
            data = self.train_dataset
            assert isinstance(data, PairData)
            bad = [data.pairs[i]["row_id"] for pairs, loss in self._losses for i in pairs[~loss.isfinite()].tolist()]
            what = f"the loss is not finite for pairs {', '.join(bad[:8])}" if bad else "the gradient is not finite"
            raise UserError(
                f"step {self.state.global_step + 1}: {what}. The weights of this step were not changed; "
                f"checkpoints, every {self.args.save_steps:g} steps (train.save_every_steps), are kept under {self.args.output_dir}"
            )
        return norm

    # Reports -------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Means over the pairs since the last log, under names that are the same for every objective."""
        if "grad_norm" not in logs:  # the Trainer's closing summary, which ours replaces
            return
        means, pairs, tokens = self._means(self._sums)
        seconds = time.perf_counter() - self._window_began
        self._sums, self._window_began = {}, time.perf_counter()
        own = {"pairs_per_second": pairs / seconds, "tokens_per_second": tokens / seconds, "epoch": self.state.epoch}
        named = {f"train/{k}": v for k, v in {**means, **logs, "loss": means["loss"], **own}.items()}
        super().log(dict(named), start_time)  # which adds a key of its own
        if self.on_metrics is not None:
            self.on_metrics(self.state.global_step, named)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Exact means over the held-out pairs, dealt to the ranks; `eval/accuracy/<group>` for each group.

        The reward accuracy of a group is that of the objective's own implicit reward.
        """
        data = self.eval_dataset
        assert isinstance(data, PairData)
        groups = list(data.pairs["group"])
        sums = self._sums
        kept: dict[int, float] = {}
        began = time.perf_counter()
        self._sums = {}
        with evaluating(self.model):
            plan = plan_micro_batches(data.lengths, data.layout, FORWARD_ONLY * self.micro_batch_tokens)
            for i, group in enumerate(plan):
                if i % self.where.world != self.where.rank:
                    continue
                batch = self._on_device(data[MicroBatch(tuple(group), len(group))])
                _, metrics = self._pair_loss(self.model, batch)
                kept |= dict(zip(group, metrics["rewards/accuracies"].tolist(), strict=True))
                self._add(metrics, batch)
        right = torch.zeros(len(data), device=self.where.device, dtype=torch.double)
        right[list(kept)] = torch.tensor(list(kept.values()), device=self.where.device, dtype=torch.double)
        right = self.accelerator.reduce(right, "sum")
        means, _, _ = self._means(self._all_ranks(self._sums))
        self._sums, self._window_began = sums, self._window_began + time.perf_counter() - began
        for group in sorted(set(groups) - {""}):
            members = [i for i, name in enumerate(groups) if name == group]
            means[f"accuracy/{group}"] = right[members].mean().item()
        named = {f"{metric_key_prefix}/{name}": value for name, value in means.items()}
        if self.on_metrics is not None:
            self.on_metrics(self.state.global_step, named)
        return named

    def _all_ranks(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """A rank that got no held-out micro-batch adds zeros under the names the others have."""
        if sums or self.where.world == 1:
            return sums
        data = self.eval_dataset
        assert isinstance(data, PairData)
        with evaluating(self.model):
            batch = self._on_device(data[MicroBatch((0,), 1)])
            _, metrics = self._pair_loss(self.model, batch)
        self._sums = {}
        self._add(metrics, batch)
        return {name: torch.zeros_like(value) for name, value in self._sums.items()}


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
