"""Data sets → checked dialogues, and which of them are held out for validation."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from chatfine.data import custom
from chatfine.data.builtin import BuiltIn
from chatfine.data.formats import Shape, Templates, detect, missing_field, to_dialogue
from chatfine.data.problems import Problems
from chatfine.data.rows import Row
from chatfine.data.sources import locate, read_rows, resolve_split, splits_of
from chatfine.data.user_file import Function
from chatfine.errors import DataError, UsageError
from chatfine.i18n import t
from chatfine.types import Dialogue

if TYPE_CHECKING:
    from chatfine.tokenizer.encode import ChatTokenizer

DEFAULT_FRACTION = 0.1
EMPTY = ("data-empty-question", "data-empty-answer")
"""What a published set may hold without ending a run."""
SAMPLE_ROWS = 100
"""How many rows of a file decide its shape."""


@dataclass(frozen=True, slots=True)
class DataSettings:
    """How rows become examples: the plain form of config.DataOptions.

    `max_length` is in tokens, 0 means no limit; the caller fills in the model's own.
    """

    validation: str = ""
    prompt: str = ""
    response: str = ""
    system: str = ""
    train_on: str = "answers"
    max_length: int = 0
    too_long: str = "drop"
    max_dropped: float = 0.2
    on_bad_row: str = "error"
    name: str = "Xiaofan"
    author: str = "chatfine"
    mix: tuple[float, ...] = ()
    seed: int = 42


@dataclass(frozen=True, slots=True)
class Part:
    """One split of one data set; `fraction` of its dialogues is held out for validation."""

    dataset: str
    split: str
    fraction: float = 0.0

    @property
    def only_validates(self) -> bool:
        """Whether nothing of this part is trained on."""
        return self.fraction == 1.0


def read_dialogues(
    part: Part,
    settings: DataSettings,
    problems: Problems,
    tokenizer: ChatTokenizer | None = None,
) -> Iterator[Dialogue]:
    """The dialogues of one split in the order of its rows; what is wrong goes into `problems`.

    Args:
        part: what to read.
        settings: see `DataSettings`.
        problems: collects rows that can't be used.
        tokenizer: handed to a data set's function; other data sets don't need it.

    Raises:
        DataError: no such data set or split; with `problems.skip` also a file that can't be read.
    """
    resolve_split(part.dataset, part.split)
    place = locate(part.dataset)
    try:
        if place.function:
            call = call_of(part, place.function, settings)
            yield from _dialogues_of_function(call, tokenizer, settings, problems)
            return
        rows = read_rows(part.dataset, part.split, problems.add)
        for _, group in itertools.groupby(rows, key=lambda row: row.path):
            yield from _dialogues_of_file(group, place.entry, settings, problems)
    except DataError as error:
        problems.add_fatal(error)


def call_of(part: Part, function: Function, settings: DataSettings) -> custom.Call:
    """How a data set's function is called for one split."""
    validates = part.only_validates or part.split in ("validation", "test")
    return custom.Call(function, part.split, validates, settings.max_length, settings.train_on)


def _dialogues_of_function(
    call: custom.Call,
    tokenizer: ChatTokenizer | None,
    settings: DataSettings,
    problems: Problems,
) -> Iterator[Dialogue]:
    if tokenizer is None:
        raise DataError(
            "data-function-needs-model",
            t("data from a function needs a model's tokenizer"),
            where=str(call.function),
            fix=t("name a model: -m MODEL"),
        )
    found = custom.items(call, tokenizer)
    yield from _dialogues_of_file(
        (item for item in found if isinstance(item, Row)), None, settings, problems
    )
    for item in found:
        if isinstance(item, DataError):
            problems.add(item)
        elif isinstance(item, Dialogue):
            _refuse_rewriting(item, settings)
            yield item


