"""The training of a policy on pairs, from top to bottom, as each process does it.

    policy, settled layout -> reference column -> step zero -> steps, logged, evaluated, saved -> the trained policy

Its folder then holds metrics.jsonl, start.json, reference.safetensors, checkpoints/, held_out.jsonl and the policy; it goes
on from whatever of that is there. Left out: where settings, pairs and processes come from, and the judge (runs/); the step
itself (loop.py).
"""

import contextlib
import itertools
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.trainer_utils import align_special_tokens

from align import engine
from align.choices import Layout, Strategy
from align.data.pairs import as_group
from align.engine.batching import StepSampler
from align.files import whole, write_json, write_text
from align.launch import strategy
from align.launch.rank import Rank, StopRequest, free, heeding_signals, join, leave
from align.model.load import load_policy, policy_fingerprint
from align.say import Stopped, UserError, say
from align.tracking.trackers import Tracker
from align.train import memory, reference
from align.train.checkpoint import COST, last_checkpoint, load_checkpoint, save_checkpoint, save_policy, step_of
from align.train.job import Job, PairData, build_objective
from align.train.loop import Loop, check_step_zero, evaluate
from align.train.memory import longest_pair, micro_batch_that_fits, token_budget
from align.train.metrics import Cost, Meter, Report, Tally
from align.train.sentinel import sentinel_of
from objectives import Objective


def train(job: Job, tracker: Tracker) -> None:
    """Train in step with the other processes of the run, which are left again at the end.

    The policy is then in its folder, and `job.figures` has {"start": figures at step 0, "trained": figures, "cost": cost}.

    Raises:
        CollapsedError: the run is beyond hope.
        Stopped: it was asked to stop, and has written a checkpoint.
    """
    with contextlib.ExitStack() as at_the_end:
        at_the_end.callback(leave)
        rank, knobs, checkpoints = join(job.cluster), job.cfg.train, job.dir / "checkpoints"
        checkpoint = common_checkpoint(job, rank)
        loop, splits = prepare(job, rank)
        pairs, held_out = splits["train"], splits["held_out"]
        sampler = StepSampler(
            pairs.lengths, pairs.layout, knobs.pairs_per_step, rank.world, rank.number, loop.budget, job.cfg.seed
        )
        report = Report(job.dir / "metrics.jsonl", tracker, rank, job.steps, checkpoint, step_of(checkpoint))
        at_the_end.callback(report.bar.close)
        with heeding_signals() as request:
            start = resume(job, loop, splits, checkpoint) if checkpoint else begin(job, loop, splits, report, request)
            watch = sentinel_of(job, loop.accelerator.unwrap_model(loop.model), start["eval/mean_logp/chosen"], rank)
            meter = Meter(rank, Cost(**json.loads((checkpoint / COST).read_text())) if checkpoint else Cost())
            for share in itertools.islice(sampler.after(loop.done), job.steps - loop.done):
                batches = [pairs.batch(some, rank.device) for some in share]
                update = loop.step(batches)
                meter.tokens += sum(batch.responses.fed_tokens for batch in batches)
                stops, last = not rank.least(int(not request.came)), loop.done == job.steps
                if stops or loop.done % knobs.log_every_steps == 0:
                    metrics = step_metrics(loop, meter, update, len(sampler))
                    with meter.paused():
                        metrics |= watch.sampled(loop.done)
                    report(loop.done, metrics)
                    watch.check(loop.done, metrics)
                if knobs.eval_every_steps and loop.done % knobs.eval_every_steps == 0 and not last:
                    with meter.paused():
                        report(loop.done, evaluate(loop, held_out)[0])
                if stops or last or loop.done % knobs.save_every_steps == 0:
                    save_checkpoint(loop, checkpoints, meter.cost(), knobs.keep_checkpoints)
                if stops and not last:
                    raise Stopped(f"at step {loop.done} of {job.steps}, with a checkpoint", request.time_is_up)
        cost = meter.cost()
        trained, of_pairs = evaluate(loop, held_out)
        report(loop.done, trained)
        sides = {"start": start, "trained": trained}
        figures = {side: {k.removeprefix("eval/"): v for k, v in metrics.items()} for side, metrics in sides.items()}
        save(job, loop, {**figures, "cost": asdict(cost)}, of_pairs)
        loop.accelerator.free_memory()
        strategy.forget()


