"""Preference rows in, token ids out: chat template, filters, truncation; prepared once and cached.

A prepared pair is a prompt and two responses, as token ids. Every response token is scored and no prompt token is, so
the response mask is decided here alone, by the end of the prompt (`train.response_mask`).
Left out: reading rows (rows.py), padding and batching (engine/), the reference's column (train/reference.py).
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow.compute
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from align.choices import ResponseMask, SystemMessage, Truncation
from align.config import DatasetConfig, TrainConfig
from align.data.rows import BadRow, Conversation, Rows, load_splits, read_number, read_pair
from align.files import build_once, fingerprint
from align.model.chat import end_of_turn, merge_system_message, tokenizer_fingerprint, with_one_bos
from align.model.load import Start
from align.say import UserError

_CHUNK = 1000  # rows tokenised at once: the tokenizer's threads share a chunk
_VERSION = 2  # of the cache's content: raise it when preparing changes


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Prepared pairs, `train` and `held_out`, and counts of rows that were dropped or cut.

    Columns: `row_id` text; `conversation` the prompt as JSON (messages, or a plain text); `prompt_ids`, `chosen_ids`,
    `rejected_ids` token ids; `chosen_win_prob` and `rejected_win_prob` (NaN if the source has none); `cut_tokens`
    and `cut_prompt_tokens`, response and prompt tokens lost to truncation; `group`.
    """

    train: datasets.Dataset
    held_out: datasets.Dataset
    counts: dict[str, Any]
    fingerprint: str
    folder: Path


def prepare_pairs(cfg: DatasetConfig, train: TrainConfig, system: SystemMessage, start: Start, cache: Path) -> Pairs:
    """Read, check, render, tokenise and truncate the pairs of a run (cached); or raise `UserError`."""
    splits = load_splits(cfg, start, cache)
    rules = Rules(tokenizer=start.tokenizer, train=train, system_message=system, group_by=cfg.group_by)
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

    folder = build_once(cache / "pairs" / f"{cfg.name}-{key}", build, what=f"pairs of {cfg.name}")
    counts = json.loads((folder / "counts.json").read_text())
    return Pairs(
        train=datasets.load_from_disk(str(folder / "train")),
        held_out=datasets.load_from_disk(str(folder / "held_out")),
        counts=counts,
        fingerprint=key,
        folder=folder,
    )


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Rules by which a row becomes token ids."""

    tokenizer: PreTrainedTokenizerBase
    train: TrainConfig  # response mask, truncation and lengths
    system_message: SystemMessage = SystemMessage.template
    group_by: str | None = None


class Text(NamedTuple):
    """A pair as text: the prompt, and prompt and response of each side."""

    prompt: str
    chosen: str  # begins with `prompt`
    rejected: str  # likewise


def render(pair: tuple[Conversation | str, str, str], rules: Rules, ending: tuple[str, str] | None) -> Text:
    """Render a pair as text, a conversation by the chat template; `BadRow` where that fails or changes the prompt.

    `ending` is `end_of_turn(tokenizer)`: a response ends with its first part; the second is cut off.
    """
    prompt, *answers = pair
    if isinstance(prompt, str):
        eos = str(rules.tokenizer.eos_token)
        chosen, rejected = (prompt + (a if a.endswith(eos) else a + eos) for a in answers)
        return Text(prompt=prompt, chosen=chosen, rejected=rejected)
    assert ending is not None

    def apply(conversation: list[Any], header: bool) -> str:
        try:
            text = rules.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=header)
        except Exception as error:  # a template's author may raise anything
            raise BadRow(f"the chat template refuses it: {error}") from error
        assert isinstance(text, str)
        return text

    opened = apply(prompt, header=rules.train.response_mask is ResponseMask.completion)
    full = [
        apply([*prompt, {"role": "assistant", "content": answer}], header=False).removesuffix(ending[1])
        for answer in (answer.removesuffix(ending[0]) for answer in answers)  # some data sets include the end of turn
    ]
    full = [text if text.endswith(ending[0]) else text + ending[0] for text in full]
    if not all(text.startswith(opened) for text in full):
        raise BadRow("the chat template writes the prompt otherwise when an answer follows")
    return Text(prompt=opened, chosen=full[0], rejected=full[1])


def tokenise(texts: list[Text], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Yield (prompt ids, chosen ids, rejected ids) for each text, with one BOS in front if the tokenizer has one.

    Both sides share the prompt's ids, which are those from which the policy generates. The response's ids follow them;
    if a token straddles the boundary, the response is tokenised by itself.
    """

    def encode(batch: list[str]) -> list[list[int]]:
        return tokenizer(batch, add_special_tokens=False).input_ids

    columns = (encode(list(column)) for column in zip(*texts, strict=True))
    for text, (prompt, *sides) in zip(texts, zip(*columns, strict=True), strict=True):
        chosen, rejected = (
            ids[len(prompt) :] if ids[: len(prompt)] == prompt else encode([whole[len(text.prompt) :]])[0]
            for whole, ids in zip(text[1:], sides, strict=True)
        )
        yield with_one_bos(prompt, tokenizer), chosen, rejected


