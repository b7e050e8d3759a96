"""Layouts of a batch of groups. A group is a prompt and its responses; a pair is a group with two of them.

    shared   one row: for each group the prompt, then its responses, each as if it followed the prompt alone
    packed   one row: for each response its prompt and itself, so a prompt is fed once per response
    padded   a row per response, padded on the right; for models that the other two cannot serve

Positions in a row start again with every prompt, and in `shared` every response continues those of its prompt. The last
token of a response predicts nothing and is not fed. Left out: the number of groups in a batch (batching.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from align.choices import Layout

Group = tuple[list[int], list[list[int]]]  # token ids of a prompt and of its responses


@dataclass(frozen=True)
class Segments:
    """Division of a row into groups, each `(tokens of the prompt, fed tokens of each response)`.

    `windows` records the sliding window that each layer asked for; `cached` holds masks and indices that layers share.
    """

    groups: tuple[tuple[int, tuple[int, ...]], ...]
    windows: dict[int, int | None] = field(default_factory=dict, compare=False)
    cached: dict[object, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """R responses with N tokens in all, ordered by group."""

    input_ids: Tensor  # [1, T] or [R, L]
    position_ids: Tensor  # same shape
    attention_mask: Tensor | None  # [R, L]; None for a row, which has segments
    segments: Segments | None
    predicted_at: Tensor  # [N] index in the flattened input_ids whose output predicts the token
    target: Tensor  # [N] its id
    response: Tensor  # [N] number of its response
    index: Tensor  # [N] its position in that response
    length: Tensor  # [R] tokens of a response
    longest: int  # tokens of the longest response
    fed_tokens: int  # without padding

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device, without the masks and indices that were cached on another."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: to_device(tensor, device) for name, tensor in tensors.items()}
        return replace(self, **moved, segments=self.segments and Segments(self.segments.groups))


def collate(groups: Sequence[Group], layout: Layout, pad_token_id: int) -> Batch:
    """Build a batch of prompts and their responses, on the CPU. No prompt and no response may be empty."""
    assert all(prompt and responses and all(responses) for prompt, responses in groups)
    if layout is not Layout.shared:
        groups = [(prompt, [response]) for prompt, responses in groups for response in responses]
    segments = tuple((len(prompt), tuple(len(one) - 1 for one in responses)) for prompt, responses in groups)
    sizes = [prompt + sum(responses) for prompt, responses in segments]
    width = max(sizes) if layout is Layout.padded else 0
    offsets = accumulate([0, *(width or size for size in sizes[:-1])])  # of a group's first token
    rows: list[list[int]] = []  # fed tokens of a group
    positions: list[list[int]] = []
    predicted_at: list[int] = []
    target: list[int] = []
    lengths: list[int] = []
    for (prompt, responses), offset in zip(groups, offsets, strict=True):
        row, position = list(prompt), list(range(len(prompt)))
        for response in responses:
            first, fed = offset + len(row), len(response) - 1
            predicted_at += [offset + len(prompt) - 1, *range(first, first + fed)]
            target += response
            lengths.append(len(response))
            row += response[:-1]
            position += range(len(prompt), len(prompt) + fed)
        rows.append(row)
        positions.append(position)
    length = torch.tensor(lengths)
    return Batch(
        input_ids=_rows(rows, width, pad_token_id),
        position_ids=_rows(positions, width, 0),
        attention_mask=_rows([[1] * len(row) for row in rows], width, 0) if width else None,
        segments=None if width else Segments(segments),
        predicted_at=torch.tensor(predicted_at),
        target=torch.tensor(target),
        response=torch.arange(len(lengths)).repeat_interleave(length),
        index=torch.cat([torch.arange(n) for n in lengths]),
        length=length,
        longest=max(lengths),
        fed_tokens=sum(sizes),
    )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device, without waiting for a GPU's running work."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _rows(rows: list[list[int]], width: int, pad: int) -> Tensor:
    """Return `[len(rows), width]`, padded, or for width 0 the rows one after another, `[1, T]`."""
    if not width:
        return torch.tensor([[value for row in rows for value in row]])
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows])
