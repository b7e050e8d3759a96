"""The interface of a scorer: for a prompt and its K responses it gives each a number, or each pair a probability.

Two kinds, as the published data were made with both: ArmoRM gives a number per response, PairRM says who beats whom.
`select.py` turns either into what a pair needs, so nothing here does. Left out: files, shards and resuming
(score.py); how a scorer is named and made (registry.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

Prompt = list[dict[str, str]] | str  # messages of {role, content}, the last of them the user's; or a plain text


class Kind(Enum):
    """The two kinds of scorers."""

    pointwise = "pointwise"  # a number per response; higher is better, in the scorer's own unit
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

    #: pointwise [K]; pairwise [K][K] P(i beats j), P_ij + P_ji = 1 and 1/2 on the diagonal; NaN: nothing can be said
    values: Sequence[float] | Sequence[Sequence[float]]
    #: [K] what was cut or spent, always with the same keys; pairwise, of comparisons in which response i stood first
    counts: Sequence[Mapping[str, int]] = ()


class Scorer(Protocol):
    """Scores items. It loads weights at the first call, so that one whose scores are all there costs nothing.

    A third party's is made by a function of (`ScorerConfig`, `align.launch.rank.Rank`): see registry.py.
    """

    @property
    def identity(self) -> Identity:
        """The scorer's identity, known before anything heavy is loaded."""

    def __call__(self, items: Sequence[Item]) -> list[Scores]:
        """Return the scores of each item, in order; an item alone scores the same as among others."""


def last_turn(prompt: Prompt) -> str:
    """Return the last message of a conversation, or the plain text."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def as_text(prompt: Prompt) -> str:
    """Return a conversation as plain text: one user turn as its content, more as "role: content" paragraphs."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def as_messages(prompt: Prompt) -> list[dict[str, str]]:
    """Return the messages of a conversation; a plain text becomes one user turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
