"""Losses, weights and rewards of the golden pairs, against the fact sheet and against formulas in plain floats."""

# ruff: noqa: E741 - w and l are the papers' letters
import math
from collections.abc import Callable

import pytest
import torch
from objective_cases import GOLDEN, VARIANTS, golden_pairs, response, sigmoid, variant, weighted_pair

from objectives import Response, build

Side = dict[str, float]
CASES = GOLDEN["cases"]


# The papers' equations in plain floats: nothing here comes from the package, and nothing is a tensor.
def nll(x: float) -> float:
    return -math.log(sigmoid(x))


def log_ratio(y: Side) -> float:
    return y["logp"] - y["ref_logp"]


def mean_logp(y: Side) -> float:
    return y["logp"] / y["length"]


def dpo(w: Side, l: Side, label_smoothing: float = 0.0) -> float:
    margin = 0.1 * (log_ratio(w) - log_ratio(l))
    return (1 - label_smoothing) * nll(margin) + label_smoothing * nll(-margin)


def simpo(w: Side, l: Side) -> float:
    return nll(2 * (mean_logp(w) - mean_logp(l)) - 1)


def simpo_hinge(w: Side, l: Side) -> float:
    return max(0.0, 1 - (2 * (mean_logp(w) - mean_logp(l)) - 1))


def sppo(w: Side, l: Side, p_w: float, p_l: float) -> float:
    return ((log_ratio(w) - (p_w - 0.5) / 0.1) ** 2 + (log_ratio(l) - (p_l - 0.5) / 0.1) ** 2) / 2


def ipo_tokens(w: Side, l: Side) -> float:
    return (log_ratio(w) / w["length"] - log_ratio(l) / l["length"] - 1 / 0.2) ** 2


def ipo_none(w: Side, l: Side) -> float:
    return (log_ratio(w) - log_ratio(l) - 1 / 0.2) ** 2


def wpo_weight(w: Side, l: Side, expected: str | None) -> float:
    w_w, w_l = (math.exp((y["logp"] - (y[expected] if expected else 0.0)) / y["length"]) for y in (w, l))
    return min(1.0, w_w * w_l)


FORMULAS: dict[str, Callable[[Side, Side], float]] = {
    "dpo": dpo,
    "dpo_smoothed": lambda w, l: dpo(w, l, 0.2),
    "simpo": simpo,
    "simpo_hinge": simpo_hinge,
    "sppo_soft": lambda w, l: sppo(w, l, w["win_prob"], l["win_prob"]),
    "sppo_single": lambda w, l: sppo(w, l, w["win_prob"], 1 - w["win_prob"]),
    "sppo_hard": lambda w, l: sppo(w, l, 1.0, 0.0),
    "ipo_tokens": ipo_tokens,
    "ipo_none": ipo_none,
    "plus_sft_simpo": lambda w, l: simpo(w, l) - 0.25 * mean_logp(w),
    "wpo_dpo": lambda w, l: wpo_weight(w, l, "log_sum_sq") * dpo(w, l),
    "wpo_greedy": lambda w, l: wpo_weight(w, l, "log_max") * dpo(w, l),
    "wpo_unaligned": lambda w, l: wpo_weight(w, l, None) * dpo(w, l),
    "wpo_simpo": lambda w, l: wpo_weight(w, l, "log_sum_sq") * simpo(w, l),
    "wpo_dpo_smoothed": lambda w, l: wpo_weight(w, l, "log_sum_sq") * dpo(w, l, 0.2),
}

# Implicit reward of one response: beta * log_ratio (DPO, SPPO), beta * mean_logp (SimPO), tau * its log-ratio (IPO).
REWARDS: dict[str, Callable[[Side], float]] = {
    "dpo": lambda y: 0.1 * log_ratio(y),
    "simpo": lambda y: 2 * mean_logp(y),
    "simpo_hinge": lambda y: 2 * mean_logp(y),
    "sppo_soft": lambda y: 0.1 * log_ratio(y),
    "ipo_tokens": lambda y: 0.1 * log_ratio(y) / y["length"],
    "ipo_none": lambda y: 0.1 * log_ratio(y),
    "plus_sft_simpo": lambda y: 2 * mean_logp(y),
    "wpo_dpo": lambda y: 0.1 * log_ratio(y),
    "wpo_simpo": lambda y: 2 * mean_logp(y),
}


def plain_pairs() -> list[tuple[Side, Side]]:
    """The golden pairs as (chosen, rejected) mappings of plain floats."""
    sides = (GOLDEN["statistics"]["chosen"], GOLDEN["statistics"]["rejected"])
    chosen, rejected = ([{name: float(v[i]) for name, v in side.items()} for i in range(3)] for side in sides)
    return list(zip(chosen, rejected, strict=True))


def log_product_pairs(*log_products: float) -> tuple[Response, Response]:
    """Pairs of one token a side whose WPO weight is exp(log_product) before the clamp."""
    zeros = [0.0] * len(log_products)
    ones = [1.0] * len(log_products)
    chosen = response(logp=log_products, length=ones, ref_logp=zeros, log_sum_sq=zeros)
    return chosen, response(logp=zeros, length=ones, ref_logp=zeros, log_sum_sq=zeros)


