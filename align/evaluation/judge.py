"""Suite `judge`: the run's answers to prompts against those of the start model, another run or a file, by any scorer.

A scorer that gives numbers lets the higher one win; one that compares is asked in both orders (onpolicy/scorers). A prompt
counts once, however many answers it has:

    win_rate       = mean over prompts of the mean over pairs of answers of P(ours beats theirs); a tie is one half
    standard_error = standard deviation of the prompts' win rates / sqrt(prompts), so it is clustered by prompt
    lc_win_rate    = what AlpacaEval's GLM predicts at equal lengths (report/length_control.py), without the difficulties
                     of instructions, which exist for AlpacaEval's own only: an approximation
    length, tokens = of an answer, in characters and in tokens; `opponent/...` are theirs

Asked as the run's own judge was, against the start model at the same prompts with the same scorer, sampling and seed, it
reads the run's answers and scores: a win rate is measured once. Left out: an opponent whose chat template takes other roles than this run's, and significance tests (report).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.choices import Backend
from align.config import DatasetConfig, PairSourceConfig
from align.data.pairs import prepare_pairs
from align.data.prompts import PromptRow, load_prompts
from align.evaluation import judging
from align.evaluation.base import (
    OURS,
    THEIRS,
    Evaluation,
    Outcome,
    check_place,
    in_words_of,
    scorer_identity,
    trained_run,
)
from align.evaluation.judging import Contestant
from align.evaluation.settings import JudgeConfig
from align.files import fingerprint
from align.launch.rank import Rank
from align.model.policy import Policy
from align.onpolicy import figures
from align.onpolicy.pairs import scored_prompts
from align.onpolicy.sample import ResponseRow, read_samples
from align.onpolicy.score import read_scores, score_responses
from align.onpolicy.select import ScoredPrompt
from align.say import UserError
from align.stats.length_control import length_controlled_win_rate


@dataclass(frozen=True, kw_only=True)
class _Match:
    """Policies that answer the same prompts, the first of them ours and the last the opponent, and the folder of scores.

    Against a file's answers there is our policy alone, and the prompts carry the opponent's answers.
    """

    contestants: Sequence[Contestant]
    prompts: Sequence[PromptRow]
    scores: Path

    @property
    def opponent(self) -> Contestant | None:
        """The opponent, where it is a policy."""
        return self.contestants[-1] if len(self.contestants) > 1 else None

    @property
    def sides(self) -> dict[str, str]:
        """Origins of answers by the words that samples.jsonl has for them."""
        return {"opponent": self.opponent.name if self.opponent else THEIRS, "policy": self.contestants[0].name}


def made_of(given: Evaluation) -> dict[str, Any]:
    """The values that decide the results: who is asked what, against whom, and who judges."""
    match = _match(given)
    return {
        "suite": {**asdict(_settings(given)), "prompts": None, "against": None},  # wherever they lie
        "prompts": fingerprint([[prompt.id, [asdict(c) for c in prompt.candidates]] for prompt in match.prompts]),
        "opponent": match.opponent.policy.fingerprint if match.opponent else "answers of a file",
        "scorer": scorer_identity(given),
    }


def work(given: Evaluation, rank: Rank) -> None:
    """Sample both sides, and score."""
    match = _match(given)
    asked = [replace(prompt, candidates=()) for prompt in match.prompts]
    for contestant in match.contestants:
        judging.answer(contestant, asked, given.cfg, given.sampling, rank)
    score_responses(_rows(given, match), given.cfg, match.scores, rank)


def measure(given: Evaluation) -> Outcome:
    """Compare, and write samples.jsonl for people."""
    match = _match(given)
    rows = _rows(given, match)
    scored = list(scored_prompts(rows, read_scores(match.scores)))
    results = compared(rows, scored, ours=match.sides["policy"], theirs=match.sides["opponent"])
    given.folder.mkdir(parents=True, exist_ok=True)
    judging.write_samples(given.folder / "samples.jsonl", rows, scored, match.sides)
    against = _settings(given).against or "the start model"
    judge, dropped = scorer_identity(given)["name"], len(scored) - len(figures.usable(scored))
    note = f"answers to {len(match.prompts):,} prompts, {given.sampling.samples} each, against {against}, judged by {judge}"
    note += f"; {dropped} prompts without a finite score are left out" if dropped else ""
    return Outcome(results=results, note=f"{note}; lc_win_rate is an approximation without instruction difficulties")


def _match(given: Evaluation) -> _Match:
    """The match: that of the run's own judge where the question is the same."""
    suite, run = _settings(given), given.run
    prompts = _prompts(given)
    if _is_own(given):
        policies = run.policies(given.cache)
        judged = (policies[-1], policies[-2], policies[0])
        contestants = judging.contestants_of(run.dir, judged, run.iterations > 0)
        return _Match(contestants=contestants, prompts=prompts, scores=run.judged / "scores")
    made = [
        Contestant(name=OURS, policy=given.policy, stream=given.policy.iteration, folder=given.folder / "responses")
    ]
    if not _is_file(suite.against):
        opponent, folder = _opponent(given), given.folder / f"responses_of_{THEIRS}"
        made.append(Contestant(name=THEIRS, policy=opponent, stream=0, folder=folder))
    return _Match(contestants=made, prompts=prompts, scores=given.folder / "scores")


