"""Suite `judge`: the run's answers to prompts against those of the start model, another run or a file, by any scorer.

A scorer that gives numbers lets the higher one win; one that compares is asked in both orders (onpolicy/scorers). A prompt
counts once, however many answers it has:

    win_rate       = mean over prompts of the mean over pairs of answers of P(ours beats theirs); a tie is one half
    standard_error = standard deviation of the prompts' win rates / sqrt(prompts), so it is clustered by prompt
    lc_win_rate    = AlpacaEval's length-controlled win rate (stats/length_control.py), without the difficulties of
                     instructions, which exist for AlpacaEval's own only: an approximation
    length, tokens = of an answer, in characters and in tokens; `opponent/...` are theirs

Where the run's own judge has answered the same question (the start model, the same prompts, scorer, sampling and seed),
its answers and scores are read: a win rate is measured once. Left out: an opponent whose chat template takes other roles
than this run's, and significance tests (report).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from align.choices import Backend
from align.config import DatasetConfig, PairSourceConfig
from align.data.pairs import prepare_pairs
from align.data.prompts import PromptRow, load_prompts
from align.evaluation import base, judging
from align.evaluation.base import OURS, TABLES, THEIRS, Evaluation
from align.evaluation.judging import Contestant
from align.evaluation.settings import JudgeConfig
from align.files import MANIFEST, fingerprint
from align.launch.rank import Rank
from align.onpolicy import figures
from align.onpolicy.sample import ResponseRow, read_samples
from align.onpolicy.score import score_responses
from align.onpolicy.select import ScoredPrompt
from align.say import UserError
from align.stats.length_control import rate_by_answers


def inputs(evaluation: Evaluation[JudgeConfig]) -> dict[str, Any]:
    """Return the values that decide the results: the prompts, the opponent, the scorer."""
    contestants, prompts = _contestants(evaluation), _prompts(evaluation)
    return {
        "suite": {**asdict(evaluation.suite), "prompts": None, "against": None},  # wherever they lie
        "prompts": fingerprint([[prompt.id, [asdict(c) for c in prompt.candidates]] for prompt in prompts]),
        "opponent": contestants[-1].policy.fingerprint if len(contestants) > 1 else "answers of a file",
        "scorer": base.scorer_identity(evaluation),
    }


def work(evaluation: Evaluation[JudgeConfig], rank: Rank) -> None:
    """Sample both sides, and score."""
    contestants, prompts = _contestants(evaluation), _prompts(evaluation)
    for contestant in contestants:
        judging.answer(contestant, prompts, evaluation.cfg, evaluation.cfg.sampling, rank)
    score_responses(_rows(evaluation, contestants), evaluation.cfg, contestants[0].scores, rank)


def measure(evaluation: Evaluation[JudgeConfig]) -> tuple[dict[str, float], str]:
    """Compare, and write samples.jsonl for people."""
    contestants, who = _contestants(evaluation), base.scorer_identity(evaluation)["name"]
    ours, theirs = contestants[0].name, contestants[-1].name if len(contestants) > 1 else THEIRS
    rows, prompts = _rows(evaluation, contestants), _prompts(evaluation)
    scored = judging.judged_prompts(rows, contestants[0].scores, who)
    judging.write_samples(evaluation.folder / "samples.jsonl", rows, scored, {"opponent": theirs, "policy": ours})
    against, answers = evaluation.suite.against or "the start model", evaluation.cfg.sampling.samples
    note = f"answers to {len(prompts):,} prompts, {answers} each, against {against}, judged by {who}"
    if dropped := len(prompts) - len(scored):
        note += f"; {dropped} prompts without a finite score are left out"
    note += "; lc_win_rate is an approximation without instruction difficulties"
    return compared(rows, scored, ours, theirs), note


def compared(
    rows: Sequence[ResponseRow], scored: Sequence[ScoredPrompt], ours: str = OURS, theirs: str = THEIRS
) -> dict[str, float]:
    """Return the metrics of our answers against theirs, by their origins. Pure."""
    by_prompt = figures.win_rates(scored, ours, theirs)
    texts = [{name: [c.text for c in p.candidates if c.origin == name] for name in (ours, theirs)} for p in scored]
    games = ((figures.chances(p, ours, theirs), of[ours], of[theirs]) for p, of in zip(scored, texts, strict=True))
    results = {
        "win_rate": fmean(by_prompt),
        "standard_error": standard_error(by_prompt),
        "ties": figures.ties(scored, ours, theirs),
        "lc_win_rate": rate_by_answers(games),
    }
    for name, prefix in ((ours, ""), (theirs, "opponent/")):
        of_side = figures.figures(rows, scored, name)
        results |= {
            f"{prefix}length": fmean(len(row.response) for row in rows if row.origin == name),
            f"{prefix}tokens": of_side["sample_length"],
            f"{prefix}repetition": of_side["repetition"],
        }
        if "judge_score" in of_side:
            results[f"{prefix}score"] = of_side["judge_score"]
    return {**results, "prompts": len(by_prompt)}


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of independent values; of one value nothing is known, and it is 0."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _contestants(evaluation: Evaluation[JudgeConfig]) -> list[Contestant]:
    """Return our policy first and the opponent last: those of the run's own judge where the question is the same.

    Against the answers of a file there is our policy alone, and the prompts carry them as candidates of THEIRS.
    """
    run, policy, folder, against = evaluation.run, evaluation.policy, evaluation.folder, evaluation.suite.against
    if _is_own(evaluation):
        policies = run.policies()
        return judging.contestants_of(run.dir, (policies[-1], policies[-2], policies[0]), run.iterations > 0)
    ours = Contestant(name=OURS, policy=policy, stream=policy.iteration, folder=folder / "responses")
    if _is_file(against):
        return [ours]
    if evaluation.cfg.sampling.backend is Backend.openai:
        raise UserError(
            "sampling.backend=openai serves one policy, and the opponent's answers are sampled too: use sampling.backend=hf "
            "or vllm, or give its answers as a file, suite.against=answers.jsonl"
        )
    other = None if against is None else base.trained_run("suite.against", against, run.cache)
    opponent = other.policies()[-1] if other else run.start()
    theirs = Contestant(name=THEIRS, policy=opponent, stream=0, folder=folder / f"responses_of_{THEIRS}")
    return [ours, theirs]


def _is_own(evaluation: Evaluation[JudgeConfig]) -> bool:
    """Return True where the run's own judge has answered the question, by the scorer as it is now."""
    suite, cfg = evaluation.suite, evaluation.run.cfg
    limit = suite.limit or cfg.evaluation.prompts
    sampling = judging.sampling_of(cfg.evaluation, evaluation.cfg.sampling.tokens_per_batch)
    asked = (suite.against, suite.prompts, limit, evaluation.cfg.seed, evaluation.cfg.sampling)
    if asked != (None, None, cfg.evaluation.prompts, cfg.seed, sampling):
        return False
    manifest = evaluation.run.last / "evaluation" / "scores" / MANIFEST
    return manifest.is_file() and json.loads(manifest.read_text()).get("scorer") == base.scorer_identity(evaluation)


