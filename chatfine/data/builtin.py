"""The data sets that come with chatfine: short dialogues with a summary, and who the model is.

Both are ours, half English and half Chinese, line by line in turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
REQUESTS = {
    "en": "Summarize the dialogue in one sentence.",
    "zh": "用一句话总结这段对话。",
}
"""What the model is asked before a dialogue, by language."""

Prepare = Callable[[dict[str, Any], str, str], dict[str, Any]]
"""(row, name, author) → the row as training sees it."""


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """One data set: its splits lie in chatfine/data/NAME/SPLIT.jsonl."""

    name: str
    splits: tuple[str, ...]
    prepare: Prepare

    def path(self, split: str) -> Path:
        """The file of a split."""
        return FOLDER / self.name / f"{split}.jsonl"


def summary_prompt(dialogue: str, language: str) -> str:
    """The question the `dialogs` set asks about a dialogue; `language` is en or zh."""
    return f"{REQUESTS[language]}\n\n{dialogue}"


def _dialogs(values: dict[str, Any], _name: str, _author: str) -> dict[str, Any]:
    prompt = summary_prompt(values["dialogue"], values["language"])
    return values | {"prompt": prompt, "completion": values["summary"]}


def _identity(values: dict[str, Any], name: str, author: str) -> dict[str, Any]:
    filled = {"{name}": name, "{author}": author}

    def fill(text: str) -> str:  # in one pass, so that a name may hold braces
        return re.sub(r"\{name\}|\{author\}", lambda match: filled[match[0]], text)

    return values | {key: fill(values[key]) for key in ("question", "answer")}


TABLE = {
    entry.name: entry
    for entry in (
        BuiltIn("dialogs", ("train", "validation", "test"), _dialogs),
        BuiltIn("identity", ("train", "test"), _identity),
    )
}
"""All built-in data sets by name."""
