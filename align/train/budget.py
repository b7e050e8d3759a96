"""Tokens that a device holds at once in training: measured on a GPU, a fixed number on a CPU.

Two micro-batches of different sizes run forward and backward; the difference of their peaks is the cost of a token.
Left out: sharded weights, as a policy that is not wrapped yet does not gather any.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from align.choices import Layout
from align.engine import Group, collate, response_statistics
from align.engine.batching import CPU_TOKENS
from align.launch.rank import Rank
from align.say import UserError
from align.train.memory import MOST_TOKENS, USABLE

_PROBES = (2048, 6144)  # tokens


def token_budget(
    policy: PreTrainedModel,
    groups: Sequence[Group],
    layout: Layout,
    statistics: Sequence[str],
    rank: Rank,
    later: int,
) -> int:
    """Find the tokens of a micro-batch for a policy that is `attach`ed in `layout` and on its device.

    Args:
        groups: groups of the data, the longest first; repeated if they are fewer than some thousand tokens.
        statistics: those that the objective needs.
        later: bytes of training that are not there yet in a forward and backward: optimizer state, buckets.

    Raises:
        UserError: the longest group does not fit.
    """
    device = rank.device
    if device.type != "cuda":
        return CPU_TOKENS
    policy.train()
    peaks: list[tuple[int, int]] = []
    for tokens in _PROBES:
        some = [groups[0]]
        while sum(len(p) + sum(map(len, rs)) for p, rs in some) < tokens:
            some.append(groups[len(some) % len(groups)])
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        try:
            with rank.autocast():
                batch = collate(some, layout, pad_token_id=0).to(device)
                response_statistics(policy, batch, statistics)["logp"].sum().backward()
        except torch.cuda.OutOfMemoryError as error:
            if peaks:
                break
            raise UserError(
                f"a pair of {batch.fed_tokens} tokens does not fit into this GPU's memory: set "
                "engine.gradient_checkpointing=true if it is not, or a smaller train.max_length"
            ) from error
        finally:
            policy.zero_grad(set_to_none=True)
        peaks.append((batch.input_ids.numel(), torch.cuda.max_memory_allocated(device) - before))
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0] - later
    return fitting_tokens(peaks, int(USABLE * free))


def fitting_tokens(peaks: Sequence[tuple[int, int]], free: int) -> int:
    """Find the tokens whose peak is `free` bytes, on a straight line through the (tokens, peak bytes) of the probes."""
    (few, low), (many, high) = peaks[0], peaks[-1]
    if many == few:  # the second probe did not fit
        return few
    per_token = max(1.0, (high - low) / (many - few))
    return max(few, min(MOST_TOKENS, int(few + (free - low) / per_token)))
