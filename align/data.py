"""Preference rows in, token ids out: formats, chat template, filters, truncation; prepared once and cached.

A prepared pair is a prompt and two responses, as token ids. Every response token is scored and no prompt token is,
so the response mask is a question of where the prompt ends (`train.response_mask`), answered here and nowhere else.
Left out: padding and batching (batching.py), and the reference's column (reference.py).

Formats are TRL's (https://huggingface.co/docs/trl/dataset_formats): conversational or plain, explicit or implicit
prompt; optional columns `chosen_win_prob` and `rejected_win_prob` in [0, 1], `chosen_score`, `rejected_score`, `id`.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow  # type: ignore[import-untyped]
from datasets.table import InMemoryTable
from pyarrow import parquet
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from align.cache import build_once
from align.config import (
    DatasetConfig,
    ResponseMask,
    SourceConfig,
    SystemMessage,
    TrainConfig,
    Truncation,
    UserError,
    file_fingerprint,
    fingerprint,
    resolve,
)
from align.model import Start, end_of_turn, merge_system_message, tokenizer_fingerprint

_CHUNK = 1000  # rows tokenised at once: the tokenizer's threads share a chunk
_VERSION = 1  # of what is written to the cache: raise it when preparing changes
_OURS = ("prompt", "chosen", "rejected", "chosen_win_prob", "rejected_win_prob", "chosen_score", "rejected_score", "id")
_HINT = "expected chosen and rejected, and prompt where they do not hold it; dataset.columns={ours: yours} renames"

Message = Mapping[str, Any]


class BadRow(Exception):  # noqa: N818 - read in `except BadRow`, a noun says more
    """A row that cannot be trained on; the message is the reason it is counted under."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Prepared pairs: `train` and `held_out`, and what was dropped or cut on the way.

    Columns: `row_id` text; `conversation` the prompt as JSON (messages, or a plain text); `prompt_ids`, `chosen_ids`, `rejected_ids` token ids; `chosen_win_prob` and
    `rejected_win_prob` (NaN where the source has none); `cut_tokens` response tokens lost to truncation; `group`.
    """

    train: datasets.Dataset
    held_out: datasets.Dataset
    counts: dict[str, Any]
    fingerprint: str
    folder: Path


def prepare(cfg: DatasetConfig, train: TrainConfig, system: SystemMessage, start: Start, cache: Path) -> Pairs:
    """Read, check, render, tokenise and truncate the pairs of a run, or load them from the cache.

    Raises:
        UserError: a source that cannot be read, a bad row under `strict`, or nothing left to train on.
    """
    splits = _load_splits(cfg, start, cache)
    rules = Rules(
        tokenizer=start.tokenizer,
        response_mask=train.response_mask,
        truncation=train.truncation,
        max_length=train.max_length,
        max_prompt_length=train.max_prompt_length,
        system_message=system,
        group_by=cfg.group_by,
    )
    limits = {"train": cfg.limit, "held_out": cfg.eval_limit}
    key = fingerprint(
        _VERSION,
        {name: rows.fingerprint for name, rows in splits.items()},
        tokenizer_fingerprint(start.tokenizer),
        [train.response_mask.name, train.truncation.name, train.max_length, train.max_prompt_length],
        [system.name, cfg.group_by, cfg.strict, limits, cfg.name],
    )

    def build(into: Path) -> None:
        counts = {}
        for name, rows in splits.items():
            pairs, counts[name] = _prepare_split(rows, rules, cfg.strict, limits[name], f"{cfg.name}, {name}")
            pairs.save_to_disk(str(into / name))
        (into / "counts.json").write_text(json.dumps(counts, indent=2))

    folder = build_once(cache / "pairs" / f"{cfg.name}-{key}", build)
    counts = json.loads((folder / "counts.json").read_text())
    return Pairs(
        train=datasets.load_from_disk(str(folder / "train")),
        held_out=datasets.load_from_disk(str(folder / "held_out")),
        counts=counts,
        fingerprint=key,
        folder=folder,
    )


# Sources -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Raw rows of a split, renamed to our columns, and a fingerprint of their content."""

    rows: Sequence[Mapping[str, Any]]
    fingerprint: str
    where: str  # for errors: what the row numbers count in


