"""Statistics of responses under a policy, without ever holding the logits of a batch.

The trunk runs over padded rows; only the positions that predict a response token reach the head, in chunks whose
backward recomputes their logits. Called as the wrapped model's own forward, with the head called as a module, so
that DDP and sharding hooks fire. Objectives, data formats and what the numbers are for are unknown here.
Left out in this layout: packing and shared prompts.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from align.config import UserError

#: Statistics that this file can compute for an objective (`objectives.base.STATISTICS` has them all).
COMPUTED = frozenset({"logp", "length", "log_sum_sq", "log_max"})

_CHUNK_ELEMENTS = 2**23  # logits held at once: 32 MB in float32
_TOLERANCE = 1e-3  # nats per token, float32, between this file and the model's own logits

Batch = dict[str, Tensor]


def collate_pairs(pairs: Sequence[Mapping[str, Any]], pad_token_id: int) -> Batch:
    """Pairs as one micro-batch of 2b rows: the chosen responses, then the rejected ones."""
    rows = [(p["prompt_ids"], p[f"{side}_ids"]) for side in ("chosen", "rejected") for p in pairs]
    return collate(rows, pad_token_id)


def collate(rows: Sequence[tuple[list[int], list[int]]], pad_token_id: int) -> Batch:
    """(prompt ids, response ids) of R responses as one batch, padded on the right.

    Returns:
        `input_ids`, `attention_mask` `[R, L]`; and for each of the N response tokens: `predicted_at`, the position
        in the flattened `[R * L]` that predicts it; `target`, its id; `row` and `column`, its place in `[R, |y|]`.
        `length` `[R]`: response tokens.
    """
    width = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    predicted_at: list[int] = []
    target: list[int] = []
    row: list[int] = []
    column: list[int] = []
    for i, (prompt, response) in enumerate(rows):
        input_ids[i, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
        attention_mask[i, : len(prompt) + len(response)] = 1
        first = i * width + len(prompt) - 1
        predicted_at += range(first, first + len(response))
        target += response
        row += [i] * len(response)
        column += range(len(response))
    index = {"predicted_at": predicted_at, "target": target, "row": row, "column": column}
    lengths = torch.tensor([len(response) for _, response in rows])
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "length": lengths,
        **{name: torch.tensor(values) for name, values in index.items()},
    }


def attach(model: nn.Module) -> None:
    """Teach a causal language model, bare or inside peft, to return statistics in place of logits.

    Its class becomes a subclass of itself: weights, names, saving and generation stay as they are.
    """
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not isinstance(inner, _Scoring):
        cls = type(inner)
        inner.__class__ = type(cls.__name__, (_Scoring, cls), {"__module__": cls.__module__})


def response_statistics(model: nn.Module, batch: Batch, statistics: Iterable[str]) -> dict[str, Tensor]:
    """Statistics of the R responses of a batch.

    Args:
        model: an `attach`ed policy, wrapped or not.
        batch: from `collate`, on the model's device.
        statistics: any of `log_sum_sq`, `log_max`, `entropy`; `logp` and `length` always come.

    Returns:
        `[R]` float32 tensors: sums over response tokens, in nats. Only `logp` carries a gradient.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "length"}
    sums = model(**inputs, statistics=sorted(statistics))
    return {**sums, "length": batch["length"].float()}


class _Scoring:
    """Mixed in front of a causal language model's class by `attach`."""

    def forward(self, *args: Any, statistics: Sequence[str] | None = None, **inputs: Any) -> Any:
        if statistics is None:
            return super().forward(*args, **inputs)  # type: ignore[misc]
        assert isinstance(self, PreTrainedModel)
        scored = {name: inputs.pop(name) for name in ("predicted_at", "target", "row", "column")}
        hidden = self.base_model(**inputs, use_cache=False).last_hidden_state  # [R, L, H]
        hidden = hidden.flatten(0, 1)[scored["predicted_at"]]  # [N, H]
        names = ("logp", *statistics)
        per_token = self._score(hidden, scored["target"], names)  # of each name [N]
        responses, longest = inputs["input_ids"].shape
        sums = {}
        for name, values in zip(names, per_token, strict=True):
            table = values.new_zeros(responses, longest)  # summed by row: index_add is not deterministic on CUDA
            sums[name] = table.index_put((scored["row"], scored["column"]), values).sum(1)
        return sums

    def _score(self, hidden: Tensor, target: Tensor, names: tuple[str, ...]) -> list[Tensor]:
        """The statistics of each token, `[N]` per name, a chunk of positions at a time."""
        assert isinstance(self, PreTrainedModel)
        rows = max(1, _CHUNK_ELEMENTS // self.get_output_embeddings().weight.shape[0])
        chunks = []
        for at in range(0, len(hidden), rows):
            args = (hidden[at : at + rows], target[at : at + rows], names)
            chunks.append(
                checkpoint(self._score_chunk, *args, use_reentrant=False)
                if torch.is_grad_enabled()
                else self._score_chunk(*args)
            )
        return [torch.cat(parts) for parts in zip(*chunks, strict=True)]

    def _score_chunk(self, hidden: Tensor, target: Tensor, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        logits = self._logits(hidden)  # [n, V] float32
        log_normaliser = logits.logsumexp(-1)
        logp = logits.gather(-1, target[:, None]).squeeze(-1) - log_normaliser
        made = {"logp": logp}
        with torch.no_grad():
            logits, log_normaliser = logits.detach(), log_normaliser.detach()
            if "log_sum_sq" in names:
                made["log_sum_sq"] = (2 * logits).logsumexp(-1) - 2 * log_normaliser
            if "log_max" in names:
                made["log_max"] = logits.amax(-1) - log_normaliser
            if "entropy" in names:
                made["entropy"] = log_normaliser - ((logits - log_normaliser[:, None]).exp() * logits).sum(-1)
        return tuple(made[name] for name in names)

    def _logits(self, hidden: Tensor) -> Tensor:
        """The head in float32 (rounding logits to bf16 costs 0.05 nats on 300 tokens), with what models do behind it."""
        assert isinstance(self, PreTrainedModel)
        config = self.config.get_text_config()
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.get_output_embeddings()(hidden.float())
        if scale := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if scaling := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / scaling
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma-2
            logits = torch.tanh(logits / cap) * cap
        return logits


@torch.no_grad()
def check_against_logits(model: PreTrainedModel, batch: Batch) -> None:
    """Compare `logp` with the model's own logits, in float32. `batch`: a few tokens suffice.

    Raises:
        UserError: they differ, so this model does something behind its head that align does not know.
    """
    was_training = model.training
    model.eval()
    ours = response_statistics(model, batch, ())
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    logp = logits.float().log_softmax(-1).flatten(0, 1)[batch["predicted_at"], batch["target"]]
    theirs = torch.zeros_like(ours["logp"]).index_add(0, batch["row"], logp)
    model.train(was_training)
    worst = ((ours["logp"] - theirs).abs() / ours["length"]).max().item()
    if not worst < _TOLERANCE:
        raise UserError(
            f"{type(model).__name__}: the log-probabilities differ from the model's own by {worst:.3g} nats per token; "
            "it transforms its logits in a way that align does not know, please open an issue"
        )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradient and evaluation mode, put back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