def test_every_golden_case_has_a_formula():
    assert CASES.keys() == FORMULAS.keys()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "fact_sheet_loss" in case])
def test_loss_is_the_fact_sheets_to_six_digits(name):
    loss = build(CASES[name]["objective"])(*golden_pairs()).loss
    assert loss.tolist() == pytest.approx(CASES[name]["fact_sheet_loss"], rel=0, abs=1e-6)


def test_fact_sheet_covers_dpo_simpo_sppo_and_wpo():
    covered = {name for name, case in CASES.items() if "fact_sheet_loss" in case}
    assert covered == {"dpo", "simpo", "sppo_soft", "wpo_dpo"}


@pytest.mark.parametrize("name", CASES)
def test_loss_is_the_formulas_in_plain_floats(name):
    expected = [FORMULAS[name](w, l) for w, l in plain_pairs()]
    loss = build(CASES[name]["objective"])(*golden_pairs()).loss
    assert loss.dtype == torch.float64
    assert loss.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_loss_is_the_golden_files(name):
    loss = build(CASES[name]["objective"])(*golden_pairs()).loss
    assert loss.tolist() == pytest.approx(CASES[name]["loss"], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", REWARDS)
def test_rewards_are_the_formulas_in_plain_floats(name):
    result = build(CASES[name]["objective"])(*golden_pairs())
    assert result.chosen_reward.tolist() == pytest.approx([REWARDS[name](w) for w, _ in plain_pairs()], rel=1e-12)
    assert result.rejected_reward.tolist() == pytest.approx([REWARDS[name](l) for _, l in plain_pairs()], rel=1e-12)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_output_is_one_number_per_pair_and_only_the_loss_carries_a_gradient(name):
    chosen, rejected = golden_pairs()
    chosen.logp.requires_grad_()
    rejected.logp.requires_grad_()
    result = variant(name)(chosen, rejected)
    assert result.loss.shape == (3,)
    assert result.loss.requires_grad
    for tensor in (result.chosen_reward, result.rejected_reward, *result.metrics.values()):
        assert tensor.shape == (3,)
        assert not tensor.requires_grad


def test_simpo_gamma_is_beta_times_its_ratio():
    by_gamma = build({"name": "simpo", "beta": 10, "gamma": 3})(*golden_pairs())
    by_ratio = build({"name": "simpo", "beta": 10, "gamma_beta_ratio": 0.3})(*golden_pairs())
    assert by_gamma.loss.tolist() == pytest.approx(by_ratio.loss.tolist(), rel=1e-12)


def test_simpo_target_margin_is_half_of_beta_when_neither_is_given():
    assert build({"name": "simpo", "beta": 10}).target_margin == 5.0  # start at .5: the authors' README


def test_simpo_gamma_of_zero_means_no_margin():
    assert build({"name": "simpo", "gamma": 0}).target_margin == 0.0
    assert build({"name": "simpo", "gamma_beta_ratio": 0}).target_margin == 0.0


def test_dpo_loss_is_ln_2_while_the_policy_is_the_reference():
    chosen, rejected = golden_pairs()
    chosen.__dict__["ref_logp"], rejected.__dict__["ref_logp"] = chosen.logp, rejected.logp
    for name in ("dpo", "dpo_smoothed"):
        assert variant(name)(chosen, rejected).loss.tolist() == pytest.approx([math.log(2)] * 3, rel=1e-12)


def test_sppo_scaled_loss_is_beta_squared_times_the_loss():
    # At the authors' beta, 1e-3, and P = .8, .2 the first pair's targets are +300 and -300 nats, its log-ratios 2 and
    # -1: (298^2 + 299^2) / 2 = 89102.5.
    result = variant("sppo_soft_published")(*golden_pairs())
    assert result.loss[0].item() == pytest.approx(89102.5, rel=1e-12)
    assert result.metrics["scaled_loss"][0].item() == pytest.approx(0.0891025, rel=1e-12)


def test_plus_sft_reports_the_nats_per_token_that_it_adds():
    result = variant("plus_sft_simpo")(*golden_pairs())
    assert result.metrics["sft_nll"].tolist() == [2.0, 1.75, 1.5]  # 20/10, 35/20, 12/8


@pytest.mark.parametrize("name", ["dpo", "simpo", "wpo_dpo", "wpo_simpo"])
@pytest.mark.parametrize("sign", [1, -1])
def test_ten_thousand_nats_overflow_neither_loss_nor_gradient(name, sign):
    chosen, rejected = (
        Response(
            **{k: torch.tensor([v]) for k, v in {"length": 2.0, "ref_logp": -5.0, "log_sum_sq": -4.0}.items()},
            logp=torch.tensor([logp], requires_grad=True),
        )
        for logp in (-1e4 * (sign < 0), -1e4 * (sign > 0))
    )
    loss = variant(name)(chosen, rejected).loss
    loss.sum().backward()
    for tensor in (loss, chosen.logp.grad, rejected.logp.grad):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "weight" in case])
