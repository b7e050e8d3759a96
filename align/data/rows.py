"""Rows of pairs or prompts: read from files, the hub or a function; mixed, split, and parsed.

Formats are TRL's (https://huggingface.co/docs/trl/dataset_formats): conversational or plain, explicit or implicit
prompt; optional columns `chosen_win_prob` and `rejected_win_prob` in [0, 1], `chosen_score`, `rejected_score`, `id`.
Left out: tokens (pairs.py).
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import takewhile
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets.table import InMemoryTable
from pyarrow import parquet
from tqdm import tqdm

from align.config import DatasetConfig, SourceConfig
from align.files import file_fingerprint, fingerprint
from align.model.load import Start, is_local
from align.say import UserError, first_line, resolve

_OURS = ("prompt", "chosen", "rejected", "chosen_win_prob", "rejected_win_prob", "chosen_score", "rejected_score", "id")
_HINT = "expected chosen and rejected, and prompt where they do not hold it; dataset.columns={ours: yours} renames"
Conversation = list[dict[str, str]]  # each with a role and its content


class BadRow(Exception):  # noqa: N818 - in `except BadRow` a noun reads better
    """A row that cannot be trained on. Its message is the reason, by which such rows are counted."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of a split under our column names, and a fingerprint of their content."""

    rows: Sequence[Mapping[str, Any]]
    fingerprint: str
    where: str  # for errors: the source in which row numbers count


class Content(Enum):
    """Content to read from rows, and the columns it needs: one out of each tuple."""

    pairs = (("chosen",), ("rejected",))
    prompts = (("prompt", "chosen"),)


def load_splits(cfg: DatasetConfig, start: Start, cache: Path, content: Content = Content.pairs) -> dict[str, Rows]:
    """Read the rows of `train` and `held_out` from the one source, or from the mix in proportion to the weights."""
    if not cfg.mix:
        return _load_source("dataset", cfg, cfg.eval_fraction, start, cache, content)
    parts = {
        name: _load_source(f"dataset.mix.{name}", source, cfg.eval_fraction, start, cache, content)
        for name, source in cfg.mix.items()
    }
    ours = [parts[name] for name, source in cfg.mix.items() if source.eval_path is None and source.eval_split is None]
    held_out = {_prompt_hash(row) for part in ours for row in part["held_out"].rows}
    for part in parts.values():  # a prompt that is held out of one source may be in another
        rows = [row for row in part["train"].rows if _prompt_hash(row) not in held_out]
        part["train"] = replace(part["train"], rows=rows)
    weights = {name: source.weight for name, source in cfg.mix.items()}
    return {
        split: _mix({name: part[split] for name, part in parts.items()}, weights) for split in ("train", "held_out")
    }


