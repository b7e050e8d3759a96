"""The engine against an oracle that holds every logit: values, gradients, what is never in memory, what stays as it was."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from conftest import make_tiny
from oracle import KINDS, STATISTICS, UGLY, VOCABULARY, gradients, group, ids, mixed_signs, oracle, tiny, worst
from torch.nn.functional import logsigmoid
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from align import engine
from align.choices import Layout
from align.engine import attention, head
from align.engine.layout import Segments
from align.say import UserError

EXTRAS = STATISTICS[1:]
TOLERANCE = 1e-5  # relative; float32 leaves less than 1e-6

layouts = pytest.mark.parametrize("layout", Layout, ids=lambda layout: layout.name)
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def small(monkeypatch):
    """Tiles and blocks that a small model needs several of, the last ones short."""
    monkeypatch.setitem(head._TILE, "cpu", 13 * 40)  # 101 words: 40, 40 and 21
    monkeypatch.setitem(head._TILE_TOKENS, "cpu", 13)
    monkeypatch.setattr(attention, "_BLOCK", 5)


@pytest.fixture(scope="module")
def truth():
    """(statistics, gradients of the log-probabilities in a weighted sum) of UGLY by a kind of model; made once."""
    known = {}

    def of(kind):
        if kind not in known:
            model = tiny(kind)
            expected = oracle(model, UGLY)
            (expected["logp"] * mixed_signs(6)).sum().backward()
            known[kind] = {name: value.detach() for name, value in expected.items()}, gradients(model)
        return known[kind]

    return of


def attached(model, layout):
    engine.attach(model, layout)
    return model


def run(model, groups, layout):
    """(statistics, gradients) by the engine, in the same weighted sum as the oracle's."""
    made = engine.response_statistics(model, engine.collate(groups, layout, pad_token_id=0), EXTRAS)
    (made["logp"] * mixed_signs(len(made["logp"]))).sum().backward()
    return {name: value.detach() for name, value in made.items()}, gradients(model)


def assert_same(made, expected):
    """Every response's statistics and every weight's gradient, to 1e-5."""
    for name, value in expected[0].items():
        torch.testing.assert_close(made[0][name], value, rtol=TOLERANCE, atol=TOLERANCE)
    assert made[1].keys() == expected[1].keys() and expected[1]
    assert worst(made[1], expected[1]) < TOLERANCE


@layouts
@kinds
def test_statistics_and_gradients_equal_those_of_the_full_logits(kind, layout, truth):
    made = run(attached(tiny(kind), layout), UGLY, layout)
    assert made[0]["length"].tolist() == [1, 3, 140, 1, 1, 1]
    assert_same(made, truth(kind))


@layouts
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_statistics_and_gradients_are_the_same_in_small_tiles_and_blocks(kind, layout, truth, small):
    assert_same(run(attached(tiny(kind), layout), UGLY, layout), truth(kind))


@layouts
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_statistics_and_gradients_are_the_same_under_gradient_checkpointing(kind, layout, truth):
    model = attached(tiny(kind), layout).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    runs = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    assert_same(run(model, UGLY, layout), truth(kind))
    assert len(runs) == 2  # forward, and again in the backward


@kinds
def test_a_group_has_any_number_of_responses_and_a_prompt_may_be_one_token(kind):
    groups = [group(5, 4, 1, 9), group(1, 1), group(12, 6, 11), group(1, 2, 1, 3, 2)]
    expected = oracle(tiny(kind), groups)
    for layout in Layout:
        batch = engine.collate(groups, layout, pad_token_id=0)
        with torch.no_grad():
            made = engine.response_statistics(attached(tiny(kind), layout), batch, EXTRAS)
        assert worst({name: made[name] for name in STATISTICS}, expected) < TOLERANCE, layout


# Mistakes that the comparisons above would find: (kind of model, change of the attached model, change of the batch)


def seen_by_the_other(batch):
    """Of each group one response, the others' tokens behind the first's."""
    return replace(batch, segments=Segments(tuple((prompt, (sum(rs),)) for prompt, rs in batch.segments.groups)))


def blind_to_the_prompt(batch):
    """The second response as a group of its own: the first of its tokens taken for a prompt."""
    parts = [part for prompt, (first, second) in batch.segments.groups for part in ((prompt, (first,)), (second, (0,)))]
    return replace(batch, segments=Segments(tuple(part for part in parts if part[0])))


def layers(name, value):
    """Sets an attribute of every attention."""

    def change(model):
        for layer in model.model.layers:
            setattr(layer.self_attn, name, value)

    return change


