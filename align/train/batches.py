"""Prepared pairs as tensors, a micro-batch at a time."""

from dataclasses import dataclass

import datasets
import torch
from torch import Tensor

from align.choices import Layout
from align.data.pairs import as_group, pair_lengths
from align.engine import Batch, collate, to_device
from align.engine.batching import MicroBatch


@dataclass(frozen=True, kw_only=True, eq=False)
class PairBatch:
    """A micro-batch of b pairs, on its device."""

    responses: Batch  # 2b of them: each chosen one, and its rejected one behind it
    row_ids: tuple[str, ...]
    counted: Tensor  # [b] 1; 0 for a pair that only keeps this rank in step with the others
    truncated: Tensor  # [b] 1 where the prompt or a response was cut
    columns: dict[str, Tensor]  # [b, 2] statistics that come with the data: win_prob, ref_logp
    pairs_in_step: int  # what the sum of losses is divided by


class PairData:
    """The pairs of a split, and their reference column `ref_logp`: `[N, 2]` nats once there is one.

    Args:
        layout: that the policy is attached in.
    """

    def __init__(self, pairs: datasets.Dataset, layout: Layout, pad_token_id: int) -> None:
        self.pairs, self.layout, self.pad_token_id = pairs, layout, pad_token_id
        self.lengths = pair_lengths(pairs)
        self.ref_logp: Tensor | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, micro_batch: MicroBatch, device: torch.device) -> PairBatch:
        """Collate the pairs of a micro-batch."""
        index = list(micro_batch.pairs)
        rows = self.pairs.select(index).to_list()
        responses = collate([as_group(row) for row in rows], self.layout, self.pad_token_id)
        columns = {"win_prob": torch.tensor([[row["chosen_win_prob"], row["rejected_win_prob"]] for row in rows])}
        if self.ref_logp is not None:
            columns["ref_logp"] = self.ref_logp[index]
        truncated = torch.tensor([float(row["cut_tokens"] + row["cut_prompt_tokens"] > 0) for row in rows])
        return PairBatch(
            responses=responses.to(device),
            row_ids=tuple(row["row_id"] for row in rows),
            counted=to_device(torch.tensor(micro_batch.counted, dtype=torch.float32), device),
            truncated=to_device(truncated, device),
            columns={name: to_device(values, device) for name, values in columns.items()},
            pairs_in_step=micro_batch.pairs_in_step,
        )
