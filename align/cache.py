"""Files that are whole or not there. Build a folder once, whoever asks: many runs, many ranks, at the same moment, killed at any moment.

A folder under the cache exists only when it is whole: it is built beside its place and renamed into it, under a
lock that the others wait for. Nothing here ever deletes what a build has finished.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from align.config import UserError


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, after `build(temporary folder)` has filled it, now or earlier. Returns `folder`.

    Raises:
        UserError: the cache cannot be written.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock")
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"cache_dir: cannot write {folder.parent} ({error.strerror}); set cache_dir= or ALIGN_CACHE"
        ) from error
    with lock:
        if folder.is_dir():
            return folder
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a build that was killed: the lock is ours now
        unfinished.mkdir()
        build(unfinished)
        unfinished.replace(folder)
    return folder


def write_json(file: Path, value: Any) -> None:
    """Write `value` as JSON: whole, or not at all."""
    unfinished = file.with_suffix(".unfinished")
    with unfinished.open("w") as out:
        json.dump(value, out, indent=2, default=str)
        out.flush()
        os.fsync(out.fileno())  # a rename may reach the disk before what it renames
    unfinished.replace(file)
