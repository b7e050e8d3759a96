"""The interface of a sampler: prompts as token ids in, responses out. It knows nothing of files, iterations or scores.

Every response has a seed of its own, so that it does not depend on what it is drawn together with, except by rounding.
Distributions are the policy's own, after temperature and top_p: what a model's generation_config adds (top_k,
penalties) is left out, since samples would not be on-policy.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.config import EvaluationConfig, SamplingConfig

_SEEDS = 2**31  # what every server takes


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt as token ids, and a seed for each response to draw."""

    token_ids: Sequence[int]
    seeds: Sequence[int]  # in [0, 2^31)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A response: its text without special tokens, and the token ids that were drawn."""

    text: str
    response_ids: list[int]  # the stop token included
    finished: bool  # it ends with a stop token; else it was cut at max_new_tokens


Settings = SamplingConfig | EvaluationConfig
#: Returns for each prompt a response for each of its seeds. It reads `temperature`, by which logits are divided; `top_p`,
#: which the most probable tokens that are drawn from reach together; and `max_new_tokens`, the stop token included.
Sampler = Callable[[Sequence[Prompt], Settings], list[list[Sample]]]


def seeds(seed: int, iteration: int, prompt_id: str, samples: int) -> list[int]:
    """Return the seeds of a prompt's K responses. The k-th does not depend on K."""
    digests = (hashlib.sha256(f"{seed} {iteration} {k} {prompt_id}".encode()).digest() for k in range(samples))
    return [int.from_bytes(digest[:8], "big") % _SEEDS for digest in digests]


def as_sample(
    drawn: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[int],
    stopped: bool = False,
    by: Any = None,
) -> Sample:
    """Return the sample that these token ids are; what was drawn behind the first stop token is left out.

    `stopped`: a server says that the response ended by itself, and maybe leaves out the stop token, which is added: `by`
    where it is named.
    """
    ids = list(drawn[: next((at for at, token in enumerate(drawn, 1) if token in stops), len(drawn))])
    finished = bool(ids) and ids[-1] in stops
    if stopped and not finished:
        ids.append(by if by in stops else stops[0])
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return Sample(text=str(text), response_ids=ids, finished=finished or stopped)
