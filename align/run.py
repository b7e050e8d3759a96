"""A run from its configuration: prepare, plan, reference, train, evaluate, save. Re-running it goes on or is done.

Everything that can be wrong is found before a model is loaded; everything a run makes is in its folder:
config.yaml, plan.txt, first_pair.txt, metrics.jsonl, results.json, samples.jsonl, checkpoints/, model/.
"""

import contextlib
import inspect
import json
import math
import os
import shutil
import signal
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

import objectives
from align import (
    arguments,
    card,
    config,
    data,
    engine,
    evaluate,
    launch,
    memory,
    model,
    plan,
    reference,
    slurm,
    strategy,
    tracking,
)
from align.config import Launcher, Layout, RunConfig, Stopped, Strategy, UserError
from align.launch import Fleet, Place
from align.trainer import MADE_BY, PairData, PairTrainer, step_of
from objectives import Objective

_ENDING = 5.0  # seconds in which the processes of a run that was killed are gone


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run that is checked and prepared, as it is handed to the processes that train."""

    cfg: RunConfig
    start: model.Start
    pairs: data.Pairs
    fleet: Fleet
    identity: dict[str, Any]
    dir: Path
    plan: str

    @property
    def results(self) -> Path:
        """The file whose existence says that the run is complete."""
        return self.dir / "results.json"

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return plan.total_steps(self.cfg, len(self.pairs.train))


def run(cfg: RunConfig) -> float | None:
    """Run `cfg` to its end, or print its plan, or submit it. Returns the win rate against the start model where there is
    a judge, else the held-out accuracy by mean_logp; None where nothing was trained.

    Raises:
        UserError: anything the user can put right.
        Stopped: it was asked to stop.
    """
    _quieten()
    slurm.take_place()
    job = prepare(cfg)
    if cfg.plan:
        _say(job.plan)
        return None
    if not job.results.exists():
        if cfg.cluster.launcher is Launcher.slurm and not launch.inside():
            given = replace(
                cfg, run_dir=str(job.dir.resolve()), cache_dir=str(Path(cfg.cache_dir).expanduser().resolve())
            )
            slurm.enqueue(given, job.fleet.per_node, job.fleet.device == "cuda")
            return None
        _train(job)
    else:
        _say(f"This run is complete: {job.dir}. To train it anew, delete that folder or give another run_dir=")
    results = json.loads(job.results.read_text()) if _is_first() else None
    if results is None:
        return None
    _say(card.text_table(card.table(results["start"], results["trained"])))
    _say(f"model    {job.dir / 'model'}\nmetrics  {job.dir / 'metrics.jsonl'}")
    trained: dict[str, float] = results["trained"]
    return trained.get("win_rate", trained["accuracy/mean_logp"])


def prepare(cfg: RunConfig) -> Job:
    """Check everything, and make what the processes need: data, start model, plan, the run folder's name."""
    objective = check(cfg)
    fleet = launch.fleet(cfg.cluster, cfg.plan)
    cache = Path(cfg.cache_dir).expanduser()
    try:
        start = model.prepare_start(cfg.model, cache)
    except model.NotHereError as error:
        if not cfg.plan:
            raise
        _say(f"align: {error}; the plan counts tokens by the built-in tokenizer: more of them, the same steps")
        start = model.stand_in(cfg.model)
    pairs = data.prepare(cfg.dataset, cfg.train, cfg.model.system_message, start, cache)
    check_data(cfg, objective, start, pairs, fleet)
    fleet = plan.settle_strategy(cfg, start, pairs, fleet)
    if not cfg.plan:
        strategy.check(fleet)
        if cfg.cluster.launcher is Launcher.slurm and not launch.inside():
            slurm.check()
    if warning := arguments.high_learning_rate(cfg.optimizer, plan.shape(cfg.model, start).parameters):
        warnings.warn(warning, UserWarning, stacklevel=2)
    if warning := plan.too_large(cfg, start, pairs, fleet):
        warnings.warn(warning, UserWarning, stacklevel=2)
    identity = _identity(plain(cfg), objective, start, pairs, fleet)
    names = f"{cfg.model.name}-{cfg.dataset.name}-{cfg.objective['name']}"
    folder = Path(cfg.run_dir or f"runs/{names}-{config.fingerprint(identity)[:6]}").expanduser()
    text = plan.describe(cfg, start, pairs, objective, fleet)
    job = Job(cfg=cfg, start=start, pairs=pairs, fleet=fleet, identity=identity, dir=folder, plan=text)
    _recognise(job)
    return job