def _load_splits(cfg: DatasetConfig, start: Start, cache: Path) -> dict[str, Rows]:
    """Rows of `train` and `held_out`: of the one source, or of the mix in proportion to the weights."""
    if not cfg.mix:
        return _load_source("dataset", cfg, cfg.eval_fraction, start, cache)
    parts = {
        name: _load_source(f"dataset.mix.{name}", source, cfg.eval_fraction, start, cache)
        for name, source in cfg.mix.items()
    }
    ours = [parts[name] for name, source in cfg.mix.items() if source.eval_path is None and source.eval_split is None]
    held = {_prompt_hash(row) for part in ours for row in part["held_out"].rows}
    for part in parts.values():  # a prompt that we hold out of one source may be in another
        rows = [row for row in part["train"].rows if _prompt_hash(row) not in held]
        part["train"] = replace(part["train"], rows=rows)
    weights = {name: source.weight for name, source in cfg.mix.items()}
    return {
        split: _mix({name: part[split] for name, part in parts.items()}, weights) for split in ("train", "held_out")
    }


def _mix(parts: dict[str, Rows], weights: dict[str, float]) -> Rows:
    """As many rows as the scarcest part allows, in the proportion of the weights; no row twice.

    Rows are taken evenly over each part, and carry the part's name in the column `source`.
    """
    total = min(len(part.rows) / weights[name] for name, part in parts.items())
    mixed: list[Mapping[str, Any]] = []
    for name, part in parts.items():
        count = min(len(part.rows), round(total * weights[name]))
        taken = [part.rows[i * len(part.rows) // count] for i in range(count)]
        mixed += [{"source": name, **row, "_number": f"{row['_number']} of {name}"} for row in taken]
    key = fingerprint({name: (part.fingerprint, weights[name]) for name, part in parts.items()})
    return Rows(rows=mixed, fingerprint=key, where="the mix")


def _load_source(key: str, source: SourceConfig, eval_fraction: float, start: Start, cache: Path) -> dict[str, Rows]:
    def load(knob: str, path: str | None, split: str) -> Rows:
        if source.rows is not None:
            made = resolve(source.rows, f"{key}.rows")(split, start, cache)
            return Rows(rows=made, fingerprint=_content_fingerprint(made), where=f"{source.rows}, {split}")
        assert path is not None
        return _read(f"{key}.{knob}", path, split, source)

    train = load("path", source.path, source.split)
    if source.eval_path is not None or source.eval_split is not None:
        knob = "path" if source.eval_path is None else "eval_path"
        held_out = load(knob, source.eval_path or source.path, source.eval_split or source.split)
        return {"train": _renamed(train, source, key), "held_out": _renamed(held_out, source, key)}
    train = _renamed(train, source, key)
    hashes = [_prompt_hash(row) for row in train.rows]
    held = _held_out_prompts(hashes, eval_fraction)
    if len(held) == len(set(hashes)):
        raise UserError(f"{train.where} has one prompt only, so none can be held out: give {key}.eval_path")
    sides = {"train": False, "held_out": True}
    return {
        name: Rows(
            rows=[row for row, prompt in zip(train.rows, hashes, strict=True) if (prompt in held) is side],
            fingerprint=fingerprint(train.fingerprint, name, eval_fraction),
            where=train.where,
        )
        for name, side in sides.items()
    }


def _read(key: str, path: str, split: str, source: SourceConfig) -> Rows:
    """Rows of a local file, a `save_to_disk` folder, or a hub dataset."""
    file = Path(path).expanduser()
    if file.is_file():
        readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
        if file.suffix not in readers:
            raise UserError(f"{key}={path} ends in {file.suffix!r}; files can be {', '.join(readers)}")
        return Rows(rows=readers[file.suffix](file), fingerprint=file_fingerprint(file), where=path)
    if not file.is_dir():
        if path.startswith(("/", ".", "~")) or file.suffix in (".jsonl", ".json", ".parquet"):
            raise UserError(f"{key}={path} does not exist; it is taken from the working folder {Path.cwd()}")
        return _read_hub(key, path, split, source)
    try:
        stored = datasets.load_from_disk(str(file))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{key}={path} is a folder, but not one written by save_to_disk: {error} (or give a file in it)"
        ) from error
    if isinstance(stored, datasets.DatasetDict):
        if split not in stored:
            raise UserError(f"{key}={path} has no split {split!r}; it has {', '.join(map(str, stored))}")
        stored = stored[split]
    return Rows(rows=stored, fingerprint=fingerprint(stored._fingerprint), where=f"{path}, {split}")


def _read_hub(key: str, path: str, split: str, source: SourceConfig) -> Rows:
    try:
        stored = datasets.load_dataset(path, name=source.config, split=split, revision=source.revision)
    except Exception as error:  # the hub's errors share no base class: offline, no such set, split or configuration
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"{key}={path} is nothing local, and its split {split!r} cannot be had from the hub: {reason}"
        ) from error
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


