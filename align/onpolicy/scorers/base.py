"""The interface of a scorer, and the plainest one, a program: to a prompt and its K responses numbers, or chances to win.

Two kinds, as the published data were made with both: ArmoRM gives a number per response, PairRM says who beats whom.
Left out: files, shards and resuming (score.py); how a scorer is named and made (registry.py).
"""

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from align.config import ScorerConfig
from align.files import file_fingerprint
from align.launch.rank import Rank
from align.say import UserError, resolve

Prompt = list[dict[str, str]] | str  # messages of {role, content}, the last of them the user's; or a plain text

Matrix = Sequence[Sequence[float]]  # [K][K]: row i, column j is P(response i beats response j)
ROUNDING = 1e-3  # by which P_ij + P_ji may miss 1: scorers round, but an order effect is no rounding


class Kind(Enum):
    """The two kinds of scorers."""

    pointwise = "pointwise"  # a number per response; higher is better
    pairwise = "pairwise"  # P(a beats b) for every ordered pair of a prompt's responses


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The identity of a scorer, recorded with its scores: two that could disagree differ in it."""

    kind: Kind
    name: str  # the kind of scorer and what it loaded: "reward_model:Skywork/..."
    revision: str  # a hub commit, or a fingerprint of local weights or code
    template: str  # that puts prompt and response into one text; a sentence where there is none
    settings: Mapping[str, Any] = field(default_factory=dict)  # whatever else can change a score


@dataclass(frozen=True, kw_only=True)
class Item:
    """A prompt with its K responses."""

    prompt: Prompt
    responses: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of an item."""

    #: pointwise [K]; pairwise [K][K], P_ij + P_ji = 1 and 1/2 on the diagonal; NaN: nothing can be said
    values: Sequence[float] | Matrix
    #: [K] what was cut or spent, always with the same keys; pairwise, of comparisons in which response i stood first
    counts: Sequence[Mapping[str, int]] = ()


class Scorer(Protocol):
    """Scores items. It loads weights at the first call, so that one whose scores are all there costs nothing."""

    @property
    def identity(self) -> Identity:
        """The scorer's identity, known before anything heavy is loaded."""

    def __call__(self, items: Sequence[Item]) -> list[Scores]:
        """Return the scores of each item, in order; an item alone scores the same as among others."""


class ProgramScorer:
    """Any "module:function" (last user turn or plain text, response text) -> float, such as the built-in task's judge."""

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


def check_preferences(preferences: Matrix, count: int) -> None:
    """Raise for what cannot be P(i beats j) of `count` candidates; numbers that are not finite pass."""
    if any(len(side) != count for side in (preferences, *preferences)):
        raise UserError(f"preferences of {count} candidates must be {count} rows of as many numbers")
    for i, row in enumerate(preferences):
        for j, p in enumerate(row):
            q = preferences[j][i]
            if not (math.isfinite(p) and math.isfinite(q)):
                continue
            if not 0 <= p <= 1:
                raise UserError(f"P({i} beats {j}) is {p}, which is no probability")
            if abs(p + q - 1) > ROUNDING:
                both = f"P({i} beats {j}) is {p} and P({j} beats {i}) is {q}"
                raise UserError(f"{both}; they must add up to 1: take the mean of both orders, and 1/2 against itself")


def last_turn(prompt: Prompt) -> str:
    """Return the last message of a conversation, or the plain text."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def as_text(prompt: Prompt) -> str:
    """Return a conversation as plain text: one user turn as its content, more as "role: content" paragraphs."""
    if isinstance(prompt, str) or len(prompt) == 1:
        return last_turn(prompt)
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def as_messages(prompt: Prompt) -> list[dict[str, str]]:
    """Return the messages of a conversation; a plain text becomes one user turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
