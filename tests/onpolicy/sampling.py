"""The first stage, with a sampler of the test's own in place of the policy's."""

from contextlib import nullcontext

import pytest
import torch

from align.config import ModelConfig, RunConfig
from align.launch.rank import Rank
from align.model.load import Policy, Start
from align.onpolicy import sample

RANK = Rank(device=torch.device("cpu"), bf16=False, number=0, world=1)


def policy_of(tokenizer, path="", fingerprint="a policy") -> Policy:
    start = Start(path=str(path), fingerprint=fingerprint, tokenizer=tokenizer)
    return Policy(iteration=0, cfg=ModelConfig(name="tiny", path=str(path)), start=start)


def sample_by(
    sampler, prompts, settings, folder, tokenizer, *, seed=7, iteration=2, fingerprint="a policy", opening=None
) -> None:
    """Let `sampler` answer; or `opening`, a context manager that yields it."""
    policy = policy_of(tokenizer, fingerprint=fingerprint)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "open_sampler", lambda *_: opening or nullcontext(sampler))
        sample.sample_from(policy, prompts, RunConfig(seed=seed), settings, folder, iteration, "responses", RANK)
