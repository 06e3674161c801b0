"""Fetch one file over HTTP: resume, retries, hash; every failure as an error that says what to do.

Standard library only. A proxy is taken from the usual variables (HTTPS_PROXY and so on).
"""

from __future__ import annotations

import email.message
import errno
import hashlib
import http.client
import json
import os
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from chatfine.errors import ChatfineError
from chatfine.hub.refusals import (
    MODEL,
    Repository,
    asked_pause,
    bad_answer,
    cut_off,
    disk_full,
    status_error,
    unreachable,
    wrong_hash,
    wrong_length,
)
from chatfine.i18n import t

T = TypeVar("T")

CONNECT_SECONDS = 5.0  # per address; a host that is cut off must not hold up `--source auto`
ANSWER_SECONDS = 12.0  # for a whole listing, name look-up and all addresses included
READ_SECONDS = 30.0
PAUSE_SECONDS = 1.0  # before the first retry; doubled each time
LONGEST_PAUSE_SECONDS = 20.0
RETRIES = 4
LISTING_RETRIES = 2
_CHUNK_BYTES = 1 << 20
_MAX_LISTING_BYTES = 64 << 20
_CUT = (OSError, http.client.HTTPException)  # URLError, timeouts and resets are OSErrors


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a hub and how to know that it arrived whole: its SHA-256, or its git blob id.

    `name` may hold folders, with slashes. Without either hash only the length is compared.
    """

    name: str
    url: str
    size: int
    sha256: str = ""
    git_id: str = ""
    repository: Repository = MODEL


class _KeepTokenAtHome(urllib.request.HTTPRedirectHandler):
    """Follow redirects, but hand the token on only to the same host (not to a storage provider)."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage | email.message.Message,
        newurl: str,
    ) -> urllib.request.Request | None:
        new = super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]
        old_host, new_host = (urllib.parse.urlsplit(url)[:2] for url in (req.full_url, newurl))
        if new is not None and old_host == new_host and "Authorization" in req.unredirected_hdrs:
            new.add_unredirected_header("Authorization", req.unredirected_hdrs["Authorization"])
        return new


def _open(url: str, token: str, timeout: float, start: int = 0) -> http.client.HTTPResponse:
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise bad_answer(url, t("its address is not one of http or https"))
    request = urllib.request.Request(url, headers={"User-Agent": "chatfine"})
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    if start:
        request.add_header("Range", f"bytes={start}-")
    opener = urllib.request.build_opener(_KeepTokenAtHome)
    return opener.open(request, timeout=timeout)  # type: ignore[no-any-return]


def fetch_json(url: str, token: str = "", repository: Repository = MODEL) -> Any:
    """GET a listing; a busy or broken server is asked again LISTING_RETRIES times.

    One answer takes at most ANSWER_SECONDS, whatever the network does.
    """
    raw = fetch_bytes(url, token, repository)
    try:
        return json.loads(raw)
    except ValueError:
        start = raw[:60].decode("utf-8", "replace").replace("\n", " ")
        raise bad_answer(url, t("it is not JSON: {start}", start=start), repository) from None


def fetch_bytes(url: str, token: str = "", repository: Repository = MODEL) -> bytes:
    """GET something small, as `fetch_json` does."""

    def ask() -> bytes:
        with _open(url, token, CONNECT_SECONDS) as response:
            return response.read(_MAX_LISTING_BYTES)

    return _patiently(ask, url, token, repository)


def remote_size(url: str, repository: Repository = MODEL) -> int:
    """Bytes of the file at `url`, as a GET announces them; nothing of it is read."""

    def ask() -> str:
        with _open(url, "", CONNECT_SECONDS) as response:
            return response.headers.get("Content-Length", "")

    announced = _patiently(ask, url, "", repository)
    if not announced.isdigit():
        raise bad_answer(url, t("it does not say how long the file is"), repository)
    return int(announced)


def _patiently(ask: Callable[[], T], url: str, token: str, repository: Repository) -> T:
    """What `ask` returns; a busy or broken server is asked again LISTING_RETRIES times."""
    for attempt in range(LISTING_RETRIES + 1):
        try:
            return _within(ANSWER_SECONDS, ask)
        except urllib.error.HTTPError as error:
            if attempt == LISTING_RETRIES or not _worth_waiting(error):
                raise status_error(error, url, repository, bool(token)) from None
            pause = max(PAUSE_SECONDS * 2**attempt, asked_pause(error))
            time.sleep(min(pause, LONGEST_PAUSE_SECONDS))
        except _CUT as error:
            raise unreachable(url, error, repository) from None
    raise AssertionError("the last attempt returns or raises")


def _within(seconds: float, ask: Callable[[], T]) -> T:
    """The result of `ask`, or TimeoutError; a look-up that hangs is left behind in its thread."""
    answers: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue()

    def work() -> None:
        try:
            answers.put((ask(), None))
        except BaseException as error:  # handed to the caller's thread
            answers.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(t("no answer within {n} s", n=round(seconds))) from None
    if error is not None:
        raise error
    return answer  # type: ignore[return-value]


