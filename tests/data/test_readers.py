"""Bad bytes, bad JSON, bad tables: each problem has its line and column and says what to do."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path

import pytest

from chatfine.data.dialogues import DataSettings, Part, load_dialogues, read_dialogues
from chatfine.data.problems import Problems
from chatfine.data.sources import read_rows, splits_of
from chatfine.errors import DataError

GOOD = {"question": "Who?", "answer": "Me, 我。"}


def write(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.write_bytes(text.encode(encoding))
    return str(path)


def lines(*rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def refusal(path: str, **settings: object) -> DataError:
    with pytest.raises(DataError) as caught:
        load_dialogues(path, DataSettings(**settings))  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    assert caught.value.fix, "every refusal says what to do now"
    return caught.value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", lines(GOOD, GOOD)),
        ("a.jsonl", "\ufeff" + lines(GOOD) + "\n\n" + lines(GOOD)),
        ("a.json", lines(GOOD, GOOD)),
        ("a.json", json.dumps([GOOD, GOOD], indent=2)),
        ("a.jsonl", json.dumps([GOOD, GOOD], indent=2)),
        ("a.json", json.dumps({"version": "1", "data": [GOOD, GOOD]}, indent=1)),
        ("a.json", json.dumps(GOOD, indent=2) + "\n" + json.dumps(GOOD, indent=2)),
        ("a.csv", 'question,answer\nWho?,"Me, 我。"\r\nWho?,"Me, 我。"\n'),
        ("a.csv", "question;answer\nWho?;Me, 我。\nWho?;Me, 我。"),
        ("a.tsv", "question\tanswer\nWho?\tMe, 我。\nWho?\tMe, 我。\n"),
    ],
)
def test_every_kind_of_text_file_gives_the_same_rows(tmp_path: Path, name: str, text: str) -> None:
    rows = list(read_rows(write(tmp_path / name, text)))
    assert [row.values for row in rows] == [GOOD, GOOD]


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([GOOD, GOOD | {"answer": None}]), path)
    first, second = read_rows(str(path))
    assert first.values == GOOD
    assert second.at("answer") == f"{path}:2:answer"
    assert refusal(str(path)).code == "data-wrong-type"
    path.write_bytes(b"PAR1 and then nothing")
    assert refusal(str(path)).code == "data-bad-parquet"


def test_text_paragraphs_know_their_first_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\nstill one\n\n\n  \ntwo\r\nstill two\n")
    rows = list(read_rows(path))
    assert [row.values["text"] for row in rows] == ["one\nstill one", "two\nstill two"]
    assert [row.line for row in rows] == [1, 6]


def test_csv_lines_count_breaks_inside_quotes(tmp_path: Path) -> None:
    """Against an oracle: the place of each record's first byte in the text that was written."""
    chance = random.Random(0)
    pieces = ["a", 'say "hi"', "two\nlines", "x,y", "\n\n", "end\n", ""]
    text, expected = "question,answer\n", []
    for _ in range(200):
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerow(
            ["q" + "".join(chance.choices(pieces, k=3)), "".join(chance.choices(pieces, k=2)) + "!"]
        )
        expected.append(text.count("\n") + 1)
        text += buffer.getvalue()
    rows = list(read_rows(write(tmp_path / "a.csv", text)))
    assert [row.line for row in rows] == expected
    source = text.split("\n")
    for row in rows:
        line, column = map(int, row.at("answer").rsplit(":", 2)[1:])
        assert source[line - 1][column - 2 : column - 1] == ",", "the answer begins after a comma"


@pytest.mark.parametrize("indent", [None, 2])
def test_bad_json_is_found_to_the_column(tmp_path: Path, indent: int | None) -> None:
    text = json.dumps([GOOD] * 5, indent=indent, ensure_ascii=False)
    broken = text.replace('"answer"', "answer", 3).replace("answer:", '"answer":', 2)
    place = broken.index("answer:")
    error = refusal(write(tmp_path / "a.json", broken))
    line = broken.count("\n", 0, place) + 1
    column = place - broken.rfind("\n", 0, place)
    assert error.code == "data-bad-json"
    assert (error.where or "").endswith(f"a.json:{line}:{column}")
    assert f"line {line}" in error.what


def test_all_problems_come_at_once_the_first_20_in_full(tmp_path: Path) -> None:
    bad = '{"question": "Who?", "answer": }'
    rows = [lines(GOOD).strip() if i % 2 else bad for i in range(60)]
    path = write(tmp_path / "a.jsonl", "\n".join(rows))
    error = refusal(path)
    assert "30 problems" in error.what
    assert "10 more" in error.what
    assert error.what.count("a.jsonl:") == 20
    assert f"{path}:1:{bad.index(chr(125)) + 1}:" in error.what
    assert "--on-bad-row skip" in " ".join(error.fix)
    assert len(load_dialogues(path, DataSettings(on_bad_row="skip"))) == 30


