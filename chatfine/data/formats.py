"""A row → the messages of a dialogue; which columns mean what is detected from their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from chatfine.data.rows import Row
from chatfine.data.turns import bad, check_dialogue, message, need_text, turns
from chatfine.errors import DataError, UsageError, did_you_mean
from chatfine.i18n import t
from chatfine.types import Dialogue, Message

MESSAGES = ("messages",)
CONVERSATIONS = ("conversations", "conversation")
INSTRUCTION = ("instruction", "指令")
INPUT = ("input", "context", "输入")
OUTPUT = ("output", "response", "输出")
PROMPT = ("prompt",)
COMPLETION = ("completion", "response", "output")
QUESTION = ("question", "query", "ask", "input", "q", "user", "human", "问题", "提问", "问", "用户")
ANSWER = (
    "answer", "response", "reply", "output", "a", "assistant", "bot",
    "回答", "答案", "回复", "答", "助手",
)  # fmt: skip
DIALOGUE = ("dialogue", "dialog", "对话")
SUMMARY = ("summary", "摘要", "总结")
TEXT = ("text", "content", "文本", "内容")
HAN = re.compile(r"[一-鿿]")
FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


@dataclass(frozen=True, slots=True)
class Shape:
    """What kind of rows a file holds, and which column plays which part (part → column)."""

    kind: str
    columns: dict[str, str]


@dataclass(frozen=True, slots=True)
class Templates:
    """Question and answer written as templates over the columns: "Summarize:\\n{dialogue}".

    `\\n` and `\\t` in a template become a line break and a tab; `{{` and `}}` stand for braces.
    """

    prompt: str
    response: str

    def __post_init__(self) -> None:
        if bool(self.prompt) != bool(self.response):
            missing = "--response" if self.prompt else "--prompt"
            raise UsageError(
                "missing-template",
                t("--prompt and --response belong together; {flag} is missing", flag=missing),
                fix=t('such as --prompt "Summarize:\\n{dialogue}" --response "{summary}"'),
            )

    def fields(self) -> list[str]:
        """The columns the templates name, in order."""
        found = FIELD.findall(self.prompt) + FIELD.findall(self.response)
        return list(dict.fromkeys(name for name in found if name))


Rule = tuple[str, dict[str, Sequence[str]]]
RULES: tuple[Rule, ...] = (
    ("messages", {"messages": MESSAGES}),
    ("messages", {"messages": CONVERSATIONS}),
    ("alpaca", {"instruction": INSTRUCTION, "output": OUTPUT}),
    ("prompt", {"prompt": PROMPT, "completion": ("completion",)}),
    ("prompt", {"prompt": PROMPT, "completion": COMPLETION}),
    ("question", {"prompt": ("question",), "completion": ("answer",)}),
    ("question", {"prompt": QUESTION, "completion": ANSWER}),
    ("prompt", {"prompt": PROMPT, "completion": ("answer",)}),
    ("summary", {"dialogue": DIALOGUE, "summary": SUMMARY}),
    ("text", {"text": ("text",)}),
    ("text", {"text": TEXT}),
)
"""Tried in order, exact names first: a kind of row and, for each part it needs, the usual names."""

OPTIONAL: dict[str, dict[str, Sequence[str]]] = {
    "alpaca": {"input": INPUT, "history": ("history", "历史"), "system": ("system", "系统")},
    "messages": {"system": ("system",)},
    "prompt": {"system": ("system",)},
    "question": {"system": ("system",), "history": ("history", "历史")},
    "summary": {"language": ("language",)},
}


def detect(columns: Iterable[str]) -> Shape:
    """The shape of rows with these columns.

    Raises:
        DataError: no shape fits, or two columns could play the same part.
    """
    names = list(columns)
    if {"chosen", "rejected"} <= set(names):
        raise DataError(
            "data-preferences",
            t("the rows hold preferences (chosen, rejected); only dialogues can be learned yet"),
            fix=t("give a data set of dialogues, or choose columns with --prompt and --response"),
        )
    by_lower: dict[str, str] = {name.strip().lower(): name for name in names}
    for kind, parts in RULES:
        found = _matches(by_lower, parts)
        if not all(found.values()):
            continue
        for columns in found.values():
            if len(columns) > 1:
                raise _ambiguous(columns, names)
        optional = _matches(by_lower, OPTIONAL.get(kind, {}))
        chosen = {part: match[0] for part, match in (found | optional).items() if match}
        return Shape(kind, chosen)
    raise DataError(
        "data-unknown-shape",
        t(
            "it is not clear which columns hold question and answer: {names}",
            names=", ".join(names),
        ),
        fix=_template_hint(names),
    )


def _matches(by_lower: dict[str, str], parts: dict[str, Sequence[str]]) -> dict[str, list[str]]:
    """For each part the columns that could play it."""
    return {
        part: [by_lower[name] for name in known if name in by_lower]
        for part, known in parts.items()
    }


def to_dialogue(row: Row, shape: Shape | Templates, system: str = "") -> Dialogue:
    """The dialogue of one row; `system` is put before it unless it has a system message.

    A question after the last answer is left out, since nothing in it is learned.

    Raises:
        DataError: the row can't be used; `where` is file:line:column.
    """
    if isinstance(shape, Templates):
        messages = _from_templates(row, shape)
    else:
        for part, column in shape.columns.items():
            if column not in row.values and part not in OPTIONAL.get(shape.kind, {}):
                raise missing_field(row, column)
        if shape.kind == "text":
            column = shape.columns["text"]
            text = need_text(row, column, row.values[column])
            if not text.strip():
                raise bad("data-empty-text", t("the text is empty"), row.at(column))
            return Dialogue((Message("assistant", text),), row.where, plain=True)
        messages = _BUILDERS[shape.kind](row, shape.columns)
    if system and messages and messages[0].role != "system":
        messages = [Message("system", system), *messages]
    return Dialogue(check_dialogue(row, messages), row.where)


def missing_field(row: Row, column: str) -> DataError:
    """The error for a row without `column`, with the closest column it has."""
    return DataError(
        "data-missing-field",
        t("the field {name} is missing", name=column),
        where=f"{row.where}:{row.column}",
        why=t("the row has: {names}", names=", ".join(row.values)),
        fix=did_you_mean(column, row.values) or t("add the field to this row"),
    )


def _from_templates(row: Row, templates: Templates) -> list[Message]:
    return [
        Message("user", _fill(templates.prompt, row)),
        Message("assistant", _fill(templates.response, row)),
    ]


def _fill(template: str, row: Row) -> str:
    """Columns put into a template in one pass: braces and backslashes in the data mean nothing."""

    def value(match: re.Match[str]) -> str:
        if match[0] in ("{{", "}}"):
            return match[0][0]
        column = match[1]
        if column not in row.values:
            raise missing_field(row, column)
        found = row.values[column]
        if isinstance(found, (int, float)) and not isinstance(found, bool):
            return str(found)
        return need_text(row, column, found)

    return FIELD.sub(value, template.replace("\\n", "\n").replace("\\t", "\t"))


def _messages(row: Row, columns: dict[str, str]) -> list[Message]:
    messages = turns(row, columns["messages"], row.values[columns["messages"]])
    system = _optional_text(row, columns, "system")
    return [Message("system", system), *messages] if system else messages


def _alpaca(row: Row, columns: dict[str, str]) -> list[Message]:
    """Instruction and input joined by a line break; history is a list of [question, answer]."""
    question = need_text(row, columns["instruction"], row.values[columns["instruction"]])
    extra = _optional_text(row, columns, "input")
    question = f"{question}\n{extra}" if question and extra else question or extra
    answer = need_text(row, columns["output"], row.values[columns["output"]])
    return [
        *_before(row, columns),
        message(row, columns["instruction"], "user", question),
        message(row, columns["output"], "assistant", answer),
    ]


def _pair(row: Row, columns: dict[str, str]) -> list[Message]:
    """Prompt and completion, each a text or a list of messages."""
    messages = _before(row, columns)
    for part, role in (("prompt", "user"), ("completion", "assistant")):
        value = row.values[columns[part]]
        if isinstance(value, list):
            messages += turns(row, columns[part], value)
        else:
            messages.append(message(row, columns[part], role, value))
    return messages


def _summary(row: Row, columns: dict[str, str]) -> list[Message]:
    """A dialogue to summarise; asked in the row's language, else in that of its text."""
    dialogue = need_text(row, columns["dialogue"], row.values[columns["dialogue"]])
    language = row.values.get(columns.get("language", ""))
    if language not in ("zh", "en"):
        language = "zh" if len(HAN.findall(dialogue)) * 5 > len(dialogue) else "en"
    request = "总结这段对话。" if language == "zh" else "Summarize the dialogue."
    prompt = f"{request}\n\n{dialogue}" if dialogue.strip() else ""
    return [
        message(row, columns["dialogue"], "user", prompt),
        message(row, columns["summary"], "assistant", row.values[columns["summary"]]),
    ]


