"""Files that are whole or not there, and locks that decide which process makes them.

    whole          a file written beside its place and renamed into it
    build_once     a folder of the cache, built beside its place by one process while the others wait
    Shards         JSON rows in files of one folder, which any number of processes write together
    fingerprint    sixteen hex digits of a value, or of a file

Processes may be killed at any moment: the lock goes with the process, and the next one starts that file or folder anew.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from tqdm import tqdm

from align.say import UserError

MANIFEST = "manifest.json"
_AGAIN = "type the command that makes it again"
_SILENCE = 3.0  # seconds without a word while another process builds
_BAR_SHARDS = 4  # a progress bar over fewer shards is noise


@contextlib.contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Yield a path to write to, and put what was written there in the place of `file`: whole, or not at all."""
    unfinished = file.with_suffix(".unfinished")
    yield unfinished
    with unfinished.open("rb") as written:
        os.fsync(written.fileno())  # a rename may reach the disk before what it renames
    unfinished.replace(file)


def write_text(file: Path, text: str) -> None:
    """Write a file: whole, or not at all."""
    with whole(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(file: Path, value: Any) -> None:
    """Write `value` as JSON: whole, or not at all."""
    write_text(file, json.dumps(value, indent=2, default=str))


@contextlib.contextmanager
def writing(what: str, remedy: str) -> Iterator[None]:
    """Turn what a disk refuses into one line: "<what> (<why>)<remedy>"."""
    try:
        yield
    except Timeout:  # which is an OSError
        raise
    except (OSError, SafetensorError) as error:
        raise UserError(f"{what} ({getattr(error, 'strerror', None) or error}){remedy}") from error


def build_once(
    folder: Path, build: Callable[[Path], None], remedy: str = "set cache_dir= or ALIGN_CACHE", what: str = ""
) -> Path:
    """Return `folder`, filled by `build(temporary folder)` now or earlier; `what` is named in a line, `remedy` in an error."""
    if folder.is_dir():
        return folder
    with writing(f"cannot write {folder.parent}", f"; {remedy}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock")
        try:
            lock.acquire(timeout=_SILENCE)
        except Timeout:
            print(f"align: waiting for another process, which makes {folder}", file=sys.stderr)
            lock.acquire()
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
    """Print one line about what is in the cache from now on; `began` by `time.perf_counter`."""
    print(f"made {what} in {time.perf_counter() - began:.1f} s: {folder}", flush=True)


def check_manifest(folder: Path, inputs: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return the manifest of a folder of `what`, such as "pairs", or raise `UserError` with the inputs that differ."""
    remedy = "delete it, or name another"
    manifest = _read_manifest(folder, what, remedy)
    if differ := differences({name: manifest.get(name) for name in inputs}, as_json(inputs)):
        raise UserError(f"{folder} holds {what} of other inputs ({'; '.join(differ)}): {remedy}")
    return manifest


def _read_manifest(folder: Path, what: str, remedy: str) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder} holds no {what}: {remedy}") from error
    except ValueError as error:
        raise UserError(f"{folder / MANIFEST} is damaged ({error}): delete {folder}, and {_AGAIN}") from error
    return manifest


def as_json(value: Any) -> Any:
    """Return `value` as it would be read from a file: tuples are lists, choices are their values."""
    return json.loads(json.dumps(value, default=lambda it: it.value if isinstance(it, Enum) else str(it)))


@dataclass(frozen=True, kw_only=True)
class Shards:
    """JSON rows in the files of one folder, which any number of processes, jobs and machines write together.

        <folder>/manifest.json            the inputs that decide the rows; a folder of other inputs is refused
        <folder>/00000-of-00007.jsonl     a shard: a row a line, written whole or not there
        <folder>/locks/                   a lock for each file, held by the process that makes it

    A process takes the next shard that no other works on, and at the end waits for those that others work on, or
    makes them itself where these have died. A killed process loses one shard.
    """

    folder: Path
    what: str  # the rows are, for messages: "responses"
    count: int  # shards
    rows: int  # in all of them
    remedy: str = ": name another folder"  # for a folder that cannot be written

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """Write the manifest, or raise `UserError` where the one that is there has other inputs."""
        inputs = {**inputs, "shards": self.count, "rows": self.rows}
        with self._writing():
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            with self._lock(MANIFEST):
                if not (self.folder / MANIFEST).exists():
                    write_json(self.folder / MANIFEST, as_json(inputs))
        check_manifest(self.folder, inputs, self.what)

    @classmethod
    def open(cls, folder: Path, what: str, remedy: str) -> "Shards":
        """Find the shards that another command has begun; the remedy says what to type where there are none."""
        manifest = _read_manifest(folder, what, remedy)
        if not {"shards", "rows"} <= manifest.keys():
            raise UserError(f"{folder} holds {what} of another version of align: delete it, and {_AGAIN}")
        return cls(folder=folder, what=what, count=manifest["shards"], rows=manifest["rows"])

    def missing(self) -> list[int]:
        """Return the numbers of the shards that are not there."""
        return [number for number in range(self.count) if not self._file(number).exists()]

    def claim(self, title: str = "", decide: Callable[[Callable[[], Any]], Any] = lambda make: make()) -> Iterator[int]:
        """Yield the number of each missing shard while this process holds its lock, for the caller to write it.

        Args:
            title: of a progress bar; empty for none.
            decide: returns what rank 0 makes, on all processes that make each shard together: `Rank.from_first`.
        """
        total = len(decide(self.missing))
        with tqdm(total=total, desc=title, unit="shard", disable=not title or total < _BAR_SHARDS) as bar:
            for timeout in (0, -1):  # first what no one works on, then what others have not finished
                for number in decide(self.missing):
                    lock = self._lock(self._file(number).name, timeout)
                    try:
                        if decide(partial(self._take, number, lock)):
                            yield number
                    finally:
                        lock.release()
                    if not bar.disable:  # others have been at work too
                        bar.update(total - len(self.missing()) - bar.n)

    def write(self, number: int, rows: Iterable[Any]) -> None:
        """Write a shard that this process has claimed."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with self._writing():
            write_text(self._file(number), text)

    def read(self, parse: Callable[[Any], Any] = lambda row: row) -> list[Any]:
        """Return the rows of all shards in order, as `parse` makes them, or raise `UserError` for one that is damaged."""
        rows: list[Any] = []
        for file in map(self._file, range(self.count)):
            try:
                with file.open(encoding="utf-8") as lines:
                    rows += [parse(json.loads(line)) for line in lines]
            except FileNotFoundError as error:
                raise UserError(f"{self.folder} is not finished, {file.name} is missing: {_AGAIN}") from error
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{file} is damaged ({error}): delete it, and {_AGAIN}") from error
        if (count := len(rows)) != self.rows:
            raise UserError(f"{self.folder} holds {count} {self.what} in place of {self.rows}: delete it, and {_AGAIN}")
        return rows

    def _take(self, number: int, lock: FileLock) -> bool:
        """Return True with the lock of a shard that is still to be made; False while another process works on it."""
        try:
            with self._writing():
                lock.acquire()
        except Timeout:
            return False
        return not self._file(number).exists()

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05}-of-{self.count:05}.jsonl"

    def _lock(self, name: str, timeout: float = -1) -> FileLock:
        return FileLock(self.folder / "locks" / f"{name}.lock", timeout=timeout)

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return writing(f"cannot write {self.folder}", self.remedy)


def fingerprint(*parts: Any) -> str:
    """Return sixteen hex digits that change when any of these JSON-able values does."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_fingerprint(path: Path) -> str:
    """Return sixteen hex digits of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted keys, as they are typed; an empty node has none."""
    made: dict[str, Any] = {}
    for name, value in node.items():
        made |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return made


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return "key: was -> is" for every value that differs, long ones cut."""
    was, made = flat(before), flat(now)
    differing = sorted(key for key in {*was, *made} if was.get(key) != made.get(key))
    return [f"{key}: {_short(was.get(key))} -> {_short(made.get(key))}" for key in differing]


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) < 60 else f"{text[:57]}..."
