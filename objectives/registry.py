"""Objectives by name: registration, and building one from plain values with every mistake named.

`build` is the only way from a configuration to an objective. It checks names and types here, so that a typing
error costs a second and not a queue slot; ranges are checked by each objective's `__post_init__`.
"""

import dataclasses
import importlib.metadata
import importlib.util
import sys
import types
import typing
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from objectives.base import Objective

_REGISTRY: dict[str, type[Objective]] = {}
_CODE = "objective_code_"  # of module names: files outside any package
_T = TypeVar("_T", bound=type[Objective])


def register(name: str) -> Callable[[_T], _T]:
    """Register the decorated class as `objective=<name>`.

    A third party's package does this through the entry-point group `align.objectives`: an entry point that names
    the module is enough, since importing it registers the class.
    """

    def add(cls: _T) -> _T:
        known = _REGISTRY.get(name)
        same = known is not None and (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__)
        from_files = known is not None and known.__module__.startswith(_CODE) and cls.__module__.startswith(_CODE)
        if known is not None and not same and not from_files:  # of two files the last one counts
            raise ValueError(f"objective {name!r} is already registered by {known.__module__}.{known.__qualname__}")
        _REGISTRY[name] = cls
        return cls

    return add


def available() -> dict[str, type[Objective]]:
    """Return name -> class of every objective: ours and those of installed packages."""
    for entry in importlib.metadata.entry_points(group="align.objectives"):
        entry.load()
    return dict(sorted(_REGISTRY.items()))


def load_file(path: str) -> None:
    """Run a Python file that registers an objective (`code:` in its YAML), for objectives outside any package."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"code: there is no Python file {path}; the path is taken from the working folder")
    name = f"{_CODE}{file.resolve()}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"code: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while the class is made
    spec.loader.exec_module(module)


def build(values: Mapping[str, Any]) -> Objective:
    """Build an objective from plain values: `name`, then hyperparameters; or raise `ValueError`, one line with the key.

    A key that the named objective does not have is passed to the objective that it wraps, so `objective.beta` reaches
    the base of `wpo`.
    """
    objective, unclaimed = _build(dict(values))
    if unclaimed:
        keys = ", ".join(f"objective.{key}" for key in unclaimed)
        allowed = ", ".join(f"objective.{key}" for key in _all_keys(objective))
        raise ValueError(f"unknown key {keys}; {values['name']} takes {allowed}")
    return objective


def _build(values: dict[str, Any]) -> tuple[Objective, dict[str, Any]]:
    """Build the objective. Returns it, and the values that neither it nor the objectives it wraps have claimed."""
    name, known = values.pop("name", None), available()
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"unknown objective {name!r}; there are {', '.join(known)}")
    cls = known[name]
    hints = typing.get_type_hints(cls)
    own: dict[str, Any] = {}
    for field in sorted(dataclasses.fields(cls), key=lambda field: hints[field.name] is Objective):
        key, given = f"objective.{field.name}", values.pop(field.name, dataclasses.MISSING)
        if hints[field.name] is Objective:  # comes last: the wrapped objective takes the remaining values
            if given in (None, dataclasses.MISSING):
                raise ValueError(f"{key} is missing: {name} wraps one of {', '.join(known)}")
            inner = dict(given) if isinstance(given, Mapping) else {"name": given}
            own[field.name], values = _build({**inner, **values})
        elif given is not dataclasses.MISSING:
            own[field.name] = _checked(key, given, hints[field.name])
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{key} is missing: {name} has no default for it")
    try:
        objective = cls(**own)
    except ValueError as error:
        raise ValueError(f"objective {name}: objective.{error}") from error
    _warn_outside_published(name, objective)
    return objective, values


def _all_keys(objective: Objective) -> list[str]:
    keys: list[str] = []
    for field in dataclasses.fields(objective):
        value = getattr(objective, field.name)
        keys.append(field.name)
        if isinstance(value, Objective):
            keys += [key for key in _all_keys(value) if key not in keys]
    return keys


_WORDS = {float: "a number", int: "a whole number", bool: "true or false", str: "text", type(None): "null"}


def _checked(key: str, value: Any, hint: Any) -> Any:
    """Return `value` if it fits the annotation; an int fits a float."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    allowed: list[str] = []
    for option in typing.get_args(hint) if union else (hint,):
        if typing.get_origin(option) is Literal:
            if value in typing.get_args(option):
                return value
            allowed += map(str, typing.get_args(option))
        else:
            kinds = (float, int) if option is float else option
            if isinstance(value, kinds) and not (isinstance(value, bool) and option in (int, float)):
                return float(value) if option is float else value
            allowed.append(_WORDS.get(option, str(option)))
    raise ValueError(f"{key} must be {' or '.join(allowed)}, not {value!r}")


def _warn_outside_published(name: str, objective: Objective) -> None:
    for field in dataclasses.fields(objective):
        value, known = getattr(objective, field.name), field.metadata.get("published")
        if known is None or not value:
            continue
        low, high = known
        if value < low / 10 or value > high * 10:
            span = f"{low:g}" if low == high else f"{low:g} to {high:g}"
            warnings.warn(
                f"objective.{field.name}={value:g} is far outside {name}'s published {span}: {field.metadata['why']}",
                UserWarning,
                stacklevel=3,
            )
