"""Suite `alpaca_eval`: AlpacaEval 2, https://arxiv.org/abs/2404.04475 (https://github.com/tatsu-lab/alpaca_eval).

The run's answers are written in its format, model_outputs.json. Who then judges them against the reference outputs:

    scorer=llm_judge ...            one of our scorers, in both orders: annotations.json is written in AlpacaEval's format
    suite.annotator=weighted_alpaca_eval_gpt4_turbo    the package alpaca-eval, which asks its judge once, in a random order
    suite.annotations=annotations.json                 somebody elsewhere, of just these answers
    nobody                          the answers are written, and what to type next is said

    win_rate = mean of preference - 1, standard_error = its standard deviation / sqrt(N), length in characters
    lc_win_rate by the published GLM (report/length_control.py); with suite.difficulties as the leaderboard has it,
    without it by two terms, which is no leaderboard figure

Files are AlpacaEval's own: from its hub dataset, or paths. Left out: AlpacaEval 1, and inputs beside an instruction.
"""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import huggingface_hub
import numpy as np

from align.evaluation.base import (
    OURS,
    THEIRS,
    Evaluation,
    Outcome,
    absent,
    answer,
    answers_by_text,
    check_one_answer,
    questions,
    read_table,
    score,
    scored,
    scorer_identity,
)
from align.evaluation.judge import standard_error
from align.evaluation.settings import AlpacaEvalConfig
from align.files import file_fingerprint, fingerprint, write_text, writing
from align.launch.rank import Rank
from align.onpolicy import figures as answer_figures
from align.onpolicy.sample import ResponseRow
from align.say import UserError, say
from align.stats.length_control import average_length, length_controlled_win_rate, outcomes

_HUB = "tatsu-lab/alpaca_eval"


_FILES = {  # of the hub's dataset
    "instructions": "alpaca_eval.json",
    "reference": "alpaca_eval_gpt4_baseline.json",
    "difficulties": "df_gamed.csv",
}


_ANNOTATION = ("instruction", "output_1", "output_2", "preference")  # 1 is the reference, 2 the model


Row = dict[str, Any]


def made_of(given: Evaluation) -> dict[str, Any]:
    """The files' contents, wherever they lie, and who judges."""
    suite = _settings(given)
    check_one_answer(given)
    if len(judges := _judges(given)) > 1:
        raise UserError(f"{' and '.join(judges)} both say who judges: give one of them")
    made: dict[str, Any] = {"instructions": fingerprint(_instructions(suite))}
    if suite.annotations is not None:
        made["annotations"] = fingerprint(read_table("suite.annotations", suite.annotations, _ANNOTATION))
    elif judges:
        made["reference"] = fingerprint(_reference(suite))
    if suite.annotator is not None:
        _package(suite.annotator)
    if suite.difficulties is not None:
        made["difficulties"] = file_fingerprint(_file("difficulties", suite.difficulties))
    return {
        "suite": {**asdict(suite), **made},
        "scorer": scorer_identity(given) if given.scored_by_name else None,
    }


def work(given: Evaluation, rank: Rank) -> None:
    """Answer all instructions, and score the answers where one of our scorers judges."""
    asked = questions(given, [row["instruction"] for row in _asked(given)])
    answer(given, given.policy, asked, OURS, rank)
    if given.scored_by_name:
        score(given, _both(given, _outputs(given), _reference(_settings(given))), rank)


def measure(given: Evaluation) -> Outcome | None:
    """Write the answers; compute the leaderboard's figures, where somebody has judged them."""
    suite, outputs = _settings(given), _outputs(given)
    file = given.folder / "model_outputs.json"
    _write(file, outputs)
    if not _judges(given):
        say(
            f"answers  {file}\nNobody has judged them yet. Type the command again with one more word: scorer=llm_judge (with its "
            "scorer.judge.urls and served_model), suite.annotator=weighted_alpaca_eval_gpt4_turbo, or after\n"
            f"  alpaca_eval --model_outputs {file} --annotators_config weighted_alpaca_eval_gpt4_turbo\n"
            "suite.annotations=<its annotations.json>"
        )
        return None
    annotations = _annotations(given, outputs)
    judged = [row for row in annotations if row["preference"] is not None and not math.isnan(row["preference"])]
    if not judged:
        raise UserError(f"none of {len(annotations)} annotations has a preference: nobody could be judged")
    positions = {row["instruction"]: at for at, row in enumerate(_instructions(suite))}
    results = figures(judged, *_difficulties(suite, [positions[row["instruction"]] for row in judged]))
    unjudged = len(outputs) - len(judged)
    judges = ", ".join(dict.fromkeys(str(row.get("annotator", "somebody")) for row in annotations))
    note = f"AlpacaEval 2, {len(judged):,} instructions, judged by {judges}"
    note += f"; {unjudged} are not judged and left out" if unjudged else ""
    if not suite.difficulties:
        note += "; lc_win_rate is without instruction difficulties, so no leaderboard figure"
    return Outcome(results=results, note=note)


