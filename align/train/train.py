"""The training of one prepared run, as each of its processes does it: policy, reference, steps, evaluation, saving.

Everything it makes is in the run folder: metrics.jsonl, start.json, reference.safetensors, checkpoints/, the policy,
held_out.jsonl, samples.jsonl, results.json; it goes on from whatever of that is there. Left out: where configuration,
data and processes come from (run.py, launch.py), and the step itself (trainer.py).
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from align import engine
from align.choices import Layout, Strategy
from align.data.pairs import as_group, pair_lengths
from align.engine.batching import CPU_TOKENS
from align.files import write_json, write_text
from align.launch import strategy
from align.launch.rank import Rank, free, heeding_signals, join, leave
from align.model.chat import prompt_ids
from align.model.load import load_policy, policy_fingerprint
from align.onpolicy.samplers import Prompt, hf_sampler, seeds
from align.say import Stopped, UserError
from align.tracking.trackers import Tracker
from align.train import memory, reference, sentinel
from align.train.budget import token_budget
from align.train.checkpoint import COST, last_checkpoint, step_of
from align.train.cost import Cost
from align.train.job import Job, build_objective
from align.train.loop import PairData, PairTrainer
from align.train.memory import micro_batch_that_fits
from align.train.metrics import Report
from align.train.optim import training_arguments
from align.train.sentinel import Sentinel

_SENTINEL_STREAM = 2  # third random stream; the start model's answers are 0, the policy's 1


def train(job: Job, tracker: Tracker) -> dict[str, Any]:
    """Train in step with the other processes of the run, which are left again at the end.

    Returns:
        {"start": figures at step 0, "trained": figures, "cost": cost}. The policy is in its folder then.

    Raises:
        UserError: anything the user can put right.
        CollapsedError: the run is beyond hope.
        Stopped: it was asked to stop, and has written a checkpoint.
    """
    try:
        return _Training(job, join(job.cluster), tracker).run()
    finally:
        leave()


class _Training:
    """One process's part of a run: reference, training, evaluation, saving."""

    def __init__(self, job: Job, rank: Rank, tracker: Tracker) -> None:
        self.job, self.cfg, self.rank, self.tracker = job, job.cfg, rank, tracker
        self.objective = build_objective(job.cfg)
        self.cache = Path(job.cfg.cache_dir).expanduser()
        self.checkpoint: Path | None = rank.from_first(lambda: last_checkpoint(job.dir / "checkpoints"))
        known = self.checkpoint or job.dir
        if not rank.least(int(known.exists())):
            raise UserError(f"run_dir: some processes do not see {known}; all nodes must share the folder of the run")
        self.at_start: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        """Train, evaluate and save with all processes."""
        job, cfg, rank = self.job, self.cfg, self.rank
        policy, layout, attention = self._policy()
        self.layout, self.attention = layout, attention
        self.budget = self._tokens_per_micro_batch(policy)
        trainer = self._trainer(policy)
        del policy
        report: Report | None = None
        if rank.is_first:
            every = cfg.train.eval_every_steps
            report = Report(job.dir / "metrics.jsonl", self.tracker, job.steps, step_of(self.checkpoint), every)
        trainer.on_metrics = report
        try:
            self._fit(trainer)
            cost = asdict(trainer.cost())
            measured = {"start": self.at_start, "trained": trainer.evaluate()}
            results = {side: {k.removeprefix("eval/"): v for k, v in m.items()} for side, m in measured.items()}
            self._save(trainer)
            trainer.accelerator.wait_for_everyone()
            trainer.accelerator.free_memory()
            del trainer, self.made
            strategy.forget()
        finally:
            if report is not None:
                report.close()
        return {**results, "cost": cost}

    def _fit(self, trainer: PairTrainer) -> None:
        trainer.on_ready = lambda: self._at_step_zero(trainer)
        with heeding_signals() as request:
            self.request = request
            trainer.stop = lambda: request.came
            trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
        at = int(trainer.state.global_step)
        if at < self.job.steps:
            raise Stopped(f"at step {at} of {self.job.steps}, with a checkpoint", request.time_is_up)

    def _stop_before_step_one(self) -> None:
        """All processes stop, or none."""
        if not self.rank.least(int(not self.request.came)):
            raise Stopped("before the first step", self.request.time_is_up)

    def _at_step_zero(self, trainer: PairTrainer) -> None:
        """The reference column and the start policy's figures: made before step 1, read again where a run goes on."""
        columns, figures = self.job.dir / "reference.safetensors", self.job.dir / "start.json"
        splits = {"train": trainer.train_dataset, "held_out": trainer.eval_dataset}
        if self.checkpoint is not None:
            self._say(f"going on from {self.checkpoint}")
            trainer.spent = Cost.read(self.checkpoint / COST)
            known = load_file(str(columns))
            for name, split in splits.items():
                split.ref_logp = known.get(name)
            self.at_start = json.loads(figures.read_text())
            trainer.sentinel = self._sentinel(trainer)
            return
        # Held-out pairs always get the column: they are few, and what is comparable across objectives needs it.
        wanted = ["held_out"] + (["train"] if "ref_logp" in self.objective.needs else [])
        made = {name: self._reference(trainer, splits[name], name) for name in wanted}
        for name, column in made.items():
            splits[name].ref_logp = column
        trainer.check_step_zero()
        self.at_start = trainer.evaluate()
        if self.rank.is_first:
            save_file(made, str(columns.with_suffix(".unfinished")))
            columns.with_suffix(".unfinished").replace(columns)
            write_json(figures, self.at_start)
        trainer.sentinel = self._sentinel(trainer)

    def _sentinel(self, trainer: PairTrainer) -> Sentinel:
        """Of the policy in training, which the first process samples: it must hold whole weights."""
        cfg, tokenizer = self.cfg, self.job.start.tokenizer
        asked = list(dict.fromkeys(self.job.pairs.held_out["conversation"]))[: sentinel.PROMPTS]
        prompts = [  # the same random numbers each time, and not those of the win rate
            Prompt(
                token_ids=prompt_ids(json.loads(text), tokenizer),
                seeds=seeds(cfg.seed, _SENTINEL_STREAM, text, cfg.evaluation.samples_per_prompt),
            )
            for text in asked
        ]

        def sample() -> list[list[int]]:
            policy = trainer.accelerator.unwrap_model(trainer.model_wrapped)
            devices = [self.rank.device] if self.rank.device.type == "cuda" else []
            with torch.random.fork_rng(devices), self.rank.autocast():  # training goes on as if nobody had looked
                drawn = hf_sampler(policy, tokenizer, cfg.sampling.tokens_per_batch)(
                    prompts,
                    temperature=cfg.evaluation.temperature,
                    top_p=cfg.evaluation.top_p,
                    max_new_tokens=cfg.evaluation.max_new_tokens,
                )
            return [answer.response_ids for of_prompt in drawn for answer in of_prompt]

        start = self.at_start["eval/mean_logp/chosen"]
        return Sentinel(cfg=cfg.sentinel, rank=self.rank, start_mean_logp=start, sample=sample)

    def _reference(self, trainer: PairTrainer, split: PairData, name: str) -> Tensor:
        return reference.reference_logps(
            trainer.model_wrapped,
            policy_fingerprint(self.cfg.model, self.job.start, self.cfg.seed),
            split.pairs,
            self.job.pairs.fingerprint,
            split.lengths,
            self.rank,
            layout=self.layout,
            budget=self.budget,
            pad_token_id=split.pad_token_id,
            cache=self.cache,
            name=name,
            between=self._stop_before_step_one,
        )

    def _say(self, text: str) -> None:
        if self.rank.is_first:
            print(text, flush=True)

    # The policy ----------------------------------------------------------------------------------------------------

    def _policy(self) -> tuple[PreTrainedModel, Layout, str]:
        """The policy at step 0 and how every process can feed it, checked against its own logits.

        Where weights are divided, the first process checks a whole copy before any is divided.
        """
        rank = self.rank
        if rank.sharded:
            layout, attention, why = rank.from_first(self._settled_whole)
            self.made = training_arguments(self.cfg, self.job.dir / "checkpoints", rank)
            policy = load_policy(self.cfg.model, self.job.start, self.cfg.seed)
        else:
            self.made = training_arguments(self.cfg, self.job.dir / "checkpoints", rank)
            policy = self._whole_policy(rank.device)
            layout, attention, why = self._settled(policy)
            layouts = list(Layout)  # the plan of a step must be the same for all
            layout = layouts[-rank.least(-layouts.index(layout))]
        engine.attach(policy, layout, attention)
        if why:
            self._say(why)
        if self.cfg.engine.gradient_checkpointing:  # as the Trainer will, but before memory is measured
            policy.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        return policy, layout, attention

    def _settled_whole(self) -> tuple[Layout, str, str | None]:
        """By a whole copy, on the GPU if it has room for one, and gone again."""
        policy, device = self._whole_policy(torch.device("cpu")), self.rank.device
        if device.type == "cpu" or torch.cuda.mem_get_info(device)[0] > 2 * policy.get_memory_footprint():
            layout, attention, why = self._settled(policy.to(device))
        else:
            layout, _, why = self._settled(policy)
            attention = engine.backends(device, self.cfg.model.attn_implementation)[0]
        del policy
        free()
        return layout, attention, why

    def _settled(self, policy: PreTrainedModel) -> tuple[Layout, str, str | None]:
        pairs = self.job.pairs.train
        some = [as_group(pair) for pair in pairs.select(range(min(2, len(pairs))))]
        groups = [(prompt[-32:], [chosen[:32], rejected[:24]]) for prompt, (chosen, rejected) in some]
        with self.rank.autocast():
            return engine.settle(policy, groups, self.cfg.engine.layout, self.cfg.model.attn_implementation)

    def _whole_policy(self, device: torch.device) -> PreTrainedModel:
        policy = load_policy(self.cfg.model, self.job.start, self.cfg.seed)
        return policy.to(device)

    def _tokens_per_micro_batch(self, policy: PreTrainedModel) -> int:
        """The setting, or what fits every process's device."""
        wanted = self.cfg.engine.tokens_per_micro_batch
        if isinstance(wanted, int):
            return wanted
        if self.rank.device.type == "cpu":
            return CPU_TOKENS
        if self.rank.sharded or self.rank.strategy is Strategy.zero2:
            fits = micro_batch_that_fits(self.cfg, self.job.start, self.job.pairs, self.job.cluster)
        else:
            lengths = pair_lengths(self.job.pairs.train)
            longest = sorted(range(len(lengths)), key=lambda i: -sum(lengths[i]))[:8]
            groups = [as_group(self.job.pairs.train[i]) for i in longest]
            needs = sorted(self.objective.needs & engine.COMPUTED - {"logp", "length"})
            need = memory.need(memory.setup(self.cfg, self.job.start, self.job.cluster), self.rank.strategy, 1)
            later = need.optimizer + need.buckets
            fits = token_budget(policy, groups, self.layout, needs, self.rank, later)
        fits = self.rank.least(fits)
        self._say(f"engine.tokens_per_micro_batch={fits}, by free memory")
        return fits

    def _trainer(self, policy: PreTrainedModel) -> PairTrainer:
        tokenizer = self.job.start.tokenizer
        pad = int(tokenizer.pad_token_id)
        return PairTrainer(
            policy,
            self.made,
            self.objective,
            PairData(self.job.pairs.train, None, self.layout, pad),
            PairData(self.job.pairs.held_out, None, self.layout, pad),
            tokenizer,
            self.rank,
            pairs_per_step=self.cfg.train.pairs_per_step,
            micro_batch_tokens=self.budget,
        )

    # The end -------------------------------------------------------------------------------------------------------

    def _save(self, trainer: PairTrainer) -> None:
        folder = self.job.policy
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        if self.rank.is_first:
            shutil.rmtree(unfinished, ignore_errors=True)
        trainer.save_policy(unfinished)
        if self.rank.is_first:
            self.job.start.tokenizer.save_pretrained(unfinished)
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before its results
            unfinished.replace(folder)
            names = sorted(trainer.held_out.keys() - {"rewards/accuracies"})  # which no two objectives share
            columns = zip(self.job.pairs.held_out["row_id"], *(trainer.held_out[name] for name in names), strict=True)
            lines = (json.dumps(dict(zip(("pair", *names), values, strict=True))) for values in columns)
            write_text(self.job.dir / "held_out.jsonl", "".join(f"{line}\n" for line in lines))
