"""Gradients by autograd against central differences and against derivatives worked out by hand."""

# ruff: noqa: E741 - w and l are the papers' letters
from collections.abc import Callable

import pytest
import torch
from objective_cases import VARIANTS, golden_pairs, response, sigmoid, variant, weighted_pair
from torch import Tensor

from objectives import Objective, Response, build
from objectives.plus_sft import PlusSFT
from objectives.wpo import WPO

Loss = Callable[[Response, Response], Tensor]
STEP = 1e-4  # nats


def many_pairs() -> tuple[Response, Response]:
    """The golden pairs; pairs whose WPO weight is clamped; pairs at random; and one that the hinge has let go."""
    generator = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(8, generator=generator, dtype=torch.float64)

    def random_side() -> Response:
        length = uniform(1, 40).floor()
        per_token = {"logp": (-3, -0.2), "ref_logp": (-3, -0.2), "log_sum_sq": (-2.5, -0.2), "log_max": (-2, -0.1)}
        sums = {name: length * uniform(*bounds) for name, bounds in per_token.items()}
        return response(**sums, length=length, win_prob=uniform(0, 1))

    easy = {"length": [9.0], "log_sum_sq": [-9.0], "log_max": [-5.0], "win_prob": [0.5]}
    let_go = response(logp=[-1.0], ref_logp=[-20.0], **easy), response(logp=[-50.0], ref_logp=[-20.0], **easy)
    parts = [golden_pairs(), weighted_pair(0.4, -1.0), weighted_pair(0.4, -0.1), (random_side(), random_side()), let_go]
    return tuple(  # type: ignore[return-value]
        Response(**{name: torch.cat([vars(part[side])[name] for part in parts]) for name in vars(parts[0][side])})
        for side in (0, 1)
    )


def with_logp(side: Response, logp: Tensor) -> Response:
    return Response(**{**vars(side), "logp": logp})


def autograd(objective: Objective, chosen: Response, rejected: Response) -> tuple[Tensor, Tensor]:
    """dL/dlogp of each side, `[B]`; the pairs do not touch each other, so their sum has every gradient in it."""
    logps = [side.logp.clone().requires_grad_() for side in (chosen, rejected)]
    loss = objective(with_logp(chosen, logps[0]), with_logp(rejected, logps[1])).loss
    grad_w, grad_l = torch.autograd.grad(loss.sum(), logps)
    return grad_w, grad_l


def differences(loss: Loss, chosen: Response, rejected: Response) -> tuple[Tensor, Tensor]:
    """dL/dlogp of each side, `[B]`, by central differences: no autograd."""
    with torch.no_grad():
        up_w, down_w = (loss(with_logp(chosen, chosen.logp + step), rejected) for step in (STEP, -STEP))
        up_l, down_l = (loss(chosen, with_logp(rejected, rejected.logp + step)) for step in (STEP, -STEP))
    return (up_w - down_w) / (2 * STEP), (up_l - down_l) / (2 * STEP)


def frozen(objective: Objective, chosen: Response, rejected: Response) -> Loss:
    """The objective's loss with WPO's weight held at its value for these pairs: what a stop-gradient means."""
    if isinstance(objective, WPO):
        weight, base = objective(chosen, rejected).metrics["weight"], frozen(objective.base, chosen, rejected)
        return lambda w, l: weight * base(w, l)
    if isinstance(objective, PlusSFT):
        inner = frozen(objective.base, chosen, rejected)
        return lambda w, l: inner(w, l) - objective.sft_weight * w.logp / w.length
    return lambda w, l: objective(w, l).loss


def plain(side: Response) -> list[dict[str, float]]:
    """One mapping of plain floats per response."""
    columns = {name: tensor.tolist() for name, tensor in vars(side).items()}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


# By hand, per pair: (dL/dlogp_w, dL/dlogp_l), in plain floats.
def by_hand_dpo(w, l, e=0.0):
    # d/dm [-(1-e) log s(m) - e log s(-m)] = -(1-e) s(-m) + e s(m), and m = beta * (log_ratio_w - log_ratio_l).
    margin = 0.1 * (w["logp"] - w["ref_logp"] - l["logp"] + l["ref_logp"])
    slope = 0.1 * (-(1 - e) * sigmoid(-margin) + e * sigmoid(margin))
    return slope, -slope