MISTAKES = {
    "positions that go on": ("llama", None, lambda b: replace(b, position_ids=torch.arange(b.input_ids.numel())[None])),
    "a response sees the other": ("llama", None, seen_by_the_other),
    "a response does not see its prompt": ("llama", None, blind_to_the_prompt),
    "predicted one token late": ("llama", None, lambda b: replace(b, predicted_at=(b.predicted_at + 1).clamp(max=22))),
    "no window": ("mistral", lambda model: setattr(model.config, "sliding_window", None), None),
    "a window in every layer": ("gemma3_text", layers("sliding_window", 8), None),
    "a window one token longer": ("mistral", lambda model: setattr(model.config, "sliding_window", 9), None),
    "no cap in attention": ("gemma2", layers("attn_logit_softcapping", None), None),
    "no cap in the head": ("gemma2", lambda model: setattr(model.config, "final_logit_softcapping", None), None),
    "another scale in attention": ("gemma2", layers("scaling", 1.0), None),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_a_thousand_times_the_tolerance(name):
    kind, change_model, change_batch = MISTAKES[name]
    groups = [group(9, 4, 5), group(4, 3, 2)]  # 23 fed tokens
    expected = oracle(tiny(kind), groups)
    model = attached(tiny(kind), Layout.shared)
    if change_model is not None:
        change_model(model)
    with torch.no_grad():
        batch = engine.collate(groups, Layout.shared, pad_token_id=0)
        made = engine.response_statistics(model, change_batch(batch) if change_batch else batch, EXTRAS)
    assert worst({name: made[name] for name in STATISTICS}, expected) > 1000 * TOLERANCE


# LoRA ---------------------------------------------------------------------------------------------------------------

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "all linear, and the head": {"target_modules": [*ALL, "lm_head"]},
    "rank-stabilised, and the head": {"target_modules": [*ALL, "lm_head"], "use_rslora": True},
    "the head saved whole": {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
    "not the head": {"target_modules": "all-linear"},
}
OF_HEAD = dict(zip(ADAPTERS, (2, 2, 1, 0), strict=True))  # trained weights: two factors, or the whole
SHORT = [group(9, 4, 5), group(4, 1, 2), group(30, 17, 1)]


def with_adapter(kind, **fields):
    """A tiny model with an adapter that already does something."""
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny(kind), peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **fields))
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.add_(0.05 * torch.randn_like(weight))
    return model


@layouts
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_statistics_and_gradients_of_an_adapter_equal_those_of_the_full_logits(adapter, layout, small):
    model = with_adapter("llama", **ADAPTERS[adapter])
    other = copy.deepcopy(model)
    expected = oracle(other, SHORT)
    (expected["logp"] * mixed_signs(6)).sum().backward()
    trained = gradients(other)
    assert worst(expected, oracle(tiny("llama"), SHORT)) > 1000 * TOLERANCE  # leaving the adapter out would show
    assert len([name for name in trained if "lm_head" in name]) == OF_HEAD[adapter]
    made = run(attached(model, layout), SHORT, layout)
    assert_same(made, ({name: value.detach() for name, value in expected.items()}, trained))


def test_the_start_model_is_what_an_attached_one_gives_without_its_adapter():
    model = attached(with_adapter("llama", **ADAPTERS["all linear, and the head"]), Layout.shared)
    with torch.no_grad(), model.disable_adapter():
        made = engine.response_statistics(model, engine.collate(SHORT, Layout.shared, 0), EXTRAS)
    assert worst({name: made[name] for name in STATISTICS}, oracle(tiny("llama"), SHORT)) < TOLERANCE


@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*has no bias")
@pytest.mark.parametrize("field", [{"use_dora": True}, {"lora_bias": True}, {"alora_invocation_tokens": [5]}], ids=str)
def test_an_adapter_of_the_head_that_is_not_plain_is_refused(field):
    model = with_adapter("llama", target_modules=["lm_head"], **field)
    with pytest.raises(UserError, match="the output head"):
        engine.attach(model, Layout.shared)
        engine.response_statistics(model, engine.collate(UGLY, Layout.shared, 0), ())


# Layouts and plans --------------------------------------------------------------------------------------------------

PAIRS = [group(9, 12, 5), group(31, 2, 40), group(4, 1, 1), group(23, 17, 3), group(2, 30, 29), group(60, 8, 9)]
PLANS = {
    "one batch": [[0, 1, 2, 3, 4, 5]],
    "each alone": [[5], [2], [0], [4], [1], [3]],
    "uneven": [[1, 4], [0, 2, 3], [5]],
}


def loss_and_gradient(kind, layout, plan):
    """The mean of a loss over pairs, -log s(0.1 * margin), by micro-batches; its gradient, all weights in a row."""
    model = attached(tiny(kind), layout)
    total = 0.0
    for batch in plan:
        made = engine.response_statistics(model, engine.collate([PAIRS[i] for i in batch], layout, 0), EXTRAS)
        chosen, rejected = made["logp"].view(-1, 2).unbind(1)
        loss = -logsigmoid(0.1 * (chosen - rejected)).sum() / len(PAIRS)
        loss.backward()
        total += loss.item()
    return total, torch.cat([gradient.flatten() for gradient in gradients(model).values()])


