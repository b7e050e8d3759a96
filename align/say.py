"""Lines for people: what is printed, once per run, and errors that the user can put right."""

import difflib
import importlib
import os
from collections.abc import Callable
from typing import Any

FULL_ERROR = os.environ.get("HYDRA_FULL_ERROR") == "1"


def is_first() -> bool:
    """Of several processes that were started from outside, the one that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


class UserError(ValueError):
    """Something the user can put right. Shown as one line; the message says what to type."""


class Stopped(KeyboardInterrupt):
    """A run was asked to stop (Ctrl-C, SIGTERM) and has written a checkpoint; a sweep stops with it. Shown as one line."""

    def __init__(self, text: str, time_is_up: bool = False) -> None:
        super().__init__(text)
        self.time_is_up = time_is_up  # SLURM's warning: the job is to be queued again


def closest(word: str, names: list[str], prefix: str = "") -> str:
    """ " (did you mean ...?)", where one of the names is close to the word."""
    close = difflib.get_close_matches(word, names, n=1)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""


def resolve(reference: str, key: str) -> Callable[..., Any]:
    """The function that "module:function" names; `key` is the knob it came from, for the error."""
    module, _, name = reference.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f'{key}={reference} is not "module:function" of something importable: {error}') from error
    assert callable(function)
    return function


def say(text: str) -> None:
    """Print, once per run."""
    if is_first():
        print(text)


def quieten() -> None:
    """No progress bars and notes of libraries: ours say what matters."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
