"""Names of runs: what tells them apart, and nothing more. Pure: of settings, by their dotted keys."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from align.report.run import Run

Settings = Mapping[str, Any]

_PROMINENT = ("objective.", "model.name", "dataset.name", "optimizer.learning_rate", "optimizer.", "train.")
_FINGERPRINTS = ("start", "pairs", "device", "bf16")
_EVERYWHERE = ("model.name", "dataset.name")  # named in every label where they differ, also where the objective does


def settings_of(run: Run) -> dict[str, Any]:
    """Return what decides a run's result, but the seed."""
    known = run.identity or run.config
    settings = {key: _as_number(value) for key, value in known.items() if key != "seed"}
    if _is_selfplay(run):
        settings["iterations"] = len(run.iterations) or run.config.get("iterations")
    return settings


def kind(run: Run) -> str:
    """Return "dpo", or "dpo self-play"."""
    return f"{run.objective} self-play" if _is_selfplay(run) else run.objective


def labels(methods: Sequence[tuple[str, Settings]]) -> list[str]:
    """Name each (kind, settings): the kind, its hyperparameters that vary, and what else tells it from the others."""
    everywhere = [key for key in _EVERYWHERE if len({str(s.get(key)) for _, s in methods}) > 1]
    found = []
    for name, settings in methods:
        group = [other for its, other in methods if its == name]
        named = list(everywhere)
        for key in sorted(varied(group), key=prominence):
            tells_more = len(_classes(group, [*named, key])) > len(_classes(group, named))
            if key not in named and (key.startswith("objective.") or tells_more):
                named.append(key)
        short = [short_name(key) for key in named]
        words = [word if short.count(word) == 1 else key for word, key in zip(short, named, strict=True)]
        pairs = [f"{word}={value_text(settings.get(key))}" for word, key in zip(words, named, strict=True)]
        found.append(" ".join([name, *pairs]))
    return found


def varied(settings: Sequence[Settings]) -> list[str]:
    """List the keys whose values differ."""
    keys = dict.fromkeys(key for one in settings for key in one)
    return [key for key in keys if len({json.dumps(one.get(key), default=str) for one in settings}) > 1]


def prominence(key: str) -> tuple[int, str]:
    """Return a key to sort by: what people tell runs apart by comes first, fingerprints last."""
    at = next((number for number, start in enumerate(_PROMINENT) if key.startswith(start)), len(_PROMINENT))
    return (at + is_fingerprint(key), key)


def is_fingerprint(key: str) -> bool:
    """True for a key that says what something is, and is no setting."""
    return key in _FINGERPRINTS or key.startswith("objective_code")


def short_name(key: str) -> str:
    """Return beta of objective.beta, model of model.name."""
    return key.removesuffix(".name").rpartition(".")[2]


def value_text(value: Any) -> str:
    """Return a setting as it is typed."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value) if isinstance(value, list | dict) else str(value)


def _as_number(value: Any) -> Any:
    """Return 2 for 2.0, which are one setting."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_selfplay(run: Run) -> bool:
    return bool(run.iterations) or run.config.get("source.name") == "selfplay"


def _classes(group: Sequence[Settings], keys: Sequence[str]) -> set[str]:
    return {json.dumps([settings.get(key) for key in keys], default=str) for settings in group}
