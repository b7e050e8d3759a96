"""Batches worked by hand, which layout a model is fed in, and how much at once."""

from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny
from oracle import STATISTICS, UGLY, VOCABULARY, group, oracle, tiny, worst
from torch import Tensor

from align import engine
from align.choices import Layout
from align.config import EngineConfig
from align.engine.batching import CPU_TOKENS, fed_tokens
from align.launch.rank import Cluster
from align.say import UserError
from align.train.memory import fitting_tokens, micro_batch_that_fits

# Two pairs: prompts [2, 5] and [2, 6, 7]; the last token of a response is not fed, 40 is a response by itself.
GROUPS = [([2, 5], [[20, 21, 22], [30, 31]]), ([2, 6, 7], [[40], [50, 51, 52]])]

EXPECTED = {
    Layout.shared: {
        "input_ids": [[2, 5, 20, 21, 30, 2, 6, 7, 50, 51]],
        "position_ids": [[0, 1, 2, 3, 2, 0, 1, 2, 3, 4]],
        "attention_mask": None,
        "predicted_at": [1, 2, 3, 1, 4, 7, 7, 8, 9],
        "fed_tokens": 10,  # prompt + chosen + rejected - 2: 5 and 5
    },
    Layout.packed: {
        "input_ids": [[2, 5, 20, 21, 2, 5, 30, 2, 6, 7, 2, 6, 7, 50, 51]],
        "position_ids": [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 4]],
        "attention_mask": None,
        "predicted_at": [1, 2, 3, 5, 6, 9, 12, 13, 14],
        "fed_tokens": 15,
    },
    Layout.padded: {
        "input_ids": [[2, 5, 20, 21, 9], [2, 5, 30, 9, 9], [2, 6, 7, 9, 9], [2, 6, 7, 50, 51]],
        "position_ids": [[0, 1, 2, 3, 0], [0, 1, 2, 0, 0], [0, 1, 2, 0, 0], [0, 1, 2, 3, 4]],
        "attention_mask": [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
        "predicted_at": [1, 2, 3, 6, 7, 12, 17, 18, 19],
        "fed_tokens": 15,
    },
}
SEGMENTS = {
    Layout.shared: ((2, (2, 1)), (3, (0, 2))),
    Layout.packed: ((2, (2,)), (2, (1,)), (3, (0,)), (3, (2,))),
}


def values(batch):
    """Fields of a batch as plain values."""
    return {
        field.name: value.tolist() if isinstance(value, Tensor) else value
        for field in fields(batch)
        for value in [getattr(batch, field.name)]
    }


@pytest.mark.parametrize("layout", Layout, ids=lambda layout: layout.name)
def test_a_batch_worked_by_hand(layout):
    made = values(engine.collate(GROUPS, layout, pad_token_id=9))
    segments = made.pop("segments")
    assert (segments and segments.groups) == SEGMENTS.get(layout)
    assert made == {
        **EXPECTED[layout],
        "target": [20, 21, 22, 30, 31, 40, 50, 51, 52],
        "response": [0, 0, 0, 1, 1, 2, 3, 3, 3],
        "index": [0, 1, 2, 0, 1, 0, 0, 1, 2],
        "length": [3, 2, 1, 3],
        "longest": 3,
    }


@pytest.mark.parametrize("layout", Layout, ids=lambda layout: layout.name)
def test_a_batch_has_as_many_tokens_as_was_planned(layout):
    groups = [*UGLY, group(5, 4, 1, 9), group(6, 8)]
    lengths = [(len(prompt), *map(len, responses)) for prompt, responses in groups]
    batch = engine.collate(groups, layout, pad_token_id=0)
    assert batch.input_ids.numel() == fed_tokens(lengths, layout)
    assert (batch.fed_tokens == batch.input_ids.numel()) == (layout is not Layout.padded)


@pytest.mark.parametrize("layout", Layout, ids=lambda layout: layout.name)
def test_a_batch_moves_to_a_device_whole(layout):
    batch = engine.collate(GROUPS, layout, pad_token_id=9)
    moved = batch.to(torch.device("meta"))
    tensors = [name for name, value in vars(batch).items() if isinstance(value, Tensor)]
    assert len(tensors) == (8 if layout is Layout.padded else 7)
    assert all(getattr(moved, name).device.type == "meta" for name in tensors)
    assert (moved.segments, moved.longest, moved.fed_tokens) == (batch.segments, batch.longest, batch.fed_tokens)
    assert all(getattr(batch, name).device.type == "cpu" for name in tensors)


# Which layout a model is fed in -------------------------------------------------------------------------------------

SOME = [group(11, 9, 4), group(6, 1, 14)]  # shorter than a window of 16


def layer_without(model):
    """The last layer's attention is not told of a window that its mask has."""
    model.model.layers[0].self_attn.sliding_window = None


