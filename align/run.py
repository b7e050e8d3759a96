"""A run from its configuration: prepare, plan, reference, train, evaluate, save. Re-running it goes on or is done.

Everything that can be wrong is found before a model is loaded; everything a run makes is in its folder:
config.yaml, plan.txt, first_pair.txt, metrics.jsonl, results.json, samples.jsonl, checkpoints/, model/.
"""

import inspect
import json
import math
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

import datasets
import transformers
from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from tqdm import tqdm
from transformers import PreTrainedModel, TrainingArguments

import objectives
from align import arguments, card, config, data, engine, evaluate, launch, model, plan, reference, tracking
from align.config import Layout, RunConfig, UserError
from align.trainer import PairData, PairTrainer
from objectives import Objective


def run(cfg: RunConfig) -> float | None:
    """Run `cfg` to its end, or print its plan. Returns the win rate against the start model where there is a judge,
    else the held-out accuracy by mean_logp; None for a plan.

    Raises:
        UserError: anything the user can put right.
    """
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    objective = check(cfg)
    where = launch.place(cfg.cluster)
    cache = Path(cfg.cache_dir).expanduser()
    start = model.prepare_start(cfg.model, cache)
    pairs = data.prepare(cfg.dataset, cfg.train, cfg.model.system_message, start, cache)
    check_data(cfg, objective, start, pairs, where)
    _, parameters = plan.shape(cfg.model, start)
    if warning := arguments.high_learning_rate(cfg.optimizer, cfg.model.parameters or parameters):
        warnings.warn(warning, UserWarning, stacklevel=2)
    text = plan.describe(cfg, start, pairs, objective, where)
    if cfg.plan:
        print(text)
        return None
    prepared = _Prepared(cfg, objective, start, pairs, where, cache)
    return prepared.run(text)


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


def check_data(
    cfg: RunConfig, objective: Objective, start: model.Start, pairs: data.Pairs, where: launch.Place
) -> None:
    """What the objective and the batch ask of the data."""
    data.check_bos(pairs, start.tokenizer)
    plan.check_batch(cfg, len(pairs.train), where.world)
    for name, split in (("training", pairs.train), ("held-out", pairs.held_out)):
        sides = zip(split["chosen_win_prob"], split["rejected_win_prob"], strict=True)
        without = sum(math.isnan(chosen) or math.isnan(rejected) for chosen, rejected in sides)
        if "win_prob" in objective.needs and without:
            raise UserError(
                f"{cfg.objective['name']} needs win_prob, which {without} of {len(split)} {name} pairs of dataset "
                f"{cfg.dataset.name} lack: give rows chosen_win_prob and rejected_win_prob (dataset.columns renames), or "
                "for sppo take the labels as certain with objective.target=hard"
            )