def _refuse_rewriting(dialogue: Dialogue, settings: DataSettings) -> None:
    if settings.prompt or settings.system:
        raise DataError(
            "data-tokens-fixed",
            t("the rows are tokens already: --prompt, --response and --system can't change them"),
            where=dialogue.where,
            fix=t("leave them out, or let the function return messages"),
        )


def _dialogues_of_file(
    rows: Iterator[Row], entry: BuiltIn | None, settings: DataSettings, problems: Problems
) -> Iterator[Dialogue]:
    if entry:
        rows = _prepared(rows, entry, settings)
    sample = list(itertools.islice(rows, SAMPLE_ROWS))
    if not sample:
        return
    shape = _shape_of(sample, settings)
    for row in itertools.chain(sample, rows):
        try:
            yield to_dialogue(row, shape, settings.system)
        except DataError as error:
            if entry and entry.flawed and error.code in EMPTY:
                problems.leave_out(error)
            else:
                problems.add(error)


def _prepared(rows: Iterator[Row], entry: BuiltIn, settings: DataSettings) -> Iterator[Row]:
    """The rows as a built-in set wants them seen; where it has flaws, null is an empty text."""
    for row in rows:
        known = row.values
        if entry.flawed:
            known = {name: "" if value is None else value for name, value in known.items()}
        for values in entry.prepare(known, settings.name, settings.author):
            yield replace(row, values=values)


def _shape_of(sample: Sequence[Row], settings: DataSettings) -> Shape | Templates:
    """The shape that most rows of the sample have, so that one odd row can't decide it."""
    if settings.prompt or settings.response:
        templates = Templates(settings.prompt, settings.response)
        for field in templates.fields():
            if not any(field in row.values for row in sample):
                raise missing_field(sample[0], field)
        return templates
    votes = Counter(tuple(row.values) for row in sample)
    failure: DataError | None = None
    for columns, _ in votes.most_common():
        try:
            return detect(columns)
        except DataError as error:
            failure = failure or error
    assert failure is not None
    failure.where = f"{sample[0].where}:{sample[0].column}"
    raise failure


def parts_of(datasets: Sequence[str], settings: DataSettings) -> list[Part]:
    """What to read: the training split of each data set with its held-out share, then validation.

    `settings.validation` is a fraction, the name of a split that one of the data sets has, or
    another data set; empty means the data set's own validation split, else a tenth.

    Raises:
        DataError, UsageError: no such data set or split, or a fraction outside 0 … 1.
    """
    train = [Part(dataset, resolve_split(dataset, None)) for dataset in datasets]
    wanted = settings.validation.strip()
    if not wanted:
        return _own_validation(train)
    fraction = _as_fraction(wanted)
    if fraction is not None:
        return [replace(part, fraction=fraction) for part in train]
    with_split = [name for name in datasets if wanted in splits_of(name)]
    if with_split:
        kept = [part for part in train if part.split != wanted]
        if len(kept) < len(train):
            raise UsageError(
                "validation-is-training",
                t("the split {split} is trained on; it can't validate too", split=wanted),
                where="--validation",
                fix=t("give a fraction such as 0.1, another split or a file"),
            )
        return [*train, *(Part(name, wanted, 1.0) for name in with_split)]
    try:
        splits = splits_of(wanted)
    except DataError as error:
        known = {split for name in datasets for split in splits_of(name)}
        error.where = "--validation"
        error.why = t("it is no fraction, no data set, and the splits are: {names}",
                      names=", ".join(sorted(known)))  # fmt: skip
        raise
    chosen = next(name for name in ("validation", "test", splits[0]) if name in splits)
    return [*train, Part(wanted, chosen, 1.0)]


def _own_validation(train: Sequence[Part]) -> list[Part]:
    parts = []
    for part in train:
        if "validation" in splits_of(part.dataset):
            parts += [part, Part(part.dataset, "validation", 1.0)]
        else:
            parts.append(replace(part, fraction=default_fraction(part.dataset)))
    return parts


def default_fraction(dataset: str) -> float:
    """The share held out where neither the user nor the data set names a validation split."""
    entry = locate(dataset).entry
    return entry.fraction if entry else DEFAULT_FRACTION


