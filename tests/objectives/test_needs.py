"""An objective reads the statistics it declares: no other, and every one of them."""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from objective_cases import VARIANTS, assert_needs_are_exact, golden_pairs, response, variant

from objectives import MissingStatistic, Objective, PairLoss, Response, available
from objectives.base import STATISTICS

EXPECTED_NEEDS = {
    "dpo": {"logp", "ref_logp"},
    "simpo": {"logp", "length"},  # reference-free
    "sppo_soft": {"logp", "ref_logp", "win_prob"},
    "sppo_single": {"logp", "ref_logp", "win_prob"},
    "sppo_hard": {"logp", "ref_logp"},  # the label is taken as certain
    "ipo_tokens": {"logp", "ref_logp", "length"},
    "ipo_none": {"logp", "ref_logp"},
    "plus_sft_simpo": {"logp", "length"},
    "plus_sft_dpo": {"logp", "length", "ref_logp"},
    "plus_sft_wpo_simpo": {"logp", "length", "log_max"},
    "wpo_dpo": {"logp", "length", "ref_logp", "log_sum_sq"},
    "wpo_dpo_greedy": {"logp", "length", "ref_logp", "log_max"},
    "wpo_dpo_unaligned": {"logp", "length", "ref_logp"},
    "wpo_simpo": {"logp", "length", "log_sum_sq"},
    "wpo_sppo": {"logp", "length", "ref_logp", "win_prob", "log_sum_sq"},
}


@dataclass(frozen=True, kw_only=True)
class Toy(Objective):
    """The chosen's negative log-ratio; declares what it is told to."""

    declared: frozenset[str] = frozenset({"logp", "ref_logp"})

    @property
    def needs(self) -> frozenset[str]:
        return self.declared

    def __call__(self, chosen: Response, rejected: Response) -> PairLoss:
        return PairLoss(-chosen.log_ratio, chosen.logp.detach(), rejected.logp.detach(), {})


def ours() -> dict[str, type[Objective]]:
    """Registered objectives of this package; a machine may have third parties' installed."""
    return {name: cls for name, cls in available().items() if cls.__module__.startswith("objectives.")}


def layers(objective: Objective) -> list[Objective]:
    """The objective, the one it wraps, and so on down."""
    base = getattr(objective, "base", None)
    return [objective, *(layers(base) if base else [])]


def test_every_choice_of_every_objective_is_among_the_variants():
    tried = [layer for name in VARIANTS for layer in layers(variant(name))]
    for name, cls in ours().items():
        objectives = [objective for objective in tried if type(objective) is cls]
        assert objectives, f"{name} has no entry in VARIANTS of objective_cases.py"
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if typing.get_origin(hints[field.name]) is Literal:
                seen = {getattr(objective, field.name) for objective in objectives}
                assert seen == set(typing.get_args(hints[field.name])), f"{name}.{field.name}"


@pytest.mark.parametrize("name", VARIANTS)
def test_an_objective_reads_exactly_what_it_needs(name):
    assert_needs_are_exact(variant(name))


@pytest.mark.parametrize("name", EXPECTED_NEEDS)
def test_needs_of_each_objective(name):
    assert variant(name).needs == EXPECTED_NEEDS[name]


@pytest.mark.parametrize("name", VARIANTS)
def test_an_objective_fails_without_any_one_of_its_needs(name):
    objective = variant(name)
    for absent in objective.needs:
        chosen, rejected = (
            Response(**{key: tensor for key, tensor in vars(side).items() if key in objective.needs - {absent}})
            for side in golden_pairs()
        )
        with pytest.raises(MissingStatistic, match=f"^{absent} is not computed.*'{absent}'.*`needs`"):
            objective(chosen, rejected)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_statistic_that_is_not_needed_changes_nothing(name):
    objective, (chosen, rejected) = variant(name), golden_pairs()
    expected = objective(chosen, rejected).loss
    for side in (chosen, rejected):
        for other in set(STATISTICS) - objective.needs:
            vars(side)[other] = torch.full((3,), torch.nan, dtype=torch.float64)
    assert torch.equal(objective(chosen, rejected).loss, expected)


def test_the_check_passes_an_objective_that_declares_what_it_reads():
    assert_needs_are_exact(Toy())


@pytest.mark.parametrize("forgotten", ["logp", "ref_logp"])
def test_the_check_catches_a_statistic_that_is_read_and_not_declared(forgotten):
    with pytest.raises(MissingStatistic, match=f"{forgotten} is not computed"):
        assert_needs_are_exact(Toy(declared=frozenset({"logp", "ref_logp"} - {forgotten})))


@pytest.mark.parametrize("unread", ["length", "log_sum_sq", "win_prob"])
def test_the_check_catches_a_statistic_that_is_declared_and_not_read(unread):
    with pytest.raises(AssertionError, match=rf"never read: \['{unread}'\]"):
        assert_needs_are_exact(Toy(declared=frozenset({"logp", "ref_logp", unread})))


def test_the_check_catches_a_statistic_that_does_not_exist():
    with pytest.raises(AssertionError, match=r"no statistic \['entropy'\]"):
        assert_needs_are_exact(Toy(declared=frozenset({"logp", "ref_logp", "entropy"})))


@pytest.mark.parametrize("statistic", STATISTICS)
def test_reading_a_missing_statistic_names_it_and_needs(statistic):
    with pytest.raises(MissingStatistic, match=f"^{statistic} is not computed: add '{statistic}' to .*`needs`$"):
        getattr(Response(), statistic)


@pytest.mark.parametrize(
    ("derived", "absent"),
    [("mean_logp", "logp"), ("mean_logp", "length"), ("log_ratio", "logp"), ("log_ratio", "ref_logp")],
)
def test_a_derived_statistic_names_the_one_it_lacks(derived, absent):
    there = {name: [-2.0] for name in ("logp", "length", "ref_logp") if name != absent}
    with pytest.raises(MissingStatistic, match=f"^{absent} is not computed"):
        getattr(response(**there), derived)


def test_a_misspelled_statistic_is_an_ordinary_attribute_error():
    with pytest.raises(AttributeError, match="log_prob"):
        _ = response(logp=[-1.0]).log_prob
    with pytest.raises(AssertionError, match="log_prob"):
        response(log_prob=[-1.0])


def test_derived_statistics_are_the_definitions():
    side = response(logp=[-20.0, -35.0], length=[10.0, 20.0], ref_logp=[-22.0, -33.0])
    assert side.mean_logp.tolist() == [-2.0, -1.75]
    assert side.log_ratio.tolist() == [2.0, -2.0]