def _is_own(given: Evaluation) -> bool:
    """True where the run's own judge has answered the question: its win rate is read again, not drawn anew."""
    suite, cfg = _settings(given), given.run.cfg
    own = judging.sampling_of(cfg.evaluation, given.sampling.tokens_per_batch)
    asked = (suite.against, suite.prompts, suite.limit, given.cfg.seed, given.cfg.scorer, given.sampling)
    return asked == (None, None, None, cfg.seed, cfg.scorer, own) and (given.run.judged / "scores").is_dir()


def _rows(given: Evaluation, match: _Match) -> list[ResponseRow]:
    """The answers of all side by side, as the scorer sees them."""
    answers = {contestant.name: read_samples(contestant.folder) for contestant in match.contestants}
    if match.opponent is None:
        answers[THEIRS] = _of_file(match.prompts, given.policy.start.tokenizer)
    return figures.side_by_side(answers, given.run.iterations)


def compared(
    rows: Sequence[ResponseRow], scored: Sequence[ScoredPrompt], ours: str = OURS, theirs: str = THEIRS
) -> dict[str, float]:
    """Metrics of our answers against theirs, by their origins. Pure.

    Raises:
        UserError: no prompt has a finite score.
    """
    usable = figures.usable(scored)
    if not usable:
        raise UserError("the scorer gave no prompt a finite score: try another scorer=, or look into the folder scores")
    chances = {prompt.id: figures.chances(prompt, ours, theirs) for prompt in usable}
    by_prompt = [fmean(p for row in own for p in row) for own in chances.values()]
    texts = {
        (prompt.id, name): [c.text for c in prompt.candidates if c.origin == name]
        for prompt in usable
        for name in (ours, theirs)
    }
    games = [
        (p, len(mine), len(other))
        for name, own in chances.items()
        for mine, row in zip(texts[name, ours], own, strict=True)
        for other, p in zip(texts[name, theirs], row, strict=True)
    ]
    made = {
        "win_rate": fmean(by_prompt),
        "standard_error": standard_error(by_prompt),
        "ties": figures.ties(usable, ours, theirs),
        "lc_win_rate": length_controlled_win_rate(*zip(*games, strict=True)).rate,
    }
    for name, prefix in ((ours, ""), (theirs, "opponent/")):
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


def _opponent(given: Evaluation) -> Policy:
    """The policy whose answers are sampled too."""
    against = _settings(given).against
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
    suite, cfg, by_file = _settings(given), given.cfg, _is_file(_settings(given).against)
    start = given.run.start(given.cache).start  # whose prompts they may be
    if suite.prompts is None and not by_file and not given.run.iterations:
        pairs = prepare_pairs(cfg.dataset, cfg.train, cfg.model.system_message, start, given.cache)
        return judging.prompts_of_pairs(pairs, suite.limit or cfg.evaluation.prompts)
    dataset = cfg.dataset
    if suite.prompts is not None:
        check_place("suite.prompts", suite.prompts)
        start, path = given.policy.start, suite.prompts
        dataset = DatasetConfig(
            name=suite.name, path=path, eval_path=path, wrap_plain=suite.wrap_plain, eval_limit=None
        )
    source = PairSourceConfig(candidates={THEIRS: str(suite.against)} if by_file else {})
    with in_words_of("suite.prompts"):
        asked = load_prompts(replace(cfg, dataset=dataset, source=source), start, given.cache, ("held_out",)).held_out
    if by_file:
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
