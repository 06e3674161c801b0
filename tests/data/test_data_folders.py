"""Data folders as users have them: saved by `datasets`, downloaded by hand, cloned without LFS."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from chatfine.data.sources import locate, read_rows, splits_of
from chatfine.errors import DataError

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


def saved(folder: Path, *questions: str, parts: int = 1) -> None:
    """What `Dataset.save_to_disk` writes: Arrow streams and the list of them."""
    import pyarrow as pa

    folder.mkdir(parents=True)
    names = [f"data-{part:05}-of-{parts:05}.arrow" for part in range(parts)]
    for part, name in enumerate(names):
        table = pa.table({"question": questions[part::parts], "answer": questions[part::parts]})
        with pa.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    (folder / "dataset_info.json").write_text("{}", encoding="utf-8")


def questions(folder: Path, split: str | None = None) -> list[str]:
    return [row.values["question"] for row in read_rows(str(folder), split)]


def test_a_saved_dataset(tmp_path: Path) -> None:
    folder = tmp_path / "test"  # the folder's name is no split's name
    saved(folder, "a", "b", "c", parts=2)
    shutil.copy(folder / "data-00000-of-00002.arrow", folder / "cache-0123456789abcdef.arrow")
    assert splits_of(str(folder)) == ("train",)
    assert questions(folder) == ["a", "c", "b"]
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00002\.arrow is missing") as caught:
        locate(str(folder))
    assert caught.value.code == "data-missing-file"


def test_a_saved_dictionary_keeps_its_split_names(tmp_path: Path) -> None:
    saved(tmp_path / "all" / "train_sft", "a")
    saved(tmp_path / "all" / "train_gen", "b")
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train_sft", "train_gen"]}')
    assert splits_of(str(tmp_path / "all")) == ("train_sft", "train_gen")
    assert questions(tmp_path / "all", "train_gen") == ["b"]


def test_the_library_itself_saved_it(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"question": ["a", "b"], "answer": [{"text": ["x"]}, {"text": []}]}
    mine = datasets.Dataset.from_dict(rows)
    datasets.DatasetDict(train=mine, validation=mine).save_to_disk(str(tmp_path / "two"))
    mine.save_to_disk(str(tmp_path / "one"))
    assert splits_of(str(tmp_path / "two")) == ("train", "validation")
    for place in ("one", "two"):
        found = [row.values for row in read_rows(str(tmp_path / place), "train")]
        assert found == mine.to_list()


def test_both_forms_of_arrow(tmp_path: Path) -> None:
    import pyarrow as pa

    table = pa.table({"question": [str(n) for n in range(2500)]})
    for name, write in (("a.arrow", pa.ipc.new_file), ("b.arrow", pa.ipc.new_stream)):
        with write(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
        rows = list(read_rows(str(tmp_path / name)))
        assert [row.values["question"] for row in rows] == [str(n) for n in range(2500)]
        assert rows[-1].where == f"{tmp_path / name}:2500"


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("content", [b"", b"PAR1", b"ARROW1", b"hello, this is no table at all"])
def test_damaged_tables(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_rows(str(path)))
    assert caught.value.code == f"data-bad-{suffix}"
    assert caught.value.fix


@pytest.mark.parametrize("name", ["train.parquet", "train.arrow", "train.json", "train.jsonl",
                                  "train.csv"])  # fmt: skip
def test_lfs_pointers(tmp_path: Path, name: str) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / name
    path.write_text(POINTER, encoding="utf-8", newline="\n")
    with pytest.raises(DataError) as caught:
        list(read_rows(str(tmp_path)))
    error = caught.value
    assert error.code == "data-lfs-pointer"
    assert error.what == f"{path} is only a Git LFS pointer, the data is not here"
    assert error.fix[0] == f"in the folder {path.parent}: git lfs install && git lfs pull"
    assert "wants a token of the hub" in error.fix[1]
    assert "--kind dataset" in error.fix[2]


def test_a_saved_dataset_of_pointers(tmp_path: Path) -> None:
    saved(tmp_path / "clone", "a")
    (tmp_path / "clone" / "data-00000-of-00001.arrow").write_text(POINTER, encoding="utf-8")
    with pytest.raises(DataError, match="only a Git LFS pointer"):
        list(read_rows(str(tmp_path / "clone")))
    (tmp_path / "clone" / "state.json").write_text(POINTER, encoding="utf-8")
    with pytest.raises(DataError, match="only a Git LFS pointer"):
        list(read_rows(str(tmp_path / "clone")))


def test_a_folder_downloaded_by_hand(tmp_path: Path) -> None:
    """A clone with card, hidden files and rows in several formats of one split each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "train.json").write_text("{", encoding="utf-8")
    (tmp_path / "README.md").write_text("# card", encoding="utf-8")
    (tmp_path / "dataset_infos.json").write_text("{}", encoding="utf-8")
    table = pa.table({"question": ["a"], "answer": ["b"]})
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data" / "train-00000-of-00001.parquet")
    (tmp_path / "data" / "test.csv").write_text("question,answer\nc,d\n", encoding="utf-8")
    (tmp_path / "data" / "dev.json").write_text('[{"question": "e", "answer": "f"}]')
    assert splits_of(str(tmp_path)) == ("train", "validation", "test")
    assert questions(tmp_path) == ["a"]
    assert questions(tmp_path, "validation") == ["e"]
    assert questions(tmp_path, "test") == ["c"]
