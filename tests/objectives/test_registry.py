"""From plain values to an objective: every mistake is named, and third parties' objectives are found."""

import sys
import warnings
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Literal, Optional

import pytest
from objective_cases import golden_pairs

from objectives import Objective, PairLoss, Response, available, build, load_file, register
from objectives.dpo import DPO
from objectives.plus_sft import PlusSFT
from objectives.registry import _REGISTRY
from objectives.simpo import SimPO
from objectives.wpo import WPO

FILE_OF_AN_OBJECTIVE = """
from dataclasses import dataclass
from objectives import Objective, PairLoss, register


@register("{name}")
@dataclass(frozen=True, kw_only=True)
class Mine(Objective):
    scale: float = 1.0

    @property
    def needs(self):
        return frozenset({{"logp"}})

    def __call__(self, chosen, rejected):
        return PairLoss(self.scale * (rejected.logp - chosen.logp), chosen.logp.detach(), rejected.logp.detach(), {{}})
"""


@pytest.fixture(autouse=True)
def registry_as_it_was():
    """Whatever a test registers or imports is gone after it."""
    known, modules = dict(_REGISTRY), set(sys.modules)
    yield
    _REGISTRY.clear()
    _REGISTRY.update(known)
    for module in set(sys.modules) - modules:
        if module.startswith(("objective_code_", "third_party")):
            del sys.modules[module]