def figures(
    annotations: Sequence[Mapping[str, Any]],
    difficulties: Sequence[float] | None = None,
    gamed: Sequence[Sequence[float]] | None = None,
) -> dict[str, float]:
    """The leaderboard's figures, win rates in [0, 1]. Pure.

    Args:
        annotations: AlpacaEval's rows, output_1 the reference's.
        difficulties, gamed: see `length_controlled_win_rate`.
    """
    won = outcomes([row["preference"] for row in annotations])
    ours, theirs = ([len(row[side]) for row in annotations] for side in ("output_2", "output_1"))
    controlled = length_controlled_win_rate(won, ours, theirs, difficulties, gamed=gamed)
    return {
        "win_rate": float(won.mean()),
        "standard_error": standard_error(won.tolist()),
        "ties": float(np.mean(won == 0.5)),
        "lc_win_rate": controlled.rate,
        "lc_standard_error": controlled.standard_error,
        "length": average_length([row["output_2"] for row in annotations]),
        "reference/length": fmean(theirs),
        "instructions": len(annotations),
    }


def _settings(given: Evaluation) -> AlpacaEvalConfig:
    assert isinstance(given.suite, AlpacaEvalConfig)
    return given.suite


def _judges(given: Evaluation) -> list[str]:
    """Which words say who judges."""
    suite = _settings(given)
    said = {
        "suite.annotations": suite.annotations,
        "suite.annotator": suite.annotator,
        "scorer": given.scored_by_name,
    }
    return [word for word, value in said.items() if value]


# Files ----------------------------------------------------------------------------------------------------------------


def _existing(key: str, path: str) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        raise absent(key, path)
    return file


def _file(name: str, value: str) -> Path:
    """A file of AlpacaEval's dataset, from the hub or where the user has it."""
    if value != "hub":
        return _existing(f"suite.{name}", value)
    try:
        return Path(huggingface_hub.hf_hub_download(_HUB, _FILES[name], repo_type="dataset"))
    except Exception as error:  # the hub's errors share no base class: offline, no access
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"suite.{name}=hub: {_FILES[name]} of {_HUB} cannot be had ({reason[:120]}); give a copy, suite.{name}=<file>"
        ) from error


def _instructions(suite: AlpacaEvalConfig) -> list[Row]:
    """All of them, in AlpacaEval's order, which is that of the difficulties."""
    return read_table("suite.instructions", str(_file("instructions", suite.instructions)), ("instruction",))


def _asked(given: Evaluation) -> list[Row]:
    return _instructions(_settings(given))[: given.suite.limit]


def _reference(suite: AlpacaEvalConfig) -> dict[str, Row]:
    """The reference outputs, by instruction.

    Raises:
        UserError: one is missing.
    """
    rows = read_table("suite.reference", str(_file("reference", suite.reference)), ("instruction", "output"))
    made = {row["instruction"]: row for row in rows}
    asked = [row["instruction"] for row in _instructions(suite)[: suite.limit]]
    if missing := [instruction for instruction in asked if instruction not in made]:
        raise UserError(
            f"suite.reference={suite.reference} has no output to {len(missing)} of {len(asked)} instructions, the first is "
            f"{missing[0][:60]!r}"
        )
    return made


def _outputs(given: Evaluation) -> list[Row]:
    """The answers in AlpacaEval's format."""
    asked = _asked(given)
    said = answers_by_text(given, [row["instruction"] for row in asked])
    return [
        {
            "dataset": row.get("dataset", ""),
            "instruction": row["instruction"],
            "output": said[row["instruction"]],
            "generator": given.run.name,
        }
        for row in asked
    ]


def _difficulties(
    suite: AlpacaEvalConfig, positions: Sequence[int]
) -> tuple[list[float] | None, list[list[float]] | None]:
    """Difficulties of the instructions at these positions of AlpacaEval's list, and the gamed baselines' rows."""
    if suite.difficulties is None:
        return None, None
    path = _file("difficulties", suite.difficulties)
    with path.open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    try:
        known = {int(row["index"]): float(row["instruction_difficulty"]) for row in table}
        names = ("preference", "std_delta_len", "instruction_difficulty")
        gamed = [[float(row[name]) for name in names] for row in table if row["preference"]]
        return [known[at] for at in positions], [row for row in gamed if not math.isnan(row[0])]
    except (KeyError, ValueError) as error:
        raise UserError(
            f"suite.difficulties={suite.difficulties} is not AlpacaEval's df_gamed.csv, or of other instructions: {error!r}"
        ) from error


