"""The forward of a policy: a batch of groups in, statistics of each response out. Logits exist only one tile at a time.

The trunk runs over the batch's row; only the positions that predict a response token reach the head (head.py). It is
called as the wrapped model's own forward, and the head as a module, so that the hooks of DDP, FSDP2 and ZeRO-3 fire.
Nothing here depends on objectives or data formats.
"""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.choices import Layout
from align.engine.attention import backends
from align.engine.head import Transform, attach_head
from align.engine.layout import Batch, Group, collate
from align.say import UserError

#: Statistics that the engine can compute for an objective (`objectives.base.STATISTICS` has them all).
COMPUTED = frozenset({"logp", "length", "log_sum_sq", "log_max"})
#: Nats per token between the engine and the model's own logits: rounding stays below this, a mistake does not.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def attach(model: nn.Module, layout: Layout, attention: str | None = None) -> None:
    """Teach a causal language model, bare or inside peft, to return statistics in place of logits.

    Its class becomes a subclass of itself: weights, names, saving and generation stay as they are. Raises `UserError`
    where the output head is not linear.

    Args:
        layout: layout of later batches. For rows the model's attention is replaced with ours.
        attention: one of `attention.backends`; None: the first one for the model's device.
    """
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    config = inner.config.get_text_config()
    try:
        attach_head(inner.get_output_embeddings())
    except ValueError as error:
        raise UserError(f"{type(inner).__name__}: {error}, which align cannot score") from error
    if not isinstance(inner, _Scoring):
        inner.__class__ = _scoring_class(type(inner))
        inner._own_attention = config._attn_implementation
    ours = attention or backends(inner.device, None)[0]
    config._attn_implementation = inner._own_attention if layout is Layout.padded else ours


def settle(
    model: nn.Module, groups: Sequence[Group], layout: Layout, attention: str | None = None
) -> tuple[Layout, str, str | None]:
    """`attach` in this layout, or in the next one that the model can run, by comparison with the model's own logits.

    The comparison is in float32 first, where rounding cannot hide a mistake, and then under the caller's autocast with
    the attention that training will use. Raises `UserError` if even padded rows differ from the model's own numbers: it
    changes its logits in a way unknown here.

    Args:
        groups: real data; the beginnings of two responses to the last tokens of two prompts are enough.
        attention: `model.attn_implementation`, if the user chose one.

    Returns:
        The layout, the attention, and one line with the reason if the layout differs from the requested one.
    """
    some = [(prompt[-32:], [responses[0][:32], responses[-1][:24]]) for prompt, responses in groups[:2]]
    why, device = None, next(model.parameters()).device
    for candidate in list(Layout)[list(Layout).index(layout) :]:
        with torch.autocast(device.type, enabled=False):
            fault = _fault(model, some, candidate, backends(device, "sdpa")[0])
        for name in backends(device, attention) if fault is None else []:
            if (fault := _fault(model, some, candidate, name)) is None:
                why = why and f"engine.layout={candidate.name}, not {layout.name}, for {type(model).__name__}: {why}"
                return candidate, name, why
        why = why or fault
    raise UserError(f"{type(model).__name__}: {fault}; align cannot score this model, please open an issue")


def response_statistics(model: nn.Module, batch: Batch, statistics: Iterable[str]) -> dict[str, Tensor]:
    """Compute statistics of the R responses of a batch.

    Args:
        model: an `attach`ed policy, wrapped or not.
        batch: from `collate`, on the model's device, in the layout of `attach`.
        statistics: any of `log_sum_sq`, `log_max`, `entropy`; `logp` and `length` are always computed.

    Returns:
        `[R]` float32 tensors: sums over response tokens, in nats. Only `logp` carries a gradient.
    """
    sums: dict[str, Tensor] = model(batch=batch, statistics=sorted(statistics))
    return {**sums, "length": batch.length.float()}