def test_nul_bytes(tmp_path: Path) -> None:
    text = lines(GOOD, GOOD) + '{"question": "\0\0'
    error = refusal(write(tmp_path / "a.jsonl", text))
    assert (error.code, (error.where or "")[-5:]) == ("data-nul", ":3:15")
    table = "question,answer\nWho?,Me\nWho?,M\0e\n"
    error = refusal(write(tmp_path / "a.csv", table))
    assert (error.code, (error.where or "")[-4:]) == ("data-nul", ":3:7")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("gbk", "GBK"), ("utf-16", "UTF-16"), ("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE")],
)
def test_other_encodings_are_named_with_a_command(
    tmp_path: Path, name: str, encoding: str, shown: str
) -> None:
    text = {
        "a.jsonl": lines(*[{"question": "你是谁？", "answer": "我是小凡。"}] * 3),
        "a.json": json.dumps(
            [{"question": "你是谁？", "answer": "我是小凡。"}], ensure_ascii=False
        ),
        "a.csv": "question,answer\n你是谁？,我是小凡。\n",
        "a.txt": "plain words first\n你是谁？我是小凡。\n",
    }[name]
    path = write(tmp_path / name, text, encoding)
    for policy in ("error", "skip"):  # a whole file is no bad row
        error = refusal(path, on_bad_row=policy)
        assert error.code == "data-encoding"
        assert f"encoded as {shown};" in error.what
    assert error.fix[0].startswith("iconv -f ")
    command = error.fix[1].split('python -c "')[1].removesuffix('"')
    exec(command)  # the Python command does what it says
    converted = tmp_path / name.replace(".", ".utf8.")
    assert converted.read_text(encoding="utf-8") == text


def test_one_damaged_line_does_not_make_a_file_gbk(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = lines({"question": "你是谁？", "answer": "我是小凡。"}).encode()
    path.write_bytes(good + good[:-5] + b"\n" + good)
    error = refusal(str(path))
    assert error.code == "data-not-utf8"
    assert ":2:" in (error.where or "")
    assert len(load_dialogues(str(path), DataSettings(on_bad_row="skip"))) == 2


@pytest.mark.parametrize(
    ("text", "code", "place"),
    [
        ('question,answer\nWho?,"Me\nWho?,Me\n', "data-open-quote", ":2:1"),
        ("question,answer\nWho?\n", "data-row-width", ":2:1"),
        ("question,answer\nWho?,Me,too\n", "data-row-width", ":2:1"),
        ("question,question\nWho?,Me\n", "data-bad-header", ":1:1"),
        ("", "data-bad-header", ":1:1"),
        ('question,answer\n"Who?"x,Me\n', "data-bad-csv", ":2:1"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str, code: str, place: str) -> None:
    error = refusal(write(tmp_path / "a.csv", text))
    assert error.code == code
    assert (error.where or "").endswith(place)


def test_deep_nesting_and_wrong_tops(tmp_path: Path) -> None:
    assert refusal(write(tmp_path / "a.jsonl", "[" * 100_000)).code == "data-bad-json"
    assert refusal(write(tmp_path / "b.jsonl", lines(GOOD, 3))).code == "data-not-an-object"
    assert refusal(write(tmp_path / "c.jsonl", "")).code == "data-empty"
    assert refusal(write(tmp_path / "d.json", "[]")).code == "data-empty"


def test_what_is_no_data_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"PK\x03\x04rest")
    assert refusal(str(tmp_path / "a.jsonl")).code == "data-binary"
    write(tmp_path / "b.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert refusal(str(tmp_path / "b.jsonl")).code == "data-lfs-pointer"
    write(tmp_path / "c.xlsx", "x")
    assert "CSV" in refusal(str(tmp_path / "c.xlsx")).fix[0]
    error = refusal(str(tmp_path / "b.jsonlx"))
    assert (error.code, "b.jsonl?" in error.fix[0]) == ("no-dataset", True)
    assert "dialogs" in refusal("dialog").fix[0]
    assert refusal("some.py:function").code == "data-no-function-file"
    assert refusal("nobody/nothing-of-that-name").code == "data-offline"


def test_folders_are_read_by_the_words_in_file_names(tmp_path: Path) -> None:
    for name in ("MTS-TrainingSet.csv", "MTS-ValidationSet.csv", "test/part0.csv", "latest.csv"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        write(path, f"question,answer\nWho?,{name}\n")
    write(tmp_path / "README.md", "not data")
    assert splits_of(str(tmp_path)) == ("train", "validation", "test")
    found = [row.values["answer"] for row in read_rows(str(tmp_path), "train")]
    assert found == ["MTS-TrainingSet.csv", "latest.csv"]


def test_problems_of_several_files_are_collected(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", lines(GOOD) + "{\n")
    write(tmp_path / "b.jsonl", lines(GOOD | {"answer": " "}))
    problems = Problems()
    kept = list(read_dialogues(Part(str(tmp_path), "train"), DataSettings(), problems))
    assert len(kept) == 1
    assert sorted(problems.by_code) == ["data-bad-json", "data-empty-answer"]
