"""JSON and JSON lines → rows with line and column."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from chatfine.data.encoding import read_lines, read_text
from chatfine.data.problems import OnBad
from chatfine.data.rows import Row
from chatfine.errors import DataError
from chatfine.i18n import t

Record = tuple[int, int, Any]
"""Start and end in the text, and the value."""

SPACE = re.compile(r"\s*")
_DECODER = json.JSONDecoder()


def is_json_lines(path: Path) -> bool:
    """Whether the first line of a file is a whole JSON object and a second one follows."""
    with path.open("rb") as file:
        try:
            json.loads(file.readline().decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return False
        return file.readline().lstrip().startswith(b"{")


def read_json_lines(path: Path, shown: str, on_bad: OnBad) -> Iterator[Row]:
    """Rows of a file with one JSON object a line; blank lines are passed over."""
    for line in read_lines(path, shown):
        if line.error:
            on_bad(line.error)
            continue
        if not line.text.strip():
            continue
        try:
            values = _as_values(json.loads(line.text))
        except (ValueError, RecursionError) as error:
            on_bad(bad_json(error, line.text, shown, line.number))
            continue
        if values is None:
            on_bad(_not_an_object(f"{shown}:{line.number}:1"))
            continue
        yield Row(shown, line.number, values, line.text, find=_find_in_json)


def read_json(path: Path, shown: str, on_bad: OnBad) -> Iterator[Row]:
    """Rows of a list of objects, of an object with one list inside, or of objects in a row.

    Raises:
        DataError: bad JSON; unlike in JSON lines, what follows can't be read any more.
    """
    text = read_text(path, shown)
    line, counted = 1, 0
    try:
        for start, end, value in _records(text):
            line += text.count("\n", counted, start)
            counted = start
            column = start - text.rfind("\n", 0, start)
            values = _as_values(value)
            if values is None:
                on_bad(_not_an_object(f"{shown}:{line}:{column}"))
            else:
                yield Row(shown, line, values, text[start:end], column, _find_in_json)
    except (ValueError, RecursionError) as error:
        raise bad_json(error, text, shown) from None


def _records(text: str) -> Iterator[Record]:
    """(start, end, value) of each record in a JSON text."""
    start = _skip(text, 0)
    if text[start] == "[":
        end = yield from _items(text, start)
        if text[end:].strip():
            raise json.JSONDecodeError("Extra data", text, _skip(text, end))
        return
    value, end = _DECODER.raw_decode(text, start)
    inner = _only_list(value)
    if inner and not text[end:].strip():
        yield from _items(text, _value_start(text, start, inner))
        return
    yield start, end, value
    while (start := _skip(text, end)) < len(text):
        value, end = _DECODER.raw_decode(text, start)
        yield start, end, value


def _items(text: str, start: int) -> Generator[Record, None, int]:
    """Each item of the list at `start`; the generator's return value is the list's end."""
    index = _skip(text, start + 1)
    if text[index : index + 1] == "]":
        return index + 1
    while True:
        value, end = _DECODER.raw_decode(text, index)
        yield index, end, value
        index = _skip(text, end)
        sign = text[index : index + 1]
        if sign == "]":
            return index + 1
        if sign != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, index)
        index = _skip(text, index + 1)


def _skip(text: str, index: int) -> int:
    match = SPACE.match(text, index)
    return match.end() if match else index


def _only_list(value: Any) -> str:
    """The key of the one list of objects in `value`; "" when `value` is itself a row."""
    if not isinstance(value, dict):
        return ""
    lists = [key for key, item in value.items() if isinstance(item, list) and item]
    if (
        len(lists) != 1
        or is_turns(value[lists[0]])
        or not isinstance(value[lists[0]][0], (dict, list))
    ):
        return ""
    return str(lists[0])


def _value_start(text: str, start: int, key: str) -> int:
    """Where the value of `key` begins in the JSON object at `start`."""
    index = _skip(text, start + 1)
    while True:
        name, end = _DECODER.raw_decode(text, index)
        index = _skip(text, _skip(text, end) + 1)  # over the colon
        if name == key:
            return index
        _, end = _DECODER.raw_decode(text, index)
        index = _skip(text, _skip(text, end) + 1)  # over the comma


def is_turns(value: Any) -> bool:
    """Whether a value is a list of messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and bool({"role", "from"} & set(value[0]))
    )


def _as_values(value: Any) -> dict[str, Any] | None:
    if isinstance(value, dict):
        return value
    return {"messages": value} if is_turns(value) else None


def _not_an_object(where: str) -> DataError:
    return DataError(
        "data-not-an-object",
        t("the row is not a JSON object"),
        where=where,
        fix=t('each row must look like {"question": "…", "answer": "…"}'),
    )


def bad_json(error: Exception, text: str, shown: str, line: int = 1) -> DataError:
    """The error for JSON text that begins at `line` of `shown`."""
    if not isinstance(error, json.JSONDecodeError):
        return DataError(
            "data-bad-json",
            t("this is not valid JSON"),
            where=f"{shown}:{line}:1",
            why=t("it is nested too deeply or a number is too long"),
            fix=t("delete or repair this line"),
        )
    near = text[max(0, error.pos - 20) : error.pos + 20].strip()
    place = min(error.pos, len(text.rstrip()))  # what breaks off at its end breaks off on its line
    number = line + text.count("\n", 0, place)
    column = place - text.rfind("\n", 0, place)
    return DataError(
        "data-bad-json",
        t("bad JSON at line {line}, column {column}", line=number, column=column),
        where=f"{shown}:{number}:{column}",
        why=t("{reason}, near: {near}", reason=_reason(error.msg), near=near),
        fix=t('repair the line; quotes and line breaks inside a text are written \\" and \\n'),
    )


def _reason(message: str) -> str:
    """The standard library's explanation in the reader's language."""
    known = {
        "Expecting value": t("a value is missing"),
        "Expecting property name": t("a name in double quotes is missing"),
        "Illegal trailing comma": t("there is one comma too many"),
        "Expecting ',' delimiter": t("a comma is missing, or the text ends too early"),
        "Expecting ':' delimiter": t("a colon is missing"),
        "Unterminated string": t("a text has no closing quote"),
        "Invalid control character": t("a line break or tab stands inside a text"),
        "Invalid \\escape": t("a backslash is followed by a letter that means nothing"),
        "Invalid \\uXXXX": t("\\u must be followed by four hexadecimal digits"),
        "Extra data": t("something follows after the end"),
    }
    return next((text for start, text in known.items() if message.startswith(start)), message)


def _find_in_json(raw: str, _columns: list[str], field: str, nth: int) -> int:
    """The `nth` key called `field`; a quote inside a JSON text is escaped, so texts can't match."""
    key = re.escape(json.dumps(field, ensure_ascii=False))
    matches = list(re.finditer(rf"(?<!\\){key}\s*:", raw))
    return matches[nth].start() if nth < len(matches) else -1
