"""Self-play: prompts -> responses -> scores -> pairs -> reference -> training, and again with the policy that came out.

    run folder/results.json      the start model and the last policy, in figures; and each iteration
               iter_0/evaluation/responses/                 of the start model, to held-out prompts
               iter_1/responses/ scores/ pairs/             the stages (onpolicy/), each a folder of files
                     /config.yaml, metrics.jsonl, policy/   the training, a run folder like any other
                     /evaluation/responses/ scores/         the new policy's own answers, against those before
                     /summary.json
               iter_2/...

Every process of the fleet runs all of this. Sampling and scoring share the work by files, one shard to whoever is free;
only training connects the processes. What is whole is not made again, so the same command goes on after a kill at any
moment. The reference of an iteration is the policy that sampled it (SPPO: https://arxiv.org/abs/2405.00675, algorithm 1).
An iteration's checkpoints go once its policy is there and compared: they are several times its size. Left out: servers
of the openai backend, which whoever started them has to start again with the next policy.
"""

import contextlib
import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from align import config, engine
from align.choices import Launcher
from align.config import DatasetConfig, PairSourceConfig, RunConfig, SamplingConfig, ScorerConfig
from align.data.prompts import PromptRow, prompts_of
from align.engine.batching import CPU_TOKENS
from align.evaluation import card, judging
from align.files import fingerprint, write_json
from align.launch import slurm, strategy
from align.launch.local import in_each_process
from align.launch.rank import Rank, alone, free, inside
from align.model.chat import prompt_ids
from align.model.policy import Policy, trained_from
from align.onpolicy import figures
from align.onpolicy.pairs import describe_counts, scored_prompts, write_pairs
from align.onpolicy.sample import ResponseRow, read_samples, sample_from
from align.onpolicy.score import read_scores, score_responses
from align.onpolicy.scorers import registry
from align.onpolicy.scorers.base import Identity, Item
from align.runs import plan, spine
from align.runs.folder import Play, identify, open_folder, own_folder, recognise
from align.runs.prepare import check_sentinel, check_settings, prepare_answers, prepare_training, scored_by, who_scores
from align.say import UserError, is_first, quieten, say
from align.tracking import trackers
from align.tracking.trackers import Stretch, Tracker
from align.train import sentinel
from align.train.cost import Cost, together
from align.train.job import Job, check_batch
from align.train.memory import settle_strategy, too_large
from align.train.sentinel import CollapsedError

_EVALUATION_SHARD = 16  # prompts: few, so that many processes share them


# Beginning -----------------------------------------------------------------------------------------------------------


def selfplay(cfg: RunConfig) -> float | None:
    """Run the iterations of `cfg`, or print their plan, or submit them. Returns the last policy's win rate against the
    start model.

    Raises:
        UserError: anything the user can put right.
        Stopped: it was asked to stop.
    """
    quieten()
    slurm.take_place()
    play = prepare(cfg)
    if play.is_done and play.done > cfg.iterations:
        say(f"{play.dir} holds {play.done} iterations already, which are more than the {cfg.iterations} asked for")
    return spine.carry_out(play, selfplay, begin)


