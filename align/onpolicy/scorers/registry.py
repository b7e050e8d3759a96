"""Scorers by name: those here, those of installed packages, and "module:function".

A package registers, in the entry-point group `align.scorers`, what "module:function" names: a function of
(`ScorerConfig`, `Rank`) that returns a `Scorer`. A setting that the chosen scorer would not read is refused.
"""

import importlib.metadata
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from align.config import RunConfig, ScorerConfig
from align.launch.rank import Rank
from align.onpolicy.scorers.base import Identity, Kind, Scorer
from align.say import UserError, closest, resolve

_HERE = "align.onpolicy.scorers"
_MODEL = ("path", "revision", "max_length", "tokens_per_batch", "system_message")
#: name -> (class, keys of `ScorerConfig` that it reads; of a nested node the first word)
_BUILT_IN: dict[str, tuple[str, tuple[str, ...]]] = {
    "program": ("base:ProgramScorer", ("path",)),
    "reward_model": ("models:RewardModelScorer", (*_MODEL, "template")),
    "armorm": ("armorm:ArmoRMScorer", _MODEL),
    "pairrm": ("pairrm:PairRMScorer", ("path", "revision", "tokens_per_batch")),
    "llm_judge": ("llm_judge:JudgeScorer", ("revision", "template", "judge")),
}
_PAIRWISE = ("pairrm", "llm_judge")


def scorer_of(cfg: RunConfig) -> ScorerConfig:
    """Return the scorer that is configured, or else the dataset's own judge."""
    if cfg.scorer.name is not None:
        return cfg.scorer
    if cfg.dataset.judge is None:
        raise UserError(
            f"answers need a scorer, and dataset {cfg.dataset.name} has no judge of its own: give scorer=armorm, "
            "scorer=pairrm, scorer=reward_model scorer.path=<folder or hub name>, scorer=llm_judge, or scorer=program "
            "scorer.path=module:function"
        )
    return replace(cfg.scorer, name="program", path=cfg.dataset.judge)


def build(cfg: ScorerConfig, rank: Rank) -> Scorer:
    """Build the scorer that the configuration describes, or raise `UserError`; models run on `rank.device`."""
    assert cfg.name is not None, "scorer_of"
    entries = {entry.name: entry for entry in importlib.metadata.entry_points(group="align.scorers")}
    if ":" in cfg.name:
        make: Callable[..., Any] = resolve(cfg.name, "scorer.name")
    elif cfg.name in _BUILT_IN:
        name, reads = _BUILT_IN[cfg.name]
        for key, default in vars(ScorerConfig()).items():
            if getattr(cfg, key) != default and key not in ("name", *reads):
                known = ", ".join(reads)
                raise UserError(f"scorer.{key} does nothing with scorer.name={cfg.name}, which reads {known}")
        make = resolve(f"{_HERE}.{name}", "scorer.name")
    elif cfg.name in entries:
        make = entries[cfg.name].load()
    else:
        near = closest(cfg.name, names := sorted({*_BUILT_IN, *entries}))
        raise UserError(f"scorer.name={cfg.name} is unknown{near}; there are {', '.join(names)}, and module:function")
    scorer = make(cfg, rank)
    if not callable(scorer) or not isinstance(getattr(scorer, "identity", None), Identity):
        raise UserError(
            f"scorer.name={cfg.name} made a {type(scorer).__name__}, which is no scorer: {_HERE}.base says what one is"
        )
    return scorer


def stand_in(cfg: ScorerConfig) -> Identity:
    """Return what is known of a scorer without its files, for plans where the hub cannot be reached."""
    kind = Kind.pairwise if cfg.name in _PAIRWISE else Kind.pointwise
    return Identity(kind=kind, name=f"{cfg.name}:{cfg.path}", revision="unknown", template="unknown")