def by_hand_simpo(w, l):
    # The reward's slope is beta / |y|, so a short response moves more.
    slope = -2 * sigmoid(-(2 * (w["logp"] / w["length"] - l["logp"] / l["length"]) - 1))
    return slope / w["length"], -slope / l["length"]


def by_hand_simpo_hinge(w, l):
    slope = -2.0 if 2 * (w["logp"] / w["length"] - l["logp"] / l["length"]) - 1 < 1 else 0.0
    return slope / w["length"], -slope / l["length"]


def by_hand_sppo(w, l, p_w, p_l):
    # Each response is drawn to its own target; the sides are not coupled.
    return w["logp"] - w["ref_logp"] - (p_w - 0.5) / 0.1, l["logp"] - l["ref_logp"] - (p_l - 0.5) / 0.1


def by_hand_ipo_tokens(w, l):
    ratio_w, ratio_l = ((y["logp"] - y["ref_logp"]) / y["length"] for y in (w, l))
    slope = 2 * (ratio_w - ratio_l - 5)
    return slope / w["length"], -slope / l["length"]


def by_hand_ipo_none(w, l):
    slope = 2 * (w["logp"] - w["ref_logp"] - l["logp"] + l["ref_logp"] - 5)
    return slope, -slope


BY_HAND = {
    "dpo": by_hand_dpo,
    "dpo_smoothed": lambda w, l: by_hand_dpo(w, l, 0.2),
    "simpo": by_hand_simpo,
    "simpo_hinge": by_hand_simpo_hinge,
    "sppo_soft": lambda w, l: by_hand_sppo(w, l, w["win_prob"], l["win_prob"]),
    "sppo_single": lambda w, l: by_hand_sppo(w, l, w["win_prob"], 1 - w["win_prob"]),
    "sppo_hard": lambda w, l: by_hand_sppo(w, l, 1.0, 0.0),
    "ipo_tokens": by_hand_ipo_tokens,
    "ipo_none": by_hand_ipo_none,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_gradient_is_the_central_difference(name):
    objective, pairs = variant(name), many_pairs()
    expected = differences(frozen(objective, *pairs), *pairs)
    for gradient, difference in zip(autograd(objective, *pairs), expected, strict=True):
        torch.testing.assert_close(gradient, difference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", BY_HAND)
def test_gradient_is_the_derivative_worked_out_by_hand(name):
    chosen, rejected = many_pairs()
    by_hand = [BY_HAND[name](w, l) for w, l in zip(plain(chosen), plain(rejected), strict=True)]
    for gradient, expected in zip(autograd(variant(name), chosen, rejected), zip(*by_hand, strict=True), strict=True):
        assert gradient.tolist() == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_the_pairs_of_these_tests_meet_every_branch():
    pairs = many_pairs()
    clamped = variant("wpo_dpo")(*pairs).metrics["weight_clamped"]
    assert clamped.any()
    assert not clamped.all()
    hinge = variant("simpo_hinge")(*pairs).loss
    assert (hinge == 0).any()
    assert (hinge > 0).any()


@pytest.mark.parametrize("alignment", ["sampled", "greedy", "none"])
@pytest.mark.parametrize("base", ["dpo", "simpo", "sppo", "ipo"])
def test_wpo_gradient_is_the_detached_weight_times_the_bases(base, alignment):
    pairs = many_pairs()
    wpo = build({"name": "wpo", "base": base, "alignment": alignment})
    weight = wpo(*pairs).metrics["weight"]
    for gradient, of_base in zip(autograd(wpo, *pairs), autograd(build({"name": base}), *pairs), strict=True):
        torch.testing.assert_close(gradient, weight * of_base, rtol=1e-12, atol=0)


def test_no_gradient_flows_through_wpos_alignment():
    chosen, rejected = golden_pairs()
    for side in (chosen, rejected):
        side.log_sum_sq.requires_grad_()
        side.logp.requires_grad_()
    variant("wpo_dpo")(chosen, rejected).loss.sum().backward()
    for side in (chosen, rejected):
        assert side.log_sum_sq.grad is None
        assert side.logp.grad is not None


def test_plus_sft_adds_its_weight_over_the_length_to_the_chosens_gradient_only():
    pairs = many_pairs()
    base_w, base_l = autograd(build({"name": "simpo"}), *pairs)
    grad_w, grad_l = autograd(variant("plus_sft_simpo"), *pairs)
    torch.testing.assert_close(grad_w, base_w - 0.25 / pairs[0].length, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_l, base_l, rtol=0, atol=0)
