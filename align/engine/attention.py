"""Attention of packed rows: a token sees its prompt and the tokens before it in its own response, and no others.

Each backend is registered under a name with transformers' AttentionInterface, so no model is patched. A layer passes
queries, keys and values of the whole row, its own scale, soft-cap and sliding window, and the batch's `segments`.

    sdpa    torch's scaled_dot_product_attention for each segment; our own, in blocks, with a soft-cap. Any device
    flash   one varlen call of the flash-attn package; the keys of a prompt are repeated before each response. CUDA
    flex    torch's flex_attention with a block mask. CUDA

Left out: dropout (policies have none), attention biases and sinks (a model with these is fed padded).
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.utils import is_flash_attn_2_available

from align.engine.layout import Segments, to_device

_PREFIX = "align_"
_BLOCK = 64  # queries of a block, where no kernel of torch skips the keys that are not seen
_HIDDEN = -1e4  # in place of -inf, which times a weight of 0 is NaN; its exp is 0 beside any capped logit


class Variant(NamedTuple):
    """Attention of one layer: softmax(cap * tanh(q k^T * scale / cap)) v, over a window of keys."""

    scale: float
    window: int | None  # tokens, the query's own included; None: all before it
    cap: float | None  # None: softmax(q k^T * scale) v


#: (query [1, H, T, D], key and value [1, K, T, D], segments, variant) -> [1, T, H, D]
Backend = Callable[[Tensor, Tensor, Tensor, Segments, Variant], Tensor]


def backends(device: torch.device, wanted: str | None) -> list[str]:
    """List the attention implementations to try, the fastest first. `wanted` is `model.attn_implementation`."""
    if device.type != "cuda" or wanted == "sdpa":
        return [_PREFIX + "sdpa"]
    flash = wanted != "flex_attention" and torch.is_autocast_enabled("cuda") and is_flash_attn_2_available()
    return [_PREFIX + name for name in ["flash"] * flash + ["flex", "sdpa"]]


def _registered(backend: Backend) -> Callable[..., tuple[Tensor, None]]:
    """Adapt a backend to transformers' registry. Raises `ValueError` where a model needs more from attention."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        segments: Segments | None = None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        if segments is None:
            raise ValueError("its attention is not told how the batch's row is made up")
        options["attention_mask"] = attention_mask
        for name in ("attention_mask", "s_aux", "sinks", "position_bias", "head_mask"):
            if options.get(name) is not None:
                raise ValueError(f"its attention uses {name}")
        segments.windows[getattr(module, "layer_idx", len(segments.windows))] = sliding_window
        variant = Variant(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
        if torch.is_autocast_enabled(query.device.type):  # rotary embeddings return float32
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        return backend(query, key, value, segments, variant), None

    return attention


# sdpa --------------------------------------------------------------------------------------------------------------


def _sdpa(query: Tensor, key: Tensor, value: Tensor, segments: Segments, variant: Variant) -> Tensor:
    """Call torch once for each prompt with its first response, and once for every further response."""
    scale, window, cap = variant

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if cap is not None:
            with torch.autocast(q.device.type, enabled=False):  # autocast would mix types inside
                return _CappedAttention.apply(q, k, v, scale, cap, window)
        call = partial(functional.scaled_dot_product_attention, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        queries, keys = q.shape[2], k.shape[2]
        if queries == keys and (window is None or window >= keys):
            return call(q, k, v, is_causal=True)
        parts = []  # in blocks, since with a mask the kernel also computes the masked logits
        for rows, columns in _blocks(queries, keys, window):
            mask = _mask(segments, rows.stop - rows.start, columns.stop - columns.start, window, q)
            parts.append(call(q[:, :, rows], k[:, :, columns], v[:, :, columns], attn_mask=mask))
        return torch.cat(parts, 2)

    # `split`, not slices: the backward of a slice allocates a gradient of the whole row
    sizes = [prompt + sum(responses) for prompt, responses in segments.groups]
    out = []
    rows = (tensor.split(sizes, 2) for tensor in (query, key, value))
    for (prompt, (first, *others)), *row in zip(segments.groups, *rows, strict=True):
        parts = [tensor.split([prompt + first, *others], 2) for tensor in row]
        before = [parts[i][0][:, :, :prompt] for i in (1, 2)]
        out.append(attend(*(part[0] for part in parts)))
        for q, k, v in list(zip(*parts, strict=True))[1:]:
            if q.shape[2]:
                out.append(attend(q, torch.cat([before[0], k], 2), torch.cat([before[1], v], 2)))
    return torch.cat([part.transpose(1, 2) for part in out], 1)


def _mask(segments: Segments, queries: int, keys: int, window: int | None, like: Tensor) -> Tensor:
    """Return `[queries, keys]` to add to the logits of the last of the keys: a corner of a mask that segments share."""
    longest = max(prompt + max(responses) for prompt, responses in segments.groups)
    name = ("mask", window, like.dtype, like.device)
    if name not in segments.cached:
        unseen = _unseen(min(_BLOCK, longest), longest, 0, window, like.device)
        segments.cached[name] = torch.zeros_like(unseen, dtype=like.dtype).masked_fill_(unseen, -torch.inf)
    corner: Tensor = segments.cached[name][-queries:, -keys:]
    return corner.contiguous() if like.is_cuda else corner  # CUDA's kernels need it aligned


def _unseen(queries: int, keys: int, first_key: int, window: int | None, device: torch.device) -> Tensor:
    """Return `[queries, keys - first_key]`, True for a key after its query, one of the last keys, or before its window."""
    query = torch.arange(keys - queries, keys, device=device)
    distance = query[:, None] - torch.arange(first_key, keys, device=device)
    return (distance < 0) if window is None else (distance < 0) | (distance >= window)


class _CappedAttention(torch.autograd.Function):
    """softmax(cap * tanh(q k^T * scale / cap)) v of the last Tq of Tk tokens, causal, in blocks of queries.

    A block reads only the keys that it sees. Its capped logits are kept for the backward: half of one attention map,
    where autograd would keep four whole ones. q [1, K * G, Tq, D], k and v [1, K, Tk, D] -> [1, K * G, Tq, D]; in a
    block the queries that share a key head are together, [K, G * n, D].
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, cap: float, window: int | None) -> Tensor:
        out = torch.empty(1, q.shape[2], q.shape[1], q.shape[3], dtype=q.dtype, device=q.device).transpose(1, 2)
        kept = []
        for rows, columns in _blocks(q.shape[2], k.shape[2], window):
            block = (q[:, :, rows] * (scale / cap)).reshape(k.shape[1], -1, k.shape[3])
            logits = block @ k[0, :, columns].transpose(1, 2)
            logits.tanh_().mul_(cap)
            queries, keys = rows.stop - rows.start, columns.stop - columns.start
            square = window is None or window >= keys  # without a window only the last keys can come after a query
            first = keys - queries if square else 0
            unseen = _unseen(queries, keys, first, None if square else window, q.device)
            logits.view(k.shape[1], -1, queries, keys)[..., first:].masked_fill_(unseen, _HIDDEN)
            peak = logits.amax(-1, keepdim=True)
            weights = (logits - peak).exp_()  # [K, G * n, m], not divided by their sum yet
            total = weights.sum(-1, keepdim=True)
            out[:, :, rows] = (weights @ v[0, :, columns]).div_(total).view(1, q.shape[1], -1, q.shape[3])
            kept += [logits, peak + total.log()]
        ctx.save_for_backward(q, k, v, *kept)
        ctx.options = (scale, cap, window)
        return out

    @staticmethod
    def backward(ctx: Any, by_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        by_q, by_k, by_v = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        scale, cap, window = ctx.options
        blocks = _blocks(q.shape[2], k.shape[2], window)
        with torch.autocast(by_out.device.type, enabled=False):  # the caller's backward may be under it
            for (rows, columns), logits, normaliser in zip(blocks, kept[::2], kept[1::2], strict=True):
                weights = (logits - normaliser).exp_()
                block, by_block = (x[:, :, rows].reshape(k.shape[1], -1, k.shape[3]) for x in (q, by_out))
                by_v[0, :, columns].baddbmm_(weights.transpose(1, 2), by_block)
                by_logits = by_block @ v[0, :, columns].transpose(1, 2)
                by_logits.sub_(torch.linalg.vecdot(by_logits, weights)[..., None]).mul_(weights)
                by_logits.addcmul_(by_logits, (logits / cap).square_(), value=-1)  # 1 - tanh^2
                by_q[:, :, rows] = (by_logits @ k[0, :, columns]).view(1, q.shape[1], -1, q.shape[3])
                by_k[0, :, columns].baddbmm_(by_logits.transpose(1, 2), block)
            return by_q.mul_(scale), by_k.mul_(scale), by_v, None, None, None


def _blocks(queries: int, keys: int, window: int | None) -> list[tuple[slice, slice]]:
    """List (queries, the keys that they see) for each block."""
    before = keys - queries
    blocks = []
    for top in range(0, queries, _BLOCK):
        bottom = min(top + _BLOCK, queries)
        left = 0 if window is None else max(0, before + top - window + 1)
        blocks.append((slice(top, bottom), slice(left, before + bottom)))
    return blocks


# flash -------------------------------------------------------------------------------------------------------------


def _flash(query: Tensor, key: Tensor, value: Tensor, segments: Segments, variant: Variant) -> Tensor:
    """Call flash-attn once. A prompt and its first response are one sequence, every further response is another.

    The keys of the latter are the prompt's and its own: FlashAttention aligns its causal mask to the last key.
    """
    from flash_attn import flash_attn_varlen_func

    index, ends_q, ends_k, longest_q, longest_k = _varlen(segments, query.device)
    k, v = (x[0].transpose(0, 1)[index] for x in (key, value))  # [Tk, K, D]
    out: Tensor = flash_attn_varlen_func(
        query[0].transpose(0, 1),
        k,
        v,
        cu_seqlens_q=ends_q,
        cu_seqlens_k=ends_k,
        max_seqlen_q=longest_q,
        max_seqlen_k=longest_k,
        softmax_scale=variant.scale,
        causal=True,
        window_size=(-1, -1) if variant.window is None else (variant.window - 1, 0),
        softcap=variant.cap or 0.0,
    )
    return out[None]


def _varlen(segments: Segments, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Return (index in the row of every key, ends of query sequences, ends of key sequences, longest of both)."""
    if "varlen" not in segments.cached:
        index: list[int] = []
        queries, keys, at = [], [], 0
        for prompt, (first, *others) in segments.groups:
            start = at
            for repeated, fed in [(0, prompt + first), *((prompt, size) for size in others if size)]:
                index += [*range(start, start + repeated), *range(at, at + fed)]
                queries.append(fed)
                keys.append(repeated + fed)
                at += fed
        ends = (functional.pad(torch.tensor(sizes).cumsum(0), (1, 0)).int() for sizes in (queries, keys))
        on_device = (to_device(tensor, device) for tensor in (torch.tensor(index), *ends))
        segments.cached["varlen"] = (*on_device, max(queries), max(keys))
    return segments.cached["varlen"]


# flex --------------------------------------------------------------------------------------------------------------


def _flex(query: Tensor, key: Tensor, value: Tensor, segments: Segments, variant: Variant) -> Tensor:
    """Call flex_attention once, with a block mask that all layers of the same window share."""
    attend, make_mask = _flex_functions(query.device.type)
    name = ("flex", variant.window)
    if name not in segments.cached:
        sees, tokens = _sees(segments, variant.window, query.device), query.shape[2]
        segments.cached[name] = make_mask(sees, None, None, tokens, tokens, device=query.device)
    out = attend(
        query,
        key,
        value,
        score_mod=None if variant.cap is None else _soft_cap(variant.cap, query.device),
        block_mask=segments.cached[name],
        scale=variant.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous()


@cache
def _flex_functions(kind: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return flex_attention and create_block_mask, compiled on a GPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if kind != "cuda":
        return flex_attention, create_block_mask
    # A kernel is compiled for each window, cap and mode of autograd; beyond the limit flex runs uncompiled, silently.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    compiled = torch.compile(flex_attention, dynamic=True, fullgraph=True)
    return compiled, torch.compile(create_block_mask, dynamic=True)


@cache
def _soft_cap(cap: float, device: torch.device) -> Callable[..., Tensor]:
    """Return the one function for a cap: a new one at every call would be compiled at every call."""
    bound = torch.tensor(cap, device=device)  # the compiler cannot lower the symbol that a number would become

    def soft_cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return bound * torch.tanh(score / bound)

    return soft_cap


def _sees(segments: Segments, window: int | None, device: torch.device) -> Callable[..., Tensor]:
    """Return a function that tells whether the token at index `query` of the row sees the one at `key`."""
    if "places" not in segments.cached:  # the group, the response (0: the prompt) and the position of each token, [T]
        places: tuple[list[int], list[int], list[int]] = ([], [], [])
        for i, (prompt, responses) in enumerate(segments.groups):
            for number, (start, size) in enumerate([(0, prompt), *((prompt, size) for size in responses)]):
                for values, more in zip(places, ([i] * size, [number] * size, range(start, start + size)), strict=True):
                    values += more
        segments.cached["places"] = tuple(to_device(torch.tensor(values), device) for values in places)
    group, response, position = segments.cached["places"]
    reach = 2**30 if window is None else window

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        related = (response[key] == 0) | (response[key] == response[query])
        near = position[query] - position[key] < reach
        return (group[query] == group[key]) & related & (query >= key) & near

    return sees


for _name, _backend in {"sdpa": _sdpa, "flash": _flash, "flex": _flex}.items():
    AttentionInterface.register(_PREFIX + _name, _registered(_backend))