def _write(file: Path, rows: Sequence[Row]) -> None:
    with writing(f"cannot write {file.parent}", ""):
        write_text(file, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")


# Judges ---------------------------------------------------------------------------------------------------------------


def _annotations(given: Evaluation, outputs: Sequence[Row]) -> list[Row]:
    """AlpacaEval's rows of who was preferred, from whoever judges."""
    suite = _settings(given)
    if suite.annotations is not None:
        given_rows = read_table("suite.annotations", suite.annotations, _ANNOTATION)
        said = {row["instruction"]: row["output"] for row in outputs}
        other = [row for row in given_rows if said.get(row["instruction"]) != row["output_2"].strip()]
        if other:
            raise UserError(
                f"suite.annotations={suite.annotations}: {len(other)} of {len(given_rows)} are not of this run's answers, the "
                f"first is to {other[0]['instruction'][:60]!r}; annotate {given.folder / 'model_outputs.json'}"
            )
        return given_rows
    reference = _reference(suite)
    if suite.annotator is not None:
        made = _by_package(suite.annotator, outputs, [reference[row["instruction"]] for row in outputs])
    else:
        made = _by_scorer(given, outputs, reference)
    _write(given.folder / "annotations.json", made)
    return made


def _both(given: Evaluation, outputs: Sequence[Row], reference: Mapping[str, Row]) -> list[ResponseRow]:
    """Both answers to each instruction, for a scorer: one that compares sees them in both orders."""
    instructions = [row["instruction"] for row in outputs]
    said = {row["instruction"]: row["output"] for row in outputs}
    asked = list(zip(dict.fromkeys(instructions), questions(given, instructions), strict=True))

    def rows(texts: Mapping[str, str]) -> list[ResponseRow]:
        return [
            ResponseRow(iteration=1, prompt_id=prompt.id, k=0, prompt=prompt.text, response=texts[instruction])
            for instruction, prompt in asked
        ]

    return answer_figures.side_by_side(
        {OURS: rows(said), THEIRS: rows({name: row["output"] for name, row in reference.items()})}, 1
    )


def _by_scorer(given: Evaluation, outputs: Sequence[Row], reference: Mapping[str, Row]) -> list[Row]:
    """What one of our scorers makes of them; a pair without a finite score has no preference."""
    of_prompts = answer_figures.usable(scored(given, _both(given, outputs, reference)))
    chance = {prompt.id: answer_figures.chances(prompt, OURS, THEIRS)[0][0] for prompt in of_prompts}
    judge = scorer_identity(given)["name"]

    def row(ours: Row) -> Row:
        theirs, won = reference[ours["instruction"]], chance.get(fingerprint(ours["instruction"]))
        return {
            "instruction": ours["instruction"],
            "output_1": theirs["output"],
            "generator_1": theirs.get("generator", "reference"),
            "dataset": ours["dataset"],
            "output_2": ours["output"],
            "generator_2": ours["generator"],
            "annotator": judge,
            "preference": None if won is None else 1 + won,
        }

    return [row(ours) for ours in outputs]


def _package(annotator: str) -> Any:
    try:
        import alpaca_eval
    except ImportError as error:
        raise UserError(
            f"suite.annotator={annotator} needs alpaca-eval, which wants an older setuptools: "
            f"pip install 'alpaca-eval>=0.6.6,<0.7' 'setuptools<81' ({error})"
        ) from error
    return alpaca_eval


def _by_package(annotator: str, outputs: Sequence[Row], reference: Sequence[Row]) -> list[Row]:
    """The judge of the package alpaca-eval; its figures are left to ours, which need no hub file."""
    package = _package(annotator)
    try:
        _, annotations = package.evaluate(
            model_outputs=list(outputs),
            reference_outputs=list(reference),
            annotators_config=annotator,
            fn_metric="get_winrate",
            sort_by="win_rate",
            precomputed_leaderboard=None,
            output_path=None,
            is_return_instead_of_print=True,
        )
    except Exception as error:  # no key, no such annotator, a server's: they share no base class
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"suite.annotator={annotator}: alpaca-eval fails ({reason})") from error
    return [dict(row) for row in annotations]