def _quieten() -> None:
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _is_first() -> bool:
    """Of several processes that were started from outside, the one that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def _say(text: str) -> None:
    if _is_first():
        print(text)


def _train(job: Job) -> None:
    """Train in this process, in processes of ours, or as one of several that were started from outside."""
    with contextlib.ExitStack() as held:
        if _is_first():
            held.enter_context(_own_folder(job.dir))
            check_checkpoint(job)
            _open_folder(job)
        if launch.inside() or job.fleet.strategy is Strategy.single:
            work(job)
        else:
            launch.start(job.fleet, job.dir / "logs", work, job)


def work(job: Job) -> None:
    """What each process does."""
    _quieten()
    place = launch.join(job.fleet)
    try:
        _Training(job, place).run()
    finally:
        launch.leave()


def check(cfg: RunConfig) -> Objective:
    """Everything that can be wrong with the configuration alone; builds the objective."""
    config.check(cfg)
    arguments.check_optimizer(cfg.optimizer)
    tracking.check(cfg)
    if cfg.dataset.judge is not None:
        config.resolve(cfg.dataset.judge, "dataset.judge")
    values = dict(cfg.objective)
    try:
        if code := values.pop("code", None):
            objectives.load_file(code)
        return objectives.build(values)
    except ValueError as error:
        raise UserError(str(error)) from error


def check_data(cfg: RunConfig, objective: Objective, start: model.Start, pairs: data.Pairs, fleet: Fleet) -> None:
    """What the objective and the batch ask of the data."""
    data.check_bos(pairs, start.tokenizer)
    plan.check_batch(cfg, len(pairs.train), fleet.world)
    for name, split in (("training", pairs.train), ("held-out", pairs.held_out)):
        sides = zip(split["chosen_win_prob"], split["rejected_win_prob"], strict=True)
        without = sum(math.isnan(chosen) or math.isnan(rejected) for chosen, rejected in sides)
        if "win_prob" in objective.needs and without:
            raise UserError(
                f"{cfg.objective['name']} needs win_prob, which {without} of {len(split)} {name} pairs of dataset "
                f"{cfg.dataset.name} lack: give rows chosen_win_prob and rejected_win_prob (dataset.columns renames), or "
                "for sppo take the labels as certain with objective.target=hard"
            )


def _recognise(job: Job) -> None:
    """Refuse a folder that holds another run."""
    known = job.dir / "identity.json"
    if not known.exists():
        return
    try:
        before = json.loads(known.read_text())
    except ValueError as error:
        raise UserError(f"run_dir: {known} is damaged; delete {job.dir} or give another run_dir=") from error
    differs = _differences(before, json.loads(json.dumps(job.identity, default=str)))
    if differs:
        raise UserError(f"{job.dir} holds another run ({'; '.join(differs[:4])}); give another run_dir= or delete it")


def check_checkpoint(job: Job) -> None:
    """Raise `UserError` for a checkpoint that this strategy on so many processes cannot read."""
    checkpoint = last_checkpoint(job.dir / "checkpoints")
    if checkpoint is None:
        return
    made = json.loads((checkpoint / MADE_BY).read_text())
    before, now = Strategy(made["strategy"]), job.fleet.strategy
    whole = {Strategy.single, Strategy.ddp}  # both write weights and optimizer in one piece
    same = before is now or {before, now} <= whole
    by_rank = before in (Strategy.zero2, Strategy.zero3)  # DeepSpeed's shards are those of its ranks
    if not same or (by_rank and made["processes"] != job.fleet.world):
        other = f"cluster.strategy={before.value}" + (f" cluster.processes={made['processes']}" if by_rank else "")
        raise UserError(
            f"{checkpoint} was written by {before.value} on {made['processes']} process(es), and this is {now.value} on "
            f"{job.fleet.world}: go on with {other}, or begin anew with another run_dir="
        )


@contextlib.contextmanager
def _own_folder(folder: Path) -> Iterator[None]:
    """The run folder, which is created, and its lock."""
    lock = FileLock(folder / ".lock", timeout=_ENDING)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UserError(f"another process is training in {folder}; give another run_dir=") from error
    except OSError as error:
        raise UserError(f"run_dir: cannot write {folder} ({error.strerror}); give another run_dir=") from error
    with lock:
        yield


def _open_folder(job: Job) -> None:
    """Write down what runs."""
    try:
        pair = data.show_pair(job.pairs.train[0], job.start.tokenizer)
        OmegaConf.save(OmegaConf.create(plain(job.cfg)), job.dir / "config.yaml")
        (job.dir / "plan.txt").write_text(job.plan + "\n")
        (job.dir / "first_pair.txt").write_text(pair + "\n")
        _write_json(job.dir / "identity.json", job.identity)
    except OSError as error:
        raise UserError(f"run_dir: cannot write {job.dir} ({error.strerror}); give another run_dir=") from error
    print(f"{job.plan}\n{pair}\nrun folder  {job.dir}", flush=True)


def _write_json(file: Path, value: Any) -> None:
    """Whole or not at all."""
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(value, indent=2, default=str))
    unfinished.replace(file)


class _Training:
    """One process's part of a run: reference, training, evaluation, saving."""

    def __init__(self, job: Job, place: Place) -> None:
        self.job, self.cfg, self.where = job, job.cfg, place
        self.objective = check(job.cfg)
        self.cache = Path(job.cfg.cache_dir).expanduser()
        self.checkpoint = last_checkpoint(job.dir / "checkpoints")
        self.at_start: dict[str, float] = {}

    def run(self) -> None:
        """Train and evaluate with all processes; then the first one alone asks the judge, where there is one."""
        job, cfg, where = self.job, self.cfg, self.where
        policy, layout, attention = self._policy()
        self.layout, self.attention = layout, attention
        self.budget = self._tokens_per_micro_batch(policy)
        trainer = self._trainer(policy)
        del policy
        tracker = tracking.start(cfg, job.dir, plain(cfg), where.rank)
        report: _Report | None = None
        if where.rank == 0:
            every = cfg.train.eval_every_steps
            report = _Report(job.dir / "metrics.jsonl", tracker, job.steps, step_of(self.checkpoint), every)
        trainer.on_metrics = report
        failed = True
        results: dict[str, Any] = {}
        try:
            self._fit(trainer)
            measured = {"start": self.at_start, "trained": trainer.evaluate()}
            results = {side: {k.removeprefix("eval/"): v for k, v in m.items()} for side, m in measured.items()}
            self._save(trainer)
            trainer.accelerator.wait_for_everyone()
            trainer.accelerator.free_memory()
            del trainer
            launch.leave()
            if where.rank == 0:
                self._finish(results)
            failed = False
        except Stopped:
            failed = False
            raise
        finally:
            if report is not None:
                report.close()
            summary = {f"result/{name}": value for name, value in results.get("trained", {}).items()}
            tracker.finish(summary, failed)

    def _fit(self, trainer: PairTrainer) -> None:
        trainer.on_ready = lambda: self._at_step_zero(trainer)
        with launch.heeding_signals() as request:
            trainer.stop = lambda: request.signal is not None
            trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
        at = int(trainer.state.global_step)
        if at < self.job.steps:
            raise Stopped(f"at step {at} of {self.job.steps}, with a checkpoint", request.signal == signal.SIGUSR2)

    def _at_step_zero(self, trainer: PairTrainer) -> None:
        """The reference column and the start policy's figures: made before step 1, read again where a run goes on."""
        columns, figures = self.job.dir / "reference.safetensors", self.job.dir / "start.json"
        splits = {"train": trainer.train_dataset, "held_out": trainer.eval_dataset}
        if self.checkpoint is not None:
            self._say(f"going on from {self.checkpoint}")
            known = load_file(str(columns))
            for name, split in splits.items():
                split.ref_logp = known.get(name)
            self.at_start = json.loads(figures.read_text())
            return
        # Held-out pairs always get the column: they are few, and what is comparable across objectives needs it.
        wanted = ["held_out"] + (["train"] if "ref_logp" in self.objective.needs else [])
        made = {name: self._reference(trainer, splits[name], name) for name in wanted}
        for name, column in made.items():
            splits[name].ref_logp = column
        trainer.check_step_zero()
        self.at_start = trainer.evaluate()
        if self.where.rank == 0:
            save_file(made, str(columns.with_suffix(".unfinished")))
            columns.with_suffix(".unfinished").replace(columns)
            _write_json(figures, self.at_start)

    def _reference(self, trainer: PairTrainer, split: PairData, name: str) -> Tensor:
        return reference.reference_logps(
            trainer.model_wrapped,
            model.policy_fingerprint(self.cfg.model, self.job.start, self.cfg.seed),
            split.pairs,
            self.job.pairs.fingerprint,
            split.lengths,
            self.where,
            layout=self.layout,
            budget=self.budget,
            pad_token_id=split.pad_token_id,
            cache=self.cache,
            name=name,
        )

    def _say(self, text: str) -> None:
        if self.where.rank == 0:
            print(text, flush=True)

    # The policy ----------------------------------------------------------------------------------------------------

    def _policy(self) -> tuple[PreTrainedModel, Layout, str]:
        """The policy at step 0 and how every process can feed it, checked against its own logits.

        Where weights are divided, the first process checks a whole copy before any is divided.
        """
        where = self.where
        if where.sharded:
            layout, attention, why = where.from_first(lambda: self._settled(self._whole_policy(where.device)))
            self.made = arguments.training_arguments(self.cfg, self.job.dir / "checkpoints", where)
            policy = model.load_policy(self.cfg.model, self.job.start, self.cfg.seed)
        else:
            self.made = arguments.training_arguments(self.cfg, self.job.dir / "checkpoints", where)
            policy = self._whole_policy(where.device)
            layout, attention, why = self._settled(policy)
            layouts = list(Layout)  # the plan of a step must be the same for all
            layout = layouts[-where.least(-layouts.index(layout))]
        engine.attach(policy, layout, attention)
        if why:
            self._say(why)
        if self.cfg.engine.gradient_checkpointing:  # as the Trainer will, but before memory is measured
            policy.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        return policy, layout, attention

    def _settled(self, policy: PreTrainedModel) -> tuple[Layout, str, str | None]:
        pairs = self.job.pairs.train
        some = [data.as_group(pair) for pair in pairs.select(range(min(2, len(pairs))))]
        groups = [(prompt[-32:], [chosen[:32], rejected[:24]]) for prompt, (chosen, rejected) in some]
        with self.where.autocast():
            return engine.settle(policy, groups, self.cfg.engine.layout, self.cfg.model.attn_implementation)

    def _whole_policy(self, device: torch.device) -> PreTrainedModel:
        policy = model.load_policy(self.cfg.model, self.job.start, self.cfg.seed)
        return policy.to(device)

    def _tokens_per_micro_batch(self, policy: PreTrainedModel) -> int:
        """The setting, or what fits every process's device."""
        wanted = self.cfg.engine.tokens_per_micro_batch
        if isinstance(wanted, int):
            return wanted
        if self.where.device.type == "cpu":
            return engine.CPU_TOKENS
        if self.where.sharded or self.where.strategy is Strategy.zero2:
            fits = plan.tokens_that_fit(self.cfg, self.job.start, self.job.pairs, self.job.fleet)
        else:
            lengths = data.pair_lengths(self.job.pairs.train)
            longest = sorted(range(len(lengths)), key=lambda i: -sum(lengths[i]))[:8]
            groups = [data.as_group(self.job.pairs.train[i]) for i in longest]
            needs = sorted(self.objective.needs & engine.COMPUTED - {"logp", "length"})
            need = memory.need(plan.setup(self.cfg, self.job.start, self.job.fleet), self.where.strategy, 1)
            later = need.optimizer + need.buckets
            fits = engine.token_budget(policy, groups, self.layout, needs, self.where, later)
        fits = self.where.least(fits)
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
            self.where,
            pairs_per_step=self.cfg.train.pairs_per_step,
            micro_batch_tokens=self.budget,
        )

    # The end -------------------------------------------------------------------------------------------------------

    def _save(self, trainer: PairTrainer) -> None:
        folder, unfinished = self.job.dir / "model", self.job.dir / "model.unfinished"
        if self.where.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        trainer.save_policy(unfinished)
        if self.where.rank == 0:
            self.job.start.tokenizer.save_pretrained(unfinished)
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before its results
            unfinished.replace(folder)

    def _finish(self, results: dict[str, Any]) -> None:
        """The win rate where there is a judge, the card, and the results, which mark the end."""
        job, folder = self.job, self.job.dir / "model"
        if self.cfg.dataset.judge is not None:
            for side, metrics in zip(("start", "trained"), self._judged(folder), strict=True):
                results[side] |= metrics
        rows = card.table(results["start"], results["trained"])
        (folder / "README.md").write_text(card.model_card(self.cfg, plain(self.cfg), job.start, job.pairs, rows))
        _write_json(job.results, results)

    def _judged(self, folder: Path) -> tuple[dict[str, float], dict[str, float]]:
        """Metrics by the dataset's judge, of the start policy and of the trained one as it was saved."""
        cfg, alone = self.cfg, replace(self.where, rank=0, world=1, strategy=Strategy.single)
        trained = model.load_trained(cfg.model, self.job.start, folder).to(alone.device)
        start_policy = self._whole_policy(alone.device)
        for policy in (trained, start_policy):
            engine.attach(policy, self.layout, self.attention)
        asked = list(dict.fromkeys(self.job.pairs.held_out["conversation"]))[: cfg.evaluation.prompts]
        return evaluate.compare_with_start(
            trained,
            start_policy,
            self.job.start,
            [json.loads(conversation) for conversation in asked],
            config.resolve(str(cfg.dataset.judge), "dataset.judge"),
            cfg.evaluation,
            alone,
            seed=cfg.seed,
            layout=self.layout,
            budget=self.budget,
            samples_file=self.job.dir / "samples.jsonl",
        )


