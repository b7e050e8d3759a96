"""SimPO: Simple Preference Optimization. Meng et al. 2024, https://arxiv.org/abs/2405.14734, Eq. 6.

    L = -log s(beta * (mean_logp_w - mean_logp_l) - gamma),   gamma = beta * gamma_beta_ratio

Reference-free, and length-normalised: the reward is beta times the mean log-probability per token. The authors'
code (https://github.com/princeton-nlp/SimPO) takes the ratio, and offers a hinge in place of the sigmoid:

    L = relu(1 - (beta * (mean_logp_w - mean_logp_l) - gamma))

Their optional SFT term is `objective=plus_sft objective.base=simpo`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import logsigmoid

from objectives.base import Objective, PairLoss, Response, above_zero, published
from objectives.registry import register


@register("simpo")
@dataclass(frozen=True, kw_only=True)
class SimPO(Objective):
    """beta: reward scale; the target margin is `gamma`, or `gamma_beta_ratio` times beta (0.5 if neither is given)."""

    beta: float = published(2.0, 2.0, 10.0, "beta multiplies a mean per token, so it is 20 to 1000 times DPO's")
    gamma_beta_ratio: float | None = None
    gamma: float | None = None
    loss: Literal["sigmoid", "hinge"] = "sigmoid"

    def __post_init__(self) -> None:
        above_zero(self, "beta")
        if self.gamma is not None and self.gamma_beta_ratio is not None:
            raise ValueError(
                f"gamma and objective.gamma_beta_ratio are both given ({self.gamma} and {self.gamma_beta_ratio}); "
                "gamma is beta * gamma_beta_ratio: give one and set the other to null"
            )
        for name in ("gamma", "gamma_beta_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be 0 or more, not {value}")

    @property
    def target_margin(self) -> float:
        """gamma, in units of the reward."""
        if self.gamma is not None:
            return self.gamma
        return self.beta * (0.5 if self.gamma_beta_ratio is None else self.gamma_beta_ratio)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logp", "length"})

    def __call__(self, chosen: Response, rejected: Response) -> PairLoss:
        reward_w = self.beta * chosen.mean_logp
        reward_l = self.beta * rejected.mean_logp
        logits = reward_w - reward_l - self.target_margin
        loss = -logsigmoid(logits) if self.loss == "sigmoid" else torch.relu(1 - logits)
        return PairLoss(loss, reward_w.detach(), reward_l.detach(), {})
