"""What doctor says of proxies, hubs, the token and the cache."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from chatfine.commands import reach
from chatfine.commands.finding import Check


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*reach.PROXIES, "NO_PROXY", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)


@pytest.fixture
def listening() -> Iterator[str]:
    """host:port of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed() -> str:
    """host:port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def found() -> dict[str, Check]:
    return {check.name: check for check in reach.network()}


def test_nothing_is_set() -> None:
    assert set(found()) == {"token"}


def test_proxies_are_shown_without_their_password(
    monkeypatch: pytest.MonkeyPatch, listening: str, closed: str
) -> None:
    monkeypatch.setenv("https_proxy", f"http://me:secret@{listening}")
    monkeypatch.setenv("HTTP_PROXY", f"http://me:s@cret@{closed}")
    monkeypatch.setenv("ALL_PROXY", "socks5://me:secret@proxy.example:1080")
    checks = found()
    assert checks["HTTPS_PROXY"] == Check("HTTPS_PROXY", "ok", f"http://{listening}")
    assert checks["HTTP_PROXY"].status == "warn"
    assert checks["HTTP_PROXY"].text.startswith(f"http://{closed} can't be reached")
    assert checks["HTTP_PROXY"].fix == "start the proxy, or unset HTTP_PROXY"
    assert checks["ALL_PROXY"].text == (
        "socks5://proxy.example:1080: downloads need an http:// proxy"
    )
    assert not any(word in str(check) for check in checks.values() for word in ("secret", "cret@"))


@pytest.mark.parametrize("value", ["proxy.example:3128", "http://proxy.example:port"])
def test_odd_proxies(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HTTPS_PROXY", value)
    monkeypatch.setenv("NO_PROXY", "*")
    check = found()["HTTPS_PROXY"]
    assert check.status == "warn"
    assert check.fix


def test_all_proxy_is_not_used_by_downloads(
    monkeypatch: pytest.MonkeyPatch, listening: str
) -> None:
    monkeypatch.setenv("all_proxy", f"http://{listening}")
    check = found()["ALL_PROXY"]
    assert check.text.endswith("downloads do not use this variable")
    assert check.fix == f"set HTTPS_PROXY=http://{listening}"


def test_no_proxy_is_missing_for_this_machine(
    monkeypatch: pytest.MonkeyPatch, listening: str
) -> None:
    monkeypatch.setenv("http_proxy", f"http://{listening}")
    assert found()["NO_PROXY"].fix == "set NO_PROXY=localhost,127.0.0.1"
    monkeypatch.setenv("no_proxy", "localhost")
    assert found()["NO_PROXY"].fix == "set NO_PROXY=127.0.0.1"
    monkeypatch.setenv("no_proxy", "localhost,127.0.0.1")
    assert "NO_PROXY" not in found()


def test_the_hub_that_the_user_named(
    monkeypatch: pytest.MonkeyPatch, listening: str, closed: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://{listening}/")
    assert found()["HF_ENDPOINT"] == Check("HF_ENDPOINT", "ok", f"http://{listening}")
    monkeypatch.setenv("http_proxy", f"http://{listening}")
    check = found()["HF_ENDPOINT"]
    assert check.text == f"http://{listening}, asked through the proxy http://{listening}"
    assert check.fix == "if it can be reached without: set NO_PROXY=127.0.0.1"
    monkeypatch.delenv("http_proxy")
    monkeypatch.setenv("HF_ENDPOINT", f"http://{closed}")
    assert "can't be reached" in found()["HF_ENDPOINT"].text
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert found()["HF_ENDPOINT"].status == "ok", "offline, nothing is tried"


@pytest.mark.parametrize(
    ("value", "status", "words"),
    [
        ("hf-mirror.com", "missing", "HF_ENDPOINT is hf-mirror.com, which is no web address"),
        ("https://hf-mirror.com/api", "warn", "there is a path after the host"),
    ],
)
def test_a_wrong_endpoint(
    monkeypatch: pytest.MonkeyPatch, value: str, status: str, words: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", value)
    check = found()["HF_ENDPOINT"]
    assert check.status == status
    assert words in check.text
    assert "HF_ENDPOINT=https://hf-mirror.com" in check.fix


@pytest.mark.parametrize(
    ("value", "status", "words"),
    [
        ("", "warn", "none; only for models whose licence must be accepted"),
        ("hf_abcdefgh", "ok", "there is one, from HF_TOKEN"),
        ("sk-abcdefgh", "warn", "does not look like one"),
        ("hf_abcd efgh", "warn", "does not look like one"),
    ],
)
def test_the_token_is_never_shown(
    monkeypatch: pytest.MonkeyPatch, value: str, status: str, words: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", value)
    check = found()["token"]
    assert check.status == status
    assert words in check.text
    assert "efgh" not in str(check)
    assert ("hf auth login" in check.fix) is (status == "warn")


def test_the_token_of_the_hubs_own_tools(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("hf_abcdefgh\n", encoding="utf-8")
    assert found()["token"].text == "there is one, from hf auth login"
    (tmp_path / "hf" / "token").write_bytes(b"\xff\xfe")
    assert found()["token"].status == "warn"


def test_offline_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert found()["HF_HUB_OFFLINE"].status == "warn"


def test_the_cache_and_the_setting_that_moves_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CHATFINE_HOME", str(tmp_path / "deep" / "home"))
    (check,) = reach.cache()
    assert check.text.startswith(str(tmp_path / "deep" / "home"))
    assert check.text.endswith("free (CHATFINE_HOME)")
    monkeypatch.delenv("CHATFINE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (check,) = reach.cache()
    assert check.text.endswith("(CHATFINE_HOME moves it)")
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("CHATFINE_HOME", str(tmp_path / "file"))
    (check,) = reach.cache()
    assert (check.status, check.text) == ("missing", f"{tmp_path / 'file'} can't be written")
    assert os.listdir(tmp_path) == ["file"], "doctor writes nothing"


def test_long_paths_of_windows(tmp_path: Path) -> None:
    short, long = Path("C:/chatfine"), Path("/" + "a" * 120)
    assert list(reach.long_paths(long, None)) == []
    assert list(reach.long_paths(long, True)) == []
    assert list(reach.long_paths(short, False)) == []
    (check,) = reach.long_paths(long, False)
    assert check.status == "warn"
    assert "CHATFINE_HOME" in check.fix
    assert "LongPathsEnabled" in check.fix