def common_checkpoint(job: Job, rank: Rank) -> Path | None:
    """Return the checkpoint to go on from, if any; raise `UserError` where a process does not see it or the folder."""
    checkpoint: Path | None = rank.from_first(lambda: last_checkpoint(job.dir / "checkpoints"))
    known = checkpoint or job.dir
    if not rank.least(int(known.exists())):
        raise UserError(f"run_dir: some processes do not see {known}; all nodes must share the folder of the run")
    return checkpoint


def prepare(job: Job, rank: Rank) -> tuple[Loop, dict[str, PairData]]:
    """Return the loop at step 0, and the pairs of both splits."""
    cfg, objective, tokenizer = job.cfg, build_objective(job.cfg), job.start.tokenizer
    policy, layout, accelerator = build_policy(job, rank)
    splits = {"train": job.pairs.train, "held_out": job.pairs.held_out}
    data = {name: PairData(pairs, layout, tokenizer.pad_token_id) for name, pairs in splits.items()}
    budget = tokens_per_micro_batch(job, policy, objective, data["train"], rank)
    align_special_tokens(policy, tokenizer)  # as they are saved with it
    set_seed(cfg.seed)
    return Loop(policy, objective, cfg.optimizer, job.steps, budget, accelerator, rank), data


def build_policy(job: Job, rank: Rank) -> tuple[PreTrainedModel, Layout, Accelerator]:
    """Return the policy at step 0, the layout in which every process can feed it, and the accelerator of the training.

    The policy is checked against its own logits. Where weights are divided, rank 0 checks a whole copy before any is.
    """
    cfg, clip = job.cfg, job.cfg.optimizer.max_grad_norm
    if rank.sharded:
        layout, attention, why = rank.from_first(lambda: settle_copy(job, rank))
        accelerator = strategy.build_accelerator(rank, clip)
        policy = load_policy(cfg.model, job.start, cfg.seed)
    else:
        accelerator = strategy.build_accelerator(rank, clip)
        policy = load_policy(cfg.model, job.start, cfg.seed).to(rank.device)
        layout, attention, why = settle(job, policy, rank)
        layouts = list(Layout)  # the plan of a step must be the same for all
        layout = layouts[-rank.least(-layouts.index(layout))]
    engine.attach(policy, layout, attention)
    if why:
        say(why)
    if cfg.engine.gradient_checkpointing:
        policy.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return policy, layout, accelerator


def settle_copy(job: Job, rank: Rank) -> tuple[Layout, str, str | None]:
    """Choose layout and attention on an unsharded copy of the model, on the GPU if it has room for one, then free it."""
    policy, device = load_policy(job.cfg.model, job.start, job.cfg.seed), rank.device
    if device.type == "cpu" or torch.cuda.mem_get_info(device)[0] > 2 * policy.get_memory_footprint():
        layout, attention, why = settle(job, policy.to(device), rank)
    else:
        layout, _, why = settle(job, policy, rank)
        attention = engine.backends(device, job.cfg.model.attn_implementation)[0]
    del policy
    free()
    return layout, attention, why


def settle(job: Job, policy: PreTrainedModel, rank: Rank) -> tuple[Layout, str, str | None]:
    """Choose layout and attention on some tokens of two pairs."""
    some = [as_group(pair) for pair in job.pairs.train.select(range(min(2, len(job.pairs.train))))]
    with rank.autocast():
        return engine.settle(policy, some, job.cfg.engine.layout, job.cfg.model.attn_implementation)


