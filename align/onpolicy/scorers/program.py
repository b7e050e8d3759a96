"""A program that judges: any "module:function" (prompt text, response text) -> float, such as the built-in task's.

The prompt is the last user turn, or the plain text: what was asked, not the whole conversation.
Left out: programs that see all K responses at once, which are scorers themselves (registry.py).
"""

import importlib
from collections.abc import Sequence
from pathlib import Path

from align.config import ScorerConfig
from align.files import file_fingerprint
from align.launch.rank import Rank
from align.onpolicy.scorers.base import Identity, Item, Kind, Scores, last_turn
from align.say import UserError, resolve


class ProgramScorer:
    """Calls the function on every response. Its revision is the fingerprint of the file that holds it."""

    def __init__(self, cfg: ScorerConfig, rank: Rank) -> None:
        if cfg.path is None:
            raise UserError("scorer.name=program needs scorer.path=module:function, e.g. align.playground.task:judge")
        self._judge = resolve(cfg.path, "scorer.path")
        file = importlib.import_module(cfg.path.partition(":")[0]).__file__
        self.identity = Identity(
            kind=Kind.pointwise,
            name=f"program:{cfg.path}",
            revision="built in" if file is None else file_fingerprint(Path(file)),
            template="the last user turn and the response, as texts",
        )

    def __call__(self, items: Sequence[Item]) -> list[Scores]:
        """Return [K] what the function says, for each item."""
        return [Scores(values=[self._score(last_turn(i.prompt), r) for r in i.responses]) for i in items]

    def _score(self, prompt: str, response: str) -> float:
        value = self._judge(prompt, response)
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.identity.name} returned {value!r} and not a number") from error
