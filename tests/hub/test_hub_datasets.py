"""Data sets of the hub: which files come, which splits they form, what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from fake_hub import COPIES_REVISION, DATA_REPO, REVISION, FakeHub

from chatfine.data.sources import digest, locate, read_rows, splits_of
from chatfine.errors import ChatfineError, DataError, OutputError
from chatfine.hub import fetch, listing
from chatfine.hub.catalog import RECORD
from chatfine.hub.datasets import cache_folder, fetch_dataset, is_hub_name

SOURCES = ["hf", "hf-mirror", "modelscope"]
CARD = """---
license: apache-2.0
configs:
- config_name: short
  data_files:
  - split: train_sft
    path: short/train-*
  - split: test
    path: [short/test.jsonl]
- config_name: long
  data_dir: long
---
# Talks
"""


def rows(*questions: str) -> bytes:
    return "".join(
        json.dumps({"question": q, "answer": q[::-1]}) + "\n" for q in questions
    ).encode()


def parquet(*questions: str) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.table({"question": questions, "answer": questions}), file)
    return file.getvalue()


def questions(dataset: str, split: str | None = None) -> list[str]:
    return [row.values["question"] for row in read_rows(dataset, split)]


def refusal(name: str = DATA_REPO, source: str = "hf", out: Path | None = None) -> ChatfineError:
    with pytest.raises(ChatfineError) as caught:
        fetch_dataset(name, source, output=out)
    assert caught.value.exit_code == 2
    return caught.value


def tree(folder: Path) -> set[str]:
    return {
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.is_file() and "locks" not in file.parts
    }


@pytest.mark.parametrize("source", SOURCES)
def test_parquet_shards_of_two_splits(fake_hub: FakeHub, tmp_path: Path, source: str) -> None:
    fake_hub.data = {
        ".gitattributes": b"*.parquet filter=lfs",
        "README.md": b"# no settings",
        "talks.py": b"print('evil')",
        "data/train-00000-of-00002-a09b74b3ef9c3b56.parquet": parquet("a", "b"),
        "data/train-00001-of-00002-a09b74b3ef9c3b56.parquet": parquet("c"),
        "data/validation-00000-of-00001.parquet": parquet("d"),
        "raw/train.csv": b"question,answer\nx,y\n",
        "extra.parquet": parquet("x"),
    }
    folder = fetch_dataset(DATA_REPO, source, output=tmp_path / "out")
    wanted = {name for name in fake_hub.data if name.startswith("data/")}
    assert tree(folder) == wanted | {RECORD}
    assert splits_of(str(folder)) == ("train", "validation")
    assert questions(str(folder), "train") == ["a", "b", "c"]
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    assert record["source"] == source
    assert record["revision"] == ("master" if source == "modelscope" else REVISION)
    assert all((folder / name).read_bytes() == fake_hub.data[name] for name in wanted)


def test_a_hub_name_is_a_dataset_and_is_asked_for_once(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hub.data = {"train.jsonl": rows("hello"), "dev.jsonl": rows("you")}
    assert splits_of(DATA_REPO) == ("train", "validation")
    assert questions(DATA_REPO) == ["hello"]
    row = next(read_rows(DATA_REPO))
    assert row.where == f"{DATA_REPO}/train.jsonl:1"
    assert cache_folder(DATA_REPO) == tmp_path / "home" / "datasets" / "acme--talks"
    before = digest(DATA_REPO)
    asked = len(fake_hub.requests)
    assert asked == 3, "the listing and two files"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert questions(DATA_REPO, "validation") == ["you"]
    assert digest(DATA_REPO) == before
    assert len(fake_hub.requests) == asked


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_offline_asks_no_hub(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    fake_hub.data = {"train.jsonl": rows("hello")}
    monkeypatch.setenv(variable, "1")
    snapshot = tmp_path / "hf" / "hub" / "datasets--acme--talks" / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    with pytest.raises(DataError, match="acme/talks is not cached") as caught:
        locate(DATA_REPO)
    assert caught.value.code == "data-offline"
    assert str(snapshot) in " ".join(caught.value.fix)
    assert fake_hub.requests == []


def test_the_card_names_subsets_and_splits(fake_hub: FakeHub) -> None:
    fake_hub.data = {
        "README.md": CARD.encode(),
        "short/train-1.jsonl": rows("a"),
        "short/train-2.jsonl": rows("b"),
        "short/test.jsonl": rows("c"),
        "long/deep/train.jsonl": rows("d"),
        "other.jsonl": rows("x"),
    }
    error = refusal()
    assert (error.code, error.what) == (
        "data-subset", "acme/talks has several subsets: name one",
    )  # fmt: skip
    assert error.why == "it has: long, short"
    assert error.fix == ("for example: acme/talks:long",)
    short = f"{DATA_REPO}:short"
    assert splits_of(short) == ("train_sft", "test")
    assert questions(short, "train_sft") == ["a", "b"]
    assert questions(f"{DATA_REPO}:long") == ["d"]
    error = refusal(f"{DATA_REPO}:shrot", "auto")
    assert error.code == "data-subset"
    assert error.fix == ("did you mean short?",)
    record = json.loads((cache_folder(short) / RECORD).read_text(encoding="utf-8"))
    assert record["licence"] == "apache-2.0"


@pytest.mark.parametrize(
    "card",
    [b"---\nconfigs: [\n---\n", b"---\nconfigs: 7\n---\n", b"---\n- 1\n---\n", b"\xff\xfe",
     b"---\r\nconfigs:\r\n- config_name: default\r\n  data_files: '*.jsonl'\r\n---\r\n"],
)  # fmt: skip
def test_odd_cards(fake_hub: FakeHub, card: bytes) -> None:
    fake_hub.data = {"README.md": card, "train.jsonl": rows("a")}
    assert questions(DATA_REPO) == ["a"]


def test_a_folder_or_a_file_as_subset(fake_hub: FakeHub) -> None:
    fake_hub.data = {
        "finetune/train_zh_0.json": rows("a"),
        "finetune/valid_zh_0.json": rows("b"),
        "pretrain/train.json": rows("c"),
        "Talks_gpt4_zh.jsonl": rows("d"),
    }
    assert splits_of(f"{DATA_REPO}:finetune") == ("train", "validation")
    assert questions(f"{DATA_REPO}:finetune") == ["a"]
    assert questions(f"{DATA_REPO}:Talks_gpt4_zh") == ["d"]
    error = refusal(f"{DATA_REPO}:fintune")
    assert error.fix == ("did you mean finetune?",)


@pytest.mark.parametrize("own", [{"talks.py": b"import os"}, {"train.jsonl.gz": b"\x1f\x8b"}])
def test_the_parquet_copies_of_the_hub(fake_hub: FakeHub, own: dict[str, bytes]) -> None:
    """A repository with only a program, or packed files, has a readable copy on the hub."""
    fake_hub.data = own
    fake_hub.copies = {
        "default/partial-train/0000.parquet": parquet("a"),
        "default/test/0000.parquet": parquet("b"),
        "other/train/0000.parquet": parquet("c"),
        "duckdb/default/index.duckdb": b"",
    }
    said: list[str] = []
    folder = fetch_dataset(DATA_REPO, "hf", said.append)
    assert splits_of(DATA_REPO) == ("train", "test")
    assert questions(DATA_REPO) == ["a"]
    assert questions(f"{DATA_REPO}:other") == ["c"]
    assert any("first part only" in line for line in said)
    assert json.loads((folder / RECORD).read_text())["revision"] == COPIES_REVISION
    assert all("talks.py" not in path for path, _ in fake_hub.requests)


@pytest.mark.parametrize(
    ("own", "why"),
    [
        (
            {"talks.py": b""},
            "it only has a program that makes the rows; such programs are never run",
        ),
        ({"a.zip": b""}, "it has no parquet, arrow, JSON or CSV files"),
    ],
)
@pytest.mark.parametrize("source", SOURCES)
def test_nothing_that_can_be_read(
    fake_hub: FakeHub, tmp_path: Path, own: dict[str, bytes], why: str, source: str
) -> None:
    fake_hub.data = own
    error = refusal(source=source)
    assert (error.code, error.why) == ("data-no-files", why)
    assert "parquet or JSON files" in error.fix[0]
    assert tree(tmp_path / "home") == set()


@pytest.mark.parametrize("source", SOURCES)
def test_a_cut_download_goes_on_in_the_next_call(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr(fetch, "RETRIES", 0)
    content = parquet(*map(str, range(999)))
    fake_hub.data = {"data/train.parquet": content, "data/test.parquet": parquet("x")}
    fake_hub.cut["data/train.parquet"] = [1000, 0]
    error = refusal(source=source)
    assert error.code == "download-cut"
    assert isinstance(error, DataError)
    fake_hub.requests.clear()
    folder = fetch_dataset(DATA_REPO, source)
    assert (folder / "data/train.parquet").read_bytes() == content
    assert fake_hub.ranges("train.parquet") == ["bytes=1000-"]
    assert fake_hub.ranges("test.parquet") == []


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (401, "hub-login", "says: no such data set, or log in first (401)"),
        (403, "hub-gated", "does not give this data set to you (403)"),
        (404, "hub-not-found", "has no such data set (404)"),
        (429, "hub-busy", "asks for fewer requests (429)"),
        (502, "hub-broken", "answered with HTTP status 502"),
    ],
)
def test_the_hubs_refusals_speak_of_data_sets(
    fake_hub: FakeHub, tmp_path: Path, status: int, code: str, words: str
) -> None:
    fake_hub.data = {"train.jsonl": rows("a")}
    fake_hub.status = status
    error = refusal()
    assert isinstance(error, DataError)
    assert error.code == code
    assert words in error.what
    assert "model" not in str(error).replace("chatfine models", "").replace("model hub", "")
    if status == 403:
        page = "https://huggingface.co/datasets/acme/talks"
        assert f"accept the licence there: {page}" in error.fix
    assert tree(tmp_path / "home") == set()


def test_wrong_bytes_and_web_pages(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.data = {"train.parquet": parquet("a")}
    fake_hub.wrong_hash = True
    assert refusal().code == "download-hash"
    fake_hub.wrong_hash = False
    fake_hub.html.add("train.parquet")
    assert refusal().code == "hub-bad-answer"
    fake_hub.html.clear()
    fake_hub.wrong_length["train.parquet"] = 3
    assert refusal().code == "download-length"
    assert tree(tmp_path / "home") == set()


@pytest.mark.parametrize(
    "name",
    ["../evil.jsonl", "a/../../evil.jsonl", "/etc/evil.jsonl", "a\\..\\evil.jsonl",
     "C:evil.jsonl", "data/nul.jsonl", "data/evil\n.jsonl", "data/con.a.parquet", "./evil.jsonl"],
)  # fmt: skip
@pytest.mark.parametrize("source", SOURCES)
def test_names_that_could_leave_the_folder(
    fake_hub: FakeHub, tmp_path: Path, name: str, source: str
) -> None:
    fake_hub.data = {"train.jsonl": rows("a"), name: rows("evil")}
    error = refusal(source=source, out=tmp_path / "deep" / "out")
    assert error.code == "unsafe-name"
    assert "folder of the data set" in (error.why or "")
    assert not list(tmp_path.rglob("*evil*"))
    assert not list((tmp_path / "deep").rglob("*"))
    assert not Path("/etc/evil.jsonl").exists()


def test_unsafe_names_of_the_copies(fake_hub: FakeHub) -> None:
    fake_hub.data = {"talks.py": b""}
    fake_hub.copies = {"../train/0000.parquet": parquet("evil")}
    assert refusal().code == "unsafe-name"


def test_the_record_can_name_nothing_outside(fake_hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_bytes(rows("secret"))
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(rows("a"))
    record = {"kind": "dataset", "splits": {"train": ["../secret.jsonl"]}}
    (folder / RECORD).write_text(json.dumps(record), encoding="utf-8")
    assert questions(str(folder)) == ["a"]


def test_more_than_one_page_of_modelscope(fake_hub: FakeHub) -> None:
    fake_hub.data = {f"part-{n:03}.jsonl": rows(str(n)) for n in range(230)}
    folder = fetch_dataset(DATA_REPO, "modelscope")
    assert questions(str(folder)) == [str(n) for n in range(230)]


def test_modelscope_without_hashes(fake_hub: FakeHub) -> None:
    fake_hub.data = {"train.jsonl": rows("a")}
    fake_hub.no_hashes = True
    assert questions(str(fetch_dataset(DATA_REPO, "modelscope"))) == ["a"]


def test_auto_goes_on_to_the_next_source(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hub.data = {"train.jsonl": rows("a")}
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    said: list[str] = []
    fetch_dataset(DATA_REPO, "auto", said.append)
    assert said[0] == "hf: 127.0.0.1 can't be reached"
    assert said[1].startswith("hf-mirror: 1 files from acme/talks")
    monkeypatch.setattr(listing, "MIRROR", "http://127.0.0.1:7")
    monkeypatch.setattr(listing, "MODELSCOPE", "http://127.0.0.1:9")
    error = refusal("acme/other", "auto")
    assert error.code == "no-source"
    assert all(f"{source}: " in (error.why or "") for source in SOURCES)


def test_an_unknown_name(fake_hub: FakeHub) -> None:
    error = refusal("acme/nothing", "auto")
    assert (error.code, error.what) == ("no-dataset", "no hub has a data set called acme/nothing")
    assert "no file or folder of that name" in (error.why or "")


def test_the_token_goes_to_the_hub_only(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fake_hub.data = {"README.md": b"---\na: 1\n---\n", "train.jsonl": rows("a")}
    for source, sent in zip(SOURCES, ("Bearer hf_secret", None, None), strict=True):
        fake_hub.requests.clear()
        fetch_dataset(DATA_REPO, source, output=tmp_path / source)
        assert {h.get("Authorization") for _, h in fake_hub.requests} == {sent}


def test_a_damaged_copy_in_the_cache_is_mended(fake_hub: FakeHub) -> None:
    fake_hub.data = {"train.jsonl": rows("a"), "test.jsonl": rows("b", "c")}
    folder = fetch_dataset(DATA_REPO, "hf")
    (folder / "test.jsonl").write_bytes(b"{")
    fake_hub.requests.clear()
    assert questions(DATA_REPO, "test") == ["b", "c"]
    assert fake_hub.ranges("train.jsonl") == [], "the sound file is kept"


def test_an_output_folder_in_use_is_refused(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.data = {"train.jsonl": rows("a")}
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work", encoding="utf-8")
    error = refusal(out=out)
    assert isinstance(error, OutputError)
    assert error.code == "output-not-empty"
    assert tree(out) == {"thesis.txt"}
    assert fake_hub.requests == []


@pytest.mark.parametrize(
    ("name", "known"),
    [("a/b", True), ("a/b:c", True), ("a-b.c/d_e:f.g", True), ("../b", False), ("a/../b", False),
     ("a/b:../c", False), ("/a/b", False), ("a", False), ("C:/a", False), ("a/b:", False)],
)  # fmt: skip
def test_hub_names(name: str, known: bool) -> None:
    assert is_hub_name(name) is known
    if not known:
        assert refusal(name).code == "no-dataset"


def test_sources_that_have_no_data_sets(fake_hub: FakeHub) -> None:
    error = refusal(source="package")
    assert error.code == "data-source"
    assert "modelscope" in error.fix[0]