def test_wpo_weight_is_the_formulas_in_plain_floats(name):
    expected_by = {"greedy": "log_max", "none": None}.get(CASES[name]["objective"].get("alignment"), "log_sum_sq")
    weight = build(CASES[name]["objective"])(*golden_pairs()).metrics["weight"]
    assert weight.tolist() == pytest.approx([wpo_weight(w, l, expected_by) for w, l in plain_pairs()], rel=1e-12)
    assert weight.tolist() == pytest.approx(CASES[name]["weight"], rel=1e-12)


def test_wpo_weights_are_the_fact_sheets_to_six_digits():
    weight = variant("wpo_dpo")(*golden_pairs()).metrics["weight"]
    assert weight.tolist() == pytest.approx(CASES["wpo_dpo"]["fact_sheet_weight"], rel=0, abs=1e-6)


def test_wpo_weight_product_is_clamped_and_not_each_factor():
    # w_w = exp(.4) > 1 and w_l = exp(-1): the product exp(-.6) = .548812 stands; factor by factor it would be .367879.
    result = variant("wpo_dpo")(*weighted_pair(0.4, -1.0))
    assert result.metrics["weight"].item() == pytest.approx(math.exp(-0.6), rel=1e-12)
    assert result.metrics["weight_clamped"].item() == 0.0


def test_wpo_weight_is_the_product_too_when_the_rejected_is_the_one_above_one():
    weight = variant("wpo_dpo")(*weighted_pair(-1.0, 0.4)).metrics["weight"]
    assert weight.item() == pytest.approx(math.exp(-0.6), rel=1e-12)


@pytest.mark.parametrize(("log_w", "log_l"), [(0.4, -0.1), (-0.1, 0.4), (0.3, 0.2), (1000.0, 1000.0)])
def test_wpo_weight_product_is_capped_at_one(log_w, log_l):
    pair = weighted_pair(log_w, log_l)
    result = variant("wpo_dpo")(*pair)
    assert result.metrics["weight"].item() == 1.0
    assert result.metrics["weight_clamped"].item() == 1.0
    assert result.loss.item() == variant("dpo")(*pair).loss.item()


def test_wpo_multiplies_both_terms_of_a_smoothed_loss():
    # w = exp(-.6); Delta = (-5 + 6) - (-7 + 6) = 2, so beta * Delta = .2; e = .2.
    loss = variant("wpo_dpo_smoothed")(*weighted_pair(0.4, -1.0)).loss
    weight, right, wrong = math.exp(-0.6), 0.8 * nll(0.2), 0.2 * nll(-0.2)
    assert loss.item() == pytest.approx(weight * right + weight * wrong, rel=1e-12)
    assert loss.item() != pytest.approx(weight * right + wrong, rel=1e-3)


def test_wpo_reports_the_loss_it_weighted():
    result = variant("wpo_dpo")(*golden_pairs())
    assert result.metrics["unweighted_loss"].tolist() == variant("dpo")(*golden_pairs()).loss.tolist()
    squared = [weight**2 for weight in CASES["wpo_dpo"]["weight"]]
    assert result.metrics["weight_squared"].tolist() == pytest.approx(squared, rel=1e-12)


def test_wpo_effective_sample_share_of_known_weights():
    # Weights 1 (clamped), 1/2, 1/2: mean 2/3, mean square 1/2, so (4/9) / (1/2) = 8/9 of the pairs.
    objective = build({"name": "wpo", "base": "dpo"})
    metrics = objective(*log_product_pairs(3.0, -math.log(2), -math.log(2))).metrics
    summary = objective.summary({name: tensor.mean().item() for name, tensor in metrics.items()})
    assert summary == {"effective_sample_share": pytest.approx(8 / 9, rel=1e-12)}


def test_wpo_effective_sample_share_is_one_when_all_weigh_the_same_and_one_over_n_when_one_has_it_all():
    objective = build({"name": "wpo", "base": "dpo"})
    for log_products, share in (([-0.7] * 4, 1.0), ([0.0, -400.0, -400.0, -400.0], 0.25)):
        metrics = objective(*log_product_pairs(*log_products)).metrics
        summary = objective.summary({name: tensor.mean().item() for name, tensor in metrics.items()})
        assert summary["effective_sample_share"] == pytest.approx(share, rel=1e-12)


def test_wpo_effective_sample_share_is_zero_when_every_weight_underflows():
    objective = build({"name": "wpo", "base": "dpo"})
    assert objective.summary({"weight": 0.0, "weight_squared": 0.0}) == {"effective_sample_share": 0.0}


def test_summary_of_a_wrapped_wpo_reaches_the_outside():
    objective = variant("plus_sft_wpo_simpo")
    assert objective.summary({"weight": 0.5, "weight_squared": 0.5}) == {"effective_sample_share": 0.5}
    assert variant("dpo").summary({}) == {}