def prepare(cfg: RunConfig) -> Play:
    """Check everything that can be checked before the first answer is sampled."""
    objective = check_settings(cfg)
    _check_selection(cfg)
    scorer = who_scores(cfg, registry.scorer_of(cfg))
    start, prompts, cluster = prepare_answers(cfg)
    asked_last = prompts_of(cfg, prompts, cfg.iterations)  # the last share is the smallest
    of_iteration = len(asked_last) - len(prompts.held_out)
    if of_iteration < cfg.train.pairs_per_step:
        shared = (
            f" shared out over {cfg.iterations} iterations (source.split_prompts)," if cfg.source.split_prompts else ""
        )
        raise UserError(
            f"an iteration trains on {of_iteration} prompts: of {cfg.dataset.name}'s {len(prompts.all)},{shared} "
            f"{len(prompts.held_out)} are held out (dataset.eval_fraction); train.pairs_per_step="
            f"{cfg.train.pairs_per_step} needs that many pairs: give more prompts, or a smaller step"
        )
    check_batch(cfg, of_iteration, cluster.world)
    longest = max(prompts.tokens.values()) + 2 * min(cfg.sampling.max_new_tokens, cfg.train.max_length)
    cluster = settle_strategy(cfg, start, cluster, longest)
    check_sentinel(cfg, cluster)
    if warning := too_large(cfg, start, cluster, longest):
        warnings.warn(warning, UserWarning, stacklevel=2)
    if not cfg.plan:
        strategy.check(cluster)
        if cfg.cluster.launcher is Launcher.slurm and not inside():
            slurm.check()
    identity = _identity(cfg, scorer, identify(config.plain(cfg), objective, start, prompts.fingerprint, cluster))
    names = f"{cfg.model.name}-{cfg.dataset.name}-{cfg.objective['name']}-selfplay"
    folder = Path(cfg.run_dir or f"runs/{names}-{fingerprint(identity)[:6]}").expanduser()
    text = plan.describe_selfplay(cfg, start, prompts, of_iteration, scorer, objective, cluster, longest)
    # Absolute, as the trainings of the iterations remember where their policies and pairs are.
    play = Play(
        cfg=cfg, start=start, prompts=prompts, cluster=cluster, identity=identity, dir=folder.resolve(), plan=text
    )
    recognise(play)
    return play


def _check_selection(cfg: RunConfig) -> None:
    """What would be found out only when all answers are sampled and scored."""
    for name in ("temperature", "min_gap"):
        if not getattr(cfg.selection, name) >= 0:
            raise UserError(f"selection.{name} must be 0 or above, not {getattr(cfg.selection, name)}")
    if cfg.sampling.samples == 1 and not cfg.source.candidates:
        raise UserError("sampling.samples=1 makes no pairs: give 2 or more, or source.candidates to pair the one with")


def _identity(cfg: RunConfig, scorer: Identity, identity: dict[str, Any]) -> dict[str, Any]:
    """What decides a result of self-play: a training's identity, and who answers, scores and selects, but not how fast.

    Iterations are left out where they share the prompts: more of them go on from those that are done.
    """
    all_of = config.plain(cfg)
    fast = {"tokens_per_batch", "urls", "served_model", "requests_at_once"}
    kept: dict[str, Any] = {name: all_of[name] for name in ("source", "selection")}
    kept["sampling"] = {key: value for key, value in all_of["sampling"].items() if key not in fast}
    if cfg.source.split_prompts:
        kept["iterations"] = cfg.iterations
    return {**identity, **kept, **scored_by(cfg, scorer)}


def begin(play: Play) -> None:
    """Run in this process, in processes of ours, or as one of several that were started from outside."""
    with own_folder(play.dir) if is_first() else contextlib.nullcontext():
        if is_first():
            open_folder(play)
        in_each_process(play.cluster, play.dir / "logs", work, play)


# Each process --------------------------------------------------------------------------------------------------------


def work(play: Play) -> None:
    """What each process does."""
    quieten()
    rank = alone(play.cluster)
    tracker = trackers.start(play.cfg, play.dir, config.plain(play.cfg), rank.number)
    made: list[dict[str, Any]] = []
    failed = True
    try:
        first = last = Policy(iteration=0, cfg=play.cfg.model, start=play.start)
        if rank.is_first:
            _try_scorer(play, rank)
        for number in range(1, play.cfg.iterations + 1):
            iteration = _Iteration(play, number, first, last, rank)
            made.append(iteration.run(tracker, steps_before=sum(of_one["steps"] for of_one in made)))
            last = iteration.next_policy
        failed = False
    except KeyboardInterrupt:
        failed = False
        raise
    except CollapsedError as end:  # of the training, whose folder is not the one that people look at
        number, steps = len(made) + 1, sum(of_one["steps"] for of_one in made)
        of_play = CollapsedError(steps + end.step, f"iteration {number}: {end.why}")
        if rank.is_first:
            (play.folder(number) / sentinel.FILE).unlink(missing_ok=True)
            sentinel.mark(play.dir, of_play)
        raise sentinel.with_remedy(of_play, play.dir) from end
    finally:
        trained = {name: value for name, value in made[-1].items() if isinstance(value, float)} if made else {}
        results = {"trained": trained, "cost": _cost(play, len(made)) if rank.is_first else {}}
        tracker.finish(card.summary(results), failed)
    if rank.is_first:
        write_json(play.results, {"start": made[0]["start"], **results, "iterations": made})