def _rows(evaluation: Evaluation[JudgeConfig], contestants: Sequence[Contestant]) -> list[ResponseRow]:
    """Return the answers of all side by side, as the scorer sees them."""
    answers = {contestant.name: read_samples(contestant.folder) for contestant in contestants}
    return figures.side_by_side(answers, evaluation.run.iterations) if len(answers) > 1 else answers[OURS]


def _is_file(against: str | None) -> bool:
    return against is not None and Path(against).suffix in TABLES


def _prompts(evaluation: Evaluation[JudgeConfig]) -> list[PromptRow]:
    """Return the held-out prompts of the run, or those of a file; with the answers of the opponent's file."""
    suite, cfg, by_file = evaluation.suite, evaluation.cfg, _is_file(evaluation.suite.against)
    start = evaluation.run.start().start  # whose prompts they may be
    if suite.prompts is None and not by_file and not evaluation.run.iterations:
        pairs = prepare_pairs(cfg.dataset, cfg.train, cfg.model.system_message, start, evaluation.run.cache)
        return judging.prompts_of_pairs(pairs, suite.limit or cfg.evaluation.prompts)
    dataset = cfg.dataset
    if suite.prompts is not None:
        start, path = evaluation.policy.start, suite.prompts
        dataset = DatasetConfig(
            name=suite.name, path=path, eval_path=path, wrap_plain=suite.wrap_plain, eval_limit=None
        )
    cfg = replace(
        cfg, dataset=dataset, source=PairSourceConfig(candidates={THEIRS: str(suite.against)} if by_file else {})
    )
    with base.in_place_of_dataset("suite.prompts", suite.prompts):
        asked = load_prompts(cfg, start, evaluation.run.cache, ("held_out",)).held_out
    if by_file:
        asked = [prompt for prompt in asked if prompt.candidates]
    return asked[: suite.limit or (cfg.evaluation.prompts if suite.prompts is None else None)]
