"""Requests to several equal HTTP servers: whichever answers gets the next one, and one that does not is left alone.

A server error, a time-out or a refused connection is tried again, at another server or later, for `PATIENCE` seconds:
servers may be killed, and started again at the same address. What a server refuses (a wrong key,
a bad request) is final. The key, from OPENAI_API_KEY, is sent to these addresses and to no other (redirects are not
followed), and stands in no message. Left out: streaming, and connections that stay open between requests.
"""

import http.client
import itertools
import json
import os
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future, as_completed
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from align.say import UserError

Body = dict[str, Any]  # of a request
Send = Callable[[str, Body | None], Any]  # (path, body or None for GET) -> the parsed answer of one server

TIMEOUT = 600.0  # seconds of silence after which a request is tried again: a model may think for long
PATIENCE = 900.0  # seconds after which a request that no server answers is an error: one may be started again
_PAUSES = (0.25, 30.0)  # seconds for which a server is left alone: after its first failure in a row, and at most
_WORTH_A_LINE = 2  # failures in a row after which one more is said: a server that is busy now and then is no news
_TRIES = 5  # of a request at least, where servers take longer to fail than that
_TRY_LATER = (408, 425, 429)  # statuses below 500 that say nothing about the request


class _Silent(Exception):  # noqa: N818 - read in `except _Silent`
    """Raised when a server did not answer; the text says how."""


class _AnyStatus(urllib.request.HTTPErrorProcessor):
    def http_response(self, request: Any, response: Any) -> Any:
        """Return the answer whatever its status. A redirect is not followed: the key would go along."""
        return response

    https_response = http_response


class Servers:
    """Equal servers behind one `ask`, which many threads may call."""

    def __init__(
        self, urls: Sequence[str], setting: str, check: Callable[[str, Send, Body], None] = lambda url, send, body: None
    ) -> None:
        """Check the addresses of the knob `setting`; nothing is sent yet.

        `check` is called with each server and its first POST, before that is sent, and again after it was away; it raises
        UserError for one that cannot be used.
        """
        if not urls:
            raise UserError(f"{setting} is empty: give the servers, e.g. '{setting}=[http://localhost:8000]'")
        self._urls = [_base(url, setting) for url in urls]
        self._setting, self._check = setting, check
        self._lock = threading.Lock()
        self._turns = itertools.count()
        self._failures = dict.fromkeys(self._urls, 0)  # in a row
        self._rests_until = dict.fromkeys(self._urls, 0.0)
        self._checked: set[str] = set()
        self._checking = {url: threading.Lock() for url in self._urls}
        self._opener = urllib.request.build_opener(_AnyStatus())

    def ask(self, path: str, body: Body | None = None, over: threading.Event | None = None) -> Any:
        """Return the parsed answer of one of the servers to a POST of `body`, or to a GET where there is none.

        `over` is set when nobody waits for the answer any more.
        """
        over = over or threading.Event()
        started, tries = time.monotonic(), 0
        while True:
            url, pause = self._next()
            if over.wait(pause):
                raise UserError("the request was given up")
            try:
                if body is not None:
                    self._once_checked(url, body)
                answer = self._send(url, path, body)
            except _Silent as error:
                self._rest(url, str(error))
                tries += 1
                if tries >= _TRIES and time.monotonic() - started > PATIENCE:
                    raise UserError(
                        f"no answer from {self._setting} in {tries} tries and {PATIENCE:.0f} s; last, {url}: "
                        f"{error}. Start the servers, then type the command again: what is finished is kept"
                    ) from error
            else:
                self._failures[url] = 0
                return answer

    def _next(self) -> tuple[str, float]:
        """Return the server whose turn it is among those that do not rest, and how long to wait for it."""
        with self._lock:
            at = next(self._turns) % len(self._urls)
            in_turn = self._urls[at:] + self._urls[:at]
            url = min(in_turn, key=lambda url: max(self._rests_until[url], time.monotonic()))
            return url, max(0.0, self._rests_until[url] - time.monotonic())

    def _rest(self, url: str, reason: str) -> None:
        """Leave a server alone for a while. Requests that were under way together count as one failure."""
        with self._lock:
            if self._rests_until[url] > time.monotonic():
                return
            if self._failures[url] == _WORTH_A_LINE:
                tqdm.write(f"align: {url}: {reason}; trying again for {PATIENCE:.0f} seconds", file=sys.stderr)
            self._rests_until[url] = time.monotonic() + min(_PAUSES[1], _PAUSES[0] * 2 ** self._failures[url])
            self._failures[url] = min(self._failures[url] + 1, 16)

    def _once_checked(self, url: str, body: Body) -> None:
        with self._checking[url]:
            if url not in self._checked:
                self._check(url, partial(self._send, url), body)
                self._checked.add(url)

    def _send(self, url: str, path: str, body: Body | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY", "").strip():
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url + path, data, headers)
        try:
            with self._opener.open(request, timeout=TIMEOUT) as answer:
                content, status, reason = answer.read(), answer.status, answer.reason
            if status < 300:
                return json.loads(content)
        except (OSError, http.client.HTTPException, ValueError) as error:  # refused, reset, timed out, cut, no JSON
            reason = getattr(error, "reason", error)
            if isinstance(reason, ConnectionRefusedError):
                self._checked.discard(url)  # it is gone, and may come back as another
            raise _Silent(str(reason) or type(reason).__name__) from error
        said = " ".join(content[:2000].decode(errors="replace").split())[:300].replace(key or "\0", "***")
        if status >= 500 or status in _TRY_LATER:
            raise _Silent(f"status {status} {said}")
        if status in (401, 403):
            raise UserError(f"{url} refuses the key (status {status}): set OPENAI_API_KEY to one of it")
        raise UserError(f"{url}{path} answers with status {status}: {said or reason}")


def in_threads(ask: Callable[[Any, threading.Event], Any], jobs: Sequence[Any], threads: int) -> list[Any]:
    """Return `[ask(job, over) for job in jobs]`, `threads` at a time.

    After the first exception, Ctrl-C included, `over` is set, and nobody waits for the other threads: a pool of the
    standard library would, for as long as a server is silent.
    """
    over, lock = threading.Event(), threading.Lock()
    answers: list[Future[Any]] = [Future() for _ in jobs]
    todo = zip(answers, jobs, strict=True)

    def work() -> None:
        while not over.is_set():
            with lock:
                answer, job = next(todo, (None, None))
            if answer is None:
                return
            try:
                answer.set_result(ask(job, over))
            except BaseException as error:
                answer.set_exception(error)

    for _ in range(min(threads, len(jobs))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for answer in as_completed(answers):
            answer.result()
    finally:
        over.set()
    return [answer.result() for answer in answers]


def _base(url: str, setting: str) -> str:
    """Return the URL with its path, without a slash at the end."""
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query:
        raise UserError(f"{setting}: an address holds more than host, port and path; a key goes into OPENAI_API_KEY")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(f"{setting}: {url!r} is no address such as http://localhost:8000")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"
