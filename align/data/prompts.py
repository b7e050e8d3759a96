"""The prompts of a run: the dataset's own, each once, none longer than a training prompt; and further candidates.

A prompt's id is a fingerprint of its text, so the same prompt has the same id, and the same random numbers, wherever
it comes from. Hybrid data have answers that the policy did not sample (WPO-HB's are GPT-4-turbo's:
https://arxiv.org/abs/2406.11827): they come from a column of the prompts' rows, or from a file or hub set of their own.
Left out: the answers' tokens (onpolicy/sample.py) and what they are worth (onpolicy/score.py).
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.config import RunConfig, SourceConfig
from align.data.rows import BadRow, Content, Conversation, load_splits, read_prompt, read_rows
from align.files import fingerprint
from align.model.chat import merge_system_message, prompt_ids
from align.model.load import Start
from align.say import UserError

POLICY = "policy"  # the origin of what the policy itself sampled


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An answer that the policy did not sample."""

    origin: str
    text: str


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """A prompt to answer."""

    id: str  # of its content
    text: Conversation | str  # messages, the last of them the user's; or a plain text
    split: str  # train or held_out
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """All prompts of a run, and how many were dropped."""

    train: list[PromptRow]
    held_out: list[PromptRow]
    tokens: dict[str, int] = field(repr=False)  # of each prompt, by its id
    dropped: dict[str, dict[str, int]]  # of each split: how many for which reason

    @property
    def fingerprint(self) -> str:
        """A fingerprint that changes when any prompt or candidate does."""
        return fingerprint([[p.id, p.split, [[c.origin, c.text] for c in p.candidates]] for p in self.all])

    @property
    def all(self) -> list[PromptRow]:
        """The prompts to train on, then those held out."""
        return [*self.train, *self.held_out]

    def answered(self) -> dict[str, int]:
        """Return how many prompts have further candidates, for each origin of them."""
        return dict(Counter(origin for p in self.all for origin in {c.origin for c in p.candidates}))

    def describe_dropped(self) -> str:
        """Return in words how many prompts were dropped, and why."""
        total = sum(map(Counter, self.dropped.values()), Counter[str]())
        return ", ".join(f"{count:,} {reason}" for reason, count in total.items()) or "none"

    def share(self, iteration: int, iterations: int) -> list[PromptRow]:
        """Return an iteration's share of the training prompts: in the order of ids, every `iterations`-th."""
        mine = {prompt.id for prompt in sorted(self.train, key=lambda p: p.id)[iteration - 1 :: iterations]}
        return [prompt for prompt in self.train if prompt.id in mine]


def load_prompts(cfg: RunConfig, start: Start, cache: Path, wanted: Sequence[str] = ("held_out", "train")) -> Prompts:
    """Load the prompts of the configured dataset in the wanted splits, with the candidates of `source.candidates`."""
    if POLICY in cfg.source.candidates:
        raise UserError(f"source.candidates.{POLICY}: that is the name of the policy's own answers; take another")
    splits = load_splits(cfg.dataset, start, cache, Content.prompts)
    others = [_Answers(origin, where, cfg) for origin, where in cfg.source.candidates.items()]
    made = Prompts(train=[], held_out=[], tokens={}, dropped={})
    for split in wanted:  # a prompt that is held out is not trained on
        rows, kept, reasons = splits[split], made.train if split == "train" else made.held_out, Counter[str]()
        limit = cfg.dataset.limit if split == "train" else cfg.dataset.eval_limit
        for row in rows.rows:
            if limit is not None and len(kept) >= limit:
                break
            try:
                prompt = _prompt(row, cfg)
                name = fingerprint(prompt)
                if name in made.tokens:  # several pairs of one prompt, say: no bad row, however strict we are
                    reasons["the prompt is there already"] += 1
                    continue
                made.tokens[name] = _count_tokens(prompt, start, cfg.train.max_prompt_length)
            except BadRow as error:
                if cfg.dataset.strict:
                    remedy = "dataset.strict=false drops and counts such rows"
                    raise UserError(f"{rows.where}, row {row['_number']}: {error} ({remedy})") from error
                reasons[str(error)] += 1
                continue
            found = tuple(candidate for answers in others for candidate in answers.to(prompt, row))
            kept.append(PromptRow(id=name, text=prompt, split=split, candidates=found))
        made.dropped[split] = dict(reasons)
        if not kept:
            why = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
            raise UserError(f"{rows.where}: none of {len(rows.rows)} {split} prompts is left ({why})")
    for answers in others:
        answers.check_used()
    return made


