"""The data sets known by name: ours, and those of the tutorial.

`dialogs` (short dialogues with a summary) and `identity` (who the model is) come with chatfine,
half English and half Chinese, line by line in turn. `samsum`, `grammar` and `alpaca` are looked for
in the working folder and otherwise fetched from a hub; `huatuo` is the user's own. `NAME:PATH`
reads a file or folder of the user as that data set: `alpaca:my/alpaca_data.json`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
REQUESTS = {
    "en": "Summarize the dialogue in one sentence.",
    "zh": "用一句话总结这段对话。",
}
"""What the model is asked before a dialogue of `dialogs`, by language."""
CORRECT = "Rewrite this text in correct English."
"""What the model is asked before a text of `grammar`."""
SPACED = re.compile(r" +(?=[.,;:!?%)\]]|n't\b|'(?:s|m|d|re|ve|ll)\b)|(?<=[(\[]) +")
"""Spaces that a word splitter has put in: `it 's late .`"""

Values = dict[str, Any]
Prepare = Callable[[Values, str, str], Iterable[Values]]
"""(row, name, author) → the rows that training sees. A row without the usual columns stays as it
is, so that its own columns decide."""


def summary_prompt(dialogue: str, language: str) -> str:
    """The question the `dialogs` set asks about a dialogue; `language` is en or zh."""
    return f"{REQUESTS[language]}\n\n{dialogue}"


def _as_it_is(values: Values, _name: str, _author: str) -> Iterable[Values]:
    return (values,)


def _dialogs(values: Values, _name: str, _author: str) -> Iterable[Values]:
    prompt = summary_prompt(values["dialogue"], values["language"])
    return (values | {"prompt": prompt, "completion": values["summary"]},)


def _identity(values: Values, name: str, author: str) -> Iterable[Values]:
    filled = {"{name}": name, "{author}": author}

    def fill(text: str) -> str:  # in one pass, so that a name may hold braces
        return re.sub(r"\{name\}|\{author\}", lambda match: filled[match[0]], text)

    return (values | {key: fill(values[key]) for key in ("question", "answer")},)


def _samsum(values: Values, _name: str, _author: str) -> Iterable[Values]:
    """Columns id, dialogue, summary; some dialogues have the line ends of Windows."""
    dialogue = values.get("dialogue")
    if not isinstance(dialogue, str):
        return (values,)
    return (values | {"dialogue": dialogue.replace("\r\n", "\n")},)


def _grammar(values: Values, _name: str, _author: str) -> Iterable[Values]:
    """Columns input and target, or (JFLEG) sentence and several corrections: one row for each."""
    if "input" in values and "target" in values:
        return (values | {"prompt": _correct(values["input"]), "completion": values["target"]},)
    if "sentence" not in values or not isinstance(values.get("corrections"), list):
        return (values,)
    prompt = _correct(_unspaced(values["sentence"]))
    return [
        values | {"prompt": prompt, "completion": _unspaced(one)} for one in values["corrections"]
    ]


def _correct(text: Any) -> Any:
    return f"{CORRECT}\n\n{text}" if isinstance(text, str) and text.strip() else text


def _unspaced(text: Any) -> Any:
    return SPACED.sub("", text).strip() if isinstance(text, str) else text


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """One data set by name.

    Attributes:
        shipped: splits that come with the package, in chatfine/data/NAME/SPLIT.jsonl.
        folders: where in the working folder its files may lie.
        files: the file of each split in such a folder; empty: whatever the folder holds.
        hub: names on the hub to fetch it from, the first that works, and the licence there.
        fraction: the share that is held out for validation where there is no such split.
        seed: decides which rows those are; None: the run's own seed.
        flawed: published with a few empty questions or answers, which are left out and counted.
        record: what one record looks like.
    """

    name: str
    prepare: Prepare = _as_it_is
    shipped: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    hub: Mapping[str, str] = field(default_factory=dict)
    fraction: float = 0.1
    seed: int | None = None
    flawed: bool = False
    record: str = ""


TABLE = {
    entry.name: entry
    for entry in (
        BuiltIn("dialogs", _dialogs, ("train", "validation", "test")),
        BuiltIn("identity", _identity, ("train", "test")),
        BuiltIn(
            "samsum",
            _samsum,
            folders=("samsum_dataset", "samsum"),
            hub={"knkarthick/samsum": "CC BY-NC-ND 4.0"},
            flawed=True,
            record='{"dialogue": "…", "summary": "…"}',
        ),
        BuiltIn(
            "grammar",
            _grammar,
            folders=("datasets_grammar", "grammar_dataset", "."),
            files={"train": "gtrain_10k.csv", "validation": "grammar_validation.csv"},
            hub={"jhu-clsp/jfleg": "CC BY-NC-SA 4.0"},
            flawed=True,
            record="input,target",
        ),
        BuiltIn(
            "alpaca",
            folders=("alpaca_dataset", "alpaca", "."),
            files={"train": "alpaca_data.json"},
            hub={"tatsu-lab/alpaca": "CC BY-NC 4.0", "yahma/alpaca-cleaned": "CC BY 4.0"},
            fraction=0.01,
            flawed=True,
            record='{"instruction": "…", "input": "…", "output": "…"}',
        ),
        BuiltIn(
            "huatuo",
            folders=("datasets_processing/personal_dataset", "personal_dataset"),
            files={"train": "format_data.json"},
            fraction=0.01,
            seed=2357,
            record='{"question": "…", "answer": "…"}',
        ),
    )
}
"""All built-in data sets by name."""

ALIASES = {f"{name}_dataset": name for name in ("samsum", "grammar", "alpaca", "huatuo")}
"""The tutorial's names."""


def find(dataset: str) -> tuple[BuiltIn, str] | None:
    """The built-in set that NAME or NAME:PATH means, and PATH ("" without one); None: another set.

    The name stands before the first colon, so PATH may be on a Windows drive. No hub name looks
    like this: it has a slash before its colon.
    """
    name, _, path = dataset.partition(":")
    entry = TABLE.get(ALIASES.get(name, name))
    if entry is None or (path and entry.shipped):
        return None
    return entry, path
