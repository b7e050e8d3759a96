"""PairRM, as SPPO takes it: a DeBERTa compares two responses at a time, and all K comparisons make the preferences.

Jiang et al. 2023, "LLM-Blender", https://arxiv.org/abs/2306.02561 (PairRanker), and llm-blender, the code of
https://huggingface.co/llm-blender/PairRM and of https://github.com/yuchenlin/LLM-Blender:

    text   <|source|> prompt <|candidate1|> A <|candidate2|> B     each part as [CLS] part [SEP], and cut at its end:
           the prompt at 1224 tokens, either response at half of what the prompt leaves of 2048, so 412 or more
    s(A) = head([h_source, h_candidate1]), s(B) = head([h_source, h_candidate2])   hidden states of the three tokens
    head = Linear(2h -> h), tanh, Linear(h -> 1)
    logit(A, B) = s(A) - s(B)
    score_i = mean_j(logit(i, j) - logit(j, i))     over all K, itself as 0; "max_logits", the default of rank()
    P(i beats j) = sigmoid(score_i - score_j)       SPPO: https://arxiv.org/abs/2405.00675, scripts/compute_prob.py of
                                                    https://github.com/uclaml/SPPO

So a preference depends on the other responses in the pool. Other than SPPO's: its prompt is the policy's chat template
with the prompt in it, cut where the word None comes (scripts/rank.py); ours is the prompt alone, as llm-blender documents,
several turns as "role: content" paragraphs. Where llm-blender computes in float16, here it is bfloat16, the head in float32.

The true weights were not at hand; a checkpoint with other names of weights than llm-blender's is refused. With random
ones, llm-blender's module, tokenize_pair and get_scores_from_cmps gave the same P to 2e-7.
Left out: llm-blender itself, which does not import on transformers 5, and its other ways to rank.
"""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2Model, DebertaV2PreTrainedModel

from align.config import ScorerConfig
from align.launch.rank import Rank
from align.onpolicy.scorers.base import Item, Kind, Scores, as_text
from align.onpolicy.scorers.models import ModelScorer
from align.onpolicy.select import preferences
from align.say import UserError

MARKERS = ("<|source|>", "<|candidate1|>", "<|candidate2|>")
MAX_SOURCE, MAX_TOKENS = 1224, 2048  # of the prompt, and of all three parts; special ones included

Comparison = tuple[int, str, str]  # the number of the item, and two different texts in their order


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
        """Return `[b]` logit(A, B); `markers`, `[b, 3]`, are the positions of the three special tokens."""
        states = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        row = torch.arange(len(states), device=states.device)
        source, first, second = (states[row, markers[:, part]] for part in range(3))  # [b, hidden] each
        scores = [self.head_layer(torch.cat([source, candidate], dim=-1)) for candidate in (first, second)]  # [b, 1]
        return (scores[0] - scores[1])[:, 0]


class PairRMScorer(ModelScorer):
    """P(a beats b) of every pair, from the comparisons of all different responses in both orders."""

    kind = PairRM

    def __init__(self, cfg: ScorerConfig, rank: Rank) -> None:
        super().__init__(cfg, rank)
        if (kind := self._config.model_type) != "deberta-v2":
            raise UserError(f"scorer.path={cfg.path} is a {kind} and not the deberta-v2 that PairRM is")
        self._marker_ids = [self._tokenizer.convert_tokens_to_ids(marker) for marker in MARKERS]
        special = {None, self._tokenizer.unk_token_id, self._tokenizer.sep_token_id, *self._marker_ids}
        if len(special) < len(MARKERS) + 3:
            names = ", ".join(MARKERS)
            raise UserError(f"the tokenizer of {cfg.path} lacks PairRM's special tokens {names} or a separator")
        self.identity = self._identify(
            Kind.pairwise,
            " ".join((MARKERS[0], "prompt", MARKERS[1], "A", MARKERS[2], "B")),
            wins="sigmoid(score_i - score_j), score_i = mean_j(logit_ij - logit_ji)",
            max_source=MAX_SOURCE,
            max_tokens=MAX_TOKENS,
        )

    @torch.inference_mode()
    def __call__(self, items: Sequence[Item]) -> list[Scores]:
        """Return [K][K] P(i beats j) for each item; `cut_tokens` of response i: lost in the comparisons in which it stood first."""
        rows, markers = [], []
        lost: dict[Comparison, int] = {}  # tokens, of each row
        for number, item in enumerate(items):
            source, cut = self._encode(0, as_text(item.prompt), MAX_SOURCE)
            room = (MAX_TOKENS - len(source)) // 2
            texts = dict.fromkeys(item.responses)  # each once: equal texts draw, whatever the model prefers of an order
            first, second = ({text: self._encode(side, text, room) for text in texts} for side in (1, 2))
            for a, b in itertools.permutations(texts, 2):
                parts = (source, first[a][0], second[b][0])
                starts = (0, len(parts[0]), len(parts[0]) + len(parts[1]))
                rows.append([token for part in parts for token in part])
                markers.append(
                    [at + part.index(i) for at, part, i in zip(starts, parts, self._marker_ids, strict=True)]
                )
                lost[number, a, b] = cut + first[a][1] + second[b][1]
        logits = dict(zip(lost, self._forward(rows, self._config.pad_token_id or 0, markers=markers), strict=True))
        return [_scores(number, item.responses, logits, lost) for number, item in enumerate(items)]

    def _encode(self, part: int, text: str, limit: int) -> tuple[list[int], int]:
        """Return the token ids of one of the three parts, within its limit, and how many tokens were cut off."""
        text = text.replace(self._tokenizer.sep_token, " ")  # as llm-blender does: it would read as the part's end
        ids = self._tokenizer(MARKERS[part] + text, add_special_tokens=True, truncation=False).input_ids
        if len(ids) <= limit:
            return ids, 0
        end = ids[-1:] if ids[-1] == self._tokenizer.sep_token_id else []
        return [*ids[: limit - len(end)], *end], len(ids) - limit


def _scores(
    number: int, responses: Sequence[str], logits: Mapping[Comparison, float], lost: Mapping[Comparison, int]
) -> Scores:
    """Return the scores of one item from all its comparisons; equal texts have none, and draw."""
    compared = [[((number, a, b), (number, b, a)) for b in responses] for a in responses]
    leads = [[logits.get(ab, 0.0) - logits.get(ba, 0.0) for ab, ba in row] for row in compared]
    wins = preferences([sum(row) / len(row) for row in leads], temperature=1.0)
    return Scores(values=wins, counts=[{"cut_tokens": sum(lost.get(ab, 0) for ab, _ in row)} for row in compared])