def _scoring_class(cls: type) -> type:
    """Derive a class that scores from a model's class. `forward` keeps its signature, which `generate` reads."""

    @functools.wraps(cls.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **inputs: Any) -> Any:
        return _Scoring.forward(self, *args, **inputs)

    return type(cls.__name__, (_Scoring, cls), {"__module__": cls.__module__, "forward": forward})


class _Scoring:
    """Mix-in that `attach` puts before a causal language model's class."""

    _own_attention: str

    def forward(self, *args: Any, batch: Batch | None = None, statistics: Sequence[str] = (), **inputs: Any) -> Any:
        assert isinstance(self, PreTrainedModel)
        config = self.config.get_text_config()
        if batch is None:  # generation and plain logits, by the model's own attention
            ours, config._attn_implementation = config._attn_implementation, self._own_attention
            try:
                return super().forward(*args, **inputs)  # type: ignore[misc]
            finally:
                config._attn_implementation = ours
        row = {} if batch.segments is None else {"segments": batch.segments}
        trunk = self.model if self.base_model is self else self.base_model  # Llama-4 has another prefix
        hidden = trunk(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
            **row,
        ).last_hidden_state
        hidden = hidden.flatten(0, 1)[batch.predicted_at]  # [N, H]
        names = ("logp", *statistics)
        head, transform = self.get_output_embeddings(), Transform.of(config)
        per_token = head(hidden, target=batch.target, names=names, transform=transform)
        sums = {}
        for name, values in zip(names, per_token, strict=True):  # summed by row, as index_add is not deterministic
            table = values.new_zeros(len(batch.length), batch.longest)
            sums[name] = table.index_put((batch.response, batch.index), values).sum(1)
        return sums


def _fault(model: nn.Module, groups: Sequence[Group], layout: Layout, attention: str) -> str | None:
    """`attach` in a layout, and explain why the model cannot run so; None if its numbers equal the model's own."""
    attach(model, layout, attention)
    device = next(model.parameters()).device
    batch, padded = (collate(groups, kind, pad_token_id=0).to(device) for kind in (layout, Layout.padded))
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    with evaluating(model):
        try:
            ours = response_statistics(model, batch, ())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model's code may raise anything when its input is not as it expects
            return " ".join(str(error).split())[:200]
        logits = model(input_ids=padded.input_ids, attention_mask=padded.attention_mask, use_cache=False).logits
    if batch.segments is not None and (reason := _wrong_windows(batch.segments.windows, config)):
        return reason
    logp = logits.float().log_softmax(-1).flatten(0, 1)[padded.predicted_at, padded.target]
    theirs = torch.zeros_like(ours["logp"]).index_add(0, padded.response, logp)
    worst = ((ours["logp"] - theirs).abs() / ours["length"]).max().item()
    autocast = torch.is_autocast_enabled(device.type)  # under it some models still return float32 logits
    dtype = torch.get_autocast_dtype(device.type) if autocast else logits.dtype
    if worst < _TOLERANCE[dtype]:
        return None
    return f"the log-probabilities differ from the model's own by {worst:.3g} nats per token"


def _wrong_windows(seen: dict[int, int | None], config: Any) -> str | None:
    """Explain which layer asked for a wrong sliding window; a few tokens do not reach the end of one, so none shows."""
    if not seen:
        return "its attention does not take part in transformers' registry"
    kinds = getattr(config, "layer_types", None)
    known = {"full_attention": None, "sliding_attention": getattr(config, "sliding_window", None)}
    for layer, asked in seen.items():
        kind = kinds[layer] if kinds else "sliding_attention"
        if kind not in known:
            return f"its layers are {kind}"
        if asked != known[kind]:
            return f"layer {layer} has a window of {known[kind]} tokens that its attention is not told"
    layers = getattr(config, "num_hidden_layers", len(seen))
    return None if len(seen) == layers else f"{layers - len(seen)} of its layers are no attention"


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode without gradients, and back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
