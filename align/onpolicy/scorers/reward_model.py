"""Any sequence-classification reward model: one number per response, the raw logit of its single label.

The score is what the model's own forward gives the text alone: its tokenizer, its chat template, its choice of the
token that is read (for a decoder the last one that is not padding), no sigmoid, which would squeeze good answers
together. Batches are padded on the right with the model's own pad token, which its forward skips; where it has none
(it would then read the last column, which is padding), only texts of one length go together.
Where pad and end-of-text are one token, transformers reads the token before a final end-of-text, in training as here.
Left out: models with several labels, and those whose head is not transformers' own, which need a file like armorm.py.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from align.config import ScorerConfig
from align.launch.rank import Rank
from align.onpolicy.scorers import models
from align.onpolicy.scorers.base import Item, Scores
from align.say import UserError


class RewardModelScorer:
    """`AutoModelForSequenceClassification` with one label."""

    def __init__(self, cfg: ScorerConfig, rank: Rank) -> None:
        self._cfg, self._rank = cfg, rank
        self._config = models.load_config(cfg)
        if self._config.num_labels != 1:
            raise UserError(
                f"scorer.path={cfg.path} has {self._config.num_labels} labels, and a reward model has one: "
                "it is a classifier, or its config.json says nothing of a head"
            )
        self._tokenizer = models.load_tokenizer(cfg)
        _set_template(self._tokenizer, cfg)
        self._max_length = models.max_length(cfg, self._config, self._tokenizer)
        self.identity = models.identity(cfg, self._config, self._tokenizer, self._max_length, rank)

    @cached_property
    def _model(self) -> PreTrainedModel:
        return models.load_weights(AutoModelForSequenceClassification, self._cfg, self._config, self._rank)

    @torch.inference_mode()
    def __call__(self, items: Sequence[Item]) -> list[Scores]:
        """[K] logits; `cut_tokens` says what a text that was too long has lost."""
        texts = [ids for item in items for ids in models.render(item, self._tokenizer, self._cfg)]
        rows, lost = zip(*(models.cut(ids, self._max_length) for ids in texts), strict=True) if texts else ((), ())
        pad_token = self._config.get_text_config().pad_token_id
        can_pad = pad_token is not None and pad_token >= 0
        logits = [0.0] * len(rows)
        for some in models.batches([len(row) for row in rows], self._cfg.tokens_per_batch, equal=not can_pad):
            ids, mask = models.pad([rows[i] for i in some], pad_token if can_pad else 0, self._rank.device)
            values = self._model(input_ids=ids, attention_mask=mask).logits  # [b, 1]
            for i, value in zip(some, values[:, 0].float().tolist(), strict=True):
                logits[i] = value
        scored = iter(zip(logits, lost, strict=True))
        return [_scores([next(scored) for _ in item.responses]) for item in items]


def _scores(scored: list[tuple[float, int]]) -> Scores:
    return Scores(values=[value for value, _ in scored], counts=[{"cut_tokens": lost} for _, lost in scored])


def _set_template(tokenizer: PreTrainedTokenizerBase, cfg: ScorerConfig) -> None:
    """The template of `scorer.template`, where given."""
    if cfg.template is not None:
        file = Path(cfg.template).expanduser()
        is_template = "{" in cfg.template
        if not is_template and not file.is_file():
            raise UserError(f"scorer.template={cfg.template} is neither a Jinja template nor a file that holds one")
        tokenizer.chat_template = cfg.template if is_template else file.read_text()
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {cfg.path} has no chat template: give scorer.template, a Jinja template or its file, "
            "that writes the texts as they were in its training"
        )
