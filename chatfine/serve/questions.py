"""Files of questions → conversations, and files of answers that survive an interruption.

A row is `{"prompt": "…"}` or `{"messages": [{role, content}, …]}`; the answer goes into it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatfine.data.readers import read_file
from chatfine.data.rows import Row
from chatfine.data.turns import message, turns
from chatfine.errors import DataError, OutputError
from chatfine.i18n import t
from chatfine.types import Message

ANSWER = "answer"
OTHER_ANSWER = "answer_compare"
"""Name of the second model's answer with --compare."""


@dataclass(frozen=True, slots=True)
class Question:
    """One row: its values as they stand in the file, and what to ask."""

    values: dict[str, Any]
    messages: tuple[Message, ...]


def read_questions(path: Path, system: str = "") -> list[Question]:
    """All questions of a file: JSONL or JSON rows, or a JSON list of dialogues (or just one).

    Args:
        path: the file.
        system: system prompt for conversations that have none.

    Raises:
        DataError: no such file, not JSON, a row without a question, or one that has an answer.
    """
    if not path.is_file():
        raise DataError("no-questions-file", t("there is no file {path}", path=path))
    bad: list[DataError] = []
    rows = list(read_file(path, str(path), bad.append))
    if bad:
        raise bad[0]
    if rows and all(set(row.values) == {"role", "content"} for row in rows):
        whole = [row.values for row in rows]  # the file is one dialogue, its messages were the rows
        rows = [Row(str(path), rows[0].line, {"messages": whole})]
    if not rows:
        raise DataError("no-questions", t("{path} holds no questions", path=path))
    return [Question(row.values, _conversation(row, system)) for row in rows]


def _conversation(row: Row, system: str) -> tuple[Message, ...]:
    values = row.values
    if ANSWER in values:
        raise DataError(
            "answer-taken",
            t("the row has a field {name} already, which would be lost", name=ANSWER),
            where=row.at(ANSWER),
            fix=t("rename the field in the file"),
        )
    if "messages" in values:
        found = turns(row, "messages", values["messages"])
    elif "prompt" in values:
        found = [message(row, "prompt", "user", values["prompt"])]
    else:
        raise DataError(
            "no-question",
            t("the row has neither prompt nor messages"),
            where=row.where,
            why=t("it has: {names}", names=", ".join(values)),
            fix='{"prompt": "Who are you?"}',
        )
    if found[-1].role not in ("user", "tool"):
        raise DataError(
            "not-a-question",
            t("the dialogue ends with {role}, so there is nothing to answer", role=found[-1].role),
            where=row.where,
            fix=t("end it with a message of the user"),
        )
    if system and found[0].role != "system":
        found.insert(0, Message("system", system))
    return tuple(found)


def check_answers_file(path: Path) -> None:
    """Refuse to replace a file that is there.

    Raises:
        OutputError: it exists, or its folder does not.
    """
    if path.exists():
        raise OutputError(
            "output-exists", t("the file {path} exists", path=path), where="--output",
            fix=t("name a new file"),
        )  # fmt: skip
    if not path.absolute().parent.is_dir():
        raise OutputError(
            "no-output-folder", t("there is no folder {path}", path=path.parent), where="--output"
        )


def write_answers(
    output: Path,
    questions: Sequence[Question],
    settings: dict[str, Any],
    answer: Callable[[Sequence[Question]], list[dict[str, str]]],
    step: int,
    on_progress: Callable[[int], None] | None = None,
) -> int:
    """Answer all questions, `step` at a time, and write `output` when all are answered.

    Until then the answers are in a hidden file beside it, named after questions and settings, so
    the same command goes on where it was interrupted and another one starts anew.

    Args:
        output: JSONL file to write.
        questions: what to ask.
        settings: all else that decides the answers.
        answer: gives the fields to add to each of some questions.
        step: questions between two writes.
        on_progress: called with the number of questions answered so far.

    Returns:
        How many answers an interrupted call had left.
    """
    key = json.dumps([[q.values for q in questions], settings], sort_keys=True, ensure_ascii=False)
    name = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    partial = output.with_name(f".{output.name}.{name}.partial")
    found = _whole_lines(partial)
    found = found[: len(found) // step * step]  # so that all batches are what they would have been
    with partial.open("r+b" if partial.exists() else "wb") as file:
        file.truncate(len(b"".join(found)))
        file.seek(0, os.SEEK_END)
        for begin in range(len(found), len(questions), step):
            if on_progress:
                on_progress(begin)
            some = questions[begin : begin + step]
            for question, added in zip(some, answer(some), strict=True):
                line = json.dumps(question.values | added, ensure_ascii=False)
                file.write(line.encode("utf-8", "surrogatepass") + b"\n")
            file.flush()
        os.fsync(file.fileno())
    os.replace(partial, output)
    return len(found)


def _whole_lines(path: Path) -> list[bytes]:
    """The lines of an interrupted file that were written to their end."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]