class _Report:
    """Metrics of rank 0 as they come: a line of metrics.jsonl, the tracker, the progress bar.

    A run that goes on drops the lines behind its checkpoint, so that the file is that of an uninterrupted run.
    """

    def __init__(
        self, file: Path, tracker: tracking.Tracker, steps: int, resumed_at: int, eval_every: int | None
    ) -> None:
        self._file, self._tracker = file, tracker
        lines = (
            [line for line in file.read_text().splitlines() if line.endswith("}")]
            if file.exists() and resumed_at
            else []
        )
        before = [line for line in lines if json.loads(line)["step"] < resumed_at]
        at = [line for line in lines if json.loads(line)["step"] == resumed_at]
        evaluated = eval_every is not None and resumed_at % eval_every == 0  # before it was saved, behind its metrics
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text("".join(f"{line}\n" for line in before + at[: 1 + evaluated]))
        unfinished.replace(file)
        self._bar = tqdm(total=steps, initial=resumed_at, desc="training", unit="step", disable=None)

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._tracker.log(step, metrics)
        if "train/loss" in metrics:
            self._bar.update(step - self._bar.n)
            shown = {"loss": metrics["train/loss"], "accuracy": metrics["train/rewards/accuracies"]}
            self._bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()})

    def close(self) -> None:
        self._bar.close()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint: one that is there is whole (`PairTrainer._save_checkpoint`)."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{MADE_BY}")]
    return max(whole, key=step_of, default=None)


