"""CSV and TSV → rows with line and column."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from chatfine.data.encoding import Line, read_lines
from chatfine.data.problems import OnBad
from chatfine.data.rows import Finder, Row
from chatfine.errors import DataError
from chatfine.i18n import t


def read_table(path: Path, shown: str, on_bad: OnBad) -> Iterator[Row]:
    """Rows of a CSV or TSV file with a header; line numbers count line breaks inside quotes.

    Raises:
        DataError: no usable header, or a quote that is never closed and so swallows the rest.
    """
    csv.field_size_limit(2**31 - 1)
    taken: list[Line] = []
    lines = _remembering(read_lines(path, shown), taken)
    first = next(lines, "")
    if not first.strip():
        raise _no_header(shown)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
    reader = csv.reader(_chain(first, lines), delimiter=delimiter, strict=True)
    columns: list[str] | None = None
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            bad = _bad_csv(error, shown, taken)
            if bad.code == "data-open-quote":
                raise bad from None
            on_bad(bad)
            taken.clear()
            continue
        record, taken[:] = list(taken), []
        if cells is None:
            return
        if not cells:
            continue
        damaged = next((line.error for line in record if line.error), None)
        if columns is None:
            if damaged:
                raise damaged
            columns = _header(cells, shown)
        elif damaged:
            on_bad(damaged)
        elif len(cells) != len(columns):
            on_bad(_wrong_width(len(cells), len(columns), f"{shown}:{record[0].number}:1"))
        else:
            raw = "".join(line.text for line in record)
            finder = _FINDERS[delimiter]
            yield Row(
                shown, record[0].number, dict(zip(columns, cells, strict=True)), raw, find=finder
            )


def _remembering(lines: Iterable[Line], taken: list[Line]) -> Iterator[str]:
    for line in lines:
        taken.append(line)
        yield line.text.replace("\0", "�")  # Python 3.10's csv module stops at a NUL


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _header(cells: list[str], shown: str) -> list[str]:
    columns = [cell.strip() for cell in cells]
    twice = {name for name in columns if columns.count(name) > 1}
    if twice:
        raise DataError(
            "data-bad-header",
            t("the column {name} appears twice", name=sorted(twice)[0]),
            where=f"{shown}:1:1",
            fix=t("give every column its own name"),
        )
    return columns


def _no_header(shown: str) -> DataError:
    return DataError(
        "data-bad-header",
        t("the table has no header"),
        where=f"{shown}:1:1",
        fix=t("the first line must hold the names of the columns, such as question,answer"),
    )


def _wrong_width(found: int, expected: int, where: str) -> DataError:
    return DataError(
        "data-row-width",
        t("the row has {found} cells, the header {expected}", found=found, expected=expected),
        where=where,
        fix=t("put cells that hold commas or line breaks between double quotes"),
    )


def _bad_csv(error: csv.Error, shown: str, taken: list[Line]) -> DataError:
    line = taken[0].number if taken else 1
    unclosed = "unexpected end" in str(error)
    return DataError(
        "data-open-quote" if unclosed else "data-bad-csv",
        t("a cell has no closing quote") if unclosed else t("a quote is in the wrong place"),
        where=f"{shown}:{line}:1",
        why=None if unclosed else str(error),
        fix=t('a double quote inside a quoted cell is written twice: ""'),
    )


def _table_finder(delimiter: str) -> Finder:
    cell = re.compile(rf'("(?:[^"]|"")*"|[^{re.escape(delimiter)}"]?[^{re.escape(delimiter)}]*)')

    def find(raw: str, columns: list[str], field: str, _nth: int) -> int:
        index = 0
        for name in columns:
            match = cell.match(raw, index)
            if name == field or match is None:
                return index
            index = match.end() + 1
        return -1

    return find


_FINDERS = {delimiter: _table_finder(delimiter) for delimiter in ",;\t"}
