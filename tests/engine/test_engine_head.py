"""The head by itself: statistics of tokens from hidden states, against float64, in tiles of all shapes."""

import shutil

import pytest
import torch
from torch import nn

from align.engine import head
from align.engine.head import Transform, attach_head

NAMES = ("logp", "entropy", "log_max", "log_sum_sq")
TRANSFORMS = {
    "none": Transform(),
    "cap": Transform(cap=3.0),
    "scale": Transform(scale=0.25),
    "both": Transform(scale=0.5, cap=2.0),
}
WORDS, WIDTH, TOKENS = 101, 16, 37


def made(bias=False):
    """(head, hidden states, targets): the first and the last word are among the targets."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(WIDTH, WORDS, bias=bias)
    with torch.no_grad():
        for weight in linear.parameters():  # values that bf16 has, so that only sums and logits could be rounded
            weight.copy_(torch.randn(weight.shape, generator=generator).bfloat16())
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).bfloat16().float()
    target = torch.randint(0, WORDS, (TOKENS,), generator=generator)
    target[:2] = torch.tensor([0, WORDS - 1])
    return linear, hidden.requires_grad_(), target


def statistics(linear, hidden, target, names=NAMES, transform=TRANSFORMS["none"]):
    attach_head(linear)
    return dict(zip(names, linear(hidden, target=target, names=names, transform=transform), strict=True))


def by_hand(linear, hidden, target, transform):
    """In float64, from all logits."""
    z = hidden.double() @ linear.weight.double().T
    z = (z if linear.bias is None else z + linear.bias.double()) * transform.scale
    z = z if transform.cap is None else transform.cap * (z / transform.cap).tanh()
    logp = z.log_softmax(-1)
    return {
        "logp": logp.gather(1, target[:, None])[:, 0],
        "entropy": -(logp.exp() * logp).sum(1),
        "log_max": logp.amax(1),
        "log_sum_sq": (2 * logp).logsumexp(1),
    }


def assert_near(made, expected, tolerance=1e-5):
    for name, value in expected.items():
        assert made[name].dtype == torch.float32
        torch.testing.assert_close(made[name].double(), value, rtol=tolerance, atol=tolerance)


#: (logits of a tile, tokens of a tile): all at once; a vocabulary of tiles; tokens of tiles; both; a word at a time.
TILES = [(10**6, 10**6), (37 * 10, 37), (5 * 101, 5), (70, 7), (1, 37)]


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_statistics_and_gradients_do_not_depend_on_tiles(transform, tile, monkeypatch):
    monkeypatch.setitem(head._TILE, "cpu", tile[0])
    monkeypatch.setitem(head._TILE_TOKENS, "cpu", tile[1])
    linear, hidden, target = made(bias=True)
    weights = torch.linspace(-2, 3, TOKENS)
    leaves = [hidden, linear.weight, linear.bias]
    expected = by_hand(linear, hidden, target, TRANSFORMS[transform])
    wanted = torch.autograd.grad((expected["logp"] * weights).sum(), leaves)
    values = statistics(linear, hidden, target, transform=TRANSFORMS[transform])
    assert_near(values, expected)
    for ours, theirs in zip(torch.autograd.grad((values["logp"] * weights).sum(), leaves), wanted, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("names", [("logp",), ("logp", "entropy"), ("log_sum_sq", "logp"), NAMES])
def test_any_statistics_may_be_asked_for_in_any_order(names):
    linear, hidden, target = made()
    values = statistics(linear, hidden, target, names)
    assert_near(values, {name: by_hand(linear, hidden, target, Transform())[name] for name in names})
    assert [name for name in names if values[name].requires_grad] == ["logp"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_under_autocast_nothing_behind_the_products_is_rounded_to_bf16(transform, name):
    """Factors that bf16 holds exactly: what is left is float32's rounding. Logits in bf16 would be off by 1e-2."""
    linear, hidden, target = made()
    with torch.autocast("cpu", torch.bfloat16):
        values = statistics(linear, hidden, target, transform=TRANSFORMS[transform])
    assert_near(values, {name: by_hand(linear, hidden, target, TRANSFORMS[transform])[name]})