def _renamed(rows: Rows, source: SourceConfig, key: str) -> Rows:
    """Rows under our column names; refuses a source without the columns that make a pair."""
    if len(rows.rows) == 0:
        raise UserError(f"{rows.where} is empty")
    names = list(rows.rows[0])
    unknown = [ours for ours in source.columns if ours not in _OURS]
    if unknown:
        raise UserError(f"{key}.columns: {unknown[0]!r} is none of our columns, which are {', '.join(_OURS)}; {_HINT}")
    missing = [theirs for theirs in source.columns.values() if theirs not in names]
    if missing:
        raise UserError(f"{rows.where} has no column {missing[0]!r} ({key}.columns); it has {', '.join(names)}")
    renamed = {*source.columns, *source.columns.values()}
    present = (set(names) - renamed) | set(source.columns)
    absent = [name for name in ("chosen", "rejected") if name not in present]
    if absent:
        raise UserError(f"{rows.where} has no column {absent[0]!r}; it has {', '.join(names)}; {_HINT}")
    bar = tqdm(rows.rows, desc=f"reading {rows.where}", disable=len(rows.rows) < 5000)
    made: list[Mapping[str, Any]] = [
        {
            **{name: value for name, value in row.items() if name not in renamed},
            **{ours: row.get(theirs) for ours, theirs in source.columns.items()},
            "_number": number,  # in the source, which a split or a mix takes rows from
            **({"wrap_plain": True} if source.wrap_plain else {}),
        }
        for number, row in enumerate(bar, 1)
    ]
    return Rows(
        rows=made, fingerprint=fingerprint(rows.fingerprint, source.columns, source.wrap_plain), where=rows.where
    )


