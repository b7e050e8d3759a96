"""Suite `judge`: the run's answers to prompts against those of the start model, another run or a file, by any scorer.

A scorer that gives numbers lets the higher one win; one that compares is asked in both orders (onpolicy/scorers). A prompt
counts once, however many answers it has:

    win_rate       = mean over prompts of the mean over pairs of answers of P(ours beats theirs); a tie is one half
    standard_error = standard deviation of the prompts' win rates / sqrt(prompts), so it is clustered by prompt
    lc_win_rate    = what AlpacaEval's GLM predicts at equal lengths (report/length_control.py), without the difficulties
                     of instructions, which exist for AlpacaEval's own only: an approximation
    length, tokens = of an answer, in characters and in tokens; `opponent/...` are theirs

Left out: an opponent whose chat template takes other roles than this run's, and significance tests (report).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.choices import Backend
from align.config import DatasetConfig, PairSourceConfig
from align.data.prompts import PromptRow, load_prompts
from align.evaluation.base import (
    OURS,
    THEIRS,
    Evaluation,
    Outcome,
    answer,
    answers_of,
    check_place,
    in_words_of,
    score,
    scored,
    scorer_identity,
    trained_run,
)
from align.evaluation.settings import JudgeConfig
from align.files import fingerprint, write_text, writing
from align.launch.rank import Rank
from align.model.policy import Policy
from align.onpolicy import figures
from align.onpolicy.sample import ResponseRow
from align.onpolicy.scorers.base import last_turn
from align.onpolicy.select import ScoredPrompt
from align.say import UserError
from align.stats.length_control import length_controlled_win_rate


def made_of(given: Evaluation) -> dict[str, Any]:
    """Who is asked what, against whom, and who judges."""
    suite = _settings(given)
    opponent = _opponent(given)
    prompts = _prompts(given)
    return {
        "suite": {**asdict(suite), "prompts": None, "against": None},  # wherever they lie
        "prompts": fingerprint([[prompt.id, [asdict(c) for c in prompt.candidates]] for prompt in prompts]),
        "opponent": opponent.fingerprint if opponent else "answers of a file",
        "scorer": scorer_identity(given),
    }


def work(given: Evaluation, rank: Rank) -> None:
    """Sample both sides, and score."""
    opponent, prompts = _opponent(given), _prompts(given)
    answer(given, given.policy, prompts, OURS, rank)
    if opponent:
        answer(given, opponent, prompts, THEIRS, rank)
    score(given, _both(given, prompts, opponent), rank)


def measure(given: Evaluation) -> Outcome:
    """Compare, and write what a person reads."""
    suite, prompts = _settings(given), _prompts(given)
    rows = _both(given, prompts, _opponent(given))
    of_prompts = scored(given, rows)
    results = compared(rows, of_prompts)
    _write_samples(given.folder / "samples.jsonl", rows, of_prompts)
    against = suite.against or "the start model"
    judge = scorer_identity(given)["name"]
    dropped = len(of_prompts) - len(figures.usable(of_prompts))
    note = f"answers to {len(prompts):,} prompts, {given.sampling.samples} each, against {against}, judged by {judge}"
    note += f"; {dropped} prompts without a finite score are left out" if dropped else ""
    return Outcome(results=results, note=f"{note}; lc_win_rate is an approximation without instruction difficulties")


def _both(given: Evaluation, prompts: Sequence[PromptRow], opponent: Policy | None) -> list[ResponseRow]:
    theirs = answers_of(given, THEIRS) if opponent else _of_file(prompts, given.policy.start.tokenizer)
    return figures.side_by_side({OURS: answers_of(given, OURS), THEIRS: theirs}, 1)


def compared(rows: Sequence[ResponseRow], scored: Sequence[ScoredPrompt]) -> dict[str, float]:
    """Metrics of OURS against THEIRS. Pure.

    Raises:
        UserError: no prompt has a finite score.
    """
    usable = figures.usable(scored)
    if not usable:
        raise UserError("the scorer gave no prompt a finite score: try another scorer=, or look into the folder scores")
    chances = {prompt.id: figures.chances(prompt, OURS, THEIRS) for prompt in usable}
    by_prompt = [fmean(p for row in own for p in row) for own in chances.values()]
    texts = {
        (prompt.id, name): [c.text for c in prompt.candidates if c.origin == name]
        for prompt in usable
        for name in (OURS, THEIRS)
    }
    games = [
        (p, len(mine), len(other))
        for name, own in chances.items()
        for mine, row in zip(texts[name, OURS], own, strict=True)
        for other, p in zip(texts[name, THEIRS], row, strict=True)
    ]
    made = {
        "win_rate": fmean(by_prompt),
        "standard_error": standard_error(by_prompt),
        "ties": figures.ties(usable, OURS, THEIRS),
        "lc_win_rate": length_controlled_win_rate(*zip(*games, strict=True)).rate,
    }
    for name, prefix in ((OURS, ""), (THEIRS, "opponent/")):
        own = [row for row in rows if row.origin == name]
        made[f"{prefix}length"] = fmean(len(row.response) for row in own)
        made[f"{prefix}tokens"] = fmean(len(row.response_ids) for row in own)
        made[f"{prefix}repetition"] = fmean(figures.repetition(row.response_ids) for row in own)
        numbers = [c.score for prompt in usable for c in prompt.candidates if c.origin == name]
        if given_numbers := [number for number in numbers if number is not None]:
            made[f"{prefix}score"] = fmean(given_numbers)
    return {**made, "prompts": len(usable)}


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; of one value nothing is known, and 0 is said."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _settings(given: Evaluation) -> JudgeConfig:
    assert isinstance(given.suite, JudgeConfig)
    return given.suite


def _is_file(against: str | None) -> bool:
    return against is not None and Path(against).suffix in (".jsonl", ".json", ".parquet")


def _opponent(given: Evaluation) -> Policy | None:
    """Whose answers are sampled too; None where they are a file's."""
    against = _settings(given).against
    if _is_file(against):
        return None
    if given.sampling.backend is Backend.openai:
        raise UserError(
            "sampling.backend=openai serves one policy, and the opponent's answers are sampled too: use sampling.backend=hf "
            "or vllm, or give its answers as a file, suite.against=answers.jsonl"
        )
    if against is None:
        return given.run.start(given.cache)
    return trained_run("suite.against", against).policy(given.cache)


