"""Shared by the tests of `objectives`: golden pairs, every variant of every objective, the check of `needs`."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from objectives import Objective, Response, build
from objectives.base import STATISTICS

GOLDEN = json.loads((Path(__file__).resolve().parent.parent / "golden" / "objectives.json").read_text())

#: Plain values, as in a YAML file, of every choice of every objective that we ship, and of wrappers of wrappers.
VARIANTS: dict[str, dict] = {
    "dpo": {"name": "dpo", "beta": 0.1},
    "dpo_smoothed": {"name": "dpo", "beta": 0.1, "label_smoothing": 0.2},
    "simpo": {"name": "simpo", "beta": 2.0, "gamma": 1.0},
    "simpo_ratio": {"name": "simpo", "beta": 10.0, "gamma_beta_ratio": 0.3},
    "simpo_hinge": {"name": "simpo", "beta": 2.0, "loss": "hinge"},
    "sppo_soft": {"name": "sppo", "beta": 0.1, "target": "soft"},
    "sppo_soft_published": {"name": "sppo", "beta": 1e-3, "target": "soft"},
    "sppo_single": {"name": "sppo", "beta": 0.1, "target": "single"},
    "sppo_hard": {"name": "sppo", "beta": 0.1, "target": "hard"},
    "ipo_tokens": {"name": "ipo", "tau": 0.1, "average": "tokens"},
    "ipo_none": {"name": "ipo", "tau": 0.1, "average": "none"},
    "plus_sft_simpo": {"name": "plus_sft", "base": "simpo", "sft_weight": 0.25},
    "plus_sft_dpo": {"name": "plus_sft", "base": "dpo", "sft_weight": 1.0},
    "plus_sft_wpo_simpo": {"name": "plus_sft", "base": {"name": "wpo", "base": "simpo"}, "alignment": "greedy"},
    "wpo_dpo": {"name": "wpo", "base": "dpo", "beta": 0.1, "alignment": "sampled"},
    "wpo_dpo_greedy": {"name": "wpo", "base": "dpo", "beta": 0.1, "alignment": "greedy"},
    "wpo_dpo_unaligned": {"name": "wpo", "base": "dpo", "beta": 0.1, "alignment": "none"},
    "wpo_dpo_smoothed": {"name": "wpo", "base": "dpo", "beta": 0.1, "label_smoothing": 0.2},
    "wpo_simpo": {"name": "wpo", "base": "simpo"},
    "wpo_ipo": {"name": "wpo", "base": "ipo", "average": "none"},
    "wpo_sppo": {"name": "wpo", "base": "sppo", "beta": 0.1},
}


def variant(name: str) -> Objective:
    return build(VARIANTS[name])


def response(**statistics: Sequence[float] | Tensor) -> Response:
    """A side of B pairs in float64."""
    return Response(**{name: torch.as_tensor(values, dtype=torch.float64) for name, values in statistics.items()})


def golden_pairs() -> tuple[Response, Response]:
    """(chosen, rejected) of the three golden pairs, with every statistic there is."""
    return response(**GOLDEN["statistics"]["chosen"]), response(**GOLDEN["statistics"]["rejected"])


def weighted_pair(log_w: float, log_l: float) -> tuple[Response, Response]:
    """One pair of four tokens a side whose WPO weights are exp(log_w) and exp(log_l)."""
    other = {"length": [4.0], "ref_logp": [-6.0], "win_prob": [0.5]}
    chosen = response(logp=[-5.0], log_sum_sq=[-5.0 - 4 * log_w], log_max=[-4.0], **other)
    rejected = response(logp=[-7.0], log_sum_sq=[-7.0 - 4 * log_l], log_max=[-4.0], **other)
    return chosen, rejected


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


class RecordedResponse(Response):
    """A response that notes in `read` every statistic that is asked of it."""

    def __init__(self, read: set[str], statistics: Mapping[str, Tensor]) -> None:
        super().__init__(**statistics)
        self.__dict__["read"] = read

    def __getattribute__(self, name: str) -> Tensor:
        if name in STATISTICS:
            self.read.add(name)
        return super().__getattribute__(name)


def assert_needs_are_exact(objective: Objective) -> None:
    """The objective reads, of either side, what it declares: `MissingStatistic` for more, a failure for less."""
    needs, read = objective.needs, set()
    assert needs <= set(STATISTICS), f"there is no statistic {sorted(needs - set(STATISTICS))}"
    sides = [
        RecordedResponse(read, {name: tensor for name, tensor in vars(side).items() if name in needs})
        for side in golden_pairs()
    ]
    objective(*sides)
    assert read == needs, f"declared and never read: {sorted(needs - read)}"
