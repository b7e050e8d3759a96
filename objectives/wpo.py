"""WPO: Weighted Preference Optimization. Zhou et al. 2024, https://arxiv.org/abs/2406.11827.

    L = stop_grad(min(1, w_w * w_l)) * L_base,   w = exp( 1/|y| * sum_t [ log pi(y_t) - log sum_v pi(v)^2 ] )

Off-policy pairs are made to count as much as the current policy would have sampled them. The weight of a
response is aligned so that a response typical of a sample weighs about 1: `sampled` subtracts what a token
sampled from pi gets on average (sum_v pi^2), `greedy` what the most likely token gets (max_v pi), `none` nothing.
The product is clamped at 1, not each factor; both weights come from the current policy, never the reference; the
weight multiplies the whole base loss, both terms of a smoothed one. The base is any objective; the paper's is DPO.
Written from the formula, not from the authors' code.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from objectives.base import Objective, PairLoss, Response
from objectives.registry import register

_ALIGNED_BY = {"sampled": "log_sum_sq", "greedy": "log_max", "none": None}


@register("wpo")
@dataclass(frozen=True, kw_only=True)
class WPO(Objective):
    """base: the objective that is weighted; alignment: what a response's log-probability is measured against."""

    base: Objective
    alignment: Literal["sampled", "greedy", "none"] = "sampled"

    @property
    def needs(self) -> frozenset[str]:
        statistic = _ALIGNED_BY[self.alignment]
        return self.base.needs | {"logp", "length"} | ({statistic} if statistic else set())

    def _log_weight(self, response: Response) -> Tensor:
        """`[B]` nats per token: log w, detached."""
        statistic = _ALIGNED_BY[self.alignment]
        expected = getattr(response, statistic) if statistic else 0.0
        return ((response.logp - expected) / response.length).detach()

    def __call__(self, chosen: Response, rejected: Response) -> PairLoss:
        base = self.base(chosen, rejected)
        log_product = self._log_weight(chosen) + self._log_weight(rejected)
        weight = torch.exp(log_product.clamp(max=0.0))
        metrics = {
            **base.metrics,
            "weight": weight,
            "weight_squared": weight**2,
            "weight_clamped": (log_product > 0).to(weight.dtype),
            "unweighted_loss": base.loss.detach(),
        }
        return PairLoss(weight * base.loss, base.chosen_reward, base.rejected_reward, metrics)

    def summary(self, means: Mapping[str, float]) -> dict[str, float]:
        """Adds the effective sample size as a share of the pairs: mean(w)^2 / mean(w^2), in (0, 1]."""
        share = means["weight"] ** 2 / means["weight_squared"] if means["weight_squared"] > 0 else 0.0
        return {**self.base.summary(means), "effective_sample_share": share}
