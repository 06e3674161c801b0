"""Data from a function of the user: `file.py` or `file.py:function`.

It is called as `function(dataset_config, tokenizer, split)` with a Hugging Face tokenizer, once for
each split ("train", "validation"), and returns rows: a list, a torch or a `datasets` Dataset. Rows
with `input_ids`, `labels` (-100 = not trained on, not shifted) and perhaps `attention_mask` are
taken as they are; any other rows (messages, question and answer, …) go the way of a file's rows.

This runs the user's code, so only for a file that somebody named, never for one that was
downloaded.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatfine.data.rows import Row
from chatfine.data.token_rows import is_token_row, to_example
from chatfine.data.user_file import Function, function_in, run_file, source_of, users_code
from chatfine.errors import DataError
from chatfine.i18n import t
from chatfine.types import Dialogue

if TYPE_CHECKING:
    from chatfine.tokenizer.encode import ChatTokenizer

NAME = "custom_dataset"
"""The tutorial's name of such a data set."""
DEFAULT_FILE = Path("datasets_processing/qa_huatuo.py")
DEFAULT_FUNCTION = "get_custom_dataset"
SPLITS = ("train", "validation")
FORM = re.compile(r"(?P<path>.+\.py)(:(?P<name>\w+))?")

Item = Row | Dialogue | DataError
"""A row of the ordinary kind, an encoded one, or what is wrong with one."""


@dataclass
class DatasetConfig:
    """What the function is told, under the names of the tutorial. `train_on` is --train-on."""

    file: str
    train_split: str
    test_split: str
    input_length: int
    train_on: str
    dataset: str = NAME

    def get(self, name: str, default: Any = None) -> Any:
        """A setting, or `default` where there is none of that name."""
        return getattr(self, name, default)


@dataclass(frozen=True, slots=True)
class Call:
    """All that decides what a function returns, but for the files it reads itself.

    Attributes:
        split: the word handed to the function.
        validates: whether its rows are kept apart from training.
        length: the longest example in tokens, 0 = no limit.
    """

    function: Function
    split: str
    validates: bool
    length: int
    train_on: str


def find(dataset: str) -> Function | None:
    """The function a data set's name means; None: another kind of data set.

    `custom_dataset` is the file that ships beside the package, `custom_dataset:FILE.py` is FILE.py.
    """
    if dataset == NAME:
        dataset = str(DEFAULT_FILE)
    match = FORM.fullmatch(dataset.removeprefix(f"{NAME}:"))
    if match is None:
        return None
    path = Path(os.path.abspath(Path(match["path"]).expanduser()))
    return Function(path, match["name"] or DEFAULT_FUNCTION)


def items(call: Call, tokenizer: ChatTokenizer) -> Sequence[Item]:
    """What the function returns for a split. It is called once, also where this is called again.

    Raises:
        DataError: no such file or function, a downloaded one, an error in it, or no rows.
    """
    return _items(call, source_of(call.function), tokenizer)


def digest(call: Call, tokenizer: ChatTokenizer) -> str:
    """A hash of the file and of all that its function returns."""
    total = hashlib.sha256(source_of(call.function).encode())
    for item in items(call, tokenizer):
        if isinstance(item, Dialogue) and item.example is not None:
            total.update(repr((list(item.example.ids), list(item.example.mask))).encode())
        else:
            total.update(repr(item.values if isinstance(item, Row) else str(item)).encode())
    return total.hexdigest()


@functools.lru_cache(maxsize=8)
def _items(call: Call, source: str, tokenizer: ChatTokenizer) -> Sequence[Item]:
    module = run_file(call.function, source)
    function = function_in(module, call.function)
    theirs = _hugging_face(tokenizer)
    found: list[Item] = []
    with users_code(call.function, call.split):
        dataset = function(_config(call), theirs, call.split)
        for number, values in enumerate(_rows_of(dataset, call), start=1):
            found.append(_item(values, number, call, tokenizer.size))
    if not found:
        raise DataError(
            "data-empty",
            t("the function gives no rows for the split {split}", split=call.split),
            where=str(call.function),
            fix=t("to hold out rows of the training data instead: --validation 0.1")
            if call.validates
            else t("let it return rows"),
        )
    return found


def _config(call: Call) -> DatasetConfig:
    train, test = SPLITS
    if call.split not in SPLITS:  # the user's own word
        train, test = (train, call.split) if call.validates else (call.split, test)
    path = str(call.function.path)
    return DatasetConfig(path, train, test, call.length, call.train_on)


@functools.lru_cache(maxsize=1)
def _hugging_face(tokenizer: ChatTokenizer) -> Any:
    """The same tokenizer as the library's class, with the chat template in use.

    Where it has no padding token the end token stands in: a new one would lie beyond the model's
    embedding.
    """
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(
        str(tokenizer.folder), local_files_only=True, trust_remote_code=False
    )
    if tokenizer.template:
        found.chat_template = tokenizer.template
    if found.pad_token_id is None:
        found.pad_token = found.eos_token
    # what is too long is cut or dropped later, and said then
    found.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return found


def _rows_of(dataset: Any, call: Call) -> Iterator[Any]:
    """The rows of whatever the function returned."""
    if isinstance(dataset, Mapping) and call.split in dataset:
        dataset = dataset[call.split]
    if isinstance(dataset, (str, bytes, Mapping)) or not (
        hasattr(dataset, "__iter__") or hasattr(dataset, "__getitem__")
    ):
        raise DataError(
            "data-function-result",
            t("{name} returned {kind}, not rows", name=call.function.name,
              kind=type(dataset).__name__),
            where=str(call.function),
            fix=t("return a list of dicts, a torch Dataset or a datasets.Dataset"),
        )  # fmt: skip
    if hasattr(dataset, "__iter__"):
        yield from dataset
    else:
        yield from (dataset[index] for index in range(len(dataset)))


def _item(values: Any, number: int, call: Call, size: int) -> Item:
    where = f"{call.function}[{call.split}]"
    if not isinstance(values, Mapping):
        return DataError(
            "data-not-an-object",
            t("the row is {kind}, not a dict", kind=type(values).__name__),
            where=f"{where}:{number}",
            fix=t("a row has input_ids and labels, or messages, or a question and an answer"),
        )
    row = Row(where, number, dict(values))
    if not is_token_row(row):
        return row
    try:
        return Dialogue((), row.where, example=to_example(row, size))
    except DataError as error:
        return error