@pytest.mark.parametrize("inside", [False, True])
def test_under_autocast_the_gradient_is_summed_in_float32(inside):
    """bf16 rounds what a logit's gradient is multiplied by, by 2^-9 of it: at most 4e-3 of the whole, if all agreed."""
    linear, hidden, target = made()
    expected = by_hand(linear, hidden, target, Transform())
    wanted = torch.autograd.grad(expected["logp"].sum(), [hidden, linear.weight])
    with torch.autocast("cpu", torch.bfloat16):
        loss = statistics(linear, hidden, target)["logp"].sum()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    for leaf, theirs in zip([hidden, linear.weight], wanted, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert (leaf.grad - theirs).norm() <= 2e-3 * theirs.norm()


def test_huge_logits_do_not_overflow():
    """Of up to 2 * 10^4, which float32 holds to 1e-3."""
    linear, hidden, target = made()
    with torch.no_grad():
        hidden *= 1000
    values = statistics(linear, hidden, target)
    assert hidden.detach().matmul(linear.weight.T).amax() > 1e4
    assert_near(values, by_hand(linear, hidden, target, Transform()), tolerance=2e-3)


def test_weights_that_are_not_trained_get_no_gradient():
    linear, hidden, target = made(bias=True)
    linear.requires_grad_(False)
    statistics(linear, hidden, target)["logp"].sum().backward()
    assert hidden.grad is not None and linear.weight.grad is None and linear.bias.grad is None


def test_a_gradient_that_no_one_gives_is_none():
    linear, hidden, target = made()
    statistics(linear, hidden, target)
    assert torch.autograd.grad((hidden * 0).sum(), [linear.weight], allow_unused=True) == (None,)


def test_an_attached_head_still_gives_logits_and_has_its_own_name():
    linear, hidden, _ = made()
    logits = linear(hidden)
    attach_head(linear)
    assert torch.equal(linear(hidden), logits) and type(linear).__name__ == "Linear" and isinstance(linear, nn.Linear)


def test_a_head_that_is_not_linear_is_refused():
    with pytest.raises(ValueError, match="the output head is a Sequential"):
        attach_head(nn.Sequential(nn.Linear(2, 3)))


def test_hooks_of_a_head_fire():
    """DDP, FSDP2 and ZeRO-3 gather a head's weights in them."""
    linear, hidden, target = made()
    fired = []
    attach_head(linear)
    linear.register_forward_pre_hook(lambda *_: fired.append("before"))
    linear.register_forward_hook(lambda *_: fired.append("behind"))
    linear.register_full_backward_hook(lambda *_: fired.append("backward"))
    statistics(linear, hidden, target)["logp"].sum().backward()
    assert fired == ["before", "behind", "backward"]


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({}, Transform()),
        ({"final_logit_softcapping": 30.0}, Transform(cap=30.0)),
        ({"final_logit_softcapping": None, "logit_scale": None}, Transform()),
        ({"logit_scale": 0.0625}, Transform(scale=0.0625)),
        ({"logits_scaling": 8.0}, Transform(scale=0.125)),
    ],
)
def test_what_a_model_does_to_its_logits_is_read_from_its_configuration(fields, expected):
    from types import SimpleNamespace

    assert Transform.of(SimpleNamespace(**fields)) == expected


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_compiled_for_any_shape_a_tile_gives_the_same(transform, monkeypatch):
    monkeypatch.setitem(head._TILE, "cpu", 70)
    monkeypatch.setitem(head._TILE_TOKENS, "cpu", 7)
    weights = torch.linspace(-2, 3, TOKENS)

    def both():
        linear, hidden, target = made(bias=True)
        values = statistics(linear, hidden, target, transform=TRANSFORMS[transform])
        (values["logp"] * weights).sum().backward()
        return [*values.values(), hidden.grad, linear.weight.grad, linear.bias.grad]

    eager = both()
    compiled = {function: torch.compile(function, dynamic=True) for function in (head._fold, head._weigh)}
    monkeypatch.setattr(head, "_compiled", lambda function, kind: compiled[function])
    for ours, theirs in zip(both(), eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