def _cost(play: Play, iterations: int) -> dict[str, Any]:
    """Of the trainings; that of sampling and scoring depends on who does it, and is not counted."""
    of_each = [json.loads((play.folder(number) / "results.json").read_text()) for number in range(1, iterations + 1)]
    return asdict(together(Cost(**of_one.get("cost", {})) for of_one in of_each))


def _try_scorer(play: Play, rank: Rank) -> None:
    """Score two answers, before hours of sampling: weights that are not there, or a server that is not, show now."""
    if (play.folder(1) / "scores").exists():
        return
    prompt = play.prompts.held_out[0]
    registry.build(registry.scorer_of(play.cfg), rank)([Item(prompt=prompt.text, responses=["yes", "no"])])
    free()


class _Iteration:
    """One iteration, as each process does it. What is made already is found and kept."""

    def __init__(self, play: Play, number: int, first: Policy, before: Policy, rank: Rank) -> None:
        self.play, self.cfg, self.number, self.rank = play, play.cfg, number, rank
        self.first, self.before, self.folder = first, before, play.folder(number)

    def run(self, tracker: Tracker, steps_before: int) -> dict[str, Any]:
        """All stages. Returns what summary.json holds, on the first process; elsewhere the steps only."""
        made: dict[str, Any]
        self._say(f"\niteration {self.number} of {self.cfg.iterations}")
        summary_file = self.folder / "summary.json"
        if summary_file.exists():
            made = json.loads(summary_file.read_text())
            self._say(f"is complete: {self.folder}\n{figures.line(made)}")
            self._tidy()
            return made
        chosen = self._pairs()
        job = self._training()
        if not job.is_done:
            if self.rank.is_first:  # of a policy that was killed before its results, and may differ in a bit
                for made_of_it in ("merged", "evaluation"):
                    shutil.rmtree(self.folder / made_of_it, ignore_errors=True)
            spine.begin(job, Stretch(tracker, steps_before))
        free()
        scored = self._compare()
        if not self.rank.is_first:
            return {"steps": job.steps}
        made = {"iteration": self.number, "steps": job.steps, "data": chosen, **scored}
        trained = json.loads(job.results.read_text())["trained"]
        made |= {name: trained[name] for name in ("accuracy/mean_logp", "rewards/accuracies")}
        write_json(summary_file, made)
        self._tidy()
        told = {f"selfplay/{name}": value for name, value in made.items() if isinstance(value, float)}
        tracker.log(steps_before + job.steps, {**told, "selfplay/iteration": self.number})
        self._say(figures.line(made))
        return made

    # Stages --------------------------------------------------------------------------------------------------------

    def _pairs(self) -> dict[str, Any]:
        """Sample, score and select; what became of the prompts, of each split."""
        responses, scores, pairs = (self.folder / name for name in ("responses", "scores", "pairs"))
        prompts = prompts_of(self.cfg, self.play.prompts, self.number)
        self._sample(self.before, prompts, self.cfg.sampling, responses, self.number, "responses")
        score_responses(read_samples(responses), self.cfg, scores, self.rank)
        made = write_pairs(responses, scores, self.cfg.selection, pairs, seed=self.cfg.seed + self.number)
        self._say(describe_counts(made))
        for split, least in (("train", self.cfg.train.pairs_per_step), ("held_out", 1)):
            if made[split]["pairs"] < least:
                raise UserError(
                    f"iteration {self.number} needs {least} {split} pairs at least: {describe_counts(made)}. Samples that are all "
                    "alike want another sampling.temperature, close scores another selection.min_gap, few pairs a "
                    "smaller train.pairs_per_step; give another run_dir= then"
                )
        return made

    def _weigh(self, policy: Policy, answers: Sequence[ResponseRow]) -> list[judging.Weight]:
        """What a policy makes of answers to held-out prompts."""
        loaded = policy.load(self.rank)
        tokenizer = policy.start.tokenizer
        groups = [
            (prompt_ids(row.prompt, tokenizer)[-32:], [list(row.response_ids[:n]) for n in (32, 24)])
            for row in answers[:2]
        ]
        with self.rank.autocast():
            layout, _, _ = engine.settle(loaded, groups, self.cfg.engine.layout, self.cfg.model.attn_implementation)
        weights = judging.weigh(loaded, tokenizer, answers, self.rank, layout=layout, budget=CPU_TOKENS)
        del loaded
        free()
        return weights

    def _training(self) -> Job:
        """An ordinary training, from the policy that has sampled, on what it has sampled."""
        pairs = self.folder / "pairs"
        cfg = replace(
            self.cfg,
            model=self.before.cfg,
            dataset=DatasetConfig(
                name=self.cfg.dataset.name,
                path=str(pairs / "train.jsonl"),
                eval_path=str(pairs / "held_out.jsonl"),
                eval_limit=None,
            ),
            cluster=replace(self.cfg.cluster, strategy=self.play.cluster.strategy),
            source=PairSourceConfig(),
            scorer=ScorerConfig(),  # the iteration compares by itself
            iterations=1,
            optimized_metric=None,  # of the whole, not of an iteration's training
            run_dir=str(self.folder),
        )
        return replace(prepare_training(cfg), policy=self.folder / "policy")

    def _compare(self) -> dict[str, Any]:
        """The new policy's answers to held-out prompts, against those of the policy before and of the start model."""
        settings = SamplingConfig(
            samples=self.cfg.evaluation.samples_per_prompt,
            temperature=self.cfg.evaluation.temperature,
            top_p=self.cfg.evaluation.top_p,
            max_new_tokens=self.cfg.evaluation.max_new_tokens,
            prompts_per_shard=_EVALUATION_SHARD,
            tokens_per_batch=self.cfg.sampling.tokens_per_batch,
        )
        asked = [replace(prompt, candidates=()) for prompt in self.play.prompts.held_out[: self.cfg.evaluation.prompts]]
        answers: dict[str, list[ResponseRow]] = {}
        for policy in (self.next_policy, self.before, self.first):
            folder = self.play.folder(policy.iteration) / "evaluation" / "responses"
            self._sample(policy, asked, settings, folder, policy.iteration, f"{policy.name}, held-out prompts")
            answers[policy.name] = read_samples(folder)
        rows = figures.side_by_side(answers, self.number)
        scores = self.folder / "evaluation" / "scores"
        score_responses(rows, self.cfg, scores, self.rank)
        if not self.rank.is_first:
            return {}
        scored = list(scored_prompts(rows, read_scores(scores)))
        ours, before, first = (policy.name for policy in (self.next_policy, self.before, self.first))
        own = self._weigh(self.next_policy, answers[ours])
        by_start = self._weigh(self.first, [*answers[ours], *answers[first]])
        by_start, of_start = by_start[: len(own)], by_start[len(own) :]
        return {
            **figures.figures(rows, scored, ours),
            "win_rate": figures.win_rate(scored, ours, first),
            "ties": figures.ties(scored, ours, first),
            "win_rate/previous": figures.win_rate(scored, ours, before),
            "sample_entropy": judging.sample_entropy(own),
            "kl_policy_start": judging.kl(own, by_start),
            "start": {
                **figures.figures(rows, scored, first),
                "win_rate": 0.5,
                "sample_entropy": judging.sample_entropy(of_start),
                "kl_policy_start": 0.0,
            },
        }

    @cached_property
    def next_policy(self) -> Policy:
        """What this iteration has made, with its adapter merged into it where there is one."""
        return trained_from(self.before, self.folder / "policy", Path(self.cfg.cache_dir).expanduser())

    def _sample(
        self,
        policy: Policy,
        prompts: Sequence[PromptRow],
        settings: SamplingConfig,
        folder: Path,
        iteration: int,
        what: str,
    ) -> None:
        sample_from(policy, prompts, self.cfg, settings, folder, iteration, what, self.rank)

    def _tidy(self) -> None:
        """What is trained needs no checkpoints, which are several times its size."""
        if self.rank.is_first:
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)

    def _say(self, text: str) -> None:
        if self.rank.is_first:
            print(text, flush=True)
