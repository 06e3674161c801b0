"""What doctor finds out about getting models and data: proxies, hubs, token, cache and disk.

No hub is asked anything. Whether a proxy, or the hub that the user named, is there at all is tried
by opening a connection and closing it.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from chatfine import console, runtime
from chatfine.commands.finding import Check
from chatfine.errors import ModelError
from chatfine.hub.listing import HUB, MIRROR, endpoint, token
from chatfine.hub.refusals import LOGIN, proxy_of, without_password
from chatfine.hub.stage import is_offline
from chatfine.i18n import t

PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
LEAST_DISK_BYTES = 2e9
LONG_CACHE_CHARACTERS = 100  # names below the cache need up to 150 of the 260 that Windows allows
PROBE_SECONDS = 2.0
_PORTS = {"http": 80, "https": 443}
_DEVELOPER = r"HKLM\SYSTEM\CurrentControlSet\Control\FileSystem"


def network() -> Iterator[Check]:
    """Proxies, the hub's address, whether hubs are asked, and the token."""
    yield from _proxies()
    if is_offline():
        yield Check("HF_HUB_OFFLINE", "warn", t("set: no hub is asked for models"),
                    t("unset HF_HUB_OFFLINE"))  # fmt: skip
    yield from _endpoint()
    yield from _token()


def cache() -> Iterator[Check]:
    """The one folder of downloads: where it is, whether it can be written, room on its disk."""
    home = runtime.home()
    there = next(place for place in (home, *home.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    move = t("set CHATFINE_HOME to a folder on another disk")
    if not there.is_dir() or not os.access(there, os.W_OK):
        yield Check("cache", "missing", t("{path} can't be written", path=home), move)
        return
    by = t("(CHATFINE_HOME)") if os.environ.get("CHATFINE_HOME") else t("(CHATFINE_HOME moves it)")
    text = t("{path}, {free} free", path=home, free=console.size(free))
    enough = free >= LEAST_DISK_BYTES
    yield Check("cache", "ok" if enough else "warn", f"{text} {by}", "" if enough else move)
    yield from long_paths(home, _long_paths_allowed())


def long_paths(home: Path, allowed: bool | None) -> Iterator[Check]:
    """Whether paths below the cache fit Windows; `allowed` is its setting, None elsewhere."""
    if allowed is False and len(str(home.absolute())) > LONG_CACHE_CHARACTERS:
        command = f"reg add {_DEVELOPER} /v LongPathsEnabled /t REG_DWORD /d 1 /f"
        yield Check("long paths", "warn",
                    t("Windows cuts paths off at 260 characters, and {path} is long", path=home),
                    t("set CHATFINE_HOME to a short folder, or as administrator: {command}",
                      command=command))  # fmt: skip


def _proxies() -> Iterator[Check]:
    found = False
    for name in PROXIES:
        value = os.environ.get(name.lower()) or os.environ.get(name)
        if value:
            found = True
            yield _proxy(name, value)
    if not found:  # Windows and macOS keep one in their settings, which downloads use too
        for scheme, value in sorted(urllib.request.getproxies().items()):
            if scheme in _PORTS:
                yield _proxy(t("{scheme} proxy", scheme=scheme), value)
    hosts = [host for host in ("localhost", "127.0.0.1") if proxy_of(f"http://{host}")[1]]
    if hosts:
        yield Check("NO_PROXY", "warn",
                    t("programs on this machine ({hosts}) would be asked through the proxy",
                      hosts=", ".join(hosts)),
                    t("set NO_PROXY={hosts}", hosts=",".join(hosts)))  # fmt: skip


def _proxy(name: str, value: str) -> Check:
    shown = without_password(value)
    parts = urllib.parse.urlsplit(value)
    if parts.scheme not in _PORTS:
        return Check(name, "warn", t("{proxy}: downloads need an http:// proxy", proxy=shown),
                     t("set {name}=http://HOST:PORT",
                       name="HTTPS_PROXY" if name == "ALL_PROXY" else name))  # fmt: skip
    if name == "ALL_PROXY":
        return Check(name, "warn", t("{proxy}: downloads do not use this variable", proxy=shown),
                     t("set {name}={proxy}", name="HTTPS_PROXY", proxy=shown))  # fmt: skip
    why = _unreachable(value)
    if why:
        return Check(name, "warn",
                     t("{proxy} can't be reached, so downloads fail: {why}", proxy=shown, why=why),
                     t("start the proxy, or unset {name}", name=name))  # fmt: skip
    return Check(name, "ok", shown)


def _endpoint() -> Iterator[Check]:
    value = os.environ.get("HF_ENDPOINT", "").strip()
    if not value:
        return
    try:
        base = endpoint()
    except ModelError as error:
        yield Check("HF_ENDPOINT", "missing", error.what, error.fix[0])
        return
    if urllib.parse.urlsplit(base).path:
        yield Check(
            "HF_ENDPOINT",
            "warn",
            t("{value}: there is a path after the host, which the hub has not", value=value),
            t("set HF_ENDPOINT={hub} or HF_ENDPOINT={mirror}", hub=HUB, mirror=MIRROR),
        )
        return  # fmt: skip
    proxy = proxy_of(base)[1]
    why = "" if proxy or is_offline() else _unreachable(base)
    host = urllib.parse.urlsplit(base).hostname or ""
    if why:
        yield Check("HF_ENDPOINT", "warn",
                    t("{value} can't be reached: {why}", value=base, why=why),
                    t("unset HF_ENDPOINT, or download with --source modelscope"))  # fmt: skip
    elif proxy:
        yield Check("HF_ENDPOINT", "warn",
                    t("{value}, asked through the proxy {proxy}", value=base, proxy=proxy),
                    t("if it can be reached without: set NO_PROXY={host}", host=host))  # fmt: skip
    else:
        yield Check("HF_ENDPOINT", "ok", base)


def _token() -> Iterator[Check]:
    """Whether there is a token; never what it is."""
    try:
        value = token()
    except (OSError, ValueError) as error:
        yield Check("token", "warn", t("the file of the hub's token can't be read: {why}",
                    why=error), LOGIN)  # fmt: skip
        return
    if not value:
        yield Check("token", "warn",
                    t("none; only for models whose licence must be accepted, such as Llama"),
                    t("{command} (or set HF_TOKEN)", command=LOGIN))  # fmt: skip
    elif not value.startswith("hf_") or not value.isascii() or len(value.split()) > 1:
        yield Check("token", "warn", t("it does not look like one: they begin with hf_"),
                    t("{command} (or set HF_TOKEN)", command=LOGIN))  # fmt: skip
    else:
        by = "HF_TOKEN" if os.environ.get("HF_TOKEN", "").strip() else LOGIN
        yield Check("token", "ok", t("there is one, from {source}", source=by))


def _unreachable(address: str) -> str:
    """Why no connection to the host of `address` can be opened; "" if one can."""
    try:
        parts = urllib.parse.urlsplit(address)
        port = parts.port or _PORTS[parts.scheme]
        socket.create_connection((parts.hostname or "", port), PROBE_SECONDS).close()
    except (OSError, ValueError) as error:  # ValueError: a port that is no number
        return str(error) or type(error).__name__
    return ""


def _long_paths_allowed() -> bool | None:
    """Whether Windows allows long paths; None on another system."""
    if sys.platform != "win32":
        return None
    import winreg

    path = r"SYSTEM\CurrentControlSet\Control\FileSystem"
    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, path) as key:
            return bool(winreg.QueryValueEx(key, "LongPathsEnabled")[0])
    except OSError:
        return False
