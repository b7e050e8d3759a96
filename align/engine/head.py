"""The head without logits: log-probabilities of target tokens and other statistics, from one tile of logits at a time.

    z = cap * tanh((x W^T + b) * scale / cap)        logits of a token, float32; scale and cap if the model has them
    logp = z[target] - log sum_v exp z_v             entropy, log sum_v p_v^2 and log max_v p_v from the same pass

A tile is some tokens by some of the vocabulary. Sums over the vocabulary are carried from tile to tile, shifted by the
largest logit so far. The backward computes each tile again: four matrix products, where logits in memory would take
three. (Three would do if the forward knew the gradient of the loss by logp, but an objective needs both responses.)
Left out: gradients of anything but logp; a LoRA of the head under ZeRO-3, which gathers the weights of the module that
is called and not those inside it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

#: Logits of a tile, and its tokens at most: on a CPU they fit the caches (2 MB), on a GPU they keep it busy (512 MB).
_TILE = {"cpu": 2**19, "cuda": 2**27}
_TILE_TOKENS = {"cpu": 1024, "cuda": 4096}


@dataclass(frozen=True)
class Transform:
    """Function from the products of hidden states and head to logits: `cap * tanh(z * scale / cap)`."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> "Transform":
        """Read it from a text model's configuration. `engine.settle` detects models for which this is wrong."""
        divisor = getattr(config, "logits_scaling", None)  # Granite
        scale = 1 / divisor if divisor else getattr(config, "logit_scale", None)  # Cohere
        return cls(1.0 if scale is None else scale, getattr(config, "final_logit_softcapping", None))  # Gemma-2

    def apply(self, z: Tensor) -> Tensor:
        """Transform the products `z` in place."""
        if self.scale != 1.0:
            z.mul_(self.scale)
        return z if self.cap is None else z.div_(self.cap).tanh_().mul_(self.cap)

    def backward(self, gradient: Tensor, z: Tensor) -> Tensor:
        """Turn the gradient by the logits `z` into that by the products, in place; `z` is overwritten."""
        if self.cap is not None:
            gradient.addcmul_(gradient, z.div_(self.cap).square_(), value=-1)  # 1 - tanh^2
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


def attach_head(head: nn.Module) -> None:
    """Teach an output head to return statistics of target tokens when it is given a `target`, in place of logits.

    Its class becomes a subclass of itself, and it is still called as a module: the hooks of DDP, FSDP2 and ZeRO-3 fire.
    Raises `ValueError` for a head that is neither linear nor a LoRA of a linear one.
    """
    wrapped = getattr(head, "modules_to_save", None)  # if peft trains the whole head, its active copy is called
    for module in [head] if wrapped is None else wrapped.values():
        _linear_terms(module)
        if not isinstance(module, _Scores):
            cls = type(module)
            module.__class__ = type(cls.__name__, (_Scores, cls), {"__module__": cls.__module__})


class _Scores:
    """Mix-in that `attach_head` puts before an output head's class."""

    def forward(
        self, hidden: Tensor, *args: Any, target: Tensor | None = None, names: Sequence[str] = (), **options: Any
    ) -> Any:
        if target is None:
            return super().forward(hidden, *args, **options)  # type: ignore[misc]
        bias, terms = _linear_terms(self)
        flat = [tensor for x, weight in terms for tensor in (hidden if x is None else x(hidden), weight)]
        return _TokenStatistics.apply(target, tuple(names), options["transform"], bias, *flat)


def _linear_terms(head: Any) -> tuple[Tensor | None, list[tuple[Callable[[Tensor], Tensor] | None, Tensor]]]:
    """Write a head as `bias + sum_i x_i(hidden) W_i^T`: (bias, [(x_i, or None for hidden itself; W_i)])."""
    linear = getattr(head, "base_layer", head)
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"the output head is a {type(linear).__name__}")
    terms: list[tuple[Callable[[Tensor], Tensor] | None, Tensor]] = [(None, linear.weight)]
    if linear is head:
        return linear.bias, terms
    for name in [] if head.disable_adapters else head.active_adapters:
        if name in getattr(head, "lora_A", {}):
            if name in head.lora_variant or head.lora_B[name].bias is not None:
                raise ValueError("the output head has a LoRA that is not plain (use_dora, lora_bias, ...)")

            def low_rank(hidden: Tensor, name: str = name) -> Tensor:
                return head.lora_A[name](hidden) * head.scaling[name]

            terms.append((low_rank, head.lora_B[name].weight))
    return linear.bias, terms