def tokens_per_micro_batch(job: Job, policy: PreTrainedModel, objective: Objective, data: PairData, rank: Rank) -> int:
    """Return the setting, or what fits every process's device."""
    fits = micro_batch_that_fits(job.cfg, job.start, job.cluster, longest_pair(job.cfg, job.pairs))
    if isinstance(job.cfg.engine.tokens_per_micro_batch, int) or rank.device.type == "cpu":
        return fits
    if not rank.sharded and rank.strategy is not Strategy.zero2:
        needs = sorted(objective.needs & engine.COMPUTED - {"logp", "length"})
        need = memory.need(memory.setup(job.cfg, job.start, job.cluster), rank.strategy, 1)
        fits = token_budget(policy, data, needs, rank, later=need.optimizer + need.buckets)
    fits = rank.least(fits)
    say(f"engine.tokens_per_micro_batch={fits}, by free memory")
    return fits


def begin(job: Job, loop: Loop, splits: dict[str, PairData], report: Report, request: StopRequest) -> dict[str, float]:
    """Make the reference column, check step zero, and return the start policy's figures."""
    rank = loop.rank

    def between_shards() -> None:
        if not rank.least(int(not request.came)):  # all processes stop, or none does
            raise Stopped("before the first step", request.time_is_up)

    # Held-out pairs always get the column: they are few, and what is comparable across objectives needs it.
    wanted = ["held_out"] + (["train"] if "ref_logp" in loop.objective.needs else [])
    for name in wanted:
        split = splits[name]
        split.ref_logp = reference.reference_logps(
            loop.model,
            policy_fingerprint(job.cfg.model, job.start, job.cfg.seed),
            split,
            job.pairs.fingerprint,
            rank,
            budget=loop.budget,
            cache=Path(job.cfg.cache_dir).expanduser(),
            name=name,
            between=between_shards,
        )
    check_step_zero(loop, splits["train"])
    start, _ = evaluate(loop, splits["held_out"])
    report(0, start)
    if rank.is_first:
        with whole(job.dir / "reference.safetensors") as file:
            save_file({name: splits[name].ref_logp for name in wanted}, file)
        write_json(job.dir / "start.json", start)
    return start


def resume(job: Job, loop: Loop, splits: dict[str, PairData], checkpoint: Path) -> dict[str, float]:
    """Go on from a checkpoint, and return the start policy's figures."""
    say(f"going on from {checkpoint}")
    load_checkpoint(loop, checkpoint)
    columns = load_file(job.dir / "reference.safetensors")
    for name, split in splits.items():
        split.ref_logp = columns.get(name)
    start: dict[str, float] = json.loads((job.dir / "start.json").read_text())
    return start


def step_metrics(loop: Loop, meter: Meter, update: dict[str, float], steps_per_epoch: int) -> dict[str, float]:
    """Return means over the pairs since the last log, under names that are the same for every objective."""
    means, pairs, tokens = loop.tally.means(loop.objective, loop.rank)
    loop.tally, seconds = Tally(), meter.lap()
    epoch, steps = divmod(loop.done - 1, steps_per_epoch)
    speed = {"pairs_per_second": pairs / seconds, "tokens_per_second": tokens / seconds}
    metrics = {**means, **update, **speed, "epoch": epoch + (steps + 1) / steps_per_epoch}
    return {f"train/{name}": value for name, value in metrics.items()}


def save(job: Job, loop: Loop, figures: dict[str, Any], of_pairs: dict[str, list[float]]) -> None:
    """Write the policy, its tokenizer, which held-out pairs it ranks rightly, and last the figures.

    Every process calls it, and none goes on before all is there: what is made of a policy is never of one that is lost.
    """
    folder = job.policy
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    if loop.rank.is_first:
        shutil.rmtree(unfinished, ignore_errors=True)
    save_policy(loop, unfinished, job.dir / "checkpoints")
    if loop.rank.is_first:
        job.start.tokenizer.save_pretrained(unfinished)
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before its results
        unfinished.replace(folder)
        names = sorted(of_pairs.keys() - {"rewards/accuracies"})  # which no two objectives share
        columns = zip(job.pairs.held_out["row_id"], *(of_pairs[name] for name in names), strict=True)
        lines = (json.dumps(dict(zip(("pair", *names), values, strict=True))) for values in columns)
        write_text(job.dir / "held_out.jsonl", "".join(f"{line}\n" for line in lines))
        write_json(job.figures, figures)
    loop.accelerator.wait_for_everyone()
