"""Any sequence-classification reward model: one number per response, the raw logit of its single label.

The score is what the model's own forward gives the text alone: its tokenizer, its chat template, its choice of the
token that is read (for a decoder the last one that is not padding), no sigmoid, which would squeeze good answers
together. Batches are padded on the right with the model's own pad token, which its forward skips; where it has none
(it would then read the last column, which is padding), only texts of one length go together.
Where pad and end-of-text are one token, transformers reads the token before a final end-of-text, in training as here.
Left out: models with several labels, and those whose head is not transformers' own, which need a file like armorm.py.
"""

from collections.abc import Sequence

from transformers import AutoModelForSequenceClassification

from align.config import ScorerConfig
from align.launch.rank import Rank
from align.onpolicy.scorers.models import PointwiseModel
from align.say import UserError


class RewardModelScorer(PointwiseModel):
    """`AutoModelForSequenceClassification` with one label."""

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

    def _numbers(self, rows: Sequence[tuple[list[int], int]]) -> list[float]:
        pad_token = self._config.get_text_config().pad_token_id
        can_pad = pad_token is not None and pad_token >= 0
        return self._forward([ids for ids, _ in rows], pad_token if can_pad else 0, equal=not can_pad)
