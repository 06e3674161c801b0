"""Meta's signed links: `*` replaced, sums checked, cut downloads resumed, expired links told."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from chatfine.commands.get import download
from chatfine.config import DownloadConfig
from chatfine.errors import ChatfineError, ModelError, OutputError, UsageError
from chatfine.hub import fetch
from chatfine.hub.meta import read_meta_folder
from chatfine.hub.meta_download import SHARDS, download_meta

NAME = "llama-2-13b-chat"
WEIGHTS = [bytes(range(256)) * 300, bytes(range(255, -1, -1)) * 300]


def sums(files: dict[str, bytes]) -> bytes:
    lines = [f"{hashlib.md5(raw).hexdigest()}  {name}" for name, raw in files.items()]
    return "\n".join(lines).encode() + b"\n"


class MetaServer:
    """Files by path, given only to links with a signature that is still good."""

    def __init__(self) -> None:
        weights = {f"consolidated.0{n}.pth": raw for n, raw in enumerate(WEIGHTS)}
        model = weights | {"params.json": b'{"dim": 64}'}
        tokenizer = {"tokenizer.model": b"pieces" * 99}
        self.files = {"LICENSE": b"licence", "USE_POLICY.md": b"# policy", **tokenizer,
                      "tokenizer_checklist.chk": sums(tokenizer),
                      f"{NAME}/checklist.chk": sums(model)}  # fmt: skip
        self.files |= {f"{NAME}/{name}": raw for name, raw in model.items()}
        self.good = {"first"}
        self.html: set[str] = set()
        self.cut: dict[str, int] = {}  # a file's answers end after so many bytes, and expire
        self.sent: list[tuple[str, str]] = []  # path, Range
        self.urls: list[str] = []
        self.base = ""

    def link(self, signature: str = "first") -> str:
        return f"{self.base}/*?Policy=eyJ_~&Signature={signature}&Key-Pair-Id=K1"

    def ranges(self, name: str) -> list[str]:
        return [asked for path, asked in self.sent if path.endswith(name)]


class Handler(BaseHTTPRequestHandler):
    server_of: MetaServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        meta, parts = self.server_of, urllib.parse.urlsplit(self.path)
        path, asked = parts.path.lstrip("/"), self.headers.get("Range", "")
        meta.urls.append(self.path)
        meta.sent.append((path, asked))
        signature = urllib.parse.parse_qs(parts.query).get("Signature", [""])[0]
        if signature not in meta.good:
            return self.answer(403, b"<Error>AccessDenied</Error>", "application/xml")
        if path not in meta.files:
            return self.answer(404, b"", "text/plain")
        if path in meta.html:
            return self.answer(200, b"<!DOCTYPE html><p>log in", "text/html")
        return self.send(path, asked)

    def send(self, path: str, asked: str) -> None:
        raw = self.server_of.files[path]
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(raw) - 1}/{len(raw)}")
        self.send_header("Content-Type", "binary/octet-stream")
        self.send_header("Content-Length", str(len(raw) - start))
        self.end_headers()
        end = len(raw)
        if path in self.server_of.cut and len(self.server_of.ranges(path)) == 2:  # after the size
            end = self.server_of.cut[path]
            self.server_of.good.clear()
        with contextlib.suppress(OSError):  # the client may want only the length
            self.wfile.write(raw[start:end])
        self.close_connection = True

    def answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def meta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MetaServer]:
    state = MetaServer()
    handler = type("ThisServer", (Handler,), {"server_of": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    ).start()
    state.base = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("CHATFINE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(fetch, "PAUSE_SECONDS", 0.001)
    yield state
    server.shutdown()
    server.server_close()


def test_the_whole_folder_arrives(meta: MetaServer, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    folder = download_meta(NAME, meta.link(), progress=lambda *counts: seen.append(counts))
    assert folder == tmp_path / "home" / "meta" / NAME
    for path, raw in meta.files.items():
        assert (folder / Path(path).name).read_bytes() == raw
    total = sum(map(len, meta.files.values()))
    assert seen[-1] == (total, total)
    assert not list(folder.parent.glob(".*")), "the stage is gone"
    assert all("*" not in url and "Policy=eyJ_~&Signature=first&Key-Pair-Id=K1" in url
               for url in meta.urls)  # fmt: skip
    said: list[str] = []
    before = len(meta.sent)
    assert download_meta("meta-llama/Llama-2-13b-chat-hf", meta.link(), say=said.append) == folder
    assert len(meta.sent) == before, "nothing is asked for what is here"
    assert said == [f"already on this machine: {folder}"]
    assert "Signature" not in "".join(f.read_text("latin-1") for f in folder.iterdir())


def test_an_expired_link_is_told_and_a_new_one_goes_on(meta: MetaServer, tmp_path: Path) -> None:
    cut = f"{NAME}/consolidated.01.pth"
    meta.cut[cut] = 50_000
    out = tmp_path / "out"
    with pytest.raises(ModelError) as error:
        download_meta(NAME, meta.link(), out)
    assert error.value.code == "meta-link-refused"
    assert "24 hours" in (error.value.why or "")
    assert "llama-downloads" in error.value.fix[0]
    assert "first" not in str(error.value), "the signature is not shown"
    assert not out.exists()
    meta.good, meta.cut = {"second"}, {}
    meta.sent.clear()
    assert download_meta(NAME, meta.link("second"), out) == out
    assert meta.ranges("consolidated.01.pth") == ["", "bytes=50000-"], "its size, then the rest"
    assert meta.ranges("consolidated.00.pth") == [""], "its size only: it is here"
    assert (out / "consolidated.01.pth").read_bytes() == WEIGHTS[1]


def test_a_wrong_sum_is_refused_and_the_file_comes_anew(meta: MetaServer, tmp_path: Path) -> None:
    path = f"{NAME}/consolidated.00.pth"
    sound = meta.files[path]
    meta.files[path] = b"x" + sound[1:]
    with pytest.raises(ModelError, match=r"consolidated\.00\.pth") as error:
        download_meta(NAME, meta.link(), tmp_path / "out")
    assert error.value.code == "download-hash"
    assert not (tmp_path / "out").exists()
    meta.files[path] = sound
    folder = download_meta(NAME, meta.link(), tmp_path / "out")
    assert (folder / "consolidated.00.pth").read_bytes() == sound
    meta.files["tokenizer.model"] = b"other" * 99
    with pytest.raises(ModelError, match=r"tokenizer\.model"):
        download_meta(NAME, meta.link(), tmp_path / "other")


def test_a_web_page_is_no_file(meta: MetaServer, tmp_path: Path) -> None:
    for path in ("tokenizer_checklist.chk", f"{NAME}/checklist.chk", f"{NAME}/params.json"):
        meta.html = {path}
        with pytest.raises(ModelError, match="did not answer as") as error:
            download_meta(NAME, meta.link(), tmp_path / "out")
        assert "web page" in (error.value.why or "")
        assert "Signature" not in str(error.value)


def test_a_link_for_other_models(meta: MetaServer, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="llama-2-7b") as error:
        download_meta("llama-2-7b", meta.link(), tmp_path / "out")
    assert error.value.code == "meta-not-in-link"


def test_the_proxy_is_used(
    meta: MetaServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", meta.base)
    link = meta.link().replace(meta.base, "http://download.meta.invalid")
    assert download_meta(NAME, link, tmp_path / "out").is_dir()
    # a proxy is asked for whole addresses
    assert all(url.startswith("http://download.meta.invalid/") for url in meta.urls)


def test_links_as_shells_and_mails_leave_them(meta: MetaServer, tmp_path: Path) -> None:
    bent = " '" + meta.link().replace("*", "\\*").replace("?", "\\?").replace("&", "\\&") + "' "
    assert download_meta(NAME, bent, tmp_path / "out").is_dir()
    for link in ("", "http://x.example/?Signature=a", "ftp://x.example/*", "see *", "http:///*"):
        with pytest.raises(UsageError) as error:
            download_meta(NAME, link, tmp_path / "bad")
        assert error.value.code == "meta-bad-link"
        assert error.value.where == "--url"


def test_names_places_and_the_offline_switch(
    meta: MetaServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {n: s for n, s in SHARDS.items() if "chat" not in n} == {
        "llama-2-7b": 1, "llama-2-13b": 2, "llama-2-70b": 8}  # fmt: skip
    assert all(SHARDS[f"{name}-chat"] == SHARDS[name] for name in list(SHARDS)[::2])
    with pytest.raises(ModelError) as unknown:
        download_meta("llama-2-7b-chat-uncensored", meta.link())
    assert unknown.value.fix[0] == "did you mean llama-2-7b-chat?"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError):
        download_meta(NAME, meta.link(), tmp_path / "full")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ChatfineError) as offline:
        download_meta(NAME, meta.link(), tmp_path / "out")
    assert offline.value.code == "offline"
    assert meta.sent == [], "nobody was asked"


def test_the_command_says_what_to_type_next(
    meta: MetaServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    settings = {"name": NAME, "source": "meta", "url": meta.link(), "output": str(out)}
    assert download(DownloadConfig.read(settings)) == {"name": NAME, "path": str(out)}
    shown = capsys.readouterr().out
    assert f"now type: chatfine convert {out} -o {NAME}-hf" in shown
    assert "8 files from 127.0.0.1" in shown
    with pytest.raises(UsageError, match="--url goes with --source meta"):
        download(DownloadConfig.read({"name": NAME, "url": meta.link()}))


def test_what_arrived_is_a_meta_folder_by_name(meta: MetaServer, tmp_path: Path) -> None:
    """A folder called anything is known as the chat model that it was downloaded as."""
    import zipfile

    path = tmp_path / "weights"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("consolidated/data.pkl", b"")
    params = b'{"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "norm_eps": 1e-6}'
    files = {"params.json": params, "consolidated.00.pth": path.read_bytes(),
             "consolidated.01.pth": path.read_bytes()}  # fmt: skip
    files["checklist.chk"] = sums(files)
    meta.files |= {f"{NAME}/{name}": raw for name, raw in files.items()}
    folder = read_meta_folder(download_meta(NAME, meta.link(), tmp_path / "anything"))
    assert folder.is_chat
    assert folder.family.name == "Llama 2"
