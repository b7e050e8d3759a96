"""IPO: Identity Preference Optimization. Azar et al. 2023, https://arxiv.org/abs/2310.12036, Eq. 17.

    L = (Delta - 1 / (2 tau))^2,   Delta = log_ratio_w - log_ratio_l

`average=tokens` takes each log-ratio per token, as IPO's authors confirmed to TRL and as TRL does; `average=none`
takes the sums, as the equation is printed.
"""

from dataclasses import dataclass
from typing import Literal

from objectives.base import Objective, PairLoss, Response, above_zero, published
from objectives.registry import register


@register("ipo")
@dataclass(frozen=True, kw_only=True)
class IPO(Objective):
    """tau: weight of the pull towards the reference; the margin's target is 1 / (2 tau)."""

    tau: float = published(0.1, 0.01, 1.0, "the margin is drawn to 1 / (2 tau) nats")
    average: Literal["tokens", "none"] = "tokens"

    def __post_init__(self) -> None:
        above_zero(self, "tau")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logp", "ref_logp", "length"} if self.average == "tokens" else {"logp", "ref_logp"})

    def __call__(self, chosen: Response, rejected: Response) -> PairLoss:
        ratio_w, ratio_l = chosen.log_ratio, rejected.log_ratio
        if self.average == "tokens":
            ratio_w, ratio_l = ratio_w / chosen.length, ratio_l / rejected.length
        loss = (ratio_w - ratio_l - 1 / (2 * self.tau)) ** 2
        return PairLoss(loss, (self.tau * ratio_w).detach(), (self.tau * ratio_l).detach(), {})
