"""SPPO: Self-Play Preference Optimization. Wu et al. 2024, https://arxiv.org/abs/2405.00675, Eq. 4.7.

    L = 1/2 [ (log_ratio_w - (P_w - 1/2) / beta)^2 + (log_ratio_l - (P_l - 1/2) / beta)^2 ],   beta = 1 / eta

P(y) is the probability that y beats a fresh sample of the policy that was sampled (`win_prob`). Targets:
`soft` uses each response's own P; `single` uses P_w and P_l = 1 - P_w, where P_w is that the chosen beats the
rejected; `hard` takes the label as certain, P_w = 1 and P_l = 0, and needs no `win_prob` (TRL's `sppo_hard` is
twice this: it leaves out the factor 1/2). The authors' code is https://github.com/uclaml/SPPO.

The raw loss starts near (1/2 / beta)^2, 2.5e5 at the authors' beta: `scaled_loss` is beta^2 times the loss.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from objectives.base import Objective, PairLoss, Response, above_zero, published
from objectives.registry import register


@register("sppo")
@dataclass(frozen=True, kw_only=True)
class SPPO(Objective):
    """beta: 1 / eta; the log-ratio of a sure winner is drawn to 1 / (2 beta) nats, of a sure loser to minus that."""

    # The authors use 1e-3; 0.1 is the default of TRL's sppo_hard and what suits models of a few million weights.
    beta: float = published(1e-3, 1e-3, 0.1, "log-ratios are drawn to (P - 1/2) / beta nats")
    target: Literal["soft", "single", "hard"] = "soft"

    def __post_init__(self) -> None:
        above_zero(self, "beta")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logp", "ref_logp"} if self.target == "hard" else {"logp", "ref_logp", "win_prob"})

    def __call__(self, chosen: Response, rejected: Response) -> PairLoss:
        log_ratio_w, log_ratio_l = chosen.log_ratio, rejected.log_ratio
        if self.target == "hard":
            p_w, p_l = torch.ones_like(log_ratio_w), torch.zeros_like(log_ratio_l)
        else:
            p_w = chosen.win_prob
            p_l = rejected.win_prob if self.target == "soft" else 1 - p_w
        error_w = log_ratio_w - (p_w - 0.5) / self.beta
        error_l = log_ratio_l - (p_l - 0.5) / self.beta
        loss = 0.5 * (error_w**2 + error_l**2)
        return PairLoss(
            loss,
            (self.beta * log_ratio_w).detach(),
            (self.beta * log_ratio_l).detach(),
            {"scaled_loss": (self.beta**2 * loss).detach()},
        )