@dataclass(frozen=True, kw_only=True)
class Logp(Objective):
    """The least an objective can be: the chosen's negative log-probability."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logp"})

    def __call__(self, chosen: Response, rejected: Response) -> PairLoss:
        return PairLoss(-chosen.logp, chosen.logp.detach(), rejected.logp.detach(), {})


@dataclass(frozen=True, kw_only=True)
class Typed(Logp):
    """A field of every type a hyperparameter may have."""

    rate: float = 1.0
    steps: int = 1
    flag: bool = False
    label: str = "a"
    kind: Literal["soft", "hard"] = "soft"
    level: Literal[1, 2] = 1
    margin: float | None = None
    count: int | None = None


@dataclass(frozen=True, kw_only=True)
class Scaled(Logp):
    """A wrapper with a field that its base has too."""

    base: Objective
    beta: float = 1.0


def message(**values: object) -> str:
    """What `build` says about these values: one line."""
    with pytest.raises(ValueError) as error:
        build(values)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_our_objectives_are_known_under_the_name_of_their_file():
    for name in ("dpo", "ipo", "plus_sft", "simpo", "sppo", "wpo"):
        assert available()[name].__module__ == f"objectives.{name}"


def test_an_unknown_objective_is_answered_with_the_known_ones():
    said = message(name="dppo")
    assert said.startswith("unknown objective 'dppo'; there are ")
    assert all(name in said for name in available())
    assert message(name="wpo", base="dppo") == said


@pytest.mark.parametrize("values", [{}, {"name": None}, {"name": 3}, {"name": "wpo", "base": {"beta": 0.1}}])
def test_an_objective_without_a_name_is_refused(values):
    assert message(**values).startswith("unknown objective ")


def test_an_unknown_key_is_named_with_the_allowed_ones():
    assert (
        message(name="dpo", btea=1) == "unknown key objective.btea; dpo takes objective.beta, objective.label_smoothing"
    )


@pytest.mark.parametrize("values", [{"base": "dpo", "btea": 1}, {"base": {"name": "dpo", "btea": 1}}])
def test_an_unknown_key_of_a_wrapper_is_named_with_the_bases_keys_too(values):
    allowed = "objective.base, objective.beta, objective.label_smoothing, objective.alignment"
    assert message(name="wpo", **values) == f"unknown key objective.btea; wpo takes {allowed}"


def test_every_unknown_key_is_named():
    assert "objective.btea, objective.gama;" in message(name="dpo", btea=1, gama=2)


def test_a_key_of_another_objective_is_unknown():
    assert "unknown key objective.gamma;" in message(name="dpo", gamma=1.0)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("rate", "0.1", "a number"),
        ("rate", "abc", "a number"),
        ("rate", None, "a number"),
        ("rate", True, "a number"),
        ("rate", [0.1], "a number"),
        ("steps", 1.5, "a whole number"),
        ("steps", 1.0, "a whole number"),
        ("steps", True, "a whole number"),
        ("steps", "1", "a whole number"),
        ("flag", 1, "true or false"),
        ("flag", 0.0, "true or false"),
        ("flag", "true", "true or false"),
        ("flag", None, "true or false"),
        ("label", 1, "text"),
        ("label", None, "text"),
        ("kind", "Soft", "soft or hard"),
        ("kind", None, "soft or hard"),
        ("kind", True, "soft or hard"),
        ("kind", ["soft"], "soft or hard"),
        ("level", 3, "1 or 2"),
        ("level", "1", "1 or 2"),
        ("margin", "0.1", "a number or null"),
        ("margin", False, "a number or null"),
        ("count", 1.5, "a whole number or null"),
        ("count", True, "a whole number or null"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_what_is_allowed(key, value, allowed):
    register("typed")(Typed)
    assert message(name="typed", **{key: value}) == f"objective.{key} must be {allowed}, not {value!r}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rate", 0.5),
        ("steps", 3),
        ("flag", True),
        ("label", ""),
        ("kind", "hard"),
        ("level", 2),
        ("margin", None),
        ("margin", 0.5),
        ("count", None),
        ("count", 0),
    ],
)
def test_a_value_of_the_right_type_is_taken_as_it_is(key, value):
    register("typed")(Typed)
    taken = getattr(build({"name": "typed", key: value}), key)
    assert taken == value
    assert type(taken) is type(value)


def test_a_field_may_be_a_choice_or_null():
    @register("choosy")
    @dataclass(frozen=True, kw_only=True)
    class Choosy(Logp):
        mode: Literal["on", "off"] | None = None

    assert build({"name": "choosy", "mode": None}) == Choosy()
    assert build({"name": "choosy", "mode": "off"}) == Choosy(mode="off")
    assert message(name="choosy", mode="none") == "objective.mode must be on or off or null, not 'none'"


def test_a_field_may_be_written_as_optional():
    @register("optional")
    @dataclass(frozen=True, kw_only=True)
    class Written(Logp):
        rate: Optional[float] = None  # noqa: UP045

    assert build({"name": "optional", "rate": 2}) == Written(rate=2.0)


def test_a_field_with_a_default_factory_has_a_default():
    @register("made")
    @dataclass(frozen=True, kw_only=True)
    class Made(Logp):
        rate: float = field(default_factory=lambda: 0.5)

    assert build({"name": "made"}).rate == 0.5


def test_a_whole_number_is_welcome_where_a_number_is_asked_for():
    beta = build({"name": "simpo", "beta": 2}).beta
    assert beta == 2.0
    assert isinstance(beta, float)
    gamma = build({"name": "simpo", "gamma": 1}).gamma
    assert gamma == 1.0
    assert isinstance(gamma, float)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"name": "simpo", "beta": "abc"}, "objective.beta must be a number, not 'abc'"),
        ({"name": "simpo", "gamma": "abc"}, "objective.gamma must be a number or null, not 'abc'"),
        ({"name": "simpo", "loss": "logistic"}, "objective.loss must be sigmoid or hinge, not 'logistic'"),
        ({"name": "sppo", "target": "hrad"}, "objective.target must be soft or single or hard, not 'hrad'"),
        ({"name": "ipo", "average": True}, "objective.average must be tokens or none, not True"),
        ({"name": "wpo", "base": "dpo", "beta": "abc"}, "objective.beta must be a number, not 'abc'"),
        ({"name": "wpo", "base": "dpo", "alignment": None}, "must be sampled or greedy or none, not None"),
    ],
)
def test_a_wrong_type_in_our_objectives_is_named(values, said):
    assert said in message(**values)


@pytest.mark.parametrize("value", [0, 0.0, -0.1, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"name": "dpo"}, "beta"),
        ({"name": "simpo"}, "beta"),
        ({"name": "sppo"}, "beta"),
        ({"name": "ipo"}, "tau"),
        ({"name": "plus_sft", "base": "dpo"}, "sft_weight"),
        ({"name": "wpo", "base": "dpo"}, "beta"),
    ],
)
def test_a_scale_must_be_a_finite_number_above_zero(values, key, value):
    assert f"objective.{key} must be above 0, not {float(value)}" in message(**values, **{key: value})


@pytest.mark.parametrize("value", [-0.1, 0.5, 1.0, float("nan")])
def test_label_smoothing_must_be_less_than_a_half(value):
    said = message(name="dpo", label_smoothing=value)
    assert said == f"objective dpo: objective.label_smoothing must lie in [0, 0.5), not {value}"


@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan")])
@pytest.mark.parametrize("key", ["gamma", "gamma_beta_ratio"])
def test_a_target_margin_must_be_zero_or_more(key, value):
    assert f"objective.{key} must be 0 or more, not {value}" in message(name="simpo", **{key: value})


def test_gamma_and_its_ratio_at_once_are_refused():
    said = message(name="simpo", gamma=1.0, gamma_beta_ratio=0.5)
    assert "objective.gamma and objective.gamma_beta_ratio are both given (1.0 and 0.5)" in said
    assert "both given" in message(name="simpo", gamma=0, gamma_beta_ratio=0)


def test_beta_reaches_the_base_through_wpo():
    assert build({"name": "wpo", "base": "dpo", "beta": 0.02}) == WPO(base=DPO(beta=0.02))


def test_beta_reaches_simpo_through_plus_sft_over_wpo():
    values = {"name": "plus_sft", "base": {"name": "wpo", "base": "simpo"}, "beta": 10, "gamma_beta_ratio": 0.3}
    expected = PlusSFT(base=WPO(base=SimPO(beta=10.0, gamma_beta_ratio=0.3), alignment="greedy"), sft_weight=0.5)
    assert build({**values, "alignment": "greedy", "sft_weight": 0.5}) == expected


def test_a_base_may_be_a_name_or_a_mapping():
    by_mapping = build({"name": "wpo", "base": {"name": "dpo", "beta": 0.02}, "alignment": "none"})
    assert by_mapping == build({"name": "wpo", "base": "dpo", "beta": 0.02, "alignment": "none"})


def test_building_leaves_the_values_as_they_were():
    values = {"name": "wpo", "base": {"name": "simpo", "beta": 3.0}, "alignment": "none"}
    before = {**values, "base": dict(values["base"])}
    assert build(values) == build(values)
    assert values == before


def test_a_key_that_both_wrapper_and_base_have_is_the_wrappers():
    register("scaled")(Scaled)
    assert build({"name": "scaled", "base": "dpo", "beta": 0.05}) == Scaled(base=DPO(), beta=0.05)


def test_a_key_given_beside_the_base_and_inside_it_is_never_dropped_in_silence():
    try:
        objective = build({"name": "wpo", "base": {"name": "dpo", "beta": 0.05}, "beta": 0.02})
    except ValueError as error:
        assert "objective.beta" in str(error)
    else:
        assert objective == WPO(base=DPO(beta=0.02))


def test_a_name_that_is_a_list_is_an_unknown_objective():
    assert message(name=["dpo", "simpo"]).startswith("unknown objective ")


@pytest.mark.parametrize("name", ["wpo", "plus_sft"])
@pytest.mark.parametrize("values", [{}, {"base": None}])
def test_a_missing_base_is_named_with_the_possible_ones(name, values):
    said = message(name=name, **values)
    assert said.startswith(f"objective.base is missing: {name} wraps one of ")
    assert all(known in said for known in available())


def test_a_field_without_a_default_must_be_given():
    @register("exact")
    @dataclass(frozen=True, kw_only=True)
    class Exact(Logp):
        rate: float

    assert message(name="exact") == "objective.rate is missing: exact has no default for it"
    assert build({"name": "exact", "rate": 2}) == Exact(rate=2.0)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        # Published: FACTS.md; a warning begins ten times outside.
        ({"name": "simpo", "beta": 0.1}, "objective.beta=0.1 is far outside simpo's published 2 to 10"),
        ({"name": "simpo", "beta": 101}, "objective.beta=101 is far outside simpo's published 2 to 10"),
        ({"name": "dpo", "beta": 2}, "objective.beta=2 is far outside dpo's published 0.01 to 0.1"),
        ({"name": "sppo", "beta": 2}, "objective.beta=2 is far outside sppo's published 0.001 to 0.1"),
        ({"name": "ipo", "tau": 1e-4}, "objective.tau=0.0001 is far outside ipo's published 0.01 to 1"),
        ({"name": "wpo", "base": "dpo", "beta": 2}, "objective.beta=2 is far outside dpo's published 0.01 to 0.1"),
    ],
)
def test_a_value_far_outside_the_published_range_warns(values, said):
    with pytest.warns(UserWarning) as caught:
        build(values)
    assert len(caught) == 1
    assert str(caught[0].message).startswith(said)


@pytest.mark.parametrize(
    "values",
    [
        {"name": "simpo", "beta": 2},
        {"name": "simpo", "beta": 10},
        {"name": "simpo", "beta": 0.2},
        {"name": "simpo", "beta": 100},
        {"name": "simpo", "gamma": 0},
        {"name": "dpo", "beta": 0.01},
        {"name": "dpo", "beta": 0.1},
        {"name": "sppo", "beta": 0.001},
        {"name": "ipo", "tau": 1},
        {"name": "wpo", "base": "dpo", "beta": 0.01},
        *({"name": name} for name in ("dpo", "simpo", "sppo", "ipo")),
    ],
)
def test_a_value_near_the_published_range_does_not_warn(values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(values)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match=r"objective 'dpo' is already registered by objectives\.dpo\.DPO"):
        register("dpo")(Logp)
    assert available()["dpo"] is DPO


def test_registering_the_same_class_again_is_harmless():
    register("dpo")(DPO)
    assert available()["dpo"] is DPO


def test_an_objective_that_is_not_told_its_needs_or_its_loss_cannot_be_made():
    @dataclass(frozen=True, kw_only=True)
    class Unfinished(Objective):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Unfinished()


def test_an_objective_of_a_file_can_be_built_and_called(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FILE_OF_AN_OBJECTIVE.format(name="mine"))
    load_file(str(file))
    objective = build({"name": "mine", "scale": 2})
    assert objective(*golden_pairs()).loss.tolist() == [-20.0, 14.0, -4.0]  # twice (-30+20, -28+35, -14+12)
    wrapped = build({"name": "wpo", "base": "mine", "scale": 2, "alignment": "none"})
    assert wrapped.base == objective
    assert wrapped.needs == {"logp", "length"}


def test_an_objectives_file_may_be_loaded_twice(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FILE_OF_AN_OBJECTIVE.format(name="mine"))
    load_file(str(file))
    load_file(str(file))
    assert build({"name": "mine"}).scale == 1.0


def test_an_objectives_file_may_be_named_from_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text(FILE_OF_AN_OBJECTIVE.format(name="mine"))
    load_file("~/mine.py")
    assert "mine" in available()


def test_a_file_cannot_take_the_name_of_another_objective(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FILE_OF_AN_OBJECTIVE.format(name="dpo"))
    with pytest.raises(ValueError, match=r"'dpo' is already registered by objectives\.dpo\.DPO"):
        load_file(str(file))


@pytest.mark.parametrize("name", ["absent.py", "."])
def test_an_objectives_file_that_is_not_there_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"code: there is no Python file {name}; .* working folder"):
        load_file(name)


def test_an_objectives_file_that_is_not_python_is_refused(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\n")
    with pytest.raises(ValueError, match=r"code: .*mine\.yaml is not a Python file"):
        load_file(str(file))


def test_an_entry_point_of_another_package_is_loaded(tmp_path: Path, monkeypatch):
    (tmp_path / "third_party_objective.py").write_text(FILE_OF_AN_OBJECTIVE.format(name="third_party"))
    monkeypatch.syspath_prepend(tmp_path)
    groups = {"align.objectives": [EntryPoint("third_party", "third_party_objective", "align.objectives")]}
    monkeypatch.setattr("importlib.metadata.entry_points", lambda *, group: groups[group])
    assert "third_party" not in _REGISTRY
    assert build({"name": "third_party", "scale": 3}).scale == 3.0
    assert available()["third_party"].__module__ == "third_party_objective"


def test_a_package_installed_with_an_entry_point_is_found_without_being_imported(tmp_path: Path, monkeypatch):
    (tmp_path / "third_party_installed.py").write_text(FILE_OF_AN_OBJECTIVE.format(name="installed"))
    metadata = tmp_path / "third_party-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[align.objectives]\ninstalled = third_party_installed\n[align.others]\nbroken = third_party_absent\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert build({"name": "installed"}).needs == {"logp"}
