"""Downloads against a hub on loopback: what arrives, what is resumed, what is refused."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_hub import CONFIG, REPO, REVISION, FakeHub, write_folder

from chatfine.errors import ChatfineError, ModelError, OutputError, ResourceError
from chatfine.hub import catalog, fetch, listing
from chatfine.hub.download import download, find_model
from chatfine.hub.stage import lock


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and "locks" not in file.parts
    }


def refusal(*args: Any, **options: Any) -> ChatfineError:
    with pytest.raises(ChatfineError) as caught:
        download(*args, **options)
    assert caught.value.exit_code == 2
    return caught.value


def weights(fake_hub: FakeHub) -> bytes:
    return fake_hub.files["model.safetensors"]


def test_only_harmless_files_arrive_in_the_cache(fake_hub: FakeHub, tmp_path: Path) -> None:
    wanted = set(fake_hub.files) | {"README.md", "LICENSE", "chat_template.jinja"}
    for name in ("README.md", "LICENSE", "chat_template.jinja", "pytorch_model.bin", "modeling.py",
                 "optimizer.pt", "onnx/model.onnx", "consolidated.safetensors",
                 "pytorch_model.bin.index.json"):  # fmt: skip
        fake_hub.files[name] = b"{}"
    path = download(REPO, "hf")
    assert path == tmp_path / "home" / "models" / "acme--tiny"
    assert {file.name for file in path.iterdir()} == wanted | {catalog.RECORD}
    assert (path / "model.safetensors").read_bytes() == weights(fake_hub)
    record = json.loads((path / catalog.RECORD).read_text(encoding="utf-8"))
    assert record["revision"] == REVISION
    assert [item.name for item in path.parent.iterdir()] == ["acme--tiny"]
    asked = len(fake_hub.requests)
    assert download(REPO) == path == find_model(REPO)
    assert len(fake_hub.requests) == asked, "a cached model needs no request"
    assert catalog.cached_names() == [REPO]


def test_model_scope(fake_hub: FakeHub, tmp_path: Path) -> None:
    path = download(REPO, "modelscope", tmp_path / "out")
    assert (path / "model.safetensors").read_bytes() == weights(fake_hub)


@pytest.mark.parametrize("source", ["hf", "modelscope"])
def test_a_cut_connection_is_resumed(fake_hub: FakeHub, tmp_path: Path, source: str) -> None:
    fake_hub.cut["model.safetensors"] = [1000, 2000]
    seen: list[tuple[int, int]] = []
    path = download(REPO, source, tmp_path / "out", progress=lambda *at: seen.append(at))
    assert (path / "model.safetensors").read_bytes() == weights(fake_hub)
    ranges = fake_hub.ranges("model.safetensors")
    assert ranges == ["", "bytes=1000-", "bytes=3000-"]
    total = sum(map(len, fake_hub.files.values()))
    assert seen[-1] == (total, total)


def test_a_broken_download_goes_on_in_the_next_call(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "RETRIES", 1)
    fake_hub.cut["model.safetensors"] = [1000, 0, 0, 0]
    error = refusal(REPO, "hf", tmp_path / "out")
    assert error.code == "download-cut"
    assert f"model.safetensors stopped after 1000 of {len(weights(fake_hub))} bytes" in error.what
    assert "goes on where it stopped" in error.fix[0]
    assert not (tmp_path / "out").exists()
    fake_hub.cut.clear()
    fake_hub.requests.clear()
    path = download(REPO, "hf", tmp_path / "out")
    assert fake_hub.ranges("model.safetensors") == ["bytes=1000-"]
    assert fake_hub.ranges("config.json") == [], "a file that is whole is kept"
    assert (path / "model.safetensors").read_bytes() == weights(fake_hub)
    assert not list(tmp_path.glob(".out*"))


def test_a_server_without_ranges_sends_the_whole_file(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.ignores_range = True
    fake_hub.cut["model.safetensors"] = [1000]
    path = download(REPO, "hf", tmp_path / "out")
    assert (path / "model.safetensors").read_bytes() == weights(fake_hub)


def test_a_foreign_part_is_thrown_away(fake_hub: FakeHub, tmp_path: Path) -> None:
    stage = tmp_path / ".out.partial"
    stage.mkdir()
    (stage / "model.safetensors.part").write_bytes(b"other bytes")
    (stage / "config.json").write_bytes(b"{}")
    (stage / "stray.json").write_bytes(b"{}")
    path = download(REPO, "hf", tmp_path / "out")
    assert (path / "model.safetensors").read_bytes() == weights(fake_hub)
    assert (path / "config.json").read_bytes() == fake_hub.files["config.json"]
    assert not (path / "stray.json").exists()


def test_status_416_starts_anew(fake_hub: FakeHub, tmp_path: Path) -> None:
    stage = tmp_path / ".out.partial"
    stage.mkdir()
    (stage / "model.safetensors.part").write_bytes(b"12345")
    fake_hub.file_status["model.safetensors"] = [416]
    path = download(REPO, "hf", tmp_path / "out")
    assert fake_hub.ranges("model.safetensors") == ["bytes=5-", ""]
    assert (path / "model.safetensors").read_bytes() == weights(fake_hub)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(fake_hub: FakeHub, tmp_path: Path, status: int) -> None:
    fake_hub.file_status["model.safetensors"] = [status, status]
    path = download(REPO, "hf", tmp_path / "out")
    assert (path / "model.safetensors").read_bytes() == weights(fake_hub)


@pytest.mark.parametrize(
    ("status", "code", "words", "remedy"),
    [
        (401, "hub-login", "no such model, or log in first (401)", "HF_TOKEN"),
        (403, "hub-gated", "does not give this model to you (403)", "accept the licence"),
        (404, "hub-not-found", "has no such model (404)", "chatfine models"),
        (429, "hub-busy", "asks for fewer requests (429)", "wait some minutes"),
        (500, "hub-broken", "answered with HTTP status 500", "try again later"),
        (503, "hub-broken", "answered with HTTP status 503", "another --source"),
    ],
)
@pytest.mark.parametrize("of_file", [False, True])
def test_the_hubs_refusals(
    fake_hub: FakeHub,
    tmp_path: Path,
    status: int,
    code: str,
    words: str,
    remedy: str,
    of_file: bool,
) -> None:
    if of_file:
        fake_hub.file_status["model.safetensors"] = [status] * 9
        if status == 404:  # the model is there, its file is not
            code, remedy = "hub-no-file", "another --source"
            words = "lists model.safetensors but does not have it (404)"
    else:
        fake_hub.status = status
    before = tree(tmp_path)
    error = refusal(REPO, "hf", tmp_path / "out")
    assert error.code == code
    assert words in error.what
    assert remedy in " ".join(error.fix)
    assert tree(tmp_path) == before, "nothing is left behind"
    assert not list(tmp_path.glob(".out*"))


def test_a_long_pause_is_not_waited_for(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.file_status["model.safetensors"] = [429]
    fake_hub.retry_after = "3600"
    assert refusal(REPO, "hf", tmp_path / "out").code == "hub-busy"


def wrong_hash(fake_hub: FakeHub) -> None:
    fake_hub.wrong_hash = True


def web_page(fake_hub: FakeHub) -> None:
    fake_hub.html.add("model.safetensors")


def page_as_listing(fake_hub: FakeHub) -> None:
    fake_hub.raw_listing = b"<!DOCTYPE html><p>log in</p>"


def list_as_listing(fake_hub: FakeHub) -> None:
    fake_hub.raw_listing = b'["' + REVISION.encode() + b'"]'


def no_hashes(fake_hub: FakeHub) -> None:
    fake_hub.raw_listing = json.dumps(
        {"sha": REVISION, "siblings": [{"rfilename": name} for name in fake_hub.files]}
    ).encode()


def pickles_only(fake_hub: FakeHub) -> None:
    fake_hub.files["pytorch_model.bin"] = fake_hub.files.pop("model.safetensors")


def own_code(fake_hub: FakeHub) -> None:
    config = {**CONFIG, "auto_map": {"AutoModel": "evil.Model"}}
    fake_hub.files["config.json"] = json.dumps(config).encode()


def broken_model(fake_hub: FakeHub) -> None:
    fake_hub.files["config.json"] = json.dumps({**CONFIG, "num_hidden_layers": 3}).encode()


@pytest.mark.parametrize(
    ("harm", "code", "words"),
    [
        (wrong_hash, "download-hash", "model.safetensors arrived with other bytes"),
        (web_page, "hub-bad-answer", "127.0.0.1 did not answer as a model hub does"),
        (page_as_listing, "hub-bad-answer", "127.0.0.1 did not answer as a model hub does"),
        (list_as_listing, "hub-bad-answer", "127.0.0.1 did not answer as a model hub does"),
        (no_hashes, "hub-bad-answer", "127.0.0.1 did not answer as a model hub does"),
        (pickles_only, "hub-no-safetensors", "this repository holds no model that can be used"),
        (own_code, "model-runs-code", "config.json has auto_map"),
        (broken_model, "model-wrong-shape", "config.json says num_hidden_layers = 3"),
    ],
)
def test_what_is_not_a_sound_model_is_refused(
    fake_hub: FakeHub, tmp_path: Path, harm: Callable[[FakeHub], None], code: str, words: str
) -> None:
    harm(fake_hub)
    before = tree(tmp_path)
    error = refusal(REPO, "hf", tmp_path / "out")
    assert error.code == code
    assert words in error.what
    assert tree(tmp_path) == before
    if code == "model-runs-code":
        assert fake_hub.ranges("model.safetensors") == [], "refused before the weights"


@pytest.mark.parametrize(
    "name",
    ["../evil.json", "a/../../evil.json", "/etc/evil.json", "a\\..\\evil.json", "C:evil.json",
     "nul.json", "evil\n.json", ""],
)  # fmt: skip
@pytest.mark.parametrize("source", ["hf", "modelscope"])
def test_names_that_could_leave_the_folder(
    fake_hub: FakeHub, tmp_path: Path, name: str, source: str
) -> None:
    fake_hub.files[name] = b"{}"
    before = tree(tmp_path)
    error = refusal(REPO, source, tmp_path / "out")
    assert error.code == "unsafe-name"
    assert repr(name) in error.what
    assert tree(tmp_path) == before


def test_the_token_stays_with_its_host(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fake_hub.redirect = fake_hub.base.replace("127.0.0.1", "localhost")
    download(REPO, "hf", tmp_path / "out")
    tokens = {
        headers["Host"].split(":")[0]: headers.get("Authorization")
        for _, headers in fake_hub.requests
    }
    assert tokens == {"127.0.0.1": "Bearer hf_secret", "localhost": None}
    fake_hub.requests.clear()
    fake_hub.redirect = fake_hub.base
    download(REPO, "hf", tmp_path / "two")
    assert {headers.get("Authorization") for _, headers in fake_hub.requests} == {
        "Bearer hf_secret"
    }
    fake_hub.requests.clear()
    download(REPO, "hf-mirror", tmp_path / "three")
    assert {headers.get("Authorization") for _, headers in fake_hub.requests} == {None}


def test_auto_goes_on_to_the_next_source_and_says_so(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    said: list[str] = []
    path = download(REPO, output=tmp_path / "out", say=said.append)
    assert (path / "model.safetensors").read_bytes() == weights(fake_hub)
    assert "hf: 127.0.0.1 can't be reached" in said
    assert any(line.startswith("hf-mirror: 3 files from acme/tiny") for line in said)
    record = json.loads((path / catalog.RECORD).read_text(encoding="utf-8"))
    assert record["source"] == "hf-mirror"


def test_a_silent_host_does_not_hold_up_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "ANSWER_SECONDS", 0.05)
    never = threading.Event()
    monkeypatch.setattr(fetch, "_open", lambda *args: never.wait(5))
    with pytest.raises(ModelError, match=r"hub\.example can't be reached") as caught:
        fetch.fetch_json("https://hub.example/api")
    never.set()
    assert caught.value.code == "hub-unreachable"


def test_an_unknown_model(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.status = 404
    error = refusal("acme/nothing")
    assert error.code == "no-model"
    assert error.what == "no hub has a model called acme/nothing"
    assert "chatfine models" in " ".join(error.fix)
    assert "if it is a data set: chatfine download acme/nothing --kind dataset" in error.fix
    assert tree(tmp_path / "home") == {}


def test_when_no_source_answers(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for place in ("MIRROR", "MODELSCOPE"):
        monkeypatch.setattr(listing, place, "http://127.0.0.1:9")
    error = refusal("qwen3-0.6b")
    assert error.code == "no-source"
    for source in ("hf:", "hf-mirror:", "modelscope:"):
        assert source in (error.why or "")
    assert "HTTPS_PROXY" in error.fix[0]


def test_offline_asks_no_hub(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said: list[str] = []
    error = refusal(REPO, say=said.append)
    assert error.code == "no-source"
    assert said == [
        f"{kind}: not asked, because HF_HUB_OFFLINE is set"
        for kind in ("hf", "hf-mirror", "modelscope")
    ]
    assert refusal(REPO, "hf").code == "offline"
    assert fake_hub.requests == []


def test_not_enough_disk(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    before = tree(tmp_path)
    error = refusal(REPO, "auto", tmp_path / "deep" / "out")
    assert isinstance(error, ResourceError)
    assert error.code == "disk-full"
    assert "20.0 MB are needed" in error.what
    assert "10.0 MB are free" in error.what
    assert "CHATFINE_HOME" in " ".join(error.fix)
    assert tree(tmp_path) == before
    assert not (tmp_path / "deep").exists()


def test_an_output_folder_in_use_is_refused(fake_hub: FakeHub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work", encoding="utf-8")
    error = refusal(REPO, "hf", out)
    assert isinstance(error, OutputError)
    assert error.code == "output-not-empty"
    assert tree(out) == {"thesis.txt": b"years of work"}
    assert fake_hub.requests == []
    (out / "thesis.txt").unlink()
    assert download(REPO, "hf", out) == out, "an empty folder is fine"
    fake_hub.requests.clear()
    assert download(REPO, "hf", out) == out, "and so is the same model"
    assert fake_hub.requests == []


def test_a_damaged_cached_copy_is_replaced(fake_hub: FakeHub) -> None:
    path = download(REPO, "hf")
    (path / "model.safetensors").write_bytes(weights(fake_hub)[:-9])
    said: list[str] = []
    assert download(REPO, "hf", say=said.append) == path
    assert any("model.safetensors is cut short" in line for line in said)
    assert (path / "model.safetensors").read_bytes() == weights(fake_hub)


def test_local_copies_come_first(fake_hub: FakeHub, tmp_path: Path, folder: Path) -> None:
    assert download(str(folder)) == folder
    copied = download(str(folder), output=tmp_path / "copy")
    assert tree(copied).items() >= tree(folder).items()
    snapshot = tmp_path / "hf" / "hub" / "models--acme--tiny" / "snapshots" / REVISION
    write_folder(snapshot)
    assert find_model(REPO) == download(REPO) == snapshot
    assert download(REPO, output=tmp_path / "out") == tmp_path / "out"
    assert fake_hub.requests == []


def test_two_processes_do_not_meet(fake_hub: FakeHub, tmp_path: Path) -> None:
    """The second waits for the first, then finds its work done."""
    said: list[str] = []
    with lock(tmp_path / "out", said.append):
        late = threading.Thread(target=download, args=(REPO, "hf", tmp_path / "out", said.append))
        late.start()
        late.join(0.3)
        assert late.is_alive()
        assert said == ["another process is fetching it; waiting"]
        write_folder(tmp_path / "out")
        (tmp_path / "out" / catalog.RECORD).write_text(json.dumps({"name": REPO}), encoding="utf-8")
    late.join(10)
    assert said[1:] == [f"already on this machine: {tmp_path / 'out'}"]
    assert fake_hub.requests == []


@pytest.mark.parametrize(
    ("name", "words", "remedy"),
    [
        ("smolm2-135m-instruct", "there is no model called", "did you mean smollm2-135m-instruct?"),
        ("llama", "there is no model called llama", "chatfine models"),
        ("./models/x", "there is no model folder ./models/x", "chatfine models"),
        ("../x", "there is no model folder ../x", "chatfine models"),
        ("qwen3-0.6b", "is not on this machine yet", "chatfine download qwen3-0.6b"),
        ("Qwen/Qwen3-0.6B", "is not on this machine yet", "chatfine download qwen3-0.6b"),
        ("runs/first", "there is no folder runs/first", "chatfine download runs/first"),
    ],
)
def test_a_model_that_is_not_here(fake_hub: FakeHub, name: str, words: str, remedy: str) -> None:
    with pytest.raises(ModelError) as caught:
        find_model(name)
    assert caught.value.code == "no-model"
    assert words in caught.value.what
    assert remedy in " ".join(caught.value.fix)
    assert fake_hub.requests == []
