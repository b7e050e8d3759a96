"""Hydra, set up for align: where the YAML lies, which recipe a command picks, and errors in one line.

Three things Hydra does not do by itself. The recipe `experiments/recipe/<model>_<objective>.yaml` is chosen by the
two words of the command, and may choose the dataset (an interpolated defaults list may not). Keys under `objective`
and `optimizer` need no `+`: what is allowed there depends on the objective, and is checked where it is known. And
an error names the key and what is allowed in a line.
"""

import difflib
import re
from pathlib import Path
from typing import Any

import hydra._internal.hydra as hydra_internals
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from align import config

_HERE = Path(__file__).resolve().parent


def shipped(folder: str) -> Path:
    """`conf` or `experiments`: inside the installed package, or beside it in a checkout."""
    installed = _HERE / folder
    return installed if installed.is_dir() else _HERE.parent / folder


CONF = shipped("conf")


def _default_choices() -> dict[str, str]:
    entries = OmegaConf.load(CONF / "config.yaml").defaults
    return {key: value for entry in entries if isinstance(entry, DictConfig) for key, value in entry.items()}


class Loader(ConfigLoaderImpl):
    """Hydra's loader, over `conf/` and `experiments/`, with the two words of a command turned into a recipe."""

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        config_search_path.prepend("experiments", f"file://{shipped('experiments')}")
        super().__init__(config_search_path)

    def load_configuration(self, config_name: str | None, overrides: list[str], *args: Any, **kwargs: Any) -> DictConfig:
        overrides = [re.sub(r"^(objective|optimizer)\.", r"++\1.", override) for override in overrides]
        chosen = _default_choices() | dict(o.split("=", 1) for o in overrides if "=" in o)
        recipe = f"{chosen['model']}_{chosen['objective']}"
        if chosen["recipe"] is None and "recipe=null" not in overrides and self.repository.config_exists(f"recipe/{recipe}"):
            overrides = [f"recipe={recipe}", *overrides]
        return super().load_configuration(config_name, overrides, *args, **kwargs)


def install() -> None:
    """Make `hydra.main` use our loader and know the typed schema."""
    ConfigStore.instance().store(name="schema", node=config.RunConfig)
    hydra_internals.ConfigLoaderImpl = Loader


def one_line(error: BaseException) -> str:
    """Hydra's and OmegaConf's multi-line errors as one line that names the key and what is allowed."""
    cause = error
    while cause.__cause__ is not None and not hasattr(cause, "full_key"):
        cause = cause.__cause__
    key, parent = getattr(cause, "full_key", None), getattr(cause, "object_type", None)
    message = str(cause).splitlines()[0]
    if key and re.match(r"Key '.*' (is )?not in", message):
        names = list(getattr(parent, "__dataclass_fields__", {}))
        return _unknown_key(key, names)
    if key:
        return f"{key}: {message}"
    if "Could not find" in str(error):  # a choice that a group does not have
        missing = re.search(r"Could not find '(\w+)/(.*)'", str(error))
        options = re.search(r"Available options in .*:\n((?:\t.*\n)*)", str(error))
        if missing and options:
            group, choice = missing.groups()
            names = options.group(1).split()
            return f"there is no {group}={choice}{_closest(choice, names)}; {group} is one of {', '.join(names)}"
    return " ".join(str(error).split())


def _unknown_key(key: str, names: list[str]) -> str:
    prefix, _, last = key.rpartition(".")
    prefix = f"{prefix}." if prefix else ""
    allowed = f"; {prefix or 'the top level'} has {', '.join(names)}" if names else ""
    return f"unknown key {key}{_closest(last, names, prefix)}{allowed}"


def _closest(word: str, names: list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, names, n=1)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""
