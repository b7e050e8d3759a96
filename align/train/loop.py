"""The training step: micro-batches of a step, an objective, exact metrics, gates. A thin transformers.Trainer.

The Trainer keeps what it is good at: optimizer, schedule, clipping, checkpoints, wrapping, resuming. One batch of its
loader is this rank's share of a whole step, so gradient accumulation, and every question of how to scale it, is the
loop in `training_step`: a sum of pair losses over the pairs of the global batch.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from align.choices import Layout, Strategy
from align.data.pairs import as_group, pair_lengths
from align.engine import COMPUTED, collate, evaluating, response_statistics, to_device
from align.engine.batching import FORWARD_ONLY, MicroBatch, StepSampler, deal, plan_micro_batches
from align.files import write_json
from align.launch import strategy
from align.launch.rank import Rank
from align.say import UserError
from align.train.checkpoint import COST, MADE_BY, saying_what_to_do, step_of
from align.train.cost import Cost, forget_peak, peak_memory
from align.train.metrics import BY_PAIR, pair_metrics
from align.train.sentinel import CollapsedError, Sentinel
from objectives import Objective, PairLoss, Response

#: `responses`, the engine's batch; `pairs_in_step`; `pair`, `counted` and columns of the pairs, `[b]` or `[b, 2]`.
PairBatch = dict[str, Any]


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
            "counted": torch.tensor(micro_batch.counted, dtype=torch.float32),
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

    `on_metrics`, where it is set, is called with (step, metrics) for every logged step and evaluation. `on_ready` is called
    once the policy is wrapped, and loaded where a run goes on, before the first step. `stop` is asked after every step.
    `sentinel`, where it is set, looks at every logged step, and may end the run. `held_out` has, once evaluated, the accuracies of `_BY_PAIR` for every held-out pair.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        arguments: TrainingArguments,
        objective: Objective,
        train_pairs: PairData,
        held_out: PairData,
        tokenizer: PreTrainedTokenizerBase,
        rank: Rank,
        *,
        pairs_per_step: int,
        micro_batch_tokens: int,
    ) -> None:
        super().__init__(
            policy, arguments, train_dataset=train_pairs, eval_dataset=held_out, processing_class=tokenizer
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(_Hooks(self))
        strategy.check_built(self, rank)
        self.objective, self.rank = objective, rank
        self.on_metrics: Callable[[int, dict[str, float]], None] | None = None
        self.on_ready: Callable[[], None] = lambda: None
        self.stop: Callable[[], bool] = lambda: False
        self.sentinel: Sentinel | None = None
        self.pairs_per_step, self.micro_batch_tokens = pairs_per_step, micro_batch_tokens
        self.held_out: dict[str, list[float]] = {}
        self.spent = Cost()  # before the last log, on this process; of a run that goes on, by its checkpoint
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
            world=self.rank.world,
            rank=self.rank.number,
            budget=self.micro_batch_tokens,
            seed=self.args.seed,
        )
        return _Steps(self.train_dataset, batch_sampler=sampler, collate_fn=list)

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        """The Trainer would add a step to a run that was stopped behind its last one."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **options)

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
        total = torch.zeros((), device=self.rank.device)
        can_wait = self.rank.strategy is Strategy.ddp  # the others would keep whole gradients
        for i, batch in enumerate([self._on_device(batch) for batch in inputs]):
            last = i == len(inputs) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)  # DeepSpeed steps in the backward that syncs
            with self.accelerator.no_sync(model=model) if can_wait and not last else contextlib.nullcontext():
                result, metrics = self._pair_loss(model, batch)
                loss = (result.loss * batch["counted"]).sum() * (self.rank.world / batch["pairs_in_step"])
                self.accelerator.backward(loss)
            self._add(metrics, batch)
            self._losses.append((batch["pair"], result.loss.detach()))
            total += loss.detach()
        if self.state.global_step == 0:
            self._check_gradients(model)
        return total

    def _on_device(self, batch: PairBatch) -> PairBatch:
        responses = batch["responses"].to(self.rank.device)
        columns = {n: to_device(v, self.rank.device) for n, v in batch.items() if n != "responses"}
        return {"responses": responses, **columns}

    def _pair_loss(self, model: nn.Module, batch: PairBatch) -> tuple[PairLoss, dict[str, Tensor]]:
        """The objective's verdict on a micro-batch, and the metrics of each of its pairs, `[b]` and detached."""
        with self.rank.autocast():
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
        counted = batch["counted"].double()
        sums = {name: (values.double() * counted).sum() for name, values in metrics.items()}
        for name, value in {**sums, "pairs": counted.sum(), "tokens": batch["tokens"].double()}.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def _means(self, sums: dict[str, Tensor]) -> tuple[dict[str, float], float, float]:
        """(means over pairs, pairs, tokens), summed over all ranks. One sync."""
        totals = self.accelerator.reduce(torch.stack(list(sums.values())), "sum").tolist()
        values = dict(zip(sums, totals, strict=True))
        pairs, tokens = values.pop("pairs"), values.pop("tokens")
        means = {name: value / pairs for name, value in values.items()}
        own = {name.removeprefix("objective/"): value for name, value in means.items()}
        summary = {f"objective/{name}": value for name, value in self.objective.summary(own).items()}
        return {**means, **summary}, pairs, tokens

    def steps_begin(self) -> None:
        """From here on time and memory count."""
        forget_peak(self.rank.device)
        self._window_began = time.perf_counter()

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
        batch = self._on_device(data[MicroBatch(tuple(some), (True,) * len(some), len(some))])
        self.model_wrapped.train()
        with torch.no_grad(), self.rank.autocast():
            statistics = response_statistics(self.model_wrapped, batch["responses"], ())
        worst = ((statistics["logp"] - batch["ref_logp"].flatten()).abs() / statistics["length"]).mean().item()
        tolerance = _STEP_ZERO_TOLERANCE["bf16" if self.rank.bf16 else "fp32"]
        if not worst < tolerance:
            raise UserError(
                f"before step 1 the policy is {worst:.2g} nats per token from its reference, more than {tolerance:g}: "
                "the reference is not the start policy; remove the cached reference under cache_dir and start again"
            )

    def _check_gradients(self, model: nn.Module) -> None:
        if self.is_deepspeed_enabled:  # which keeps them elsewhere
            return
        without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        if without:
            raise UserError(f"at step 1, {len(without)} trainable weights get no gradient: {', '.join(without[:3])}")

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm before clipping; stops the run, before anything of the step is kept, where it or a loss is not finite."""
        norm = super()._get_grad_norm(model, grad_norm)
        losses = torch.cat([losses for _, losses in self._losses])
        finite = losses.isfinite().all() & torch.as_tensor(norm, device=losses.device).isfinite()
        if not self.rank.least(int(finite)):
            data = self.train_dataset
            assert isinstance(data, PairData)
            bad = [data.pairs[i]["row_id"] for pairs, loss in self._losses for i in pairs[~loss.isfinite()].tolist()]
            bad = list(dict.fromkeys(self.rank.gathered(bad)))
            what = f"the loss is not finite for pairs {', '.join(bad[:8])}" if bad else "the gradient is not finite"
            raise CollapsedError(
                self.state.global_step + 1,
                f"{what}. Nothing of this step is kept; "
                f"checkpoints, every {self.args.save_steps:g} steps (train.save_every_steps), are under {self.args.output_dir}",
            )
        return norm

    # Checkpoints ---------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        """Where the Trainer writes a checkpoint, before it is renamed."""
        return str(Path(str(self.args.output_dir)) / "unfinished")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write beside its place, and rename once every process has written its part; only then may older ones go."""
        folder, unfinished = Path(str(self.args.output_dir)), Path(self._get_output_dir(trial))
        with saying_what_to_do(folder):
            if self.rank.is_first:
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            cost = self.cost()
            if self.rank.is_first:
                whole = unfinished / f"checkpoint-{self.state.global_step}"
                made_by = {"strategy": self.rank.strategy.value, "processes": self.rank.world}
                cost.write(whole / COST)
                write_json(whole / MADE_BY, made_by)
                if not (folder / whole.name).exists():  # a save that repeats one is the same
                    whole.replace(folder / whole.name)
                for older in sorted(folder.glob("checkpoint-*"), key=step_of)[: -int(self.args.save_total_limit or 1)]:
                    shutil.rmtree(older, ignore_errors=True)
            self.accelerator.wait_for_everyone()  # no process ends before it is in its place

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The model's part of a checkpoint. DeepSpeed's is written with its optimizer, in shards."""
        if not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)

    def save_policy(self, folder: Path) -> None:
        """Write the policy as a Hugging Face model that one process can load, in float32. Every process calls it."""
        if not self.is_deepspeed_enabled:
            state = self.accelerator.get_state_dict(self.model_wrapped)
        if self.rank.is_first:
            with saying_what_to_do(folder.parent):
                if self.is_deepspeed_enabled:  # the last step's checkpoint is there
                    last = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
                    state = strategy.float32_weights(last)
                policy = self.accelerator.unwrap_model(self.model_wrapped)
                tied = getattr(policy, "all_tied_weights_keys", {})  # gathered apart, they no longer look like one
                policy.save_pretrained(folder, state_dict={k: v for k, v in state.items() if k not in tied})

    # Reports -------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Means over the pairs since the last log, under names that are the same for every objective."""
        if "grad_norm" not in logs:  # the Trainer's closing summary, which ours replaces
            return
        means, pairs, tokens = self._means(self._sums)
        seconds = time.perf_counter() - self._window_began
        self._sums, self._window_began = {}, time.perf_counter()
        self.spent = replace(self.spent, seconds=self.spent.seconds + seconds, tokens=self.spent.tokens + int(tokens))
        own = {"pairs_per_second": pairs / seconds, "tokens_per_second": tokens / seconds, "epoch": self.state.epoch}
        named = {f"train/{k}": v for k, v in {**means, **logs, "loss": means["loss"], **own}.items()}
        if self.sentinel is not None:
            named |= self.sentinel.sampled(self.state.global_step)
            self._window_began = time.perf_counter()  # that is no training
        super().log(dict(named), start_time)  # which adds a key of its own
        if self.on_metrics is not None:
            self.on_metrics(self.state.global_step, named)
        if self.sentinel is not None:
            self.sentinel.check(self.state.global_step, named)

    def cost(self) -> Cost:
        """What the steps so far have cost, of all processes. Every process calls it."""
        tokens = self._sums.get("tokens", torch.zeros((), device=self.rank.device, dtype=torch.double))
        peak = max(self.rank.gathered([peak_memory(self.rank.device)])) / 2**30
        return Cost(
            seconds=self.spent.seconds + time.perf_counter() - self._window_began,
            tokens=self.spent.tokens + int(self.accelerator.reduce(tokens, "sum").item()),
            peak_memory_gib=max(peak, self.spent.peak_memory_gib),
            processes=self.rank.world,
        )

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
        names = BY_PAIR if data.ref_logp is not None else BY_PAIR[:-1]
        kept: dict[int, list[float]] = {}
        began = time.perf_counter()
        self._sums = {}
        budget = FORWARD_ONLY * self.micro_batch_tokens
        with evaluating(self.model_wrapped):
            for some in deal(range(len(data)), data.lengths, self.rank.world, data.layout, budget)[self.rank.number]:
                batch = self._on_device(data[some])
                _, metrics = self._pair_loss(self.model_wrapped, batch)
                of_pairs = torch.stack([metrics[name] for name in names], 1).tolist()
                kept |= {i: own for i, counts, own in zip(some.pairs, some.counted, of_pairs, strict=True) if counts}
                self._add(metrics, batch)
        by_pair = torch.zeros(len(data), len(names), device=self.rank.device, dtype=torch.double)
        values = torch.tensor(list(kept.values()), device=self.rank.device, dtype=torch.double)
        by_pair[list(kept)] = values.view(-1, len(names))  # of a rank that has none but fillers, too
        by_pair = self.accelerator.reduce(by_pair, "sum")
        self.held_out = {name: by_pair[:, at].tolist() for at, name in enumerate(names)}
        right = self.held_out["rewards/accuracies"]
        means, _, _ = self._means(self._sums)
        self._sums, self._window_began = sums, self._window_began + time.perf_counter() - began
        for group in sorted(set(groups) - {""}):
            members = [i for i, name in enumerate(groups) if name == group]
            means[f"accuracy/{group}"] = fmean(right[i] for i in members)
        named = {f"{metric_key_prefix}/{name}": value for name, value in means.items()}
        self.control.should_evaluate = False  # done: else the end of an epoch would ask again
        if self.on_metrics is not None:
            self.on_metrics(self.state.global_step, named)
        return named


class _Hooks(TrainerCallback):
    """What the Trainer calls at its own moments."""

    def __init__(self, trainer: PairTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """The policy is wrapped, and loaded where a run goes on."""
        self._trainer.on_ready()
        self._trainer.steps_begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """All processes stop, or none: after the same step, with a checkpoint."""
        if not self._trainer.rank.least(int(not self._trainer.stop())):
            control.should_log = control.should_save = control.should_training_stop = True
        if state.global_step >= state.max_steps:
            control.should_evaluate = False  # the run evaluates at its end, and would do it twice