_BUILDERS: dict[str, Callable[[Row, dict[str, str]], list[Message]]] = {
    "messages": _messages,
    "alpaca": _alpaca,
    "prompt": _pair,
    "question": _pair,
    "summary": _summary,
}


def _before(row: Row, columns: dict[str, str]) -> list[Message]:
    """System prompt and earlier turns of a row, where it has them."""
    system = _optional_text(row, columns, "system")
    messages = [Message("system", system)] if system else []
    column = columns.get("history", "")
    history = row.values.get(column) or []
    if not isinstance(history, list):
        raise bad("data-wrong-type", t("{name} must be a list", name=column), row.at(column))
    for pair in history:
        if not (isinstance(pair, list) and len(pair) == 2):
            raise bad(
                "data-wrong-type",
                t("{name} must hold pairs of question and answer", name=column),
                row.at(column),
            )
        messages += [
            message(row, column, "user", pair[0]),
            message(row, column, "assistant", pair[1]),
        ]
    return messages


def _optional_text(row: Row, columns: dict[str, str], part: str) -> str:
    column = columns.get(part, "")
    value = row.values.get(column)
    return need_text(row, column, value) if value else ""


def _ambiguous(found: list[str], names: list[str]) -> DataError:
    return DataError(
        "data-ambiguous",
        t("{names} could mean the same thing", names=", ".join(found)),
        fix=_template_hint(names),
    )


def _template_hint(names: Sequence[str]) -> str:
    first, second = (*names, "question", "answer")[:2] if len(names) < 2 else names[-2:]
    return t(
        "say it: --prompt {prompt} --response {response}",
        prompt=f'"{{{first}}}"',
        response=f'"{{{second}}}"',
    )