def _prompts(given: Evaluation) -> list[PromptRow]:
    """The held-out prompts of the run, or those of a file; with the answers of the opponent's file."""
    suite, cfg = _settings(given), given.cfg
    if suite.prompts is not None:
        check_place("suite.prompts", suite.prompts)
        start, dataset = (
            given.policy.start,
            DatasetConfig(
                name=suite.name,
                path=suite.prompts,
                eval_path=suite.prompts,
                wrap_plain=suite.wrap_plain,
                eval_limit=None,
            ),
        )
    else:
        start, dataset = given.run.start(given.cache).start, cfg.dataset  # whose prompts may depend on the start model
    source = PairSourceConfig(candidates={THEIRS: str(suite.against)} if _is_file(suite.against) else {})
    with in_words_of("suite.prompts"):
        asked = load_prompts(replace(cfg, dataset=dataset, source=source), start, given.cache, ("held_out",)).held_out
    if source.candidates:
        asked = [prompt for prompt in asked if prompt.candidates]
    return asked[: suite.limit or (cfg.evaluation.prompts if suite.prompts is None else None)]


def _of_file(prompts: Sequence[PromptRow], tokenizer: PreTrainedTokenizerBase) -> list[ResponseRow]:
    """The answers of a file, as rows, in the tokens of our policy."""
    return [
        ResponseRow(
            iteration=0,
            prompt_id=prompt.id,
            k=k,
            prompt=prompt.text,
            response=answer.text,
            response_ids=tokenizer(answer.text, add_special_tokens=False).input_ids,
        )
        for prompt in prompts
        for k, answer in enumerate(prompt.candidates)
    ]


def _write_samples(file: Path, rows: Sequence[ResponseRow], scored: Sequence[ScoredPrompt]) -> None:
    """What a person reads: a line for each prompt, with the answers of both and P(ours beats theirs)."""
    asked = {row.prompt_id: row.prompt for row in rows}
    lines = []
    for prompt in figures.usable(scored):
        said = {name: [c.text for c in prompt.candidates if c.origin == name] for name in (OURS, THEIRS)}
        line = {"prompt": last_turn(asked[prompt.id]), **said, "chances": figures.chances(prompt, OURS, THEIRS)}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    with writing(f"cannot write {file.parent}", ""):
        write_text(file, "".join(lines))
