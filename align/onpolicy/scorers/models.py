"""Scorers that are models: loading without guesses, batches by tokens, padding that changes nothing; and reward models.

Weights are safetensors and no remote code runs. A model whose checkpoint lacks a weight, or has one that nothing
reads, is refused: transformers would fill the head with random numbers and only log it, and scores of a random head
look like scores. The head computes in float32: a bfloat16 number around 10 comes in steps of 1/16, which makes ties.
Left out: models that do not fit one device, quantisation, and heads that are not transformers' own (see armorm.py).
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from align.config import ScorerConfig
from align.launch.rank import Rank
from align.model.chat import merge_system_message, read_template
from align.model.load import cannot_load, content_fingerprint
from align.onpolicy.batches import batches, pad
from align.onpolicy.scorers.base import Identity, Item, Kind, Scores, as_messages
from align.say import UserError

_DECIDES = ("*.safetensors", "config.json", "tokenizer*.json", "special_tokens_map.json", "chat_template.jinja")
_SOME = 3  # names in an error


class ModelScorer:
    """A scorer that is a model: its configuration and tokenizer are loaded at once, its weights at the first call."""

    kind: Any  # what its weights are loaded by: `kind.from_pretrained`

    def __init__(self, cfg: ScorerConfig, rank: Rank) -> None:
        self._cfg, self._rank = cfg, rank
        if cfg.path is None:
            raise UserError(f"scorer.name={cfg.name} needs scorer.path: a hub name or a folder")
        self._path = str(Path(cfg.path).expanduser()) if cfg.path.startswith("~") else cfg.path
        where: dict[str, Any] = {"revision": cfg.revision, "trust_remote_code": False}
        try:
            self._config: PretrainedConfig = AutoConfig.from_pretrained(self._path, **where)
            self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self._path, **where)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise cannot_load("scorer.path", cfg.path, error) from error
        if cfg.template is not None:
            self._tokenizer.chat_template = read_template("scorer.template", cfg.template)

    def _identify(self, kind: Kind, template: str, **settings: Any) -> Identity:
        """Return the scorer's identity; a folder goes by its last name, so that moving it makes no other scorer."""
        path, folder = self._path, Path(self._path)
        revision = str(getattr(self._config, "_commit_hash", None) or self._cfg.revision or "unknown")
        if folder.is_dir():
            path, revision = folder.resolve().name, content_fingerprint(folder, _DECIDES)
        name, settings = f"{self._cfg.name}:{path}", {**settings, "bf16": self._rank.bf16}
        return Identity(kind=kind, name=name, revision=revision, template=template, settings=settings)

    @cached_property
    def _model(self) -> PreTrainedModel:
        """The model on its device, with every weight accounted for; `UserError` names those that are not."""
        try:
            model, loading = self.kind.from_pretrained(
                self._path,
                revision=self._cfg.revision,
                config=self._config,
                dtype=torch.bfloat16 if self._rank.bf16 else torch.float32,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
            raise cannot_load("scorer.path", self._path, error) from error
        problems = {
            "lacks": loading["missing_keys"],
            "has weights that this model does not read:": loading["unexpected_keys"],
            "has weights of another shape:": loading["mismatched_keys"],
        }
        if said := [f"{problem} {_some(keys)}" for problem, keys in problems.items() if keys]:
            raise UserError(
                f"scorer.path={self._path} is no checkpoint for scorer.name={self._cfg.name}: it {'; it '.join(said)}; "
                "its scores would come from random weights"
            )
        _head_in_float32(model)
        ready: PreTrainedModel = model.to(self._rank.device).eval()
        return ready

    def _forward(
        self, rows: Sequence[list[int]], pad_token_id: int, equal: bool = False, **at: Sequence[Any]
    ) -> list[float]:
        """Return the model's number for each row of token ids; `at` are further arguments of its forward, a value a row."""
        values = [0.0] * len(rows)
        for some in batches([len(row) for row in rows], self._cfg.tokens_per_batch, [1] * len(rows), equal):
            ids, mask = pad([rows[i] for i in some], pad_token_id, self._rank.device, side="right")
            more = {name: torch.tensor([each[i] for i in some], device=ids.device) for name, each in at.items()}
            out = self._model(input_ids=ids, attention_mask=mask, **more)
            numbers = out if torch.is_tensor(out) else out.logits[:, 0]  # [b]
            for i, value in zip(some, numbers.float().tolist(), strict=True):
                values[i] = value
        return values


class PointwiseModel(ModelScorer):
    """A model that gives a number to a conversation, as its chat template writes it."""

    def __init__(self, cfg: ScorerConfig, rank: Rank) -> None:
        super().__init__(cfg, rank)
        longest = self._tokenizer.model_max_length
        positions = getattr(self._config.get_text_config(), "max_position_embeddings", None) or longest
        self._max_length = int(min(cfg.max_length or positions, positions, longest))

    @cached_property
    def identity(self) -> Identity:
        """The scorer's identity, made when its subclass has found the model to be of its kind."""
        template, merged = str(self._tokenizer.chat_template), self._cfg.system_message.name
        return self._identify(Kind.pointwise, template, max_length=self._max_length, system_message=merged)

    @torch.inference_mode()
    def __call__(self, items: Sequence[Item]) -> list[Scores]:
        """Return [K] numbers for each item; `cut_tokens` says what a text that was too long has lost."""
        texts = [ids for item in items for ids in render(item, self._tokenizer, self._cfg)]
        rows = [cut(ids, self._max_length) for ids in texts]
        numbers, lost = iter(self._numbers(rows)), iter([{"cut_tokens": count} for _, count in rows])
        return [
            Scores(values=[next(numbers) for _ in item.responses], counts=[next(lost) for _ in item.responses])
            for item in items
        ]

    def _numbers(self, rows: Sequence[tuple[list[int], int]]) -> list[float]:
        """Return a number for each text, of (its token ids, how many were cut)."""
        pad_token = self._config.get_text_config().pad_token_id
        can_pad = pad_token is not None and pad_token >= 0
        return self._forward([ids for ids, _ in rows], pad_token if can_pad else 0, equal=not can_pad)


class RewardModelScorer(PointwiseModel):
    """A sequence-classification reward model: the raw logit of its single label, as a sigmoid squeezes good answers together.

    The model's own forward chooses the token that is read: for a decoder the last that is not padding, and where pad and
    end-of-text are one token, that before a final end-of-text, in training as here. Without a pad token it would read
    the last column, padding or not: then only texts of one length go together.
    """

    kind = AutoModelForSequenceClassification

    def __init__(self, cfg: ScorerConfig, rank: Rank) -> None:
        super().__init__(cfg, rank)
        if self._config.num_labels != 1:
            raise UserError(
                f"scorer.path={cfg.path} has {self._config.num_labels} labels, and a reward model has one: "
                "it is a classifier, or its config.json says nothing of a head"
            )
        if self._tokenizer.chat_template is None:
            raise UserError(
                f"the tokenizer of {cfg.path} has no chat template: give scorer.template, a Jinja template or its file, "
                "that writes the texts as they were in its training"
            )


def render(item: Item, tokenizer: PreTrainedTokenizerBase, cfg: ScorerConfig) -> list[list[int]]:
    """Return [K] token ids of the conversation with each response, by the chat template, which alone adds a BOS."""
    messages = merge_system_message(as_messages(item.prompt), cfg.system_message)
    texts = []
    for response in item.responses:
        try:
            turns = [*messages, {"role": "assistant", "content": response}]
            texts.append(tokenizer.apply_chat_template(turns, tokenize=False))
        except Exception as error:  # Jinja raises whatever the template's author chose
            system = messages[0]["role"] == "system"
            hint = ": set scorer.system_message=merge" if system else "; give a template that takes it"
            raise UserError(f"the chat template of {cfg.path} refuses a conversation ({error}){hint}") from error
    # The tokenizer would put a second BOS in front of the template's.
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False).input_ids
    return ids


def cut(ids: list[int], length: int) -> tuple[list[int], int]:
    """Return at most `length` tokens, and how many were cut: behind the first, a BOS mostly, so that the response is kept."""
    if len(ids) <= length:
        return ids, 0
    return [*ids[:1], *ids[len(ids) - length + 1 :]], len(ids) - length


def _head_in_float32(model: PreTrainedModel) -> None:
    """Cast everything outside the backbone, weights and inputs, to float32."""

    def cast(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)

    for part in model.children():
        if part is not model.base_model:
            part.float().register_forward_pre_hook(cast)


def _some(keys: Any) -> str:
    """Return `a, b, c and 7 more`."""
    names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys)
    more = f" and {len(names) - _SOME} more" if len(names) > _SOME else ""
    return ", ".join(names[:_SOME]) + more
