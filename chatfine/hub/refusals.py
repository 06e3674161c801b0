"""What can go wrong between this machine and a hub, each as an error that says what to do now."""

from __future__ import annotations

import datetime
import email.utils
import re
import shutil
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from chatfine.console import size as readable
from chatfine.errors import ChatfineError, DataError, ModelError, ResourceError
from chatfine.i18n import t

TOKENS_PAGE = "https://huggingface.co/settings/tokens"
LOGIN = "hf auth login"
_RATE_LIMIT = re.compile(r";\s*t\s*=\s*(\d+)")  # `"api";r=0;t=55`: new requests in 55 seconds


@dataclass(frozen=True, slots=True)
class Repository:
    """What is asked for, as far as messages need it.

    `page` is where its licence is accepted, `gated` says that this is known to be needed, and
    `advice` is a further line of what to do when the hub refuses it.
    """

    kind: Literal["model", "dataset"] = "model"
    page: str = ""
    gated: bool = False
    advice: str = ""

    @property
    def thing(self) -> str:
        """A word for it, translated."""
        return t("data set") if self.kind == "dataset" else t("model")

    @property
    def check_name(self) -> str:
        """What to do when the name may be wrong."""
        if self.kind == "dataset":
            return t("check the name: it is OWNER/NAME, as in the address of its page")
        return t("check the name: {command}", command="chatfine models")

    def refuse(
        self, code: str, what: str, url: str, fix: str | Sequence[str], why: str | None = None
    ) -> ChatfineError:
        """A DataError or a ModelError about the address `url`."""
        kind = DataError if self.kind == "dataset" else ModelError
        return kind(code, what, where=url, why=why, fix=fix)


MODEL = Repository()


def host(url: str) -> str:
    """The host of an address, for messages."""
    return urllib.parse.urlsplit(url).hostname or url


def asked_pause(error: urllib.error.HTTPError) -> float:
    """Seconds the server asks to wait (Retry-After, or the hub's own RateLimit); 0 if none."""
    value = error.headers.get("Retry-After", "").strip() if error.headers else ""
    if value.isdigit():
        return float(value)
    if value:
        try:
            when = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return 0.0
        now = datetime.datetime.now(when.tzinfo)
        return max(0.0, (when - now).total_seconds())
    limit = _RATE_LIMIT.search(error.headers.get("RateLimit", "")) if error.headers else None
    return float(limit[1]) if limit else 0.0


def status_error(
    error: urllib.error.HTTPError,
    url: str,
    repository: Repository = MODEL,
    with_token: bool = False,
    file: str = "",
) -> ChatfineError:
    """The error for an HTTP status.

    Args:
        with_token: whether the user's token went along.
        file: the file that was asked for; empty = the listing.
    """
    where, code, thing = host(url), error.code, repository.thing
    pause = asked_pause(error)
    told = error.headers.get("X-Error-Code", "") if error.headers else ""
    error.close()
    if code == 403 or told == "GatedRepo" or (code == 401 and repository.gated and not with_token):
        return _gated(url, code, repository, with_token)
    if code == 401:
        return _login(url, repository, with_token)
    if code == 404 and file:
        return repository.refuse(
            "hub-no-file", t("{host} lists {file} but does not have it (404)", host=where,
                             file=file), url,
            [t("try again: the {thing} may have been changed meanwhile", thing=thing),
             t("or try another --source")],
        )  # fmt: skip
    if code == 404:
        return repository.refuse(
            "hub-not-found", t("{host} has no such {thing} (404)", host=where, thing=thing), url,
            repository.check_name,
        )  # fmt: skip
    if code == 416:
        return repository.refuse(
            "hub-range", t("{host} does not go on with {file} where it stopped (416)", host=where,
                           file=file), url,
            why=t("it also did not send the file from its beginning"),
            fix=t("try again later, or another --source"),
        )  # fmt: skip
    if code == 429:
        return _busy(url, repository, pause)
    if code >= 500:
        return repository.refuse(
            "hub-broken", t("{host} answered with HTTP status {code}", host=where, code=code), url,
            why=t("the server has trouble of its own; it was asked several times"),
            fix=t("try again later, or another --source; what has arrived is kept"),
        )  # fmt: skip
    return repository.refuse(
        "hub-broken", t("{host} answered with HTTP status {code}", host=where, code=code), url,
        t("try again later, or another --source"),
    )  # fmt: skip


def _busy(url: str, repository: Repository, pause: float) -> ChatfineError:
    wait = (
        t("wait {n} seconds and try again; what has arrived is kept", n=round(pause))
        if pause
        else t("wait some minutes and try again; what has arrived is kept")
    )
    return repository.refuse(
        "hub-busy", t("{host} asks for fewer requests (429)", host=host(url)), url,
        [wait, t("log in, since users with an account may ask more often: {command}",
                 command=LOGIN), t("or try another --source")],
    )  # fmt: skip


