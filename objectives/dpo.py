"""DPO: Direct Preference Optimization. Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, Eq. 7.

    L = -log s(beta * Delta),   Delta = log_ratio_w - log_ratio_l

With label smoothing e (conservative DPO: Mitchell, https://ericmitchell.ai/cdpo.pdf), where a label is wrong with
probability e:

    L = -(1 - e) log s(beta * Delta) - e log s(-beta * Delta)
"""

from dataclasses import dataclass

from torch.nn.functional import logsigmoid

from objectives.base import Objective, PairLoss, Response, above_zero, published
from objectives.registry import register


@register("dpo")
@dataclass(frozen=True, kw_only=True)
class DPO(Objective):
    """beta: weight of the pull towards the reference; label_smoothing: probability that a label is wrong."""

    beta: float = published(0.1, 0.01, 0.1, "beta multiplies summed log-ratios, so 1 and more saturates at once")
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        above_zero(self, "beta")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must lie in [0, 0.5), not {self.label_smoothing}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logp", "ref_logp"})

    def __call__(self, chosen: Response, rejected: Response) -> PairLoss:
        reward_w = self.beta * chosen.log_ratio
        reward_l = self.beta * rejected.log_ratio
        margin, e = reward_w - reward_l, self.label_smoothing
        loss = -(1 - e) * logsigmoid(margin) - e * logsigmoid(-margin)
        return PairLoss(loss, reward_w.detach(), reward_l.detach(), {})
