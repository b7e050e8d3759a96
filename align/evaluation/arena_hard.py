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

from align.evaluation.base import Evaluation, answers, ask, check_one_answer, read_table
from align.evaluation.settings import ArenaHardConfig
from align.files import fingerprint, write_text
from align.launch.rank import Rank
from align.say import UserError, say

_CLEAR = 3  # the weight of a clear verdict
_VERDICTS = {"A>>B": (1.0, _CLEAR), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, _CLEAR)}
_VERDICTS |= {"B=A": (0.5, 1), "B<<A": (1.0, _CLEAR), "B<A": (1.0, 1), "A<B": (0.0, 1), "A<<B": (0.0, _CLEAR)}
Row = dict[str, Any]


def inputs(evaluation: Evaluation[ArenaHardConfig]) -> dict[str, Any]:
    """Return fingerprints of the files' contents, wherever they lie."""
    suite = evaluation.suite
    check_one_answer(evaluation)
    asked = fingerprint(_questions(suite))
    judged = fingerprint(_judgments(suite.judgments, evaluation.run.name)) if suite.judgments else None
    return {"suite": {**asdict(suite), "questions": asked, "judgments": judged}}


def work(evaluation: Evaluation[ArenaHardConfig], rank: Rank) -> None:
    """Answer all questions."""
    ask(evaluation, [text for _, text in _questions(evaluation.suite)], rank)


def measure(evaluation: Evaluation[ArenaHardConfig]) -> tuple[dict[str, float], str] | None:
    """Write the answers; count the judgments, where there are some."""
    suite, name = evaluation.suite, evaluation.run.name
    asked = _questions(suite)
    said = {text: row.response for text, row in answers(evaluation).items()}
    file = evaluation.folder / "model_answer" / f"{name}.jsonl"
    file.parent.mkdir(exist_ok=True)
    rows = [json.dumps(_answer(question, said[text], name), ensure_ascii=False) for question, text in asked]
    write_text(file, "".join(f"{row}\n" for row in rows))
    if suite.judgments is None:
        say(
            f"answers  {file}\nNobody has judged them yet. Put the file into data/<benchmark>/model_answer of arena-hard-auto, "
            f"name {name} in its config, run gen_judgment.py, and type the command again with "
            f"suite.judgments=<data/<benchmark>/model_judgment/<judge>/{name}.jsonl>"
        )
        return None
    judgments = _judgments(suite.judgments, name)
    judges = ", ".join(dict.fromkeys(str(row.get("judge", "somebody")) for row in judgments))
    note = f"Arena-Hard-Auto, {len(judgments):,} of {len(asked):,} questions, judged by {judges}"
    return {**figures(judgments), "length": fmean(map(len, said.values()))}, note


def figures(judgments: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the win rate in [0, 1] of the model that is B in the first game and A in the second; `UserError` without any."""
    by_category: dict[str, list[list[tuple[float, int]]]] = {}
    for row in judgments:
        verdicts = [str((game or {}).get("score")) for game in row["games"]]
        if len(verdicts) != 2 or any(verdict not in _VERDICTS for verdict in verdicts):
            continue  # show_result.py leaves them out too
        (first, first_weight), (second, second_weight) = (_VERDICTS[verdict] for verdict in verdicts)
        games = [(1 - first, first_weight), (second, second_weight)]
        by_category.setdefault(str(row.get("category", "")), []).append(games)
    if not by_category:
        raise UserError("suite.judgments: no question has verdicts on two games, such as [[A>B]]")
    results = _mean([games for questions in by_category.values() for games in questions])
    if len(by_category) > 1:
        for category, questions in by_category.items():
            results |= {f"{name}/{category}": value for name, value in _mean(questions).items()}
    return results


def _mean(judged: Sequence[Sequence[tuple[float, int]]]) -> dict[str, float]:
    """Return the weighted mean of all games and its standard error: questions are independent, the games of one are not."""
    total = sum(weight for games in judged for _, weight in games)
    rate = sum(won * weight for games in judged for won, weight in games) / total
    count = len(judged)
    off = [sum(weight * (won - rate) for won, weight in games) for games in judged]  # of a ratio: to first order
    error = math.sqrt(count / (count - 1) * math.fsum(o * o for o in off)) / total if count > 1 else 0.0
    return {"win_rate": rate, "standard_error": error, "questions": count}


def _questions(suite: ArenaHardConfig) -> list[tuple[Row, str]]:
    """Return each question with its text."""
    questions = []
    for row in read_table("suite.questions", suite.questions, ())[: suite.limit]:
        turns, text = row.get("turns"), row.get("prompt")
        if isinstance(turns, list) and len(turns) == 1:
            text = turns[0].get("content")
        if not isinstance(text, str) or not {"uid", "question_id"} & row.keys():
            raise UserError(
                f"suite.questions={suite.questions} is no question.jsonl of Arena-Hard: a row has uid and prompt, or "
                f"question_id and one turn in turns; this has {', '.join(row)}"
            )
        questions.append((row, text))
    return questions


def _answer(question: Row, text: str, name: str) -> Row:
    """Return a row of model_answer, in the format of the repository that the question is of."""
    key = fingerprint(name, question.get("uid", question.get("question_id")), text)
    if "uid" in question:
        messages = [{"role": "user", "content": question["prompt"]}, {"role": "assistant", "content": {"answer": text}}]
        return {"uid": question["uid"], "ans_id": key, "model": name, "messages": messages, "tstamp": time.time()}
    row = {"question_id": question["question_id"], "answer_id": key, "model_id": name}
    return {**row, "choices": [{"index": 0, "turns": [{"content": text}]}], "tstamp": time.time()}


def _judgments(path: str, name: str) -> list[Row]:
    rows = read_table("suite.judgments", path, ("model", "games"))
    judgments = [row for row in rows if row["model"] == name]
    if not judgments:
        models = ", ".join(dict.fromkeys(str(row["model"]) for row in rows))
        raise UserError(f"suite.judgments={path} has none of {name}, whose answers these are; it has {models}")
    return judgments