def _gated(url: str, code: int, repository: Repository, with_token: bool) -> ChatfineError:
    page = repository.page or t("the page of the {thing}", thing=repository.thing)
    fixes = [t("accept the licence there: {page}", page=page)]
    if with_token:
        fixes.append(t("your token must be allowed to read it: see {page}", page=TOKENS_PAGE))
    elif not repository.advice:
        fixes.append(t("then log in: {command} (or set HF_TOKEN to a token from {page})",
                       command=LOGIN, page=TOKENS_PAGE))  # fmt: skip
    if repository.advice:
        fixes.append(repository.advice)
    if repository.kind == "model":
        fixes.append(t("or use a model that is free to all: {command}", command="chatfine models"))
    return repository.refuse(
        "hub-gated",
        t("{host} does not give this {thing} to you ({code})", host=host(url),
          thing=repository.thing, code=code),
        url, fixes,
        why=t("its licence is not accepted yet by your account, or the token may not read it")
        if with_token
        else t("it is given only to users who accepted its licence and are logged in"),
    )  # fmt: skip


def _login(url: str, repository: Repository, with_token: bool) -> ChatfineError:
    if with_token:
        return repository.refuse(
            "hub-login", t("{host} does not accept your token (401)", host=host(url)), url,
            [t("make a new token: {page}", page=TOKENS_PAGE),
             t("then log in: {command} (or set HF_TOKEN)", command=LOGIN)],
            why=t("it is mistyped, expired or revoked"),
        )  # fmt: skip
    login = t("if it is private or gated, log in: {command} (or set HF_TOKEN)", command=LOGIN)
    return repository.refuse(
        "hub-login",
        t("{host} says: no such {thing}, or log in first (401)", host=host(url),
          thing=repository.thing),
        url, [repository.check_name, repository.advice or login],
    )  # fmt: skip


def proxy_of(url: str) -> tuple[str, str]:
    """(variable, proxy without its password) that requests to `url` go through; "" where none."""
    parts = urllib.parse.urlsplit(url)
    value = urllib.request.getproxies().get(parts.scheme, "")
    if not value or urllib.request.proxy_bypass(parts.hostname or ""):
        return "", ""
    return f"{parts.scheme.upper()}_PROXY", without_password(value)


def without_password(proxy: str) -> str:
    """scheme://host:port of a proxy's address; a user and password in it are left out."""
    scheme, separator, rest = proxy.rpartition("://")
    return scheme + separator + rest.rpartition("@")[2]


def unreachable(url: str, error: BaseException, repository: Repository = MODEL) -> ChatfineError:
    """The error for a host that can't be reached."""
    reason = getattr(error, "reason", "") or error
    why = str(reason) or type(error).__name__
    variable, proxy = proxy_of(url)
    if isinstance(reason, ssl.SSLCertVerificationError):
        return repository.refuse(
            "hub-certificate", t("the certificate of {host} is not trusted", host=host(url)), url,
            [t("if your network opens encrypted traffic, set SSL_CERT_FILE to its certificate"),
             t("else check this machine's clock; on macOS run Install Certificates.command of your "
               "Python")],
            why=why,
        )  # fmt: skip
    if proxy:
        return repository.refuse(
            "hub-unreachable",
            t("{host} can't be reached through the proxy {proxy}", host=host(url), proxy=proxy),
            url,
            [t("check {variable}, or unset it if this network needs no proxy", variable=variable),
             t("or go around it: set NO_PROXY={host}", host=host(url)),
             t("or try another --source")],
            why=why,
        )  # fmt: skip
    return repository.refuse(
        "hub-unreachable", t("{host} can't be reached", host=host(url)), url,
        [t("check the network; behind a proxy set HTTPS_PROXY"), t("or try another --source")],
        why=why,
    )  # fmt: skip


def bad_answer(url: str, why: str, repository: Repository = MODEL) -> ChatfineError:
    """The error for an answer that is something else than was asked for."""
    return repository.refuse(
        "hub-bad-answer", t("{host} did not answer as a model hub does", host=host(url)), url,
        [t("a login page of the network may be in between: open a web page in a browser first"),
         t("or try another --source")],
        why=why,
    )  # fmt: skip


def wrong_length(url: str, file: str, found: int, wanted: int, repo: Repository) -> ChatfineError:
    """The error for a file that has another length than the listing said."""
    return repo.refuse(
        "download-length",
        t("{host} sends {found} bytes for {file}, its listing says {wanted}", host=host(url),
          found=found, file=file, wanted=wanted),
        url, [t("try again: the file may have been changed meanwhile"),
              t("or try another --source")],
    )  # fmt: skip


def wrong_hash(url: str, file: str, repository: Repository) -> ChatfineError:
    """The error for a file that arrived with other bytes."""
    return repository.refuse(
        "download-hash",
        t("{file} arrived with other bytes than the hub announced", file=file),
        url, t("try again, or another --source"),
        why=t("the connection, a proxy or the mirror changed it"),
    )  # fmt: skip


def cut_off(
    url: str, file: str, have: int, size: int, error: str | BaseException, repository: Repository
) -> ChatfineError:
    """The error for a connection that broke again and again."""
    return repository.refuse(
        "download-cut",
        t("{file} stopped after {have} of {size} bytes", file=file, have=have, size=size),
        url, t("run the same command again: it goes on where it stopped"), why=str(error),
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
