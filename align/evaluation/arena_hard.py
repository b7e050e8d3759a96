"""Suite `arena_hard`: Arena-Hard-Auto, https://arxiv.org/abs/2406.11939 (https://github.com/lmarena/arena-hard-auto).

The run's answers are written as its gen_answer.py does, model_answer/<run>.jsonl; its gen_judgment.py judges them, and
suite.judgments=<its file> is read back. As its show_result.py counts, without style control:

    win_rate = mean of the verdicts on two games, in both orders: 1, 1/2 or 0; a clear one ([[A>>B]]) counts three times

standard_error is clustered by question. Questions are those of today's repository (uid, prompt), which has v0.1 and v2.0, or
of the repository of 2024 (question_id, turns), and answers and judgments are of the same. Left out: the judge itself,
several turns, and metadata for style control (its utils/add_markdown_info.py adds them).
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from align.evaluation.base import (
    OURS,
    Evaluation,
    Outcome,
    answer,
    answers_by_text,
    check_one_answer,
    questions,
    read_table,
)
from align.evaluation.settings import ArenaHardConfig
from align.files import fingerprint, write_text, writing
from align.launch.rank import Rank
from align.say import UserError, say

_CLEAR = 3  # the weight of a clear verdict


_VERDICTS = {"A>>B": (1.0, _CLEAR), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, _CLEAR)}


_VERDICTS |= {"B=A": (0.5, 1), "B<<A": (1.0, _CLEAR), "B<A": (1.0, 1), "A<B": (0.0, 1), "A<<B": (0.0, _CLEAR)}


Row = dict[str, Any]


def made_of(given: Evaluation) -> dict[str, Any]:
    """The files' contents, wherever they lie."""
    suite = _settings(given)
    check_one_answer(given)
    asked = _questions(suite)
    judged = _judgments(suite.judgments, given.run.name) if suite.judgments else None
    return {"suite": {**asdict(suite), "questions": fingerprint(asked), "judgments": judged and fingerprint(judged)}}


def work(given: Evaluation, rank: Rank) -> None:
    """Answer all questions."""
    answer(given, given.policy, questions(given, [text for _, text in _questions(_settings(given))]), OURS, rank)


def measure(given: Evaluation) -> Outcome | None:
    """Write the answers; count the judgments, where there are some."""
    suite, asked = _settings(given), _questions(_settings(given))
    said = answers_by_text(given, [text for _, text in asked])
    file = given.folder / "model_answer" / f"{given.run.name}.jsonl"
    rows = [_answer(question, said[text], given.run.name) for question, text in asked]
    with writing(f"cannot write {file.parent}", ""):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if suite.judgments is None:
        say(
            f"answers  {file}\nNobody has judged them yet. Put the file into data/<benchmark>/model_answer of arena-hard-auto, "
            f"name {given.run.name} in its config, run gen_judgment.py, and type the command again with "
            f"suite.judgments=<data/<benchmark>/model_judgment/<judge>/{given.run.name}.jsonl>"
        )
        return None
    judgments = _judgments(suite.judgments, given.run.name)
    judges = ", ".join(dict.fromkeys(str(row.get("judge", "somebody")) for row in judgments))
    results = figures(judgments)
    length = fmean(map(len, said.values()))
    note = f"Arena-Hard-Auto, {len(judgments):,} of {len(asked):,} questions, judged by {judges}"
    return Outcome(results={**results, "length": length}, note=note)


def figures(judgments: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Win rate in [0, 1] of the model that is B in the first game and A in the second. Pure.

    Raises:
        UserError: no question has two verdicts.
    """
    by_category: dict[str, list[list[tuple[float, int]]]] = {}
    for row in judgments:
        verdicts = [str((game or {}).get("score")) for game in row["games"]]
        if len(verdicts) != 2 or any(verdict not in _VERDICTS for verdict in verdicts):
            continue  # show_result.py leaves them out too
        (first, of_first), (second, of_second) = (_VERDICTS[verdict] for verdict in verdicts)
        games = [(1 - first, of_first), (second, of_second)]
        by_category.setdefault(str(row.get("category", "")), []).append(games)
    if not by_category:
        raise UserError("suite.judgments: no question has verdicts on two games, such as [[A>B]]")
    made = _mean([games for own in by_category.values() for games in own])
    if len(by_category) > 1:
        for category, own in by_category.items():
            made |= {f"{name}/{category}": value for name, value in _mean(own).items()}
    return made


def _mean(judged: Sequence[Sequence[tuple[float, int]]]) -> dict[str, float]:
    """The weighted mean of all games and its standard error: questions are independent, the games of one are not."""
    weight = sum(of for games in judged for _, of in games)
    rate = sum(won * of for games in judged for won, of in games) / weight
    count = len(judged)
    off = [sum(of * (won - rate) for won, of in games) for games in judged]  # of a ratio: to first order
    error = math.sqrt(count / (count - 1) * math.fsum(o * o for o in off)) / weight if count > 1 else 0.0
    return {"win_rate": rate, "standard_error": error, "questions": count}


def _settings(given: Evaluation) -> ArenaHardConfig:
    assert isinstance(given.suite, ArenaHardConfig)
    return given.suite


def _questions(suite: ArenaHardConfig) -> list[tuple[Row, str]]:
    """Each question with its text."""
    made = []
    for row in read_table("suite.questions", suite.questions, ())[: suite.limit]:
        turns = row.get("turns")
        text = row.get("prompt")
        if isinstance(turns, list) and len(turns) == 1:
            text = turns[0].get("content")
        if not isinstance(text, str) or not {"uid", "question_id"} & row.keys():
            raise UserError(
                f"suite.questions={suite.questions} is no question.jsonl of Arena-Hard: a row has uid and prompt, or "
                f"question_id and one turn in turns; this has {', '.join(row)}"
            )
        made.append((row, text))
    return made


def _answer(question: Row, text: str, name: str) -> Row:
    """A row of model_answer, of the repository that the question is of."""
    key = fingerprint(name, question.get("uid", question.get("question_id")), text)
    if "uid" in question:
        messages = [{"role": "user", "content": question["prompt"]}, {"role": "assistant", "content": {"answer": text}}]
        return {"uid": question["uid"], "ans_id": key, "model": name, "messages": messages, "tstamp": time.time()}
    choices = [{"index": 0, "turns": [{"content": text}]}]
    row = {"question_id": question.get("question_id"), "answer_id": key, "model_id": name}
    return {**row, "choices": choices, "tstamp": time.time()}


def _judgments(path: str, name: str) -> list[Row]:
    rows = read_table("suite.judgments", path, ("model", "games"))
    own = [row for row in rows if row["model"] == name]
    if not own:
        there = ", ".join(dict.fromkeys(str(row["model"]) for row in rows))
        raise UserError(f"suite.judgments={path} has none of {name}, whose answers these are; it has {there}")
    return own
