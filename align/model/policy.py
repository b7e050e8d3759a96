"""A policy on disk: the start model, or the result of an iteration."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from align.config import ModelConfig
from align.files import build_once
from align.launch.rank import Rank
from align.model.load import Start, load_policy, load_trained, policy_fingerprint, prepare_start


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The start model, or the result of an iteration."""

    iteration: int  # that trained it; 0: the start model
    cfg: ModelConfig
    start: Start

    def load(self, rank: Rank) -> PreTrainedModel:
        """Load the weights for sampling. An untrained LoRA adapter is skipped: it is the identity."""
        dtype = torch.bfloat16 if rank.bf16 else torch.float32
        policy: Any = load_policy(replace(self.cfg, lora={}), self.start, seed=0, dtype=dtype)
        loaded: PreTrainedModel = policy.to(rank.device)
        return loaded

    @property
    def name(self) -> str:
        """Name for people: "start", "iteration 1", ..."""
        return f"iteration {self.iteration}" if self.iteration else "start"

    @property
    def fingerprint(self) -> str:
        """Key that changes with its weights."""
        return policy_fingerprint(replace(self.cfg, lora={}), self.start, seed=0)


def trained_from(before: Policy, folder: Path, cache: Path) -> Policy:
    """Return the policy that a training of `before` left in `folder`; an adapter is merged, into `merged` beside it."""

    def merge(into: Path) -> None:
        adapted: Any = load_trained(before.cfg, before.start, folder)
        adapted.merge_and_unload().save_pretrained(into)
        before.start.tokenizer.save_pretrained(into)

    plain = build_once(folder.with_name("merged"), merge, "give another run_dir=") if before.cfg.lora else folder
    cfg = replace(before.cfg, path=str(plain), revision=None, tokenizer=None, chat_template=None, init={}, fit=None)
    return Policy(iteration=before.iteration + 1, cfg=cfg, start=prepare_start(cfg, cache))
