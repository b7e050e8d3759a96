"""ArmoRM: nineteen rewards per response, weighed by a gate that sees only the prompt.

Wang et al. 2024, https://arxiv.org/abs/2406.12845, and the card of https://huggingface.co/RLHFlow/ArmoRM-Llama3-8B-v0.1:

    rewards = W h_last                                    [19], h_last the hidden state of the text's last token
    gate    = scale * softmax(MLP(h_prompt) / temperature)  [19], h_prompt that of the last user/assistant boundary
    score   = sum_i gate_i * (rewards @ transform)_i      transform takes the reward for length out of the others

The head is ours, from that description, as the model's own code does not import on transformers 5. The true weights were
not at hand; before their scores are believed, compare the one that the card shows. These would be wrong silently:

- The boundary: the first token of the last `<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n`, so h_prompt
  is the hidden state of the `<|eot_id|>` that ends the user's turn.
- The gate's temperature where config.json has none (10), that it divides before the softmax, and that `logit_scale`
  multiplies after it. ReLU between the MLP's layers, none behind the last.

A checkpoint with other names or shapes of weights is refused. Left out: the nineteen rewards one by one, and the gate.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel

from align.config import ScorerConfig
from align.launch.rank import Rank
from align.onpolicy.scorers.models import PointwiseModel
from align.say import UserError

_BOUNDARY = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"


class Gating(nn.Module):
    """Weights of the rewards, from the prompt's hidden state."""

    def __init__(self, hidden: int, objectives: int, config: LlamaConfig) -> None:
        super().__init__()
        inner = getattr(config, "gating_hidden_dim", 1024)
        widths = [hidden, *[inner] * getattr(config, "gating_n_hidden", 3), objectives]
        self.temperature = float(getattr(config, "gating_temperature", 10))
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.logit_scale = nn.Parameter(torch.ones(1))

    def forward(self, prompt_state: Tensor) -> Tensor:
        """Return `[b, objectives]` for `[b, hidden]`, which sum to `logit_scale`."""
        x = prompt_state
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.logit_scale * torch.softmax(self.layers[-1](x) / self.temperature, dim=-1)


class ArmoRM(LlamaPreTrainedModel):
    """A Llama with ArmoRM's head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        objectives = getattr(config, "num_objectives", 19)
        self.model = LlamaModel(config)
        self.regression_layer = nn.Linear(config.hidden_size, objectives, bias=False)
        self.reward_transform_matrix = nn.Parameter(torch.eye(objectives), requires_grad=False)
        self.gating = Gating(config.hidden_size, objectives, config)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, last: Tensor, boundary: Tensor) -> Tensor:
        """Return `[b]` scores; `last` and `boundary`, `[b]`, are the positions of the two hidden states."""
        states = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        row = torch.arange(len(states), device=states.device)
        rewards = self.regression_layer(states[row, last])  # [b, objectives]
        return (self.gating(states[row, boundary]) * (rewards @ self.reward_transform_matrix.to(rewards.dtype))).sum(-1)


class ArmoRMScorer(PointwiseModel):
    """ArmoRM over the conversation and each response; NaN for a response so long that its prompt was cut away."""

    kind = ArmoRM

    def __init__(self, cfg: ScorerConfig, rank: Rank) -> None:
        super().__init__(cfg, rank)
        if self._config.model_type != "llama":
            raise UserError(f"scorer.path={cfg.path} is a {self._config.model_type} and not the Llama that ArmoRM is")
        self._boundary: list[int] = self._tokenizer(_BOUNDARY, add_special_tokens=False).input_ids

    def _numbers(self, rows: Sequence[tuple[list[int], int]]) -> list[float]:
        found = [self._find_boundary(ids, lost) for ids, lost in rows]
        texts = [ids for (ids, _), at in zip(rows, found, strict=True) if at is not None]
        last, boundary = [len(ids) - 1 for ids in texts], [at for at in found if at is not None]
        values = iter(self._forward(texts, 0, last=last, boundary=boundary))
        return [math.nan if at is None else next(values) for at in found]

    def _find_boundary(self, ids: list[int], lost: int) -> int | None:
        """Return where the last boundary begins; None where it was cut away."""
        width = len(self._boundary)
        for at in range(len(ids) - width, -1, -1):
            if ids[at : at + width] == self._boundary:
                return at
        if not lost:
            raise UserError(
                f"the chat template of {self._cfg.path} does not write {_BOUNDARY!r} before an answer, as Llama-3's "
                "does: ArmoRM's gate needs it; take the checkpoint's own tokenizer"
            )
        return None
