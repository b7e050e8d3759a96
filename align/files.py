"""Files that are whole or not there, and locks for who makes them. Build a folder once, whoever asks: many runs, many ranks, at the same moment, killed at any moment.

A folder under the cache exists only when it is whole: it is built beside its place and renamed into it, under a
lock that the others wait for. Nothing here ever deletes what a build has finished.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from align.say import UserError

_SILENCE = 3.0  # seconds without a word while another process builds


def build_once(
    folder: Path, build: Callable[[Path], None], remedy: str = "set cache_dir= or ALIGN_CACHE", what: str = ""
) -> Path:
    """`folder`, after `build(temporary folder)` has filled it, now or earlier. Returns `folder`.

    `what` it is, for a line that says that it was made: the log of a sweep then shows what its runs share once.

    Raises:
        UserError: it cannot be written; the message ends with the remedy.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock")
        try:
            lock.acquire(timeout=_SILENCE)
        except Timeout:
            print(f"align: waiting for another process, which makes {folder}", file=sys.stderr)
            lock.acquire()
    except OSError as error:
        raise UserError(f"cannot write {folder.parent} ({error.strerror}); {remedy}") from error
    with lock:
        if folder.is_dir():
            return folder
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a build that was killed: the lock is ours now
        unfinished.mkdir()
        began = time.perf_counter()
        build(unfinished)
        unfinished.replace(folder)
        if what:
            say_made(what, began, folder)
    return folder


def say_made(what: str, began: float, folder: Path) -> None:
    """One line about what is in the cache from now on; `began` by `time.perf_counter`."""
    print(f"made {what} in {time.perf_counter() - began:.1f} s: {folder}", flush=True)


def write_json(file: Path, value: Any) -> None:
    """Write `value` as JSON: whole, or not at all."""
    write_text(file, json.dumps(value, indent=2, default=str))


def write_text(file: Path, text: str) -> None:
    """Write a file: whole, or not at all."""
    unfinished = file.with_suffix(".unfinished")
    with unfinished.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())  # a rename may reach the disk before what it renames
    unfinished.replace(file)


class Claim(Enum):
    """What becomes of a shard that was missing."""

    ours = "ours"  # its lock is ours
    theirs = "theirs"  # another process is about it
    done = "done"  # another process has made it meanwhile


def lock_of(file: Path, timeout: float) -> FileLock:
    """The lock of a file, in a folder of their own: the files beside it are for people to read."""
    return FileLock(file.parent / "locks" / f"{file.name}.lock", timeout=timeout)


@contextlib.contextmanager
def claimed(file: Path, wait: bool) -> Iterator[Claim]:
    """What to do about a shard; with `wait`, whoever is about it finishes or dies first."""
    lock = lock_of(file, -1 if wait else 0)
    try:
        with writing(f"cannot write {file.parent}", ": name another folder"):
            lock.acquire()
    except Timeout:
        yield Claim.theirs
        return
    try:
        yield Claim.done if file.exists() else Claim.ours
    finally:
        lock.release()


@contextlib.contextmanager
def writing(what: str, remedy: str) -> Iterator[None]:
    """Turn what a disk refuses into one line: "<what> (<why>)<remedy>"."""
    try:
        yield
    except Timeout:  # which is an OSError
        raise
    except (OSError, SafetensorError) as error:
        raise UserError(f"{what} ({getattr(error, 'strerror', None) or error}){remedy}") from error


def fingerprint(*parts: Any) -> str:
    """Sixteen hex digits that change when any of these JSON-able values does."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_fingerprint(path: Path) -> str:
    """Sixteen hex digits of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def differences(before: Any, now: Any, key: str = "") -> list[str]:
    """ "key: was -> is" for every value that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            difference
            for name in sorted({*before, *now})
            for difference in differences(before.get(name), now.get(name), f"{key}.{name}".lstrip("."))
        ]
    return [] if before == now else [f"{key}: {before} -> {now}"]
