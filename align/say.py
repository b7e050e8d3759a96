"""Lines for people: those that are printed, once per run, and errors that the user can correct."""

import difflib
import importlib
import os
from collections.abc import Callable
from typing import Any

FULL_ERROR = os.environ.get("HYDRA_FULL_ERROR") == "1"


def is_first() -> bool:
    """Return True on rank 0, or when not distributed."""
    return os.environ.get("RANK", "0") == "0"


class UserError(ValueError):
    """An error that the user can correct. Shown as one line; the message says what to type."""


class Stopped(KeyboardInterrupt):
    """The end of a run that was asked to stop (Ctrl-C, SIGTERM); a sweep stops with it. Shown as one line."""

    def __init__(self, text: str, time_is_up: bool = False) -> None:
        super().__init__(text)
        self.time_is_up = time_is_up  # SLURM's warning: the job must be queued again


def closest(word: str, names: list[str], prefix: str = "") -> str:
    """Return " (did you mean ...?)" with the name that is close to the word, or nothing if none is."""
    close = difflib.get_close_matches(word, names, n=1)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""


def unknown_key(key: str, names: list[str]) -> str:
    """Say that a node has no such key, and which keys it has; `names` is empty where these are not known."""
    node, dot, last = key.rpartition(".")
    allowed = f"; {node or 'the top level'} has {', '.join(names)}" if names else ""
    return f"unknown key {key}{closest(last, names, node + dot)}{allowed}"


def resolve(reference: str, key: str) -> Callable[..., Any]:
    """Import the function that "module:function" names. `key` is the knob that holds the name, for the error."""
    module, _, name = reference.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f'{key}={reference} is not "module:function" of something importable: {error}') from error
    assert callable(function)
    return function


def first_line(error: Exception) -> str:
    """Return the first line of an error's message that says anything, or else the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def say(text: str) -> None:
    """Print on rank 0 only."""
    if is_first():
        print(text, flush=True)


def quieten() -> None:
    """Turn off progress bars and notes of libraries."""
    import datasets
    import huggingface_hub
    import transformers

    datasets.disable_progress_bars()
    huggingface_hub.logging.set_verbosity_error()  # without a network it tells of each of its retries
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
