"""Hydra, set up for align: where the YAML lies, which recipe a command picks, and errors in one line.

Three things Hydra does not do by itself. The recipe `experiments/recipe/<model>_<objective>.yaml`, else `<model>.yaml`, is
chosen by the two words of the command, and may choose the dataset (an interpolated defaults list may not). Keys of open nodes, such
as `objective`, need no `+`: what is allowed there is checked where it is known. And an error is one line that names
the key and what is allowed.
"""

import re
from pathlib import Path
from typing import Any

import hydra._internal.hydra as hydra_internals
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from align import config

_HERE = Path(__file__).resolve().parent


def shipped(folder: str) -> Path:
    """`conf` or `experiments`: inside the installed package, or beside it in a checkout."""
    installed = _HERE / folder
    return installed if installed.is_dir() else _HERE.parent / folder


CONF = shipped("conf")

#: Nodes that take keys of their own, checked where they are known; typed without the `+` that Hydra asks for.
_OPEN = (
    r"^((?:objective|optimizer)\.|"
    r"(?:model\.(?:lora|init|shape)|dataset\.(?:columns|mix)|source\.candidates|scorer\.judge\.request|cluster\.slurm\.options)[.=])"
)


def _default_choices() -> dict[str, str]:
    entries = OmegaConf.load(CONF / "config.yaml").defaults
    return {str(key): value for entry in entries if isinstance(entry, DictConfig) for key, value in entry.items()}


class Loader(ConfigLoaderImpl):
    """Hydra's loader, over `conf/` and `experiments/`, with the two words of a command turned into a recipe."""

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        config_search_path.prepend("experiments", f"file://{shipped('experiments')}")
        super().__init__(config_search_path)

    def load_configuration(
        self, config_name: str | None, overrides: list[str], *args: Any, **kwargs: Any
    ) -> DictConfig:
        """The composed configuration of one job."""
        groups = "|".join(_default_choices())
        overrides = [re.sub(rf"^({groups})=null$", r"\1=none", override) for override in overrides]
        overrides = [re.sub(rf"^({groups})=(\d.*)$", r"\1='\2'", override) for override in overrides]
        overrides = [re.sub(_OPEN, r"++\1", override) for override in overrides]
        chosen = _default_choices() | dict(o.split("=", 1) for o in overrides if "=" in o)
        recipes = (f"{chosen['model']}_{chosen['objective']}", chosen["model"])
        found = next((name for name in recipes if self.repository.config_exists(f"recipe/{name}")), None)
        if chosen["recipe"] is None and found is not None:
            overrides = [f"recipe={found}", *overrides]
        try:
            return super().load_configuration(config_name, overrides, *args, **kwargs)
        except ValueError as error:  # Hydra's own word on `model=3`
            words = " ".join(overrides)
            raise config.UserError(
                f"{error} (in {words}): a group takes one of its choices, as in model=tiny"
            ) from error

    def get_group_options(
        self,
        group_name: str,
        results_filter: ObjectType | None = ObjectType.CONFIG,
        config_name: str | None = None,
        overrides: list[str] | None = None,
    ) -> list[str]:
        """The choices of a group. Hydra's own copies every cached config for each group: half of `--help`'s time."""
        return self.repository.get_group_options(group_name, results_filter)


def install() -> None:
    """Make `hydra.main` use our loader and know the typed schema."""
    ConfigStore.instance().store(name="schema", node=config.RunConfig)
    hydra_internals.ConfigLoaderImpl = Loader


def one_line(error: BaseException) -> str:
    """Hydra's and OmegaConf's multi-line errors as one line that names the key and what is allowed."""
    cause = error
    while cause.__cause__ is not None and not hasattr(cause, "full_key"):
        cause = cause.__cause__
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}: write key=value, in quotes where the value has brackets, spaces or $"
    key, parent = getattr(cause, "full_key", None), getattr(cause, "object_type", None)
    message = str(cause).splitlines()[0]
    if key and re.match(r"Key '.*' (is )?not in", message):
        names = list(getattr(parent, "__dataclass_fields__", {}))
        return _unknown_key(key, names)
    if key and isinstance(cause, MissingMandatoryValue):
        return f"{key} has no value yet: type {key}=..."
    if key:
        return f"{key}: {message}"
    if "Could not find" in str(error):  # a choice that a group does not have
        missing = re.search(r"Could not find '(\w+)/(.*)'", str(error))
        options = re.search(r"Available options in .*:\n((?:\t.*\n)*)", str(error))
        if missing and options:
            group, choice = missing.groups()
            names = options.group(1).split()
            return f"there is no {group}={choice}{config.closest(choice, names)}; {group} is one of {', '.join(names)}"
    return " ".join(str(error).split())


def _unknown_key(key: str, names: list[str]) -> str:
    prefix, _, last = key.rpartition(".")
    prefix = f"{prefix}." if prefix else ""
    allowed = f"; {prefix.rstrip('.') or 'the top level'} has {', '.join(names)}" if names else ""
    return f"unknown key {key}{config.closest(last, names, prefix)}{allowed}"