def _prompt(row: Mapping[str, Any], cfg: RunConfig) -> Conversation | str:
    """Return the prompt of a row as the policy reads it."""
    prompt = read_prompt(row)
    if isinstance(prompt, str):
        return prompt
    if prompt[-1]["role"] != "user":
        raise BadRow("the last turn of the prompt is not the user's")
    return merge_system_message(prompt, cfg.model.system_message)


def _count_tokens(prompt: Conversation | str, start: Start, most: int) -> int:
    if not isinstance(prompt, str) and start.tokenizer.chat_template is None:
        raise UserError(
            "the prompts are conversations and the tokenizer has no chat template: give model.chat_template"
        )
    try:
        ids = prompt_ids(prompt, start.tokenizer)
    except Exception as error:  # Jinja raises whatever the template's author chose
        raise BadRow(f"the chat template refuses it: {error}") from error
    if not ids:
        raise BadRow("empty prompt")
    if len(ids) > most:
        raise BadRow(f"longer than train.max_prompt_length ({most} tokens)")
    return len(ids)


class _Answers:
    """The further candidates of one origin."""

    def __init__(self, origin: str, where: str, cfg: RunConfig) -> None:
        self._key, self._origin, self._where, self._used = f"source.candidates.{origin}", origin, where, False
        self._column = "/" not in where and Path(where).suffix not in (".jsonl", ".json", ".parquet")
        self._by_prompt: dict[str, list[str]] = {}
        if self._column:
            return
        rows = read_rows(self._key, where, "train", SourceConfig(path=where))
        for row in rows.rows:
            if "prompt" not in row or "response" not in row:
                columns = ", ".join(row)
                raise UserError(f"{rows.where} ({self._key}) needs the columns prompt and response; it has {columns}")
            try:
                prompt = _prompt({"prompt": row["prompt"]}, cfg)
            except BadRow:
                continue  # none of ours
            self._by_prompt.setdefault(_said(prompt), []).extend(_texts(row["response"]))

    def to(self, prompt: Conversation | str, row: Mapping[str, Any]) -> list[Candidate]:
        """Return the candidates for a prompt, which was read from `row`."""
        if self._column and self._where not in row:
            names = ", ".join(name for name in row if not name.startswith("_"))
            asked = f"{self._key}={self._where}"
            raise UserError(f"{asked} is no column of the prompts' rows, which have {names}, and no file")
        texts = _texts(row[self._where]) if self._column else self._by_prompt.get(_said(prompt), [])
        self._used |= bool(texts)
        return [Candidate(origin=self._origin, text=text) for text in texts]

    def check_used(self) -> None:
        """Raise where no prompt has got an answer: the prompts of the two sources are not the same ones."""
        if not self._used:
            there = next(iter(self._by_prompt), None)
            said = "" if there is None else f"; prompts must be equal to the letter, and its first is {there[:60]!r}"
            raise UserError(f"{self._key}={self._where} holds no answer to any of the prompts{said}")


def _said(prompt: Conversation | str) -> str:
    """Return a key of a prompt: a plain text and one user turn with that text are the same question."""
    if not isinstance(prompt, str) and len(prompt) == 1:
        prompt = prompt[0]["content"]
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def _texts(value: Any) -> list[str]:
    """Return the answers of a cell: a text, a conversation that ends with the answer, or several of either."""
    if isinstance(value, str):
        return [value] if value.strip() else []
    if not isinstance(value, Sequence):
        return []
    if value and isinstance(value[-1], Mapping):
        return _texts(value[-1].get("content"))
    return [text for one in value for text in _texts(one)]


def prompts_of(cfg: RunConfig, prompts: Prompts, iteration: int) -> list[PromptRow]:
    """Return the prompts of an iteration: its share of the training prompts, or all of them, and the held-out ones."""
    own = prompts.share(iteration, cfg.iterations) if cfg.source.split_prompts else prompts.train
    return [*own, *prompts.held_out]
