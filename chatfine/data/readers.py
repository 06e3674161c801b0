"""Data files → rows that know their line and column.

JSON and JSONL, CSV and TSV, parquet, Arrow, and plain text (each paragraph, that is each block
between blank lines, is one row). A row that can't be read is handed to `on_bad` and the reading
goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from chatfine.data.encoding import Line, read_head, read_lines
from chatfine.data.problems import OnBad
from chatfine.data.read_arrow import read_columns
from chatfine.data.read_json import is_json_lines, read_json, read_json_lines
from chatfine.data.read_table import read_table
from chatfine.data.rows import Row

TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow",
            *TEXT_SUFFIXES)  # fmt: skip
"""The kinds of file `read_file` knows."""


def read_file(path: Path, shown: str, on_bad: OnBad) -> Iterator[Row]:
    """The rows of one file, by its suffix; `shown` is its name in messages.

    Raises:
        DataError: the file as a whole can't be read.
    """
    suffix = path.suffix.lower()
    if suffix in (".parquet", ".arrow"):
        return read_columns(path, shown)
    if suffix in (".csv", ".tsv"):
        return read_table(path, shown, on_bad)
    if suffix in TEXT_SUFFIXES:
        return _paragraphs(path, shown, on_bad)
    start = read_head(path).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start == b"[" or (start == b"{" and suffix == ".json" and not is_json_lines(path)):
        return read_json(path, shown, on_bad)
    return read_json_lines(path, shown, on_bad)


def _paragraphs(path: Path, shown: str, on_bad: OnBad) -> Iterator[Row]:
    """Each block of lines between blank lines, as {"text": …}."""
    block: list[Line] = []
    for line in read_lines(path, shown):
        if line.error:
            on_bad(line.error)
        elif line.text.strip():
            block.append(line)
        elif block:
            yield _paragraph(block, shown)
            block = []
    if block:
        yield _paragraph(block, shown)


def _paragraph(block: list[Line], shown: str) -> Row:
    text = "".join(line.text for line in block).replace("\r\n", "\n").rstrip("\n")
    return Row(shown, block[0].number, {"text": text}, text, find=lambda *_: 0)