def split_seed(dataset: str, settings: DataSettings) -> int:
    """The seed that decides which rows are held out: the data set's own, else the run's."""
    entry = locate(dataset).entry
    return settings.seed if entry is None or entry.seed is None else entry.seed


def _as_fraction(text: str) -> float | None:
    try:
        fraction = float(text)
    except ValueError:
        return None
    if not 0 <= fraction < 1:
        raise UsageError(
            "bad-fraction",
            t("--validation is {value}; a fraction must be at least 0 and below 1", value=text),
            fix="--validation 0.1",
        )
    return fraction


def fingerprint(dialogue: Dialogue, seed: int) -> int:
    """64 bits of a dialogue's content and the seed."""
    content = hashlib.blake2b(f"{seed}\n".encode(), digest_size=8)
    for turn in dialogue.messages:
        content.update(f"{turn.role}\0{turn.content}\0".encode())
    if dialogue.example is not None:
        tokens = np.array(dialogue.example.ids, dtype="<i8"), dialogue.example.mask
        content.update(tokens[0].tobytes() + bytes(tokens[1]))
    return int.from_bytes(content.digest(), "little")


def held_out(prints: npt.NDArray[np.uint64], fraction: float) -> npt.NDArray[np.bool_]:
    """Which dialogues validate: those with the smallest fingerprints, about `fraction` of all.

    The choice depends on contents and seed alone, not on the order of rows or files, and equal
    dialogues stay together. Where a fraction is asked for, at least one dialogue is held out and at
    least one is trained on, provided there are two different ones.
    """
    if fraction == 1.0:
        return np.ones(len(prints), dtype=bool)
    unique, counts = np.unique(prints, return_counts=True)
    if fraction == 0 or len(unique) < 2:
        return np.zeros(len(prints), dtype=bool)
    target = max(1, round(fraction * len(prints)))
    chosen = int(np.searchsorted(np.cumsum(counts), target)) + 1
    return np.isin(prints, unique[: min(chosen, len(unique) - 1)])


def load_dialogues(
    dataset: str,
    settings: DataSettings,
    split: str = "",
    tokenizer: ChatTokenizer | None = None,
) -> list[Dialogue]:
    """The dialogues of one split, checked, for evaluation and for looking at them.

    Without `split`: test, else validation, else all rows of a set that has no splits. A set without
    splits still has "train" and "validation" by name: the parts that training with the same
    settings would use. `tokenizer` is for data sets that are functions.

    Raises:
        DataError: no such data set or split, or rows that can't be used.
    """
    splits = splits_of(dataset)
    chosen = split or next((name for name in ("test", "validation") if name in splits), splits[0])
    fraction = 0.0
    if split in ("train", "validation"):
        own = _as_fraction(settings.validation) if settings.validation else None
        if own is not None or "validation" not in splits:
            fraction = default_fraction(dataset) if own is None else own
            chosen = resolve_split(dataset, None)
    problems = Problems(skip=settings.on_bad_row == "skip")
    found = list(read_dialogues(Part(dataset, chosen), settings, problems, tokenizer))
    problems.raise_if_any()
    if fraction:
        seed = split_seed(dataset, settings)
        prints = np.array([fingerprint(one, seed) for one in found], dtype=np.uint64)
        wanted = held_out(prints, fraction) == (split == "validation")
        found = [one for one, kept in zip(found, wanted, strict=True) if kept]
    if not found:
        raise no_rows(dataset, problems)
    return found


def no_rows(dataset: str, problems: Problems) -> DataError:
    """The error for a data set of which nothing is left."""
    return DataError(
        "data-empty",
        t("the data set {name} holds no usable rows", name=dataset),
        why=t("{count} rows were skipped", count=problems.total) if problems.total else None,
        fix=t("see what is wrong: --on-bad-row error")
        if problems.total
        else t("give another file"),
    )