def truncate(
    prompt: list[int], chosen: list[int], rejected: list[int], rules: Rules
) -> tuple[list[int], list[int], list[int]]:
    """Cut a pair to `max_length`, by the rule that `truncation` names; by `drop` a pair that is too long is a `BadRow`.

    `papers` is the rule of trl 0.9.6, with which the SimPO, DPO and WPO models were trained: if prompt and longer
    response exceed `max_length`, keep the prompt's last `max_prompt_length` tokens; if they still do, cut the responses
    to `max_length - max_prompt_length`. One thing differs: a BOS that the cut would lose is kept as the first token.
    """
    longest, longest_prompt = rules.train.max_length, rules.train.max_prompt_length
    longer = max(len(chosen), len(rejected))
    if len(prompt) + longer <= longest:
        return prompt, chosen, rejected
    if rules.train.truncation is Truncation.drop:
        raise BadRow(f"longer than max_length ({longest})")
    bos = [prompt[0]] if prompt[0] == rules.tokenizer.bos_token_id else []
    if len(prompt) > longest_prompt:
        prompt = [*bos, *prompt[len(prompt) - longest_prompt + len(bos) :]]
    if len(prompt) + longer > longest:
        chosen, rejected = chosen[: longest - longest_prompt], rejected[: longest - longest_prompt]
    return prompt, chosen, rejected


def _prepare_split(
    rows: Rows, rules: Rules, strict: bool, limit: int | None, name: str
) -> tuple[datasets.Dataset, dict[str, Any]]:
    """Prepare the pairs of one split. Returns them, and counts of rows that were dropped (by reason) or cut."""
    tokenizer = rules.tokenizer
    if rules.group_by and rows.rows and not any(rules.group_by in row for row in rows.rows):
        names = ", ".join(name for name in rows.rows[0] if not name.startswith("_"))
        raise UserError(f"{rows.where} has no column {rules.group_by!r} (dataset.group_by); it has {names}")
    ending = end_of_turn(tokenizer) if tokenizer.chat_template is not None else None
    dropped: Counter[str] = Counter()
    pairs: list[dict[str, Any]] = []
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
            for (pair, _), encoded in zip(checked, tokenise([text for _, text in checked], tokenizer), strict=True):
                try:
                    pairs.append({**pair, **_finish(encoded, rules)})
                except BadRow as error:
                    bad.append((pair["number"], str(error)))
            if bad and strict:
                number, reason = bad[0]
                raise UserError(
                    f"{rows.where}, row {number}: {reason} (dataset.strict=false drops and counts such rows)"
                )
            dropped.update(reason for _, reason in bad)
            bar.update(len(chunk))
            if limit is not None and len(pairs) >= limit:
                break
    pairs = pairs[:limit]
    if not pairs:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.most_common())
        raise UserError(f"{rows.where}: none of {len(rows.rows)} rows can be used ({reasons})")
    counts = {
        "pairs": len(pairs),
        "dropped": dict(dropped),
        "cut_pairs": sum(pair["cut_tokens"] > 0 for pair in pairs),
        "cut_tokens": sum(pair["cut_tokens"] for pair in pairs),
        "cut_prompts": sum(pair["cut_prompt_tokens"] > 0 for pair in pairs),
    }
    return datasets.Dataset.from_list(pairs).remove_columns("number"), counts


