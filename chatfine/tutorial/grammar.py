"""Words of a command line → values of fields, by the grammar of Python Fire.

`--x v`, `--x=v`, bare `--x` and `--nox` for switches, hyphens like underscores, `--group.x v` for
one group's field and `--x v` for every group's field of that name. Chatfine's own settings may
stand beside them.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from chatfine.errors import UsageError
from chatfine.flags import Flag
from chatfine.i18n import t
from chatfine.tutorial.fields import Field, Value

_FLAG = re.compile(r"--?[A-Za-z]")
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


@dataclass
class Values:
    """What was given, over the defaults of the table."""

    table: tuple[Field, ...]
    given: dict[str, Value] = field(default_factory=dict)
    """`group.name` → value"""
    written: dict[str, tuple[Field, ...]] = field(default_factory=dict)
    """the flag as it was typed → the fields it set"""
    extra: dict[str, object] = field(default_factory=dict)
    """chatfine's own settings"""

    def __getitem__(self, key: str) -> Value:
        """The value of `group.name`, given or default."""
        if key in self.given:
            return self.given[key]
        return next(one.default for one in self.table if one.key == key)

    def has(self, key: str) -> bool:
        """Whether `group.name` was given."""
        return key in self.given


def parse(
    words: Sequence[str],
    table: tuple[Field, ...],
    own: Mapping[str, Flag],
    positional: str = "",
) -> Values:
    """Read a command line.

    Args:
        words: what was typed after the name of the program.
        table: the fields it may set.
        own: chatfine's settings that may be given too; a field of the same name goes first.
        positional: the field that a word without a flag sets; "" = there is none.

    Raises:
        UsageError: unknown flag (with the likeliest one meant), missing or unusable value.
    """
    values = Values(table)
    queue = deque(words)
    while queue:
        word = queue.popleft()
        if word == "--":
            continue
        if _FLAG.match(word):
            _take(word, queue, values, own)
        elif positional and not values.has(positional):
            values.given[positional] = word
        else:
            raise UsageError("extra-word", t("unexpected argument {word}", word=repr(word)),
                             fix=t("put quotes around a text with spaces"))  # fmt: skip
    return values


def _take(word: str, queue: deque[str], values: Values, own: Mapping[str, Flag]) -> None:
    """Read one flag and, where it has one, its value."""
    written, equals, text = word.partition("=")
    name = written.lstrip("-").replace("-", "_")
    value: str | None = text if equals else None
    if value is None and queue and not _FLAG.match(queue[0]) and queue[0] != "--":
        value = queue.popleft()
    fields = tuple(one for one in values.table if name in (one.name, one.key))
    if fields:
        values.written[written] = fields
        for one in fields:
            values.given[one.key] = convert(one, value, written)
        return
    positive = name.removeprefix("no").removeprefix("_")
    if name.startswith("no") and value is None:
        fields = tuple(
            one for one in values.table
            if positive in (one.name, one.key) and one.kind == "switch"
        )  # fmt: skip
        if fields:
            values.written[written] = fields
            values.given |= {one.key: False for one in fields}
            return
        if positive in own and own[positive].kind == "switch":
            values.extra[positive] = False
            return
    if name not in own:
        raise _unknown(written, name, values.table, own)
    values.extra[name] = _own_value(own[name], value, written)


def _own_value(flag: Flag, value: str | None, written: str) -> object:
    """The value of one of chatfine's settings; its class checks it."""
    if flag.kind == "switch":
        return True if value is None else value
    if value is None:
        raise _no_value(written)
    return _list_of(value) if flag.kind == "list" else value


def convert(one: Field, value: str | None, written: str = "") -> Value:
    """The value of a field, read as its kind asks.

    Raises:
        UsageError: no value, or one of another kind or not among the choices.
    """
    written = written or f"--{one.name}"
    if value is None and (one.kind == "switch" or not one.effective):
        return True
    if value is None:
        raise _no_value(written)
    if not one.effective and one.kind != "text":
        return value  # whatever it is, nothing comes of it
    match one.kind:
        case "switch":
            return _switch(written, value)
        case "whole" | "number":
            return _number(written, value, whole=one.kind == "whole")
        case "list":
            return _list_of(value)
    value = "" if value == "None" else _unquoted(value)
    if not one.choices:
        return value
    word = value.rpartition(".")[2].replace("-", "_").lower()  # ShardingStrategy.FULL_SHARD
    for choice in one.choices:
        if word == choice.lower():
            return choice
    raise UsageError(
        "bad-setting",
        t("{flag} is {value}; possible: {choices}", flag=written, value=repr(value),
          choices=", ".join(one.choices)),
    )  # fmt: skip


def _switch(written: str, value: str) -> bool:
    if value.lower() in (*_TRUE, *_FALSE):
        return value.lower() in _TRUE
    raise UsageError(
        "bad-setting",
        t("{flag} is {value}; possible: {choices}", flag=written, value=repr(value),
          choices="True, False"),
    )  # fmt: skip


def _number(written: str, value: str, whole: bool) -> int | float:
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not math.isfinite(number) or (whole and not number.is_integer()):
        raise UsageError(
            "bad-setting",
            t("{flag} is {value}; it must be a whole number", flag=written, value=repr(value))
            if whole
            else t("{flag} is {value}; it must be a number", flag=written, value=repr(value)),
        )
    return int(number) if whole else number


def _list_of(value: str) -> tuple[str, ...]:
    """`a,b`, `["a", "b"]` or `('a', 'b')` → (a, b)."""
    inner = value.strip()
    if inner[:1] in ("[", "("):
        inner = inner[1:].rstrip("])")
    return tuple(part for raw in inner.split(",") if (part := _unquoted(raw.strip())))


def _unquoted(text: str) -> str:
    """Without the quotes that a shell of Windows leaves around a value."""
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def _no_value(written: str) -> UsageError:
    return UsageError(
        "no-value", t("{flag} needs a value", flag=written),
        fix=t("a value that begins with - is written {flag}=VALUE", flag=written),
    )  # fmt: skip


def _unknown(
    written: str, name: str, table: tuple[Field, ...], own: Mapping[str, Flag]
) -> UsageError:
    known = [*(one.name for one in table), *(one.key for one in table), *own]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return UsageError(
        "unknown-flag",
        t("there is no flag {flag}", flag=written),
        fix=t("did you mean {word}?", word=f"--{close[0]}") if close else t("see --help"),
    )
