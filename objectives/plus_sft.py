"""An SFT term beside any objective: L = L_base + sft_weight * NLL(chosen).

    NLL(chosen) = -mean_logp_w, in nats per token

This is the `sft_weight` of SimPO's authors' code (default 0 there), CPO-SimPO's `cpo_alpha` in TRL, and the
regulariser of RPO (https://arxiv.org/abs/2404.19733). Rewards are the base's.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from objectives.base import Objective, PairLoss, Response, above_zero
from objectives.registry import register


@register("plus_sft")
@dataclass(frozen=True, kw_only=True)
class PlusSFT(Objective):
    """base: any objective; sft_weight: weight of the chosen response's mean NLL."""

    base: Objective
    sft_weight: float = 0.1

    def __post_init__(self) -> None:
        above_zero(self, "sft_weight")

    @property
    def needs(self) -> frozenset[str]:
        return self.base.needs | {"logp", "length"}

    def __call__(self, chosen: Response, rejected: Response) -> PairLoss:
        base = self.base(chosen, rejected)
        nll = -chosen.mean_logp
        metrics = {**base.metrics, "sft_nll": nll.detach()}
        return PairLoss(base.loss + self.sft_weight * nll, base.chosen_reward, base.rejected_reward, metrics)

    def summary(self, means: Mapping[str, float]) -> dict[str, float]:
        return self.base.summary(means)