def plain(cfg: RunConfig) -> dict[str, Any]:
    """The resolved configuration as plain values, for YAML, JSON and trackers."""

    def value(node: Any) -> Any:
        if isinstance(node, Enum):
            return node.value
        if isinstance(node, Mapping):
            return {str(name): value(inner) for name, inner in node.items()}
        return [value(inner) for inner in node] if isinstance(node, list) else node

    made: dict[str, Any] = value(asdict(cfg))
    return made


def _identity(
    config_: dict[str, Any], objective: Objective, start: model.Start, pairs: data.Pairs, fleet: Fleet
) -> dict[str, Any]:
    """What decides the result of a run: its settings, start model, pairs, precision, and the code of its objective."""
    indifferent = {"tracker", "cluster", "engine", "run_dir", "cache_dir", "plan"}
    bookkeeping = {
        "log_every_steps",
        "eval_every_steps",
        "save_every_steps",
        "keep_checkpoints",
    }
    settings = {name: value for name, value in config_.items() if name not in indifferent}
    settings["train"] = {name: value for name, value in settings["train"].items() if name not in bookkeeping}
    code, inner = {}, [objective]
    for part in inner:
        code[type(part).__qualname__] = config.file_fingerprint(Path(inspect.getfile(type(part))))
        inner += [value for value in vars(part).values() if isinstance(value, Objective)]
    computed = {"device": fleet.device, "bf16": fleet.bf16}
    return {**settings, **computed, "start": start.fingerprint, "pairs": pairs.fingerprint, "objective_code": code}


def _differences(before: Any, now: Any, key: str = "") -> list[str]:
    """ "key: was -> is" for every value that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            difference
            for name in sorted({*before, *now})
            for difference in _differences(before.get(name), now.get(name), f"{key}.{name}".lstrip("."))
        ]
    return [] if before == now else [f"{key}: {before} -> {now}"]