@kinds
def test_layouts_and_plans_change_neither_loss_nor_gradient_beyond_1e_6(kind):
    loss, gradient = loss_and_gradient(kind, Layout.shared, PLANS["one batch"])
    assert loss > 0.1 and gradient.norm() > 0.1  # there is something to compare
    others = [(Layout.shared, "each alone"), (Layout.shared, "uneven"), (Layout.packed, "one batch")]
    for layout, name in [*others, (Layout.padded, "one batch"), (Layout.padded, "uneven")]:
        other_loss, other = loss_and_gradient(kind, layout, PLANS[name])
        assert other_loss == pytest.approx(loss, rel=1e-6), (layout, name)
        assert (other - gradient).norm() <= 1e-6 * gradient.norm(), (layout, name)


def test_what_pads_a_row_changes_nothing():
    model = attached(tiny("gemma2"), Layout.padded)
    with torch.no_grad():
        made, other = (
            engine.response_statistics(model, engine.collate(SHORT, Layout.padded, pad), EXTRAS) for pad in (0, 99)
        )
    assert all(torch.equal(made[name], other[name]) for name in made)


# Precision ----------------------------------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_a_batch_may_be_used_again_in_another_precision(kind, layout):
    model, batch = attached(tiny(kind), layout), engine.collate(SHORT, layout, pad_token_id=0)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            rounded = engine.response_statistics(model, batch, EXTRAS)
        exact = engine.response_statistics(model, batch, EXTRAS)
    expected = oracle(tiny(kind), SHORT)
    assert worst({name: exact[name] for name in STATISTICS}, expected) < TOLERANCE < worst(rounded, exact) < 0.05


@kinds
def test_under_bf16_autocast_the_engine_is_as_near_to_float32_as_the_models_own_logits(kind):
    """Both round the trunk to 8 bits; the oracle rounds its logits too, so the engine has no excuse to be farther.

    In nats per token, the root of the mean square over 21 responses; half as much again for other orders of sums. bf16
    moves a logit of up to 4 by at most 1/128, which in the mean over ten tokens leaves about 0.0015 between the two.
    """
    groups = [group(11 + i, 9, 14, 7) for i in range(7)]
    length = torch.tensor([float(len(response)) for _, responses in groups for response in responses])

    def alone(a, b):
        return ((a - b) / length).square().mean().sqrt().item()

    with torch.no_grad():
        exact = oracle(tiny(kind), groups)
        with torch.autocast("cpu", torch.bfloat16):
            theirs = oracle(tiny(kind), groups)
        for layout in Layout:
            batch = engine.collate(groups, layout, pad_token_id=0)
            with torch.autocast("cpu", torch.bfloat16):
                ours = engine.response_statistics(attached(tiny(kind), layout), batch, EXTRAS)
            for name in STATISTICS:
                assert ours[name].dtype == torch.float32
                assert 0 < alone(ours[name], exact[name]) <= 1.5 * alone(theirs[name], exact[name]), (layout, name)
                assert alone(ours[name], theirs[name]) <= 0.005, (layout, name)


