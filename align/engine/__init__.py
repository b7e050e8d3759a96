"""Statistics of responses under a policy: packed rows, prompts shared, no logits. Start at forward.py."""

from align.engine.attention import backends
from align.engine.batching import CPU_TOKENS
from align.engine.forward import COMPUTED, attach, evaluating, response_statistics, settle
from align.engine.layout import Batch, Group, collate, to_device

__all__ = [
    "COMPUTED",
    "CPU_TOKENS",
    "Batch",
    "Group",
    "attach",
    "backends",
    "collate",
    "evaluating",
    "response_statistics",
    "settle",
    "to_device",
]