def _content_fingerprint(rows: Iterable[Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _prompt_hash(row: Mapping[str, Any]) -> str:
    try:
        prompt: Any = read_pair(row)[0]
    except BadRow:
        prompt = row.get("prompt")
    return hashlib.sha256(json.dumps(prompt, sort_keys=True, default=str).encode()).hexdigest()


def _held_out_prompts(hashes: Iterable[str], fraction: float) -> set[str]:
    """Hashes of the prompts that are held out: the smallest ones, so the choice is stable as a set grows."""
    ordered = sorted(set(hashes))
    return set(ordered[: max(1, round(fraction * len(ordered)))])


# Rows --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How a row becomes token ids."""

    tokenizer: PreTrainedTokenizerBase
    response_mask: ResponseMask
    truncation: Truncation
    max_length: int
    max_prompt_length: int
    system_message: SystemMessage
    group_by: str | None


@dataclass(frozen=True, kw_only=True)
class Text:
    """A pair as text: what the prompt is, and prompt and response of each side. Every text starts with `prompt`."""

    prompt: str
    chosen: str
    rejected: str


def read_pair(row: Mapping[str, Any]) -> tuple[list[Message] | str, str, str]:
    """(prompt, chosen, rejected) of a row: a conversation and two answers to it, or three plain texts.

    Raises:
        BadRow: the row cannot be trained on.
    """
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    if isinstance(chosen, list) and isinstance(rejected, list):
        given = list(prompt) if isinstance(prompt, list) else []
        contexts, answers = zip(*(_split_answer([*given, *side]) for side in (chosen, rejected)), strict=True)
        if contexts[0] != contexts[1]:
            raise BadRow("the prompts of chosen and rejected differ")
        if not contexts[0]:
            raise BadRow("empty prompt")
        pair: tuple[list[Message] | str, str, str] = contexts[0], answers[0], answers[1]
    elif isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            from trl import extract_prompt  # TRL's rule for an implicit plain prompt: the common beginning

            split = extract_prompt({"chosen": chosen, "rejected": rejected})
            prompt, chosen, rejected = split["prompt"], split["chosen"], split["rejected"]
        if isinstance(prompt, list) or row.get("wrap_plain"):
            turn = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
            pair = [_message(message) for message in turn], chosen, rejected
        elif isinstance(prompt, str):
            pair = prompt, chosen, rejected
        else:
            raise BadRow("content is not text")
        if not prompt:
            raise BadRow("empty prompt")
    else:
        raise BadRow("content is not text")
    if not pair[1].strip() or not pair[2].strip():
        raise BadRow("empty response")
    if pair[1] == pair[2]:
        raise BadRow("chosen and rejected are the same")
    return pair


def _split_answer(messages: list[Any]) -> tuple[list[Message], str]:
    if not messages:
        raise BadRow("empty response")
    conversation = [_message(message) for message in messages]
    if conversation[-1]["role"] != "assistant":
        raise BadRow("the last turn is not the assistant's")
    return conversation[:-1], conversation[-1]["content"]


def _message(message: Any) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise BadRow("a message has no role")
    if not isinstance(message.get("content"), str):
        raise BadRow("content is not text")
    return {"role": message["role"], "content": message["content"]}


def read_number(row: Mapping[str, Any], column: str, low: float, high: float) -> float:
    """A numeric column of a row; NaN where the row has none, `BadRow` where its value is not in [low, high]."""
    value = row.get(column)
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise BadRow(f"{column} is not a number" if math.isinf(high) else f"{column} is not in [{low:g}, {high:g}]")
    return float(value)


def render(pair: tuple[list[Message] | str, str, str], rules: Rules, ending: tuple[str, str] | None) -> Text:
    """The pair as text, through the chat template where the prompt is a conversation.

    `ending` is `end_of_turn(tokenizer)`: a response ends with the first part; the second is cut off.

    Raises:
        BadRow: the template refuses the conversation, or writes the prompt otherwise when an answer follows.
    """
    prompt, *answers = pair
    if isinstance(prompt, str):
        eos = str(rules.tokenizer.eos_token)
        chosen, rejected = (prompt + (a if a.endswith(eos) else a + eos) for a in answers)
        return Text(prompt=prompt, chosen=chosen, rejected=rejected)
    assert ending is not None
    messages = _for_template(prompt, rules)

    def apply(conversation: list[Any], header: bool) -> str:
        try:
            text = rules.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=header)
        except Exception as error:  # Jinja raises whatever the template's author chose
            raise BadRow(f"the chat template refuses it: {error}") from error
        assert isinstance(text, str)
        return text

    opened = apply(messages, header=rules.response_mask is ResponseMask.completion)
    full = [
        apply([*messages, {"role": "assistant", "content": answer}], header=False).removesuffix(ending[1])
        for answer in (answer.removesuffix(ending[0]) for answer in answers)  # some data sets hold the end of turn too
    ]
    full = [text if text.endswith(ending[0]) else text + ending[0] for text in full]
    if not all(text.startswith(opened) for text in full):
        raise BadRow("the chat template writes the prompt otherwise when an answer follows")
    return Text(prompt=opened, chosen=full[0], rejected=full[1])


def _for_template(prompt: list[Message] | str, rules: Rules) -> Any:
    return prompt if isinstance(prompt, str) else merge_system_message([dict(m) for m in prompt], rules.system_message)


def tokenise(texts: list[Text], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """(prompt ids, chosen ids, rejected ids) of each text, with one BOS in front where the tokenizer has one.

    Both sides share the prompt's ids, which are those the policy is given when it generates. A response is what
    follows them; where a token straddles the boundary the response is tokenised by itself.
    """
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a").input_ids[:1] == [bos]

    def encode(batch: list[str]) -> list[list[int]]:
        return tokenizer(batch, add_special_tokens=False).input_ids

    prompts = encode([text.prompt for text in texts])
    sides = {side: encode([getattr(text, side) for text in texts]) for side in ("chosen", "rejected")}
    for i, text in enumerate(texts):
        prompt = prompts[i]
        responses = []
        for side, encoded in sides.items():
            straddles = encoded[i][: len(prompt)] != prompt
            response = encode([getattr(text, side)[len(text.prompt) :]])[0] if straddles else encoded[i][len(prompt) :]
            responses.append(response)
        if bos is not None and (adds_bos or prompt[:1] == [bos]):
            while prompt[:1] == [bos]:
                prompt = prompt[1:]
            prompt = [bos, *prompt]
        yield prompt, responses[0], responses[1]


def truncate(
    prompt: list[int], chosen: list[int], rejected: list[int], rules: Rules
) -> tuple[list[int], list[int], list[int]]:
    """The pair within `max_length`, by the named policy.

    `papers` is trl 0.9.6's rule, which the SimPO, DPO and WPO models were trained by: if prompt and longer response
    exceed `max_length`, keep the prompt's last `max_prompt_length` tokens; if they still do, cut both responses to
    `max_length - max_prompt_length`. One thing differs: a BOS that the cut would lose is kept as the first token.

    Raises:
        BadRow: under `drop`, a pair that is too long.
    """
    longer = max(len(chosen), len(rejected))
    if len(prompt) + longer <= rules.max_length:
        return prompt, chosen, rejected
    if rules.truncation is Truncation.drop:
        raise BadRow(f"longer than max_length ({rules.max_length})")
    bos = [prompt[0]] if prompt[0] == rules.tokenizer.bos_token_id else []
    if len(prompt) > rules.max_prompt_length:
        prompt = [*bos, *prompt[len(prompt) - rules.max_prompt_length + len(bos) :]]
    if len(prompt) + longer > rules.max_length:
        keep = rules.max_length - rules.max_prompt_length
        chosen, rejected = chosen[:keep], rejected[:keep]
    return prompt, chosen, rejected


def _prepare_split(
    rows: Rows, rules: Rules, strict: bool, limit: int | None, name: str
) -> tuple[datasets.Dataset, dict[str, Any]]:
    """Prepared pairs of one split, and counts of what was dropped (by reason) and cut."""
    tokenizer = rules.tokenizer
    if rules.group_by and rows.rows and not any(rules.group_by in row for row in rows.rows):
        names = ", ".join(name for name in rows.rows[0] if not name.startswith("_"))
        raise UserError(f"{rows.where} has no column {rules.group_by!r} (dataset.group_by); it has {names}")
    ending = end_of_turn(tokenizer) if tokenizer.chat_template is not None else None
    dropped: Counter[str] = Counter()
    made: list[dict[str, Any]] = []
    with tqdm(total=len(rows.rows), desc=f"preparing {name}", unit="row", disable=len(rows.rows) < _CHUNK) as bar:
        for at in range(0, len(rows.rows), _CHUNK):
            chunk = [rows.rows[i] for i in range(at, min(at + _CHUNK, len(rows.rows)))]
            checked: list[tuple[dict[str, Any], Text]] = []
            bad: list[tuple[int | str, str]] = []  # number in the source, reason
            for row in chunk:
                try:
                    checked.append(_check(row, rules, ending))
                except BadRow as error:
                    bad.append((row["_number"], str(error)))
            ids = tokenise([text for _, text in checked], tokenizer) if checked else iter(())
            for (pair, _), encoded in zip(checked, ids, strict=True):
                try:
                    made.append({**pair, **_finish(encoded, rules)})
                except BadRow as error:
                    bad.append((pair["number"], str(error)))
            if bad and strict:
                number, reason = bad[0]
                raise UserError(
                    f"{rows.where}, row {number}: {reason} (dataset.strict=false drops and counts such rows)"
                )
            dropped.update(reason for _, reason in bad)
            bar.update(len(chunk))
            if limit is not None and len(made) >= limit:
                break
    made = made[:limit]
    if not made:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.most_common())
        raise UserError(f"{rows.where}: none of {len(rows.rows)} rows can be used ({reasons})")
    cut = [pair["cut_tokens"] for pair in made]
    counts = {
        "pairs": len(made),
        "dropped": dict(dropped),
        "cut_pairs": sum(c > 0 for c in cut),
        "cut_tokens": sum(cut),
    }
    for pair in made:
        del pair["number"]
    return datasets.Dataset.from_list(made), counts


def _check(row: Mapping[str, Any], rules: Rules, ending: tuple[str, str] | None) -> tuple[dict[str, Any], Text]:
    """What a pair carries besides its tokens, and its text."""
    pair = read_pair(row)
    if not isinstance(pair[0], str) and ending is None:
        raise UserError("the data are conversations and the tokenizer has no chat template: give model.chat_template")
    for column in ("chosen_score", "rejected_score"):
        read_number(row, column, -math.inf, math.inf)
    kept = {
        "number": row["_number"],
        "row_id": str(row.get("id", row["_number"])),
        "conversation": json.dumps(_for_template(pair[0], rules)),
        "chosen_win_prob": read_number(row, "chosen_win_prob", 0, 1),
        "rejected_win_prob": read_number(row, "rejected_win_prob", 0, 1),
        "group": str(row.get(rules.group_by, "")) if rules.group_by else "",
    }
    return kept, render(pair, rules, ending)


def _finish(encoded: tuple[list[int], list[int], list[int]], rules: Rules) -> dict[str, Any]:
    """Truncated token ids, checked for a second BOS."""
    if not encoded[0]:
        raise BadRow("empty prompt")
    bos = _bos(rules.tokenizer)
    if bos is not None and any(ids.count(bos) > allowed for ids, allowed in zip(encoded, (1, 0, 0), strict=True)):
        raise BadRow("a second BOS inside the text")
    prompt, chosen, rejected = truncate(*encoded, rules)
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same after truncation")
    cut = sum(len(ids) for ids in encoded[1:]) - len(chosen) - len(rejected)
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "cut_tokens": cut}