@layouts
@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_under_bf16_autocast_gradients_are_as_near_to_float32_and_checkpointing_does_not_change_them(kind, layout):
    def whole(run):
        model = tiny(kind)
        run(model)
        return torch.cat([gradient.flatten() for gradient in gradients(model).values()])

    def by_logits(model, autocast=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = (oracle(model, SHORT)["logp"] * mixed_signs(6)).sum()
        loss.backward()

    def by_engine(model, checkpointing=False):
        attached(model, layout).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with torch.autocast("cpu", torch.bfloat16):
            made = engine.response_statistics(model, engine.collate(SHORT, layout, pad_token_id=0), EXTRAS)
        (made["logp"] * mixed_signs(6)).sum().backward()

    exact = whole(lambda model: by_logits(model, autocast=False))
    ours = whole(by_engine)
    assert 0 < (ours - exact).norm() <= 1.25 * (whole(by_logits) - exact).norm() < 0.1 * exact.norm()
    assert torch.equal(whole(lambda model: by_engine(model, checkpointing=True)), ours)


# Memory and gradients -----------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@layouts
def test_no_tensor_of_all_logits_exists_in_a_training_step(layout, monkeypatch):
    vocabulary, tile = 20_000, 320_000
    monkeypatch.setitem(head._TILE, "cpu", tile)
    model = attached(make_tiny(vocab_size=vocabulary), layout)
    batch = engine.collate([([2, 5], [[7] * 60, [8] * 50]) for _ in range(4)], layout, pad_token_id=0)
    with Largest() as seen:
        engine.response_statistics(model, batch, EXTRAS)["logp"].sum().backward()
    embedding = vocabulary * 32  # [V, H], whose gradient the optimizer is given
    assert tile <= seen.elements <= embedding
    assert seen.elements < len(batch.target) * vocabulary / 10  # [N, V], 440 tokens, would be thirteen times as much


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_attention_with_a_window_never_holds_all_its_weights(kind, monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK", 16)
    model = attached(make_tiny(kind, vocab_size=VOCABULARY, sliding_window=32), Layout.shared)
    batch = engine.collate([group(300, 100, 100)], Layout.shared, pad_token_id=0)
    with Largest() as seen:
        engine.response_statistics(model, batch, ())["logp"].sum().backward()
    # The MLP of 498 tokens is 64 wide. A block's weights are 4 heads of 16 queries by at most 399 keys, which is less;
    # those of all 399 queries would be 25 times as many.
    assert seen.elements <= 498 * 64 < 4 * 399 * 399 / 10


@layouts
def test_only_logp_carries_a_gradient(layout):
    made = engine.response_statistics(
        attached(tiny("gemma2"), layout), engine.collate(UGLY, layout, pad_token_id=0), EXTRAS
    )
    assert made.keys() == {*STATISTICS, "length"}
    assert [name for name, values in made.items() if values.requires_grad] == ["logp"]


def test_statistics_that_no_one_asked_for_are_not_computed():
    made = engine.response_statistics(
        attached(tiny("llama"), Layout.shared), engine.collate(UGLY, Layout.shared, pad_token_id=0), ()
    )
    assert made.keys() == {"logp", "length"}


# What stays as it was -----------------------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gemma3_text"])
def test_an_attached_model_generates_the_same_tokens_and_gives_the_same_logits(kind, layout):
    """Greedy, two prompts of 4 and 19 tokens padded on the left, past the windows of 8."""
    prompts = torch.tensor([[0] * 15 + ids(4, 1), ids(19, 2)])
    mask = torch.tensor([[0] * 15 + [1] * 4, [1] * 19])

    def use(model):
        made = model.generate(prompts, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
        with torch.no_grad():
            return made, model(input_ids=prompts, attention_mask=mask).logits

    own_tokens, own_logits = use(tiny(kind))
    model = attached(tiny(kind), layout)
    with torch.no_grad():  # a batch between leaves nothing behind
        engine.response_statistics(model, engine.collate(UGLY, layout, pad_token_id=0), EXTRAS)
    tokens, logits = use(model)
    assert torch.equal(tokens, own_tokens) and torch.equal(logits, own_logits)


@layouts
def test_an_attached_model_is_saved_under_its_own_name_and_says_nothing_of_us(layout, tmp_path):
    model = attached(tiny("gemma2"), layout)
    model.save_pretrained(tmp_path / "attached")
    tiny("gemma2").save_pretrained(tmp_path / "own")
    ours, own = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("attached", "own"))
    assert ours == own
    assert ours["architectures"] == ["Gemma2ForCausalLM"] and "align" not in json.dumps(ours)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "attached")
    assert not isinstance(again, type(model))
    assert worst(dict(again.named_parameters()), dict(model.named_parameters())) == 0


@layouts
def test_attaching_twice_changes_nothing(layout):
    model = attached(tiny("gemma2"), layout)
    before = type(model), type(model.lm_head), model.config._attn_implementation
    attached(model, layout)
    assert (type(model), type(model.lm_head), model.config._attn_implementation) == before
    assert type(model).__mro__.count(before[0]) == 1
    with torch.no_grad():  # the model's own attention is still known
        logits = [m(input_ids=torch.tensor([ids(30, 3)])).logits for m in (model, tiny("gemma2"))]
    assert torch.equal(*logits)


def test_an_attached_model_takes_another_layout():
    model, batches = tiny("gemma2"), [engine.collate(SHORT, layout, pad_token_id=0) for layout in Layout]
    made = []
    for layout, batch in zip(Layout, batches, strict=True):
        with torch.no_grad():
            made.append(engine.response_statistics(attached(model, layout), batch, EXTRAS))
    for other in made[1:]:
        assert worst(other, made[0]) < TOLERANCE


def test_a_copy_of_an_attached_model_is_attached_and_on_its_own():
    model = attached(tiny("llama"), Layout.shared)
    copied = copy.deepcopy(model)
    batch = engine.collate(SHORT, Layout.shared, pad_token_id=0)
    with torch.no_grad():
        before = engine.response_statistics(copied, batch, EXTRAS)
        model.lm_head.weight.zero_()
        model.config._attn_implementation = "none"
        assert worst(engine.response_statistics(copied, batch, EXTRAS), before) == 0
    assert worst({name: before[name] for name in STATISTICS}, oracle(tiny("llama"), SHORT)) < TOLERANCE