class _Prepared:
    """A run whose data and start model are ready."""

    def __init__(
        self,
        cfg: RunConfig,
        objective: Objective,
        start: model.Start,
        pairs: data.Pairs,
        where: launch.Place,
        cache: Path,
    ) -> None:
        self.cfg, self.objective, self.start, self.pairs = cfg, objective, start, pairs
        self.where, self.cache = where, cache
        self.config = plain(cfg)
        self.identity = _identity(self.config, objective, start, pairs, where)
        names = f"{cfg.model.name}-{cfg.dataset.name}-{cfg.objective['name']}"
        self.dir = Path(cfg.run_dir or f"runs/{names}-{config.fingerprint(self.identity)[:6]}").expanduser()

    def run(self, plan_text: str) -> float:
        results_file = self.dir / "results.json"
        self._recognise()
        if results_file.exists():
            self._say(
                f"This run is complete: {self.dir}. To train it anew, delete that folder or give another run_dir="
            )
        else:
            made = arguments.training_arguments(self.cfg, self.dir / "checkpoints", self.where)
            policy = self._policy()
            try:
                with self._lock():
                    self._open_folder(plan_text)
                    self._train(policy, made, results_file)
            except Timeout as error:
                raise UserError(f"another process is training in {self.dir}; give another run_dir=") from error
        results = json.loads(results_file.read_text())
        self._say(card.text_table(card.table(results["start"], results["trained"])))
        self._say(f"model    {self.dir / 'model'}\nmetrics  {self.dir / 'metrics.jsonl'}")
        trained: dict[str, float] = results["trained"]
        return trained.get("win_rate", trained["accuracy/mean_logp"])

    def _say(self, text: str) -> None:
        if self.where.rank == 0:
            print(text)

    def _recognise(self) -> None:
        """Refuse a folder that holds another run."""
        known = self.dir / "identity.json"
        if not known.exists():
            return
        try:
            before = json.loads(known.read_text())
        except ValueError as error:
            raise UserError(f"run_dir: {known} is damaged; delete {self.dir} or give another run_dir=") from error
        differs = _differences(before, json.loads(json.dumps(self.identity, default=str)))
        if differs:
            raise UserError(
                f"{self.dir} holds another run ({'; '.join(differs[:4])}); give another run_dir= or delete it"
            )

    def _lock(self) -> FileLock:
        """The lock of the run folder, which is created."""
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run_dir: cannot write {self.dir} ({error.strerror}); give another run_dir=") from error
        return FileLock(self.dir / f".lock-{self.where.rank}", timeout=0)

    def _open_folder(self, plan_text: str) -> None:
        """Write down what runs. Files are rank 0's."""
        if self.where.rank != 0:
            return
        try:
            pair = data.show_pair(self.pairs.train[0], self.start.tokenizer)
            OmegaConf.save(OmegaConf.create(self.config), self.dir / "config.yaml")
            (self.dir / "plan.txt").write_text(plan_text + "\n")
            (self.dir / "first_pair.txt").write_text(pair + "\n")
            unfinished = self.dir / "identity.unfinished"
            unfinished.write_text(json.dumps(self.identity, indent=2, default=str))
            unfinished.replace(self.dir / "identity.json")
        except OSError as error:
            raise UserError(f"run_dir: cannot write {self.dir} ({error.strerror}); give another run_dir=") from error
        print(f"{plan_text}\n{pair}\nrun folder  {self.dir}")

    def _train(self, policy: PreTrainedModel, made: TrainingArguments, results_file: Path) -> None:
        cfg, where, dir_ = self.cfg, self.where, self.dir
        trainer = self._trainer(policy, made)
        checkpoint = last_checkpoint(dir_ / "checkpoints")
        tracker = tracking.start(cfg, dir_, self.config, where.rank)
        steps = plan.total_steps(cfg, len(self.pairs.train), where.world)
        report: _Report | None = None
        if where.rank == 0:
            every = cfg.train.eval_every_steps
            report = _Report(dir_ / "metrics.jsonl", tracker, steps, _step_of(checkpoint), every)
        trainer.on_metrics = report
        failed = True
        results: dict[str, Any] = {}
        try:
            trainer.check_step_zero()
            at_start = self._measure_start(trainer, checkpoint)
            if checkpoint is not None and _step_of(checkpoint) >= steps:
                trainer.load_trained(checkpoint)
            else:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            measured = {"start": at_start, "trained": trainer.evaluate()}
            results = {side: {k.removeprefix("eval/"): v for k, v in m.items()} for side, m in measured.items()}
            if where.rank == 0:
                self._finish(trainer, results, results_file)
            trainer.accelerator.wait_for_everyone()
            failed = False
        finally:
            if report is not None:
                report.close()
            summary = {f"result/{name}": value for name, value in results.get("trained", {}).items()}
            tracker.finish(summary, failed)

    def _measure_start(self, trainer: PairTrainer, checkpoint: Path | None) -> dict[str, float]:
        """Held-out metrics of the start policy: measured before step 1, and read again where a run goes on."""
        file = self.dir / "start.json"
        if checkpoint is not None:  # not `file.exists()`: every rank must take the same way
            self._say(f"going on from {checkpoint}")
            metrics: dict[str, float] = json.loads(file.read_text())
            return metrics
        metrics = trainer.evaluate()
        if self.where.rank == 0:
            file.write_text(json.dumps(metrics))
        return metrics

    def _policy(self) -> PreTrainedModel:
        """The policy at step 0, on its device, fed as every process can feed it; checked against its own logits."""
        policy = self._start_policy()
        self.weights = model.policy_fingerprint(policy)  # before the engine puts its own attention in
        some = [data.as_group(pair) for pair in self.pairs.train.select(range(min(2, len(self.pairs.train))))]
        groups = [(prompt[-32:], [chosen[:32], rejected[:24]]) for prompt, (chosen, rejected) in some]
        engine_ = self.cfg.engine
        with self.where.autocast():
            wanted = self.cfg.model.attn_implementation
            layout, self.attention, why = engine.settle(policy, groups, engine_.layout, wanted)
        layouts = list(Layout)
        self.layout = layouts[-self.where.least(-layouts.index(layout))]  # the plan of a step must be the same for all
        engine.attach(policy, self.layout, self.attention)
        if why:
            self._say(why)
        if engine_.gradient_checkpointing:  # as the Trainer will, but before memory is measured
            policy.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        return policy

    def _start_policy(self) -> PreTrainedModel:
        policy = model.load_policy(self.cfg.model, self.start, self.cfg.seed)
        policy.to(self.where.device)
        return policy

    def _tokens_per_micro_batch(self, policy: PreTrainedModel) -> int:
        """The setting, or what fits every process's device."""
        wanted = self.cfg.engine.tokens_per_micro_batch
        if isinstance(wanted, int):
            return wanted
        lengths = data.pair_lengths(self.pairs.train)
        longest = sorted(range(len(lengths)), key=lambda i: -sum(lengths[i]))[:8]
        groups = [data.as_group(self.pairs.train[i]) for i in longest]
        needs = sorted(self.objective.needs & engine.COMPUTED - {"logp", "length"})
        fits = engine.token_budget(policy, groups, self.layout, needs, self.where)
        fits = self.where.least(fits)
        if self.where.device.type == "cuda":  # a CPU's is in the plan
            self._say(f"engine.tokens_per_micro_batch={fits}, by free memory")
        return fits

    def _trainer(self, policy: PreTrainedModel, made: TrainingArguments) -> PairTrainer:
        cfg, pad = self.cfg, int(self.start.tokenizer.pad_token_id)
        self.budget = self._tokens_per_micro_batch(policy)

        def with_reference(pairs: datasets.Dataset, name: str, wanted: bool) -> PairData:
            column = None
            if wanted:
                column = reference.reference_logps(
                    policy, self.weights, pairs, self.pairs.fingerprint, data.pair_lengths(pairs), self.where,
                    layout=self.layout, budget=self.budget, pad_token_id=pad, cache=self.cache, name=name,
                )  # fmt: skip
            return PairData(pairs, column, self.layout, pad)

        # Held-out pairs always get the column: they are few, and what is comparable across objectives needs it.
        held_out = with_reference(self.pairs.held_out, "held_out", wanted=True)
        train = with_reference(self.pairs.train, "train", wanted="ref_logp" in self.objective.needs)
        return PairTrainer(
            policy,
            made,
            self.objective,
            train,
            held_out,
            self.start.tokenizer,
            self.where,
            pairs_per_step=cfg.train.pairs_per_step,
            micro_batch_tokens=self.budget,
        )

    def _finish(self, trainer: PairTrainer, results: dict[str, Any], results_file: Path) -> None:
        """The model first; then the win rate where there is a judge, the card, and the results: these mark the end."""
        policy = trainer.accelerator.unwrap_model(trainer.model)
        folder, unfinished = self.dir / "model", self.dir / "model.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        policy.save_pretrained(unfinished)
        self.start.tokenizer.save_pretrained(unfinished)
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before its results
        unfinished.replace(folder)
        if self.cfg.dataset.judge is not None:
            for side, metrics in zip(("start", "trained"), self._judged(policy), strict=True):
                results[side] |= metrics
        rows = card.table(results["start"], results["trained"])
        (folder / "README.md").write_text(card.model_card(self.cfg, self.config, self.start, self.pairs, rows))
        partial = results_file.with_suffix(".unfinished")
        partial.write_text(json.dumps(results, indent=2))
        partial.replace(results_file)

    def _judged(self, policy: PreTrainedModel) -> tuple[dict[str, float], dict[str, float]]:
        """Metrics by the dataset's judge, of the start policy and of the trained one."""
        cfg = self.cfg
        start_policy = self._start_policy()
        engine.attach(start_policy, self.layout, self.attention)
        asked = list(dict.fromkeys(self.pairs.held_out["conversation"]))[: cfg.evaluation.prompts]
        return evaluate.compare_with_start(
            policy,
            start_policy,
            self.start,
            [json.loads(conversation) for conversation in asked],
            config.resolve(str(cfg.dataset.judge), "dataset.judge"),
            cfg.evaluation,
            self.where,
            seed=cfg.seed,
            layout=self.layout,
            budget=self.budget,
            samples_file=self.dir / "samples.jsonl",
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
        file.write_text("".join(f"{line}\n" for line in before + at[: 1 + evaluated]))
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
    """The newest checkpoint that was written to its end: the Trainer writes trainer_state.json last."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=_step_of, default=None)


def _step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0


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
    config_: dict[str, Any], objective: Objective, start: model.Start, pairs: data.Pairs, where: launch.Place
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
    computed = {"device": where.device.type, "bf16": where.bf16}
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