# Looking -----------------------------------------------------------------------------------------------------------


def show_pair(pair: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """A prepared pair as a person can check it: what is the prompt, what is scored, where each token ends."""
    lines = [f"prompt, {len(pair['prompt_ids'])} tokens, not scored: {tokenizer.decode(pair['prompt_ids'])!r}"]
    for side in ("chosen", "rejected"):
        tokens = "|".join(tokenizer.decode([i]) for i in pair[f"{side}_ids"])
        lines.append(f"{side}, {len(pair[f'{side}_ids'])} tokens, all scored: {tokens!r}")
    return "\n".join(lines)


def _bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that may stand only in front; None where the tokenizer has none, or also ends texts with it (GPT-2)."""
    return None if tokenizer.bos_token_id == tokenizer.eos_token_id else tokenizer.bos_token_id


def check_bos(pairs: Pairs, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gate before step 1: exactly one BOS in every prompt if in any, none in a response."""
    bos = _bos(tokenizer)
    if bos is None:
        return
    for split in (pairs.train, pairs.held_out):
        counts = {ids.count(bos) for ids in split["prompt_ids"]}
        inside = any(bos in ids for side in ("chosen_ids", "rejected_ids") for ids in split[side])
        if len(counts) > 1 or counts - {0, 1} or inside:
            raise UserError(
                f"prompts hold {sorted(counts)} BOS tokens and responses {'some' if inside else 'none'}: expected one and none"
            )