def _mix(parts: dict[str, Rows], weights: dict[str, float]) -> Rows:
    """Mix parts in the proportion of their weights: as many rows as the scarcest part allows, and no row twice.

    Rows are taken evenly over each part, whose name is in the column `source`. Any first rows have the same proportion.
    """
    total = min(len(part.rows) / weights[name] for name, part in parts.items())
    placed: list[tuple[float, Mapping[str, Any]]] = []  # (position in the mix, row)
    for name, part in parts.items():
        count = min(len(part.rows), round(total * weights[name]))
        taken = [part.rows[i * len(part.rows) // count] for i in range(count)]
        marked = ({"source": name, **row, "_number": f"{row['_number']} of {name}"} for row in taken)
        placed += [((i + 0.5) / count, row) for i, row in enumerate(marked)]
    mixed = [row for _, row in sorted(placed, key=lambda at: at[0])]
    key = fingerprint(list(parts), {name: (part.fingerprint, weights[name]) for name, part in parts.items()})
    return Rows(rows=mixed, fingerprint=key, where="the mix")


def _load_source(
    key: str, source: SourceConfig, eval_fraction: float, start: Start, cache: Path, content: Content
) -> dict[str, Rows]:
    def load(knob: str, path: str | None, split: str) -> Rows:
        if source.rows is None:
            return _renamed(read_rows(f"{key}.{knob}", str(path), split, source), source, key, content)
        rows = resolve(source.rows, f"{key}.rows")(split, start, cache)
        lines = b"".join(json.dumps(row, sort_keys=True, default=str).encode() for row in rows)
        read = Rows(rows=rows, fingerprint=hashlib.sha256(lines).hexdigest()[:16], where=f"{source.rows}, {split}")
        return _renamed(read, source, key, content)

    train = load("path", source.path, source.split)
    if source.eval_path is not None or source.eval_split is not None:
        knob = "path" if source.eval_path is None else "eval_path"
        held_out = load(knob, source.eval_path or source.path, source.eval_split or source.split)
        return {"train": train, "held_out": held_out}
    hashes = [_prompt_hash(row) for row in train.rows]
    prompts = sorted(set(hashes))
    chosen = set(prompts[: max(1, round(eval_fraction * len(prompts)))])  # the smallest: stable as a set grows
    if len(chosen) == len(prompts):
        raise UserError(f"{train.where} has one prompt only, so none can be held out: give {key}.eval_path")
    splits: dict[str, list[Mapping[str, Any]]] = {"train": [], "held_out": []}
    for row, prompt in zip(train.rows, hashes, strict=True):
        splits["held_out" if prompt in chosen else "train"].append(row)
    return {
        name: replace(train, rows=rows, fingerprint=fingerprint(train.fingerprint, name, eval_fraction))
        for name, rows in splits.items()
    }


def read_rows(key: str, path: str, split: str, source: SourceConfig) -> Rows:
    """Read the rows of a local file, a `save_to_disk` folder, or a hub dataset."""
    file = Path(path).expanduser()
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
    if file.is_file():
        if file.suffix not in readers:
            raise UserError(f"{key}={path} ends in {file.suffix!r}; files can be {', '.join(readers)}")
        return Rows(rows=readers[file.suffix](file), fingerprint=file_fingerprint(file), where=path)
    if not file.is_dir() and (is_local(path) or file.suffix in readers):
        raise UserError(f"{key}={path} does not exist; it is taken from the working folder {Path.cwd()}")
    if file.is_dir():
        try:
            stored = datasets.load_from_disk(str(file))
        except (OSError, ValueError) as error:
            found = f"{key}={path} is a folder, but not one written by save_to_disk"
            raise UserError(f"{found}: {error} (or give a file in it)") from error
    else:
        try:
            stored = datasets.load_dataset(path, name=source.config, split=split, revision=source.revision)
        except Exception as error:  # the hub's errors have no base class: offline, no such set, split or configuration
            missing = f"{key}={path} is nothing local, and its split {split!r} cannot be had from the hub"
            raise UserError(f"{missing}: {first_line(error)}") from error
    if isinstance(stored, datasets.DatasetDict):
        if split not in stored:
            raise UserError(f"{key}={path} has no split {split!r}; it has {', '.join(map(str, stored))}")
        stored = stored[split]
    return Rows(rows=stored, fingerprint=fingerprint(stored._fingerprint), where=f"{path}, {split}")


def _read_jsonl(file: Path) -> list[dict[str, Any]]:
    rows = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:  # not JSON, or not UTF-8
                raise UserError(f"{file}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{file}, line {number} is not a JSON object but {line.decode().strip()[:40]!r}")
            rows.append(row)
    return rows


def _read_json(file: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{file} is not JSON: {error}; one row a line is a .jsonl file") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{file} must hold a list of JSON objects")
    return rows


def _read_parquet(file: Path) -> datasets.Dataset:
    try:
        return datasets.Dataset(InMemoryTable(parquet.read_table(file)))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} is not a parquet file: {error}") from error


def _renamed(rows: Rows, source: SourceConfig, key: str, content: Content) -> Rows:
    """Rename columns to ours. Raises `UserError` if there are no rows, or columns that are renamed or read are absent."""
    if len(rows.rows) == 0:
        raise UserError(f"{rows.where} is empty")
    names = list(rows.rows[0])
    if unknown := [ours for ours in source.columns if ours not in _OURS]:
        raise UserError(f"{key}.columns: {unknown[0]!r} is none of our columns, which are {', '.join(_OURS)}; {_HINT}")
    if missing := [theirs for theirs in source.columns.values() if theirs not in names]:
        raise UserError(f"{rows.where} has no column {missing[0]!r} ({key}.columns); it has {', '.join(names)}")
    renamed = {*source.columns, *source.columns.values()}
    present = (set(names) - renamed) | set(source.columns)
    absent = [one_of for one_of in content.value if present.isdisjoint(one_of)]
    if absent and content is Content.pairs and "prompt" in present:
        raise UserError(
            f"{rows.where} has prompts and no column {absent[0][0]!r}, so there are no pairs to train on: let the policy answer "
            f"them with source=selfplay; it has {', '.join(names)}; {_HINT}"
        )
    if absent:
        raise UserError(f"{rows.where} has no column {absent[0][0]!r}; it has {', '.join(names)}; {_HINT}")
    bar = tqdm(rows.rows, desc=f"reading {rows.where}", disable=len(rows.rows) < 5000)
    ours: list[Mapping[str, Any]] = [
        {
            **{name: value for name, value in row.items() if name not in renamed},
            **{our: row.get(their) for our, their in source.columns.items()},
            "_number": number,  # in the source, also after a split or a mix
            **({"wrap_plain": True} if source.wrap_plain else {}),
        }
        for number, row in enumerate(bar, 1)
    ]
    key = fingerprint(rows.fingerprint, source.columns, source.wrap_plain)
    return Rows(rows=ours, fingerprint=key, where=rows.where)


def _prompt_hash(row: Mapping[str, Any]) -> str:
    try:
        prompt: Any = read_prompt(row)
    except BadRow:
        prompt = row.get("prompt")
    return hashlib.sha256(json.dumps(prompt, sort_keys=True, default=str).encode()).hexdigest()


def read_pair(row: Mapping[str, Any]) -> tuple[Conversation | str, str, str]:
    """Parse (prompt, chosen, rejected): a conversation and two answers, or three texts; or raise `BadRow`."""
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    if not chosen or not rejected:
        raise BadRow("empty response")
    if isinstance(chosen, list) and isinstance(rejected, list):
        (prompt, chosen), (other, rejected) = (_split_answer(_whole(prompt, side)) for side in (chosen, rejected))
        if prompt != other:
            raise BadRow("the prompts of chosen and rejected differ")
    elif isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            prompt, chosen, rejected = _split_common(chosen, rejected)
        if isinstance(prompt, list):
            prompt = [_message(message) for message in prompt]
        elif not isinstance(prompt, str):
            raise BadRow("content is not text")
        elif prompt and row.get("wrap_plain"):
            prompt = [{"role": "user", "content": prompt}]
    else:
        raise BadRow("content is not text")
    if not prompt:
        raise BadRow("empty prompt")
    if not chosen.strip() or not rejected.strip():
        raise BadRow("empty response")
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same")
    return prompt, chosen, rejected


def read_prompt(row: Mapping[str, Any]) -> Conversation | str:
    """Parse the prompt of a row, with or without answers: a conversation up to them, or a text; or raise `BadRow`."""
    try:
        return read_pair(row)[0]
    except BadRow:
        prompt = row.get("prompt")
        if prompt is None:
            raise
    if isinstance(prompt, str):
        if not prompt.strip():
            raise BadRow("empty prompt")
        a_turn = row.get("wrap_plain") or isinstance(row.get("chosen"), list)
        return [{"role": "user", "content": prompt}] if a_turn else prompt
    if not isinstance(prompt, list):
        raise BadRow("content is not text")
    conversation = [_message(message) for message in prompt]
    if not conversation or not conversation[-1]["content"].strip():
        raise BadRow("empty prompt")
    return conversation


def _whole(prompt: Any, side: list[Any]) -> list[Any]:
    """Join a prompt and one side to a conversation. The side may include the prompt, and the prompt may be a text."""
    if isinstance(prompt, list):
        return side if side[: len(prompt)] == prompt else [*prompt, *side]
    alone = isinstance(side[0], Mapping) and side[0].get("role") == "assistant"
    return [{"role": "user", "content": prompt}, *side] if alone and isinstance(prompt, str) and prompt else side


def _split_common(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Split off an implicit plain prompt: the common beginning, up to the last end of a word on both sides."""
    at = len(list(takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False))))
    while at and not chosen[at - 1].isspace() and not all(side[at : at + 1].isspace() for side in (chosen, rejected)):
        at -= 1
    at = len(chosen[:at].rstrip())  # the space belongs to the response, as tokenizers have it
    return chosen[:at], chosen[at:], rejected[at:]


def _split_answer(messages: list[Any]) -> tuple[Conversation, str]:
    conversation = [_message(message) for message in messages]
    if conversation[-1]["role"] != "assistant":
        raise BadRow("the last turn is not the assistant's")
    return conversation[:-1], conversation[-1]["content"]


def _message(message: Any) -> dict[str, str]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise BadRow("a message has no role")
    if not isinstance(message.get("content"), str):
        raise BadRow("content is not text")
    return {"role": message["role"], "content": message["content"]}


def read_number(row: Mapping[str, Any], column: str, low: float, high: float) -> float:
    """Read a numeric column of a row. Returns NaN if the row has none; raises `BadRow` outside [low, high]."""
    value = row.get(column)
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise BadRow(f"{column} is not a number" if math.isinf(high) else f"{column} is not in [{low:g}, {high:g}]")
    return float(value)
