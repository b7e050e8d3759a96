"""Hydra, set up for align: the folders of YAML, the recipe of a command, names of sweeps, and errors in one line.

Four things differ from plain Hydra. The two words of a command choose the recipe,
`experiments/recipe/<model>_<objective>.yaml` or else `<model>.yaml`, which may choose the dataset (an interpolated
defaults list may not). Keys of open nodes, such as `objective`, need no `+`; they are checked by the code that reads
them. A sweep is named after its words, so that the same command is the same sweep. An error is one line that names the
key and what is allowed.
"""

import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import hydra._internal.hydra as hydra_internals
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.errors import OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import MissingMandatoryValue

from align.config import RunConfig, is_group
from align.files import fingerprint
from align.say import UserError, closest, unknown_key

_ALIGN = Path(__file__).resolve().parent.parent


def shipped(folder: str) -> Path:
    """Find `conf` or `experiments`: inside the installed package, or beside it in a checkout."""
    installed = _ALIGN / folder
    return installed if installed.is_dir() else _ALIGN.parent / folder


CONF = shipped("conf")
#: Open nodes by command, whose keys are typed without the `+` that Hydra asks for.
_OPEN = {
    "config": r"^((?:objective|optimizer)\.|(?:model\.(?:lora|init|shape)|dataset\.(?:columns|mix)|source\.candidates|"
    r"scorer\.judge\.request|cluster\.slurm\.options)[.=])",
    "evaluate": r"^((?:suite|sampling)\.|(?:scorer\.judge\.request|cluster\.slurm\.options)[.=])",
}


class Loader(ConfigLoaderImpl):
    """Hydra's loader, over `conf/` and `experiments/`, with the two words of a command turned into a recipe."""

    help_text = ""
    groups: Collection[str] | None = None  # of the command that was composed

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        config_search_path.prepend("experiments", f"file://{shipped('experiments')}")
        super().__init__(config_search_path)

    def load_configuration(
        self, config_name: str | None, overrides: list[str], run_mode: RunMode, *args: Any, **kwargs: Any
    ) -> DictConfig:
        """Compose the configuration of a job, or the part that all jobs of a sweep share, as each picks its recipe."""
        typed, root = overrides, config_name or "config"
        defaults = [entry for entry in OmegaConf.load(CONF / f"{root}.yaml").defaults if isinstance(entry, DictConfig)]
        choices = {str(key): value for entry in defaults for key, value in entry.items()}
        groups = "|".join(choices)
        optional = [f"{group}=null" for group, choice in choices.items() if choice is None and group != "recipe"]
        overrides = [override for override in overrides if override not in optional]  # Hydra accepts null in YAML only
        overrides = [re.sub(rf"^({groups})=null$", r"\1=none", override) for override in overrides]
        overrides = [re.sub(rf"^({groups})=(\d.*)$", r"\1='\2'", override) for override in overrides]
        overrides = [re.sub(_OPEN[root], r"++\1", override) for override in overrides]
        if "recipe" in choices and run_mode is RunMode.RUN:
            chosen = choices | dict(o.split("=", 1) for o in overrides if "=" in o)
            recipes = (f"{chosen['model']}_{chosen['objective']}", chosen["model"])
            found = next((name for name in recipes if self.repository.config_exists(f"recipe/{name}")), None)
            if chosen["recipe"] is None and found is not None:
                overrides = [f"recipe={found}", *overrides]
        try:
            cfg = super().load_configuration(config_name, overrides, run_mode, *args, **kwargs)
        except ValueError as error:  # Hydra's error for `model=3`
            words = " ".join(overrides)
            raise UserError(f"{error} (in {words}): a group takes one of its choices, as in model=tiny") from error
        if config_name is not None:
            with flag_override(cfg, ["readonly", "struct"], False):  # the words as they were typed
                cfg.hydra.overrides.task = [word for word in typed if not re.match(r"[+~]*hydra[./]", word)]
                cfg.hydra.help.header = self.help_text
            self.groups = choices.keys()
        return cfg

    def list_groups(self, parent_name: str) -> list[str]:
        """List the groups of this command: conf/ holds those of other commands too."""
        found = super().list_groups(parent_name)
        return found if parent_name or self.groups is None else [group for group in found if group in self.groups]

    def get_group_options(self, group_name: str, results_filter: Any = ObjectType.CONFIG, **_: Any) -> list[str]:
        """List the choices of a group. Hydra copies every cached config for each group: half of `--help`'s time."""
        return self.repository.get_group_options(group_name, results_filter)