class _TokenStatistics(torch.autograd.Function):
    """(target `[N]`, names, transform, bias `[V]` or None, x_1 `[N, H_1]`, W_1 `[V, H_1]`, ...) -> `[N]` for each name.

    Float32, in nats. Factors of products are in autocast's type, sums in float32; logits are not rounded.
    """

    @staticmethod
    def forward(
        ctx: Any, target: Tensor, names: tuple[str, ...], transform: Transform, bias: Tensor | None, *terms: Tensor
    ) -> tuple[Tensor, ...]:
        kind, device = target.device.type, target.device
        ctx.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else terms[0].dtype
        ctx.transform, ctx.logp_at = transform, names.index("logp")
        peak = torch.full((len(target),), -torch.inf, device=device)  # largest logit so far
        total, picked = torch.zeros_like(peak), torch.zeros_like(peak)  # sum exp(z - peak); logit of the target
        weighted = torch.zeros_like(peak) if "entropy" in names else None  # sum exp(z - peak) z
        square = torch.zeros_like(peak) if "log_sum_sq" in names else None  # sum exp(z - peak)^2
        carried = (peak, total, picked, weighted, square)
        fold = _compiled(_fold, kind)
        for rows, columns, z, _ in _tiles(target, ctx.dtype, transform, bias, terms):
            with torch.autocast(kind, enabled=False):  # autocast would round a vecdot's factors
                fold(z, target[rows] - columns.start, *(None if values is None else values[rows] for values in carried))
        log_normaliser = peak + total.log()
        found = {"logp": picked - log_normaliser, "log_max": peak - log_normaliser}
        if weighted is not None:
            found["entropy"] = log_normaliser - weighted / total
        if square is not None:
            found["log_sum_sq"] = square.log() - 2 * total.log()
        ctx.save_for_backward(target, log_normaliser, bias, *terms)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(found[name] for name in names if name != "logp"))
        return tuple(found[name] for name in names)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        target, log_normaliser, bias, *terms = ctx.saved_tensors
        by_logp = gradients[ctx.logp_at]
        if by_logp is None:
            return (None,) * len(ctx.needs_input_grad)
        parts = (bias, *terms)
        sums = [
            torch.zeros_like(part, dtype=torch.float32) if needed else None
            for part, needed in zip(parts, ctx.needs_input_grad[3:], strict=True)
        ]
        weigh = _compiled(_weigh, target.device.type)
        for rows, columns, z, factors in _tiles(target, ctx.dtype, ctx.transform, bias, terms):
            local = target[rows] - columns.start
            by_z = weigh(z, local, log_normaliser[rows], by_logp[rows].float(), ctx.transform)
            if sums[0] is not None:
                sums[0][columns] += by_z.sum(0)
            by_z = by_z.to(ctx.dtype)
            for (x, weight), by_x, by_weight in zip(factors, sums[1::2], sums[2::2], strict=True):
                if by_x is not None:
                    _add_product(by_x[rows], by_z, weight)
                if by_weight is not None:
                    _add_product(by_weight[columns], by_z.t(), x)
        cast = [None if g is None else g.to(part.dtype) for g, part in zip(sums, parts, strict=True)]
        return (None, None, None, *cast)


def _tiles(
    target: Tensor, dtype: torch.dtype, transform: Transform, bias: Tensor | None, terms: Sequence[Tensor]
) -> Iterator[tuple[slice, slice, Tensor, list[tuple[Tensor, Tensor]]]]:
    """Yield (token slice, vocabulary slice, logits in a buffer that the next one overwrites, factors) for each tile."""
    kind, tokens, vocabulary = target.device.type, len(target), terms[1].shape[0]
    height = min(tokens, _TILE_TOKENS[kind])
    width = min(vocabulary, max(1, _TILE[kind] // height))
    buffer = torch.empty(height * width, device=target.device, dtype=torch.float32)
    xs = [x.to(dtype) for x in terms[::2]]
    for left in range(0, vocabulary, width):
        columns = slice(left, min(left + width, vocabulary))
        weights = [weight[columns].to(dtype) for weight in terms[1::2]]
        for top in range(0, tokens, height):
            rows = slice(top, min(top + height, tokens))
            z = buffer[: (rows.stop - top) * (columns.stop - left)].view(rows.stop - top, columns.stop - left)
            factors = [(x[rows], weight) for x, weight in zip(xs, weights, strict=True)]
            for i, (x, weight) in enumerate(factors):
                _add_product(z, x, weight.t(), keep=i > 0)
            if bias is not None:
                z.add_(bias[columns])
            yield rows, columns, transform.apply(z), factors


def _fold(
    z: Tensor,
    local: Tensor,
    peak: Tensor,
    total: Tensor,
    picked: Tensor,
    weighted: Tensor | None,
    square: Tensor | None,
) -> None:
    """Add a tile of logits `z` to the carried sums, in place. `local` is the target's column, or outside the tile."""
    inside = (local >= 0) & (local < z.shape[1])
    found = z.gather(1, local.clamp(0, z.shape[1] - 1)[:, None])[:, 0]
    picked.copy_(torch.where(inside, found, picked))
    higher = torch.maximum(peak, z.amax(1))
    shrink = (peak - higher).exp_()
    peak.copy_(higher)
    exp = (z - higher[:, None]).exp_()
    total.mul_(shrink).add_(exp.sum(1))
    if weighted is not None:
        weighted.mul_(shrink).add_(torch.linalg.vecdot(exp, z))
    if square is not None:
        square.mul_(shrink.square_()).add_(torch.linalg.vecdot(exp, exp))


def _weigh(z: Tensor, local: Tensor, log_normaliser: Tensor, by_logp: Tensor, transform: Transform) -> Tensor:
    """Return the gradient by a tile's products: by_logp * (1[v = target] - p_v), transformed back; overwrites `z`."""
    p = torch.exp(z - log_normaliser[:, None]) if transform.cap else z.sub_(log_normaliser[:, None]).exp_()
    gradient = p.mul_(-by_logp[:, None])
    inside = (local >= 0) & (local < z.shape[1])
    gradient.scatter_add_(1, local.clamp(0, z.shape[1] - 1)[:, None], torch.where(inside, by_logp, 0.0)[:, None])
    return transform.backward(gradient, z)


def _add_product(into: Tensor, a: Tensor, b: Tensor, keep: bool = True) -> None:
    """Set `into = keep * into + a @ b`, summed and stored in float32 for any type of `a` and `b`."""
    if a.dtype == torch.float32:
        into.addmm_(a, b, beta=int(keep))
    elif a.is_cuda:
        torch.addmm(into, a, b, out_dtype=torch.float32, beta=int(keep), out=into)
    else:
        into.addmm_(a.float(), b.float(), beta=int(keep))


@cache
def _compiled(function: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """Compile on a GPU, which fuses passes over memory; on a CPU a tile stays in the caches."""
    return torch.compile(function, dynamic=True) if kind == "cuda" else function
