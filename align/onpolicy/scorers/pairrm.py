"""PairRM: which of two responses is better, by a DeBERTa that reads the prompt and both.

Jiang et al. 2023, "LLM-Blender", https://arxiv.org/abs/2306.02561 (PairRanker), and the card of
https://huggingface.co/llm-blender/PairRM:

    text   <|source|> prompt <|candidate1|> A <|candidate2|> B     at most 1224, 412 and 412 tokens, cut at the end
    s(A) = head([h_source, h_candidate1]), s(B) = head([h_source, h_candidate2])   hidden states of the three tokens
    head = Linear(2h -> h), tanh, Linear(h -> 1)
    logit(A, B) = s(A) - s(B)

The logit depends on the order, so both are asked: P(A beats B) = sigmoid((logit(A, B) - logit(B, A)) / 2).

Not proven, as the true weights were not at hand; only the first two can fail silently:

- Each of the three parts is encoded by itself with the tokenizer's own special tokens ([CLS] part [SEP]), which count
  for its limit, and the three are joined.
- A conversation of several turns is fed as "role: content" paragraphs; one user turn as its content alone.
- The names of the weights: `pretrained_model.*`, and `head_layer.1` and `head_layer.4`, as of a dropout, linear, tanh,
  dropout and linear layer in a row. A checkpoint with other names is refused.
- SPPO's code takes the sigmoid of differences of llm-blender's aggregated score per response; this is the pair's own.

Left out: llm-blender's ranking, which does not import on transformers 5.
"""

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2Model, DebertaV2PreTrainedModel, PreTrainedModel

from align.config import ScorerConfig, UserError
from align.launch import Place
from align.onpolicy.scorers import models
from align.onpolicy.scorers.base import Identity, Item, Kind, Scores, as_text

MARKERS = ("<|source|>", "<|candidate1|>", "<|candidate2|>")
MAX_SOURCE, MAX_CANDIDATE = 1224, 412  # tokens, special ones included


class PairRM(DebertaV2PreTrainedModel):
    """A DeBERTa-v2 (v3 is its shape too) with PairRM's head."""

    base_model_prefix = "pretrained_model"

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.pretrained_model = DebertaV2Model(config)
        self.head_layer = nn.Sequential(
            nn.Dropout(0.0), nn.Linear(2 * width, width), nn.Tanh(), nn.Dropout(0.0), nn.Linear(width, 1)
        )
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, markers: Tensor) -> Tensor:
        """`[b]` logit(A, B); `markers`, `[b, 3]`, are the positions of the three special tokens."""
        states = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        row = torch.arange(len(states), device=states.device)
        source, first, second = (states[row, markers[:, part]] for part in range(3))  # [b, hidden] each
        scores = [self.head_layer(torch.cat([source, candidate], dim=-1)) for candidate in (first, second)]  # [b, 1]
        return (scores[0] - scores[1])[:, 0]


class PairRMScorer:
    """P(a beats b) of every pair of different responses, in both orders."""

    def __init__(self, cfg: ScorerConfig, where: Place) -> None:
        self._cfg, self._where = cfg, where
        self._config = models.load_config(cfg)
        if self._config.model_type != "deberta-v2":
            raise UserError(
                f"scorer.path={cfg.path} is a {self._config.model_type} and not the deberta-v2 that PairRM is"
            )
        self._tokenizer = models.load_tokenizer(cfg)
        self._marker_ids = [self._tokenizer.convert_tokens_to_ids(marker) for marker in MARKERS]
        if len({None, self._tokenizer.unk_token_id, *self._marker_ids}) < len(MARKERS) + 2:
            raise UserError(f"the tokenizer of {cfg.path} lacks PairRM's special tokens {', '.join(MARKERS)}")
        self.identity = Identity(
            kind=Kind.pairwise,
            name=models.name(cfg),
            revision=models.revision(cfg, self._config),
            template=" ".join((MARKERS[0], "prompt", MARKERS[1], "A", MARKERS[2], "B")),
            settings={"max_source": MAX_SOURCE, "max_candidate": MAX_CANDIDATE, "bf16": where.bf16},
        )

    @cached_property
    def _model(self) -> PreTrainedModel:
        return models.load_weights(PairRM, self._cfg, self._config, self._where)

    @torch.inference_mode()
    def __call__(self, items: Sequence[Item]) -> list[Scores]:
        """[K][K] P(i beats j); `cut_tokens` of response i: lost in the comparisons in which it stood first."""
        asked, rows, markers, lost = [], [], [], []
        for number, item in enumerate(items):
            source = self._encode(0, as_text(item.prompt))
            sides = [[self._encode(side, response) for response in item.responses] for side in (1, 2)]
            for i, first in enumerate(sides[0]):
                for j, second in enumerate(sides[1]):
                    if item.responses[i] == item.responses[j]:
                        continue  # 1/2, whatever the model prefers of an order
                    parts = (source, first, second)
                    at = [sum(len(ids) for ids, _ in parts[:p]) for p in range(3)]
                    asked.append((number, i, j))
                    rows.append([token for ids, _ in parts for token in ids])
                    markers.append([a + parts[p][0].index(self._marker_ids[p]) for p, a in enumerate(at)])
                    lost.append(sum(cut for _, cut in parts))
        logits = self._logits(rows, markers)
        by_pair = {pair: (logit, cut) for pair, logit, cut in zip(asked, logits, lost, strict=True)}
        return [_scores(number, len(item.responses), by_pair) for number, item in enumerate(items)]

    def _encode(self, part: int, text: str) -> tuple[list[int], int]:
        """Token ids of one of the three parts, within its limit, and how many tokens were cut off."""
        limit = MAX_SOURCE if part == 0 else MAX_CANDIDATE
        ids = self._tokenizer(MARKERS[part] + text, add_special_tokens=True, truncation=False).input_ids
        if len(ids) <= limit:
            return ids, 0
        end = ids[-1:] if ids[-1] == self._tokenizer.sep_token_id else []
        return [*ids[: limit - len(end)], *end], len(ids) - limit

    def _logits(self, rows: list[list[int]], markers: list[list[int]]) -> list[float]:
        logits = [0.0] * len(rows)
        for some in models.batches([len(row) for row in rows], self._cfg.tokens_per_batch):
            ids, mask = models.pad([rows[i] for i in some], self._config.pad_token_id or 0, self._where.device)
            at = torch.tensor([markers[i] for i in some], device=self._where.device)
            for i, value in zip(some, self._model(ids, mask, at).float().tolist(), strict=True):
                logits[i] = value
        return logits


def _scores(number: int, count: int, by_pair: dict[tuple[int, int, int], tuple[float, int]]) -> Scores:
    """The K x K matrix of one item from the logits of its ordered pairs, which lack those of equal texts."""

    def wins(i: int, j: int) -> float:
        if (number, i, j) not in by_pair:
            return 0.5
        logit = (by_pair[number, i, j][0] - by_pair[number, j, i][0]) / 2
        return 0.5 * (1 + math.tanh(logit / 2))  # the sigmoid, without its overflow

    cut = [sum(by_pair.get((number, i, j), (0.0, 0))[1] for j in range(count)) for i in range(count)]
    return Scores(
        values=[[wins(i, j) for j in range(count)] for i in range(count)], counts=[{"cut_tokens": c} for c in cut]
    )