def _check(row: Mapping[str, Any], rules: Rules, ending: tuple[str, str] | None) -> tuple[dict[str, Any], Text]:
    """Check a row. Returns the columns of its pair that are no tokens, and its text."""
    prompt, chosen, rejected = read_pair(row)
    if not isinstance(prompt, str):
        if ending is None:
            raise UserError(
                "the data are conversations and the tokenizer has no chat template: give model.chat_template"
            )
        prompt = merge_system_message(prompt, rules.system_message)
    for column in ("chosen_score", "rejected_score"):
        read_number(row, column, -math.inf, math.inf)
    kept = {
        "number": row["_number"],
        "row_id": str(row.get("id", row["_number"])),
        "conversation": json.dumps(prompt),
        "chosen_win_prob": read_number(row, "chosen_win_prob", 0, 1),
        "rejected_win_prob": read_number(row, "rejected_win_prob", 0, 1),
        "group": str(row.get(rules.group_by, "")) if rules.group_by else "",
    }
    return kept, render((prompt, chosen, rejected), rules, ending)


def _finish(encoded: tuple[list[int], list[int], list[int]], rules: Rules) -> dict[str, Any]:
    """Truncate the token ids of a pair, after a check for a second BOS."""
    if not encoded[0]:
        raise BadRow("empty prompt")
    bos = _bos(rules.tokenizer)
    if bos is not None and any(ids.count(bos) > allowed for ids, allowed in zip(encoded, (1, 0, 0), strict=True)):
        raise BadRow("a second BOS inside the text")
    prompt, chosen, rejected = truncate(*encoded, rules)
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same after truncation")
    return {
        "prompt_ids": prompt,
        "chosen_ids": chosen,
        "rejected_ids": rejected,
        "cut_tokens": sum(len(ids) for ids in encoded[1:]) - len(chosen) - len(rejected),
        "cut_prompt_tokens": len(encoded[0]) - len(prompt),
    }


def token_counts(pairs: datasets.Dataset, column: str) -> list[int]:
    """Count the tokens of each pair in a column of token ids, without making Python lists of these."""
    lists = pairs.with_format("arrow")[:][column]
    counts: list[int] = pyarrow.compute.list_value_length(lists).to_pylist()
    return counts


def pair_lengths(pairs: datasets.Dataset) -> list[tuple[int, ...]]:
    """Count the (prompt, chosen, rejected) tokens of each pair."""
    columns = (token_counts(pairs, f"{name}_ids") for name in ("prompt", "chosen", "rejected"))
    return list(zip(*columns, strict=True))


def as_group(pair: Mapping[str, Any]) -> tuple[list[int], list[list[int]]]:
    """Return a prepared pair's prompt and its two responses, chosen first: a group for the engine."""
    return pair["prompt_ids"], [pair["chosen_ids"], pair["rejected_ids"]]


def show_pair(pair: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """Show a prepared pair to a person: the prompt, the scored tokens, and where each of them ends."""
    lines = [f"prompt, {len(pair['prompt_ids'])} tokens, not scored: {tokenizer.decode(pair['prompt_ids'])!r}"]
    for side in ("chosen", "rejected"):
        tokens = "|".join(tokenizer.decode([i]) for i in pair[f"{side}_ids"])
        lines.append(f"{side}, {len(pair[f'{side}_ids'])} tokens, all scored: {tokens!r}")
    return "\n".join(lines)


def _bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the BOS; None if the tokenizer has none, or also ends texts with it (GPT-2)."""
    return None if tokenizer.bos_token_id == tokenizer.eos_token_id else tokenizer.bos_token_id


def check_bos(pairs: Pairs, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise unless every prompt has exactly one BOS, or none has one, and no response has any: a gate before step 1."""
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
