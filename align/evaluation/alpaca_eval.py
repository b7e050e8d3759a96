"""Suite `alpaca_eval`: AlpacaEval 2, https://arxiv.org/abs/2404.04475 (https://github.com/tatsu-lab/alpaca_eval).

The run's answers are written in its format, model_outputs.json. The judge of them against the reference outputs is

    scorer=llm_judge ...                one of our scorers, in both orders: annotations.json is written in AlpacaEval's format
    suite.annotations=annotations.json  any other, of just these answers: the command of the package alpaca-eval (extra
                                        `alpaca`) asks its judge once, in a random order
    nobody                              the answers are written, and what to type next is said

    win_rate = mean of preference - 1, standard_error = its standard deviation / sqrt(N), length in characters
    lc_win_rate by the published GLM (stats/length_control.py); with suite.difficulties as the leaderboard has it,
    without it by two terms, which is no leaderboard figure

Files are AlpacaEval's own: from its hub dataset, or paths. Left out: AlpacaEval 1, and inputs beside an instruction.
"""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import huggingface_hub
import numpy as np

from align.evaluation import base
from align.evaluation.base import OURS, THEIRS, Evaluation
from align.evaluation.judge import standard_error
from align.evaluation.judging import judged_prompts
from align.evaluation.settings import AlpacaEvalConfig
from align.files import file_fingerprint, fingerprint, write_text
from align.launch.rank import Rank
from align.onpolicy.figures import chances, side_by_side
from align.onpolicy.sample import ResponseRow
from align.onpolicy.score import score_responses
from align.say import UserError, first_line, say
from align.stats.length_control import length_controlled_win_rate, outcomes

_HUB = "tatsu-lab/alpaca_eval"
_FILES = {
    "instructions": "alpaca_eval.json",
    "reference": "alpaca_eval_gpt4_baseline.json",
    "difficulties": "df_gamed.csv",
}
_ANNOTATION = ("instruction", "output_1", "output_2", "preference")  # 1 is the reference, 2 the model
Row = dict[str, Any]


def inputs(evaluation: Evaluation[AlpacaEvalConfig]) -> dict[str, Any]:
    """Return fingerprints of the files' contents, wherever they lie, and the judge."""
    suite = evaluation.suite
    base.check_one_answer(evaluation)
    if suite.annotations is not None and evaluation.scored_by_name:
        raise UserError("suite.annotations and scorer both say who judges: give one of them")
    contents: dict[str, Any] = {"instructions": fingerprint(_instructions(suite))}
    if suite.annotations is not None:
        contents["annotations"] = fingerprint(base.read_table("suite.annotations", suite.annotations, _ANNOTATION))
    elif evaluation.scored_by_name:
        contents["reference"] = fingerprint(_reference(suite))
    if suite.difficulties is not None:
        contents["difficulties"] = file_fingerprint(_file("difficulties", suite.difficulties))
    scorer = base.scorer_identity(evaluation) if evaluation.scored_by_name else None
    return {"suite": {**asdict(suite), **contents}, "scorer": scorer}


def work(evaluation: Evaluation[AlpacaEvalConfig], rank: Rank) -> None:
    """Answer all instructions, and score the answers where one of our scorers judges."""
    base.ask(evaluation, _texts(evaluation.suite), rank)
    if evaluation.scored_by_name:
        both = _both(evaluation, _reference(evaluation.suite))
        score_responses(both, evaluation.cfg, evaluation.folder / "scores", rank)


def measure(evaluation: Evaluation[AlpacaEvalConfig]) -> tuple[dict[str, float], str] | None:
    """Write the answers; compute the leaderboard's figures, where somebody has judged them."""
    suite, outputs = evaluation.suite, _outputs(evaluation)
    file = evaluation.folder / "model_outputs.json"
    _write(file, outputs)
    if suite.annotations is None and not evaluation.scored_by_name:
        say(
            f"answers  {file}\nNobody has judged them yet. Type the command again with one more word: scorer=llm_judge (with its "
            "scorer.judge.urls and served_model), or, with the extra alpaca, after\n"
            f"  alpaca_eval --model_outputs {file} --annotators_config weighted_alpaca_eval_gpt4_turbo\n"
            "suite.annotations=<its annotations.json>"
        )
        return None
    annotations = _annotations(evaluation, outputs)
    judged = [row for row in annotations if row["preference"] is not None and not math.isnan(row["preference"])]
    if not judged:
        raise UserError(f"none of {len(annotations)} annotations has a preference: nobody could be judged")
    results = figures(judged, *_difficulties(suite, [row["instruction"] for row in judged]))
    judges = ", ".join(dict.fromkeys(str(row.get("annotator", "somebody")) for row in annotations))
    note = f"AlpacaEval 2, {len(judged):,} instructions, judged by {judges}"
    if unjudged := len(outputs) - len(judged):
        note += f"; {unjudged} are not judged and left out"
    if not suite.difficulties:
        note += "; lc_win_rate is without instruction difficulties, so no leaderboard figure"
    return results, note


def figures(
    annotations: Sequence[Mapping[str, Any]],
    difficulties: Sequence[float] | None = None,
    gamed: Sequence[Sequence[float]] | None = None,
) -> dict[str, float]:
    """Return the figures of AlpacaEval's rows, output_1 the reference's, in [0, 1]. Pure."""
    won = outcomes([row["preference"] for row in annotations])
    ours, theirs = ([len(row[side]) for row in annotations] for side in ("output_2", "output_1"))
    controlled = length_controlled_win_rate(won, ours, theirs, difficulties, gamed=gamed)
    return {
        "win_rate": float(won.mean()),
        "standard_error": standard_error(won.tolist()),
        "ties": float(np.mean(won == 0.5)),
        "lc_win_rate": controlled.rate,
        "lc_standard_error": controlled.standard_error,
        "length": fmean(ours),
        "reference/length": fmean(theirs),
        "instructions": len(annotations),
    }