#: Words that cannot change the results of a sweep.
_INDIFFERENT = r"^(?:tracker|cluster|engine|cache_dir|plan)\b"


def sweep_name(words: Sequence[str]) -> str:
    """Name a sweep, for its folder under runs/groups and for the tracker.

    The name is `tracker.group` if that is typed, else the words in brief and six digits of all of them.
    """
    typed = [word for word in words if "=" in word and not word.startswith("hydra")]
    groups = [word.partition("=")[2].strip("'\"") for word in typed if re.match(r"\+*tracker\.group=", word)]
    if groups and groups[-1] != "null" and is_group(groups[-1]):
        return groups[-1]
    kept = [word for word in typed if not re.match(_INDIFFERENT, word)]
    brief = "_".join(word.partition("=")[0].rpartition(".")[2] + "-" + word.partition("=")[2] for word in kept)
    brief = re.sub(r"[^\w.-]+", "-", brief).strip("-")[:60]
    return f"{brief or 'sweep'}_{fingerprint(sorted(kept))[:6]}"


def install(schema: type = RunConfig, help_text: str = "") -> None:
    """Make `hydra.main` use our loader, know the typed schema, and open `--help` with this text."""
    Loader.help_text = help_text
    OmegaConf.register_new_resolver("sweep_name", lambda: sweep_name(sys.argv[1:]), replace=True)
    ConfigStore.instance().store(name="schema", node=schema)
    hydra_internals.ConfigLoaderImpl = Loader


def one_line(error: BaseException) -> str:
    """Turn a multi-line error of Hydra or OmegaConf into one line that names the key and what is allowed."""
    cause = error
    while cause.__cause__ is not None and not hasattr(cause, "full_key"):
        cause = cause.__cause__
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}: write key=value, in quotes where the value has brackets, spaces or $"
    key, parent = getattr(cause, "full_key", None), getattr(cause, "object_type", None)
    message = str(cause).splitlines()[0]
    if key and re.match(r"Key '.*' (is )?not in", message):
        return unknown_key(key, list(getattr(parent, "__dataclass_fields__", {})))
    if key and isinstance(cause, MissingMandatoryValue):
        return f"{key} has no value yet: type {key}=..."
    if key and "is not a ListConfig" in message:
        return f"{key} takes a list: type '{key}=[first, second]'"
    if key:
        return f"{key}: {message}"
    if several := re.search(r"(?:Sweep parameters|Ambiguous value for argument) '\+*([^']*)'", str(error)):
        return (
            f"{several[1]} are several values: type -m for a run of each, or search=optuna for a search in an interval "
            "(if that is typed, a word that begins with hydra. is misspelled)"
        )
    if foreign := re.match(r"Could not override '(\w+)'", str(error)):  # a group of another command
        return f"{foreign[1]} is no word of this command; --help lists those that are"
    if "hydra/sweeper/optuna" in str(error):
        return "search=optuna needs a package: pip install hydra-optuna-sweeper"
    missing = re.search(r"Could not find '(\w+)/(.*)'", str(error))
    options = re.search(r"Available options in .*:\n((?:\t.*\n)*)", str(error))
    if missing and options:
        (group, choice), names = missing.groups(), options[1].split()
        return f"there is no {group}={choice}{closest(choice, names)}; {group} is one of {', '.join(names)}"
    return " ".join(str(error).split())
