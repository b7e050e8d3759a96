"""How prompts and responses lie in a batch. A group is a prompt and its responses, two of them where it is a pair.

    shared   one row: of each group the prompt, then each response behind it, as if the others were not there
    packed   one row: of each response its prompt and itself; a prompt is fed once per response
    padded   a row per response, padded on the right; for models that the other two cannot serve

In a row positions start again with every prompt, and in `shared` every response continues its prompt's. The last token
of a response predicts nothing and is not fed. Left out: how many groups a batch holds (align/batching.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from align.choices import Layout

Group = tuple[list[int], list[list[int]]]  # token ids of a prompt and of its responses


@dataclass(frozen=True)
class Segments:
    """Which tokens of a row belong together: `(tokens of the prompt, fed tokens of each response)` of each group.

    `windows`: the sliding window that each layer asked for, as it was seen; `cached`: masks and indices, which all layers
    share.
    """

    groups: tuple[tuple[int, tuple[int, ...]], ...]
    windows: dict[int, int | None] = field(default_factory=dict, compare=False)
    cached: dict[object, object] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """R responses with N tokens in all, ordered by group."""

    input_ids: Tensor  # [1, T] or [R, L]
    position_ids: Tensor  # as input_ids
    attention_mask: Tensor | None  # [R, L]; None in a row, where `segments` says it all
    segments: Segments | None
    predicted_at: Tensor  # [N] where in the flattened input_ids the token is predicted from
    target: Tensor  # [N] its id
    response: Tensor  # [N] which response it belongs to
    index: Tensor  # [N] its place in that response
    length: Tensor  # [R] response tokens
    longest: int  # response tokens, at most
    fed_tokens: int  # without padding

    def to(self, device: torch.device) -> "Batch":
        """On the device; what was cached on another stays there."""
        moved: dict[str, Any] = {
            name: to_device(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved, segments=self.segments and Segments(self.segments.groups))


def collate(groups: Sequence[Group], layout: Layout, pad_token_id: int) -> Batch:
    """A batch of prompts and their responses, on the CPU. No prompt and no response is empty."""
    assert all(prompt and responses and all(responses) for prompt, responses in groups)
    if layout is not Layout.shared:
        groups = [(prompt, [response]) for prompt, responses in groups for response in responses]
    rows: list[list[int]] = []  # fed tokens of a group
    positions: list[list[int]] = []
    starts: list[list[int]] = []  # of a group's responses: where in its row the token behind the prompt is
    for prompt, responses in groups:
        row, position, start = list(prompt), list(range(len(prompt))), []
        for response in responses:
            start.append(len(row))
            row += response[:-1]
            position += range(len(prompt), len(prompt) + len(response) - 1)
        rows.append(row)
        positions.append(position)
        starts.append(start)
    width = max(map(len, rows)) if layout is Layout.padded else 0
    offsets = [i * width for i in range(len(rows))] if width else _before(list(map(len, rows)))

    predicted_at: list[int] = []
    target: list[int] = []
    lengths: list[int] = []
    for (prompt, responses), start, offset in zip(groups, starts, offsets, strict=True):
        for response, behind in zip(responses, start, strict=True):
            predicted_at.append(offset + len(prompt) - 1)
            predicted_at += range(offset + behind, offset + behind + len(response) - 1)
            target += response
            lengths.append(len(response))
    length = torch.tensor(lengths)
    return Batch(
        input_ids=_rows(rows, width, pad_token_id),
        position_ids=_rows(positions, width, 0),
        attention_mask=_rows([[1] * len(row) for row in rows], width, 0) if width else None,
        segments=None
        if width
        else Segments(tuple((len(p), tuple(len(response) - 1 for response in rs)) for p, rs in groups)),
        predicted_at=torch.tensor(predicted_at),
        target=torch.tensor(target),
        response=torch.arange(len(lengths)).repeat_interleave(length),
        index=torch.cat([torch.arange(n) for n in lengths]),
        length=length,
        longest=max(lengths),
        fed_tokens=sum(map(len, rows)),
    )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there, without waiting for what a GPU is at."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _before(sizes: list[int]) -> list[int]:
    """The sum of the sizes before each."""
    sums = [0]
    for size in sizes[:-1]:
        sums.append(sums[-1] + size)
    return sums


def _rows(rows: list[list[int]], width: int, pad: int) -> Tensor:
    """`[len(rows), width]`, padded; with width 0, all behind one another `[1, T]`."""
    if not width:
        return torch.tensor([[value for row in rows for value in row]])
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows])
