"""Fixtures of the hub's tests: a model folder to damage, and a hub on loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from fake_hub import FakeHub, Handler, write_folder

from chatfine.hub import fetch, listing


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound model folder that a test may damage."""
    return write_folder(tmp_path / "model")


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A running hub with a sound model; it is the hub, the mirror and ModelScope at once."""
    source = write_folder(tmp_path / "on-the-hub")
    hub = FakeHub({file.name: file.read_bytes() for file in source.iterdir()})
    handler = type("ThisHub", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    ).start()
    hub.base = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", hub.base)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    monkeypatch.setenv("CHATFINE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(listing, "MIRROR", hub.base)
    monkeypatch.setattr(listing, "MODELSCOPE", hub.base)
    monkeypatch.setattr(fetch, "PAUSE_SECONDS", 0.001)
    yield hub
    server.shutdown()
    server.server_close()