def fetch_file(
    file: RemoteFile,
    folder: Path,
    token: str = "",
    on_bytes: Callable[[int], None] = lambda count: None,
) -> Path:
    """Fetch `file` into `folder`; go on where an earlier try was cut; check its hash.

    Args:
        on_bytes: called with the change of the number of bytes that are here (also negative).

    Raises:
        ModelError: hub-… for the hub's refusals, download-cut, download-hash, hub-bad-answer.
    """
    final, part = folder / file.name, folder / f"{file.name}.part"
    if final.is_file():
        if _is_whole(final, file):
            on_bytes(file.size)
            return final
        final.unlink()
    final.parent.mkdir(parents=True, exist_ok=True)
    for may_restart in (part.exists(), False):
        _fetch_part(file, part, token, on_bytes)
        if _is_whole(part, file):
            os.replace(part, final)
            return final
        on_bytes(-part.stat().st_size)
        with part.open("rb") as stream:
            start = stream.read(200)
        part.unlink()
        if not may_restart:
            break
    if looks_like_html(start):
        raise _web_page(file)
    raise wrong_hash(file.url, file.name, file.repository)


def _fetch_part(file: RemoteFile, part: Path, token: str, on_bytes: Callable[[int], None]) -> None:
    """Bring `part` to the full size, over as many connections as it takes while bytes arrive."""
    part.touch()
    have = _size(part)
    on_bytes(have)
    failures, restarted = 0, False
    while have < file.size:
        reason: str | BaseException
        pause = PAUSE_SECONDS * 2**failures
        try:
            _read_some(file, part, token, on_bytes)
            reason = t("the connection ended early")
        except urllib.error.HTTPError as error:
            if error.code == 416 and have and not restarted:  # what is here does not fit the file
                part.unlink()
                on_bytes(-have)
                restarted = True
            elif failures >= RETRIES or not _worth_waiting(error):
                repository = file.repository
                raise status_error(error, file.url, repository, bool(token), file.name) from None
            reason, pause = error, max(pause, asked_pause(error))
        except _CUT as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise disk_full(part.parent, file.size - _size(part)) from None
            reason = error
        before, have = have, _size(part)
        failures = 0 if have > before else failures + 1
        if have < file.size:
            if failures > RETRIES:
                raise cut_off(file.url, file.name, have, file.size, reason, file.repository)
            time.sleep(min(pause, LONGEST_PAUSE_SECONDS) if failures else 0)


def _read_some(file: RemoteFile, part: Path, token: str, on_bytes: Callable[[int], None]) -> None:
    have = _size(part)
    with _open(file.url, token, READ_SECONDS, have) as response:
        kind = response.headers.get_content_type()
        if kind == "text/html" and not file.name.lower().startswith(("readme", "licen")):
            raise _web_page(file)
        resumed = response.status == 206 and _range_start(response) == have
        begin = have if resumed else 0
        _check_length(file, response, begin)
        if have and not resumed:  # the server sends the whole file again
            on_bytes(-have)
        with part.open("ab" if resumed else "wb") as stream:
            room = file.size - begin + 1  # one byte too many fails the hash
            while room > 0 and (chunk := response.read(min(_CHUNK_BYTES, room))):
                stream.write(chunk)
                on_bytes(len(chunk))
                room -= len(chunk)
            stream.flush()
            os.fsync(stream.fileno())


def _check_length(file: RemoteFile, response: http.client.HTTPResponse, begin: int) -> None:
    """Refuse an answer whose announced length does not make the whole file."""
    announced = response.headers.get("Content-Length", "")
    if not announced.isdigit() or response.headers.get("Content-Encoding"):
        return  # nothing to compare: the hash decides
    found = begin + int(announced)
    if found == file.size:
        return
    if begin == 0 and looks_like_html(response.read(200)):
        raise _web_page(file)
    raise wrong_length(file.url, file.name, found, file.size, file.repository)


def _web_page(file: RemoteFile) -> ChatfineError:
    why = t("it is a web page instead of {file}", file=file.name)
    return bad_answer(file.url, why, file.repository)


def _range_start(response: http.client.HTTPResponse) -> int:
    value = response.headers.get("Content-Range", "")
    digits = value.removeprefix("bytes ").split("-")[0].strip()
    return int(digits) if digits.isdigit() else -1


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _is_whole(path: Path, file: RemoteFile) -> bool:
    if _size(path) != file.size:
        return False
    if file.sha256:
        return hash_file(path) == file.sha256.lower()
    if not file.git_id:
        return True
    state = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    return hash_file(path, state) == file.git_id.lower()


def hash_file(path: Path, state: Any = None) -> str:
    """SHA-256 of a file (or `state`, updated with its bytes) as hex."""
    state = state or hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            state.update(chunk)
    return str(state.hexdigest())


def looks_like_html(start: bytes) -> bool:
    """Whether these first bytes open a web page: a login page, a block page."""
    return start.lstrip().lower().startswith((b"<!doctype html", b"<html"))


def _worth_waiting(error: urllib.error.HTTPError) -> bool:
    busy = error.code == 429 or error.code >= 500
    return busy and asked_pause(error) <= LONGEST_PAUSE_SECONDS
