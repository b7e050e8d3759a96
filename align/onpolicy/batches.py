"""Batches of token ids for a forward: which rows go together, and their padding. Shared by samplers and scorers."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def batches(lengths: Sequence[int], budget: int, rows: Sequence[int], equal: bool = False) -> Iterator[list[int]]:
    """Yield the indices of texts that go through a model together, the longest first; at least one.

    Together they have at most `budget` tokens, padding included, where a text takes so many `rows`; one of none is left
    out. With `equal` only texts of one length go together, for models that padding would confuse.
    """
    some: list[int] = []
    for i in sorted((i for i in range(len(lengths)) if rows[i]), key=lambda i: -lengths[i]):
        full = sum(rows[j] for j in [*some, i]) * lengths[some[0]] > budget if some else False
        if full or (some and equal and lengths[i] != lengths[some[0]]):
            yield some
            some = []
        some.append(i)
    if some:
        yield some


def pad(rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device, side: str) -> tuple[Tensor, Tensor]:
    """Return `[b, width]` token ids, padded on this side, and a mask with 0 for padding."""
    texts = [torch.tensor(row) for row in rows]
    ids = pad_sequence(texts, batch_first=True, padding_value=pad_token_id, padding_side=side)
    mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True, padding_side=side)
    return ids.to(device), mask.to(device)