def _file(name: str, value: str) -> Path:
    """Return the path of a file of AlpacaEval's dataset, from the hub or where the user has it."""
    if value != "hub":
        return base.existing(f"suite.{name}", value)
    try:
        return Path(huggingface_hub.hf_hub_download(_HUB, _FILES[name], repo_type="dataset"))
    except Exception as error:  # the hub's errors share no base class: offline, no access
        raise UserError(
            f"suite.{name}=hub: {_FILES[name]} of {_HUB} cannot be had ({first_line(error)[:120]}); give a copy, suite.{name}=<file>"
        ) from error


def _instructions(suite: AlpacaEvalConfig) -> list[Row]:
    """Return all instructions in AlpacaEval's order, which is that of the difficulties."""
    return base.read_table("suite.instructions", str(_file("instructions", suite.instructions)), ("instruction",))


def _texts(suite: AlpacaEvalConfig) -> list[str]:
    """Return the instructions that are put to the policy."""
    return [row["instruction"] for row in _instructions(suite)[: suite.limit]]


def _reference(suite: AlpacaEvalConfig) -> dict[str, Row]:
    """Return the reference outputs, by instruction, of which none may be missing."""
    rows = base.read_table("suite.reference", str(_file("reference", suite.reference)), ("instruction", "output"))
    reference = {row["instruction"]: row for row in rows}
    asked = _texts(suite)
    if missing := [instruction for instruction in asked if instruction not in reference]:
        raise UserError(
            f"suite.reference={suite.reference} has no output to {len(missing)} of {len(asked)} instructions, the first is "
            f"{missing[0][:60]!r}"
        )
    return reference


def _difficulties(
    suite: AlpacaEvalConfig, instructions: Sequence[str]
) -> tuple[list[float] | None, list[list[float]] | None]:
    """Return the difficulties of instructions, and the rows of the gamed baselines."""
    if suite.difficulties is None:
        return None, None
    positions = {row["instruction"]: at for at, row in enumerate(_instructions(suite))}
    with _file("difficulties", suite.difficulties).open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    try:
        known = {int(row["index"]): float(row["instruction_difficulty"]) for row in table}
        names = ("preference", "std_delta_len", "instruction_difficulty")
        gamed = [[float(row[name]) for name in names] for row in table if row["preference"]]
        difficulties = [known[positions[instruction]] for instruction in instructions]
    except (KeyError, ValueError) as error:
        raise UserError(
            f"suite.difficulties={suite.difficulties} is not AlpacaEval's df_gamed.csv, or of other instructions: {error!r}"
        ) from error
    return difficulties, [row for row in gamed if not math.isnan(row[0])]


def _outputs(evaluation: Evaluation[AlpacaEvalConfig]) -> list[Row]:
    """Return the answers in AlpacaEval's format."""
    suite, generator = evaluation.suite, evaluation.run.name
    said = base.answers(evaluation)
    return [
        {
            "dataset": row.get("dataset", ""),
            "instruction": row["instruction"],
            "output": said[row["instruction"]].response,
            "generator": generator,
        }
        for row in _instructions(suite)[: suite.limit]
    ]


def _write(file: Path, rows: Sequence[Row]) -> None:
    write_text(file, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")


def _annotations(evaluation: Evaluation[AlpacaEvalConfig], outputs: Sequence[Row]) -> list[Row]:
    """Return AlpacaEval's rows of preferences, by any judge, and write those that are made here."""
    suite = evaluation.suite
    if suite.annotations is None:
        rows = _by_scorer(evaluation, outputs)
        _write(evaluation.folder / "annotations.json", rows)
        return rows
    rows = base.read_table("suite.annotations", suite.annotations, _ANNOTATION)
    said = {row["instruction"]: row["output"] for row in outputs}
    if other := [row for row in rows if said.get(row["instruction"]) != row["output_2"].strip()]:
        raise UserError(
            f"suite.annotations={suite.annotations}: {len(other)} of {len(rows)} are not of this run's answers, the "
            f"first is to {other[0]['instruction'][:60]!r}; annotate {evaluation.folder / 'model_outputs.json'}"
        )
    return rows


def _both(evaluation: Evaluation[AlpacaEvalConfig], reference: Mapping[str, Row]) -> list[ResponseRow]:
    """Return both answers to each instruction, for a scorer: one that compares sees them in both orders."""
    ours = base.answers(evaluation)
    theirs = [replace(row, response=reference[text]["output"], response_ids=[]) for text, row in ours.items()]
    return side_by_side({OURS: list(ours.values()), THEIRS: theirs}, 1)


def _by_scorer(evaluation: Evaluation[AlpacaEvalConfig], outputs: Sequence[Row]) -> list[Row]:
    """Return annotations by one of our scorers; a pair without a finite score has no preference."""
    reference = _reference(evaluation.suite)
    judge = base.scorer_identity(evaluation)["name"]
    judged = judged_prompts(_both(evaluation, reference), evaluation.folder / "scores", judge)
    wins = {prompt.id: chances(prompt, OURS, THEIRS)[0][0] for prompt in judged}
    rows = []
    for ours in outputs:
        theirs, won = reference[ours["instruction"]], wins.get(fingerprint(ours["instruction"]))
        row = {
            "instruction": ours["instruction"],
            "output_1": theirs["output"],
            "generator_1": theirs.get("generator", "reference"),
            "dataset": ours["dataset"],
            "output_2": ours["output"],
            "generator_2": ours["generator"],
            "annotator": judge,
            "preference": None if won is None else 1 + won,
        }
        rows.append(row)
    return rows
