"""What every dialogue must satisfy, whatever the shape of its row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chatfine.data.rows import Row
from chatfine.errors import DataError, did_you_mean
from chatfine.i18n import t
from chatfine.types import Message

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}
"""Names of roles in the wild → ours. A function call is something the assistant says."""


def bad(code: str, what: str, where: str, fix: str | Sequence[str] = ()) -> DataError:
    """A problem of one row."""
    return DataError(code, what, where=where, fix=fix or t("repair this row"))


def need_text(row: Row, column: str, value: Any) -> str:
    """`value` if it is a text that can be encoded.

    Raises:
        DataError: another type, or half of a surrogate pair.
    """
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise bad(
            "data-wrong-type",
            t("{name} must be a text, not {kind}", name=column, kind=kind),
            row.at(column),
        )
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise bad(
            "data-half-character",
            t("{name} holds half of a character (a lone \\ud8xx escape)", name=column),
            row.at(column),
        )
    return value


def message(row: Row, column: str, role: str, content: Any) -> Message:
    """A message whose content must be a text that says something.

    Raises:
        DataError: wrong type, or empty.
    """
    text = need_text(row, column, content)
    if not text.strip():
        raise _empty(role, row.at(column))
    return Message(role, text)


def turns(row: Row, column: str, value: Any) -> list[Message]:
    """Messages of a list of {role, content} (OpenAI) or {from, value} (ShareGPT).

    Raises:
        DataError: a wrong type, a missing field, an unknown role, an empty message.
    """
    if not isinstance(value, list) or not value:
        raise bad(
            "data-wrong-type",
            t("{name} must be a list of messages with at least one entry", name=column),
            row.at(column),
        )
    messages = []
    seen = {"role": 0, "from": 0}
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict):
            raise bad(
                "data-wrong-type",
                t("message {number} must be an object with role and content", number=number),
                row.at(column),
            )
        role_key = "role" if "role" in turn else "from"
        where = row.at(role_key, seen[role_key]) if role_key in turn else row.at(column)
        seen[role_key] += 1
        messages.append(_turn(turn, role_key, number, where, row))
    return messages


def _turn(turn: dict[str, Any], role_key: str, number: int, where: str, row: Row) -> Message:
    content_key = "content" if "content" in turn or role_key == "role" else "value"
    for key in (role_key, content_key):
        if key not in turn:
            raise DataError(
                "data-missing-field",
                t("message {number} has no field {name}", number=number, name=key),
                where=where,
                why=t("it has: {names}", names=", ".join(turn)),
                fix=did_you_mean(key, turn) or t("each message needs role and content"),
            )
    role = ROLES.get(str(turn[role_key]).strip().lower())
    if role is None:
        raise bad(
            "data-unknown-role",
            t("unknown role {role} in message {number}", role=repr(turn[role_key]), number=number),
            where,
            did_you_mean(str(turn[role_key]), ROLES) or t("use system, user, assistant or tool"),
        )
    if turn.get("tool_calls"):
        raise bad(
            "data-tool-calls", t("tool_calls can't be used; write the call as content"), where
        )
    text = _joined(turn[content_key])
    if not isinstance(text, str):
        raise bad(
            "data-wrong-type",
            t("{name} of message {number} must be a text", name=content_key, number=number),
            where,
        )
    need_text(row, content_key, text)
    if not text.strip() and role != "tool":
        raise _empty(role, where)
    return Message(role, text)


def _joined(content: Any) -> Any:
    """The text of a list of parts ({"type": "text", "text": …}); anything else as it is."""
    if (
        isinstance(content, list)
        and content
        and all(isinstance(part, dict) and part.get("type") == "text" for part in content)
    ):
        parts = [part.get("text") for part in content]
        return "".join(parts) if all(isinstance(part, str) for part in parts) else None
    return content


def check_dialogue(row: Row, messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages up to the last answer, their order checked.

    Raises:
        DataError: no answer, a system message in the middle, an answer first, or two turns of one
            speaker in a row.
    """
    answers = [place for place, turn in enumerate(messages) if turn.role == "assistant"]
    if not answers:
        raise bad("data-no-answer", t("the dialogue has no assistant turn"), _place(row, 0))
    kept = tuple(messages[: answers[-1] + 1])
    previous = ""
    for place, turn in enumerate(kept):
        allowed = {
            "": ("system", "user"),
            "system": ("user",),
            "user": ("assistant",),
            "assistant": ("user", "tool"),
            "tool": ("assistant", "tool"),
        }[previous]
        if turn.role not in allowed:
            raise _out_of_order(turn.role, previous, place + 1, _place(row, place))
        previous = turn.role
    if kept[answers[-1]].content.strip() == "":
        raise _empty("assistant", _place(row, answers[-1]))
    if any(turn.role == "user" and not turn.content.strip() for turn in kept):
        raise _empty("user", _place(row, 0))
    return kept


def _place(row: Row, number: int) -> str:
    """file:line:column of message `number` where the row is a list of messages, else of the row."""
    for column in row.values:
        value = row.values[column]
        if isinstance(value, list) and value and isinstance(value[0], dict):
            key = "role" if "role" in value[0] else "from"
            return row.at(key, min(number, len(value) - 1))
    return f"{row.where}:{row.column}"


def _empty(role: str, where: str) -> DataError:
    if role == "assistant":
        return bad("data-empty-answer", t("the answer is empty"), where)
    if role == "user":
        return bad("data-empty-question", t("the question is empty"), where)
    return bad("data-empty-message", t("the {role} message is empty", role=role), where)


def _out_of_order(role: str, previous: str, number: int, where: str) -> DataError:
    if role == previous == "user":
        return bad("data-two-turns", t("two user turns in a row (message {n})", n=number), where)
    if role == previous:
        return bad(
            "data-two-turns",
            t("two {role} turns in a row (message {n})", role=role, n=number),
            where,
        )
    if not previous or previous == "system":
        what = t("the dialogue must begin with a user turn, not {role}", role=role)
    else:
        what = t("a {role} turn can't follow {previous} (message {n})", role=role,
                 previous=previous, n=number)  # fmt: skip
    return bad("data-turn-order", what, where)