SETTLED = {
    # kind of model: (fields, change, layout, what the line says)
    "llama": ({}, None, Layout.shared, None),
    "mistral": ({"sliding_window": 16}, None, Layout.shared, None),
    "qwen2": ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, None, Layout.shared, None),
    "qwen3": ({}, None, Layout.shared, None),
    "gemma2": ({"sliding_window": 16}, None, Layout.shared, None),
    "gemma3_text": ({"sliding_window": 16}, None, Layout.shared, None),
    "gpt2": ({}, None, Layout.shared, None),  # learned absolute positions
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 32}, None, Layout.shared, None),
    "cohere": ({"logit_scale": 0.25}, None, Layout.shared, None),
    "granite": ({"logits_scaling": 4.0}, None, Layout.shared, None),
    "bloom": ({}, None, Layout.padded, "its attention does not take part in transformers' registry"),  # ALiBi
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2}, None, Layout.padded, ""),  # ALiBi, and needs a mask
    "mamba": ({"state_size": 4}, None, Layout.padded, "its attention does not take part in transformers' registry"),
    "gpt_oss": ({"num_local_experts": 2, "num_experts_per_tok": 1}, None, Layout.padded, "its attention uses s_aux"),
    "gemma2 whose attention ignores its window": (
        {"sliding_window": 16},
        layer_without,
        Layout.padded,
        "layer 0 has a window of 16 tokens that its attention is not told",
    ),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", SETTLED)
def test_a_model_is_fed_in_a_layout_that_gives_its_own_numbers(kind, autocast):
    more, change, layout, why = SETTLED[kind]
    model = make_tiny(kind.split()[0], vocab_size=VOCABULARY, **more)
    with torch.no_grad():
        for weight in model.parameters():  # flat logits would hide a mistake
            weight.mul_(5.0 if weight.ndim > 1 else 1.0)
    if change is not None:
        change(model)
    name = type(model).__name__
    with torch.no_grad():
        expected = oracle(model, SOME)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        chosen, _, said = engine.settle(model, SOME, Layout.shared)
    assert chosen is layout
    if why is None:
        assert said is None
    else:
        assert said.startswith(f"engine.layout=padded, not shared, for {name}: ") and said.endswith(why)
        assert "\n" not in said
    with torch.no_grad():  # it is attached in that layout
        made = engine.response_statistics(model, engine.collate(SOME, chosen, pad_token_id=0), STATISTICS[1:])
    assert worst({n: made[n] for n in STATISTICS}, expected) < 1e-5


@pytest.mark.parametrize("wanted", [Layout.packed, Layout.padded], ids=lambda layout: layout.name)
def test_a_layout_that_the_user_wants_is_taken_where_the_model_can_run_it(wanted):
    assert engine.settle(tiny("gemma2"), SOME, wanted) == (wanted, "align_sdpa", None)


def test_a_model_that_transforms_its_logits_unknown_to_us_is_refused():
    model = tiny("llama")

    class Scaled(type(model)):
        def forward(self, *args, **inputs):
            out = super().forward(*args, **inputs)
            out.logits = out.logits * 5
            return out

    model.__class__ = Scaled
    with pytest.raises(UserError, match=r"Scaled: .* differ from the model's own .* nats per token"):
        engine.settle(model, SOME, Layout.shared)


def test_a_trunk_is_found_where_a_model_calls_it_otherwise_than_it_says():
    """Llama-4's text model names its trunk `model`, and `language_model` as what it is named: that is itself."""
    model = make_tiny("llama4_text", vocab_size=VOCABULARY, num_local_experts=2, intermediate_size_mlp=64)
    assert engine.settle(model, SOME, Layout.padded) == (Layout.padded, "align_sdpa", None)


def test_a_head_that_is_not_linear_is_refused():
    model = tiny("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(UserError, match="LlamaForCausalLM: the output head is a Sequential, which align cannot score"):
        engine.attach(model, Layout.shared)


# How much at once ---------------------------------------------------------------------------------------------------

GIB = 2**30


@pytest.mark.parametrize(
    "peaks, free, tokens",
    [
        # 1 MiB a token and 1 GiB whatever the tokens: 8 GiB hold (8 - 1) * 1024.
        ([(1024, 2 * GIB), (3072, 4 * GIB)], 8 * GIB, 7168),
        ([(1024, 2 * GIB), (3072, 4 * GIB)], 3 * GIB, 2048),  # between the probes
        ([(1024, 2 * GIB), (3072, 4 * GIB)], 1 * GIB, 1024),  # the first probe did fit, whatever the line says
        ([(1024, 2 * GIB), (3072, 4 * GIB)], 999 * GIB, 65536),  # more would only need more memory
        ([(2000, 2 * GIB)], 8 * GIB, 2000),  # the second probe did not fit
        ([(2000, 2 * GIB), (2000, 2 * GIB)], 8 * GIB, 2000),  # one pair is as long as both probes
        ([(1024, 2 * GIB), (3072, 2 * GIB)], 8 * GIB, 65536),  # tokens that cost nothing
        ([(1024, 2 * GIB), (3072, 1 * GIB)], 8 * GIB, 65536),  # nor less
    ],
)
def test_the_tokens_that_fit_lie_on_a_line_through_the_probes(peaks, free, tokens):
    assert fitting_tokens(peaks, free) == tokens


def test_a_cpu_has_a_fixed_budget_and_a_typed_one_is_taken_as_it_is():
    for wanted, tokens in (("auto", CPU_TOKENS), (96, 96)):
        cfg = SimpleNamespace(engine=EngineConfig(tokens_per_micro_batch=wanted))
        assert micro_batch_that_fits(cfg, None, Cluster(device="cpu"), longest=10**6) == tokens
