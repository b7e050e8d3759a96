"""Statistics of responses under a policy: packed rows, prompts shared, no logits. Start at forward.py."""

from align.engine.attention import backends
from align.engine.forward import COMPUTED, attach, evaluating, response_statistics, settle
from align.engine.layout import Batch, Group, collate, to_device

__all__ = ["COMPUTED", "Batch", "Group", "attach", "backends", "collate", "evaluating", "response_statistics"]
__all__ += ["settle", "to_device"]
