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
import shutil
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from chatfine.console import size as readable
from chatfine.errors import ModelError, ResourceError
from chatfine.i18n import t

T = TypeVar("T")

CONNECT_SECONDS = 5.0  # per address; a host that is cut off must not hold up `--source auto`
ANSWER_SECONDS = 12.0  # for a whole listing, name look-up and all addresses included
READ_SECONDS = 30.0
PAUSE_SECONDS = 1.0  # before the first retry; doubled each time
LONGEST_PAUSE_SECONDS = 20.0
RETRIES = 4
_CHUNK_BYTES = 1 << 20
_MAX_LISTING_BYTES = 64 << 20
_CUT = (OSError, http.client.HTTPException)  # URLError, timeouts and resets are OSErrors


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a hub and how to know that it arrived whole: its SHA-256, or its git blob id."""

    name: str
    url: str
    size: int
    sha256: str = ""
    git_id: str = ""


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


def fetch_json(url: str, token: str = "") -> Any:
    """GET a listing; at most ANSWER_SECONDS, whatever the network does."""

    def ask() -> bytes:
        with _open(url, token, CONNECT_SECONDS) as response:
            return response.read(_MAX_LISTING_BYTES)

    try:
        raw = _within(ANSWER_SECONDS, ask)
    except urllib.error.HTTPError as error:
        raise status_error(error, url) from None
    except _CUT as error:
        raise unreachable(url, error) from None
    try:
        return json.loads(raw)
    except ValueError:
        raise bad_answer(url, t("it is not JSON: {start}", start=_start(raw))) from None


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
    for may_restart in (part.exists(), False):
        _fetch_part(file, part, token, on_bytes)
        if _is_whole(part, file):
            os.replace(part, final)
            return final
        on_bytes(-part.stat().st_size)
        start = part.read_bytes()[:200] if part.stat().st_size < _CHUNK_BYTES else b""
        part.unlink()
        if not may_restart:
            break
    if looks_like_html(start):
        raise bad_answer(file.url, t("it is a web page instead of the file"))
    raise ModelError(
        "download-hash",
        t("{file} arrived with other bytes than the hub announced", file=file.name),
        where=file.url,
        why=t("the connection, a proxy or the mirror changed it"),
        fix=t("try again, or another --source"),
    )


def _fetch_part(file: RemoteFile, part: Path, token: str, on_bytes: Callable[[int], None]) -> None:
    """Bring `part` to the full size, over as many connections as it takes while bytes arrive."""
    part.touch()
    have = _size(part)
    on_bytes(have)
    failures = 0
    while have < file.size:
        reason: str | BaseException
        pause = PAUSE_SECONDS * 2**failures
        try:
            _read_some(file, part, token, on_bytes)
            reason = t("the connection ended early")
        except urllib.error.HTTPError as error:
            if error.code == 416 and have:  # what is here does not fit the file: start anew
                part.unlink()
                on_bytes(-have)
            elif failures >= RETRIES or not _worth_waiting(error):
                raise status_error(error, file.url) from None
            reason, pause = error, max(pause, _asked_pause(error))
        except _CUT as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise disk_full(part.parent, file.size - _size(part)) from None
            reason = error
        before, have = have, _size(part)
        failures = 0 if have > before else failures + 1
        if have < file.size:
            if failures > RETRIES:
                raise cut_off(file, have, reason)
            time.sleep(min(pause, LONGEST_PAUSE_SECONDS) if failures else 0)


def _read_some(file: RemoteFile, part: Path, token: str, on_bytes: Callable[[int], None]) -> None:
    have = _size(part)
    with _open(file.url, token, READ_SECONDS, have) as response:
        kind = response.headers.get_content_type()
        if kind == "text/html" and not file.name.lower().startswith(("readme", "licen")):
            raise bad_answer(file.url, t("it is a web page instead of the file"))
        resumed = response.status == 206 and _range_start(response) == have
        if have and not resumed:  # the server sends the whole file again
            on_bytes(-have)
        with part.open("ab" if resumed else "wb") as stream:
            room = file.size - (have if resumed else 0) + 1  # one byte too many fails the hash
            while room > 0 and (chunk := response.read(min(_CHUNK_BYTES, room))):
                stream.write(chunk)
                on_bytes(len(chunk))
                room -= len(chunk)
            stream.flush()
            os.fsync(stream.fileno())


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


def _asked_pause(error: urllib.error.HTTPError) -> float:
    value = error.headers.get("Retry-After", "") if error.headers else ""
    return float(value) if value.isdigit() else 0.0


def _worth_waiting(error: urllib.error.HTTPError) -> bool:
    busy = error.code == 429 or error.code >= 500
    return busy and _asked_pause(error) <= LONGEST_PAUSE_SECONDS


def _start(raw: bytes) -> str:
    return raw[:60].decode("utf-8", "replace").replace("\n", " ")


def host(url: str) -> str:
    """The host of an address, for messages."""
    return urllib.parse.urlsplit(url).hostname or url


def status_error(error: urllib.error.HTTPError, url: str) -> ModelError:
    """The error for an HTTP status."""
    where, code = host(url), error.code
    error.close()
    if code == 401:
        return ModelError(
            "hub-login",
            t("{host} says: no such model, or log in first (401)", host=where), where=url,
            fix=[t("check the name: {command}", command="chatfine models"),
                 t("log in with a token: set HF_TOKEN, or hf auth login")],
        )  # fmt: skip
    if code == 403:
        return ModelError(
            "hub-gated", t("{host} does not give this model to you (403)", host=where), where=url,
            why=t("its licence is not accepted yet, or the token may not read it"),
            fix=[t("accept the licence on the model's page, then set HF_TOKEN"),
                 t("or use a model that is free to all: {command}", command="chatfine models")],
        )  # fmt: skip
    if code == 404:
        return ModelError(
            "hub-not-found", t("{host} has no such model (404)", host=where), where=url,
            fix=t("check the name: {command}", command="chatfine models"),
        )  # fmt: skip
    if code == 429:
        return ModelError(
            "hub-busy", t("{host} asks for fewer requests (429)", host=where), where=url,
            fix=[t("wait some minutes and try again; what has arrived is kept"),
                 t("or try another --source")],
        )  # fmt: skip
    return ModelError(
        "hub-broken", t("{host} answered with HTTP status {code}", host=where, code=code),
        where=url, fix=t("try again later, or another --source"),
    )  # fmt: skip


def unreachable(url: str, error: BaseException) -> ModelError:
    """The error for a host that can't be reached."""
    return ModelError(
        "hub-unreachable", t("{host} can't be reached", host=host(url)), where=url,
        why=str(getattr(error, "reason", "") or error) or type(error).__name__,
        fix=[t("check the network; behind a proxy set HTTPS_PROXY"), t("or try another --source")],
    )  # fmt: skip


def bad_answer(url: str, why: str) -> ModelError:
    """The error for an answer that is something else than was asked for."""
    return ModelError(
        "hub-bad-answer", t("{host} did not answer as a model hub does", host=host(url)),
        where=url, why=why,
        fix=[t("a login page of the network may be in between: open a web page in a browser first"),
             t("or try another --source")],
    )  # fmt: skip


def disk_full(folder: Path, needed: int) -> ResourceError:
    """The error for a disk with less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    return ResourceError(
        "disk-full",
        t("{needed} are needed in {folder}, {free} are free",
          needed=readable(needed), folder=folder, free=readable(free)),
        where=str(folder),
        fix=[t("make room, or choose a folder on another disk: -o DIR"),
             t("or move the cache: set CHATFINE_HOME")],
    )  # fmt: skip


def cut_off(file: RemoteFile, have: int, error: str | BaseException) -> ModelError:
    """The error for a connection that broke again and again."""
    return ModelError(
        "download-cut",
        t("{file} stopped after {have} of {size} bytes", file=file.name, have=have, size=file.size),
        where=file.url, why=str(error),
        fix=t("run the same command again: it goes on where it stopped"),
    )  # fmt: skip
