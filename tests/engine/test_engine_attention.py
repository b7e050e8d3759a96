"""Attention of rows: each backend against a mask written out, and against the padded layout through whole models."""

import sys
from types import ModuleType

import pytest
import torch
from conftest import make_tiny
from oracle import STATISTICS, UGLY, VOCABULARY, gradients, mixed_signs, tiny, worst

from align import engine
from align.choices import Layout
from align.engine import attention
from align.engine.attention import AttentionInterface, backends
from align.engine.layout import Segments

ROWS = {
    "a pair": ((5, (4, 3)),),
    "fed tokens of no response": ((6, (0, 0)), (3, (0, 4)), (2, (5, 0))),
    "a prompt of one token": ((1, (3, 4)), (1, (0, 0))),
    "many responses": ((7, (2, 9, 0, 5)), (4, (11,)), (19, (1, 1))),
}
eager_flex = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def written_out(query, key, value, segments, scale, window, cap):
    """Attention in float64 from who may see whom, a pair of tokens at a time. [1, T, H, D]"""
    tokens = [
        (group, response, position)
        for group, (prompt, responses) in enumerate(segments.groups)
        for response, (start, size) in enumerate([(0, prompt), *((prompt, size) for size in responses)])
        for position in range(start, start + size)
    ]
    sees = torch.tensor(
        [
            [g == of and r in (0, response) and 0 <= position - p < (window or 10**6) for g, r, p in tokens]
            for of, response, position in tokens
        ]
    )
    repeats = query.shape[1] // key.shape[1]
    q, k, v = query.double(), *(x.double().repeat_interleave(repeats, 1) for x in (key, value))
    logits = q @ k.transpose(2, 3) * scale
    if cap is not None:
        logits = cap * (logits / cap).tanh()
    return (logits.masked_fill(~sees, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size, softcap
):
    """FlashAttention 2.7 as its README and docstring say, a sequence at a time.

    Sequences lie behind one another: [total, heads, D]. If there are fewer queries than keys, the causal mask is aligned
    to the bottom right: query i sees keys up to i + keys - queries. With a window, from i + keys - queries - left to
    i + keys - queries + right; -1 is no bound. soft-cap above 0 is on: scores are softcap * tanh(q k^T * scale / softcap).
    Query heads share key heads in consecutive groups.
    """
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and len(cu_seqlens_q) == len(cu_seqlens_k)
    assert len(q) == cu_seqlens_q[-1] and len(k) == len(v) == cu_seqlens_k[-1] and causal
    out = []
    for i in range(len(cu_seqlens_q) - 1):
        rows, columns = (slice(ends[i], ends[i + 1]) for ends in (cu_seqlens_q.tolist(), cu_seqlens_k.tolist()))
        queries, keys = rows.stop - rows.start, columns.stop - columns.start
        assert 0 < queries <= max_seqlen_q and 0 < keys <= max_seqlen_k
        last = torch.arange(queries)[:, None] + keys - queries
        seen = torch.arange(keys)[None] <= last
        left, right = window_size
        if left >= 0:
            seen &= torch.arange(keys)[None] >= last - left
        if right >= 0:
            seen &= torch.arange(keys)[None] <= last + right
        per_key_head = q.shape[1] // k.shape[1]
        for head in range(q.shape[1]):
            scores = q[rows, head] @ k[columns, head // per_key_head].T * softmax_scale
            if softcap > 0:
                scores = softcap * torch.tanh(scores / softcap)
            out.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[columns, head // per_key_head])
    heads = q.shape[1]
    return torch.cat([torch.stack(out[i : i + heads], 1) for i in range(0, len(out), heads)])


@pytest.fixture
def flash_attn(monkeypatch):
    """A stand-in for the package, which needs a GPU."""
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)


def inputs(groups, head_dim, dtype=torch.float32):
    """Queries of four heads, keys and values of two, peaked enough that a wrong mask shows."""
    generator = torch.Generator().manual_seed(3)
    tokens = sum(prompt + sum(responses) for prompt, responses in groups)
    shapes = ((1, 4, tokens, head_dim), (1, 2, tokens, head_dim), (1, 2, tokens, head_dim))
    return [2 * torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


@eager_flex
@pytest.mark.parametrize("window, cap", [(None, None), (3, None), (1, None), (None, 1.5), (3, 1.5)])
@pytest.mark.parametrize(
    "backend, row", [(name, row) for name in ("sdpa", "flash") for row in ROWS] + [("flex", "all")]
)
def test_a_token_sees_its_prompt_and_its_own_response(backend, row, window, cap, flash_attn, monkeypatch):
    groups = ROWS[row] if row in ROWS else tuple(group for groups in ROWS.values() for group in groups)
    monkeypatch.setattr(attention, "_BLOCK", 4)
    attend = {"sdpa": attention._sdpa, "flash": attention._flash, "flex": attention._flex}[backend]
    leaves = [x.requires_grad_(backend != "flex") for x in inputs(groups, head_dim=16)]
    out = attend(*leaves, Segments(groups), attention.Variant(0.3, window, cap))
    expected = written_out(*leaves, Segments(groups), 0.3, window, cap)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    if backend == "flex":  # torch has no backward of it on a CPU
        return
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4), dtype=torch.double)
    made, wanted = (torch.autograd.grad((x * weights).sum(), leaves) for x in (out, expected))
    for a, b in zip(made, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_the_gradient_of_capped_attention_equals_finite_differences(window, monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK", 4)
    q, k, v = (x.requires_grad_() for x in inputs(((0, (7,)),), head_dim=3, dtype=torch.double))
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention._CappedAttention.apply(q[:, :, 2:], k, v, 0.7, 1.5, window), (q, k, v)
    )


def test_blocks_of_capped_attention_hold_the_keys_that_they_see(monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK", 4)
    # Six queries behind three keys: the first four end at key 3 + 4, the last two at 3 + 6.
    assert attention._blocks(6, 9, None) == [(slice(0, 4), slice(0, 7)), (slice(4, 6), slice(0, 9))]
    # A window of two: query 0, at 3, sees 2 and 3; query 4, at 7, sees 6 and 7.
    assert attention._blocks(6, 9, 2) == [(slice(0, 4), slice(2, 7)), (slice(4, 6), slice(6, 9))]


def test_sequences_of_flash_attention_by_hand():
    """Prompt 0 1 2, first response 3, second 4 5; then prompt 6, no fed token of the first, second 7."""
    row = Segments(((3, (1, 2)), (1, (0, 1))))
    index, ends_q, ends_k, longest_q, longest_k = attention._varlen(row, torch.device("cpu"))
    assert index.tolist() == [0, 1, 2, 3, 0, 1, 2, 4, 5, 6, 6, 7]
    assert ends_q.tolist() == [0, 4, 6, 7, 8]
    assert ends_k.tolist() == [0, 4, 9, 10, 12]
    assert (longest_q, longest_k) == (4, 5)


def run(model, layout, gradient):
    with torch.set_grad_enabled(gradient):
        made = engine.response_statistics(model, engine.collate(UGLY, layout, pad_token_id=0), STATISTICS[1:])
    if gradient:
        (made["logp"] * mixed_signs(6)).sum().backward()
    return {name: value.detach() for name, value in made.items()}, gradients(model) if gradient else {}


def with_backend(model, name, layout):
    engine.attach(model, layout)
    model.config._attn_implementation = name
    return model


@pytest.mark.parametrize("layout", [Layout.shared, Layout.packed], ids=lambda layout: layout.name)
@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_a_model_on_flash_attention_equals_padded_rows(kind, layout, flash_attn):
    padded = tiny(kind)
    engine.attach(padded, Layout.padded)
    expected = run(padded, Layout.padded, gradient=True)
    made = run(with_backend(tiny(kind), "align_flash", layout), layout, gradient=True)
    assert max(worst(a, b) for a, b in zip(made, expected, strict=True)) < 1e-5


@eager_flex
def test_a_model_on_flex_attention_equals_padded_rows():
    kind = "gemma2"  # windows and soft-caps
    padded = tiny(kind)
    engine.attach(padded, Layout.padded)
    expected, _ = run(padded, Layout.padded, gradient=False)
    made, _ = run(with_backend(tiny(kind), "align_flex", Layout.shared), Layout.shared, gradient=False)
    assert worst(made, expected) < 1e-5


@pytest.mark.parametrize("autocast", [False, True])
def test_queries_keys_and_values_reach_a_backend_in_the_type_of_autocast(autocast, monkeypatch):
    """Rotary embeddings make float32 of queries and keys, which FlashAttention does not take."""
    seen = []

    def backend(query, key, value, *options):
        seen.append({x.dtype for x in (query, key, value)})
        return attention._sdpa(query, key, value, *options)

    name = "align_test"
    AttentionInterface.register(name, attention._registered(backend))
    model = with_backend(make_tiny(vocab_size=VOCABULARY), name, Layout.shared)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        run(model, Layout.shared, gradient=False)
    assert seen == 2 * [{torch.bfloat16 if autocast else torch.float32}]


@pytest.mark.parametrize(
    "device, wanted, flash, autocast, names",
    [
        ("cpu", None, True, True, ["sdpa"]),
        ("cpu", "flex_attention", True, True, ["sdpa"]),
        ("cuda", None, True, True, ["flash", "flex", "sdpa"]),
        ("cuda", None, True, False, ["flex", "sdpa"]),  # FlashAttention has no float32
        ("cuda", None, False, True, ["flex", "sdpa"]),
        ("cuda", "flex_attention", True, True, ["flex", "sdpa"]),
        ("cuda", "flash_attention_2", True, True, ["flash", "flex", "sdpa"]),
        ("cuda", "sdpa", True, True, ["sdpa"]),
    ],
)
def test_the_backends_are_what_the_device_has_and_the_user_chose(device, wanted, flash, autocast, names, monkeypatch):
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: flash)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: autocast)
    assert backends(torch.device(device), wanted) == [f"align_{name}" for name in names]
