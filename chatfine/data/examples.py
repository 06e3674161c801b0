"""Examples: token ids and masks of all dialogues in three flat arrays, cached by content."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from chatfine.data import cache as cache_files
from chatfine.data import custom
from chatfine.data.dialogues import (
    DataSettings,
    Part,
    call_of,
    fingerprint,
    held_out,
    load_dialogues,
    no_rows,
    parts_of,
    read_dialogues,
    split_seed,
)
from chatfine.data.problems import Problems, Tally
from chatfine.data.report import DataReport, PartReport, token_statistics
from chatfine.data.sources import digest as digest_of
from chatfine.data.sources import locate
from chatfine.data.tokenise import check_dropped, encode
from chatfine.types import Dialogue, Example

if TYPE_CHECKING:
    from chatfine.tokenizer.encode import ChatTokenizer

__all__ = [
    "DataSettings",
    "Examples",
    "Splits",
    "encode_dialogues",
    "load_dialogues",
    "load_examples",
]


@dataclass(frozen=True, slots=True)
class Examples:
    """Many examples end to end; example i occupies `offsets[i] : offsets[i + 1]`.

    The arrays may be memory maps of the cache: never write into them.
    """

    ids: npt.NDArray[np.int32]  # (tokens,)
    mask: npt.NDArray[np.bool_]  # (tokens,)
    offsets: npt.NDArray[np.int64]  # (examples + 1,)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, end = self.offsets[index], self.offsets[index + 1]
        ids = cast(Sequence[int], self.ids[start:end])
        return Example(ids, cast(Sequence[bool], self.mask[start:end]))

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example, (examples,)."""
        return np.diff(self.offsets)

    @property
    def supervised(self) -> npt.NDArray[np.int64]:
        """Labels of each example: trained tokens but for the first, which nothing predicts."""
        if not len(self):
            return np.zeros(0, dtype=np.int64)
        starts = self.offsets[:-1]
        counted = np.add.reduceat(self.mask, starts, dtype=np.int64)
        return cast("npt.NDArray[np.int64]", counted - self.mask[starts])

    @classmethod
    def join(cls, parts: Iterable[Examples]) -> Examples:
        """All examples of `parts` in order."""
        parts = list(parts)
        if len(parts) == 1:
            return parts[0]
        lengths = np.concatenate([np.zeros(1, np.int64), *(part.lengths for part in parts)])
        ids = np.concatenate([np.zeros(0, np.int32), *(part.ids for part in parts)])
        mask = np.concatenate([np.zeros(0, np.bool_), *(part.mask for part in parts)])
        return cls(ids, mask, np.cumsum(lengths))


@dataclass(frozen=True, slots=True)
class Splits:
    """What training needs: one Examples a data set, the validation examples, and the report."""

    train: list[Examples]
    validation: Examples | None
    report: DataReport


class _Builder:
    """Collects examples in growing flat arrays (8 bytes a token at most)."""

    def __init__(self) -> None:
        self._ids = array("i")
        self._mask = bytearray()
        self._offsets = array("q", [0])

    def add(self, ids: Sequence[int], mask: Sequence[bool]) -> None:
        self._ids.extend(ids)
        self._mask.extend(mask)
        self._offsets.append(len(self._ids))

    def done(self) -> Examples:
        return Examples(
            np.array(self._ids, dtype=np.int32),
            np.frombuffer(bytes(self._mask), dtype=np.bool_),
            np.array(self._offsets, dtype=np.int64),
        )


def load_examples(
    datasets: Sequence[str],
    tokenizer: ChatTokenizer,
    settings: DataSettings,
    cache: Path | None = None,
) -> Splits:
    """Read, check, tokenise and split data sets; all rows are checked before anything is encoded.

    Args:
        datasets: built-in names, files, folders, functions or hub names.
        tokenizer: of the model to train.
        settings: see `DataSettings`.
        cache: folder of tokenised data; None = neither read nor written. The key is a hash of all
            bytes of the data, the settings, the tokenizer and this code.

    Raises:
        DataError: rows that can't be used, nothing left, or more dropped than `max_dropped`.
    """
    parts = parts_of(datasets, settings)
    key = _cache_key(parts, tokenizer, settings)
    if cache is not None:
        found = cache_files.load(cache / key)
        if found is not None:
            return _from_cache(*found)
    splits = _build(parts, tokenizer, settings)
    if cache is not None:
        arrays = {f"train{i}": one for i, one in enumerate(splits.train)}
        if splits.validation is not None:
            arrays["validation"] = splits.validation
        flat = {
            f"{name}.{field}": getattr(one, field)
            for name, one in arrays.items()
            for field in ("ids", "mask", "offsets")
        }
        cache_files.save(cache / key, flat, splits.report.as_dict())
    return splits


def encode_dialogues(
    dialogues: Iterable[Dialogue], tokenizer: ChatTokenizer, settings: DataSettings
) -> Examples:
    """Tokenise dialogues that are already read (for evaluation), with the over-length policy.

    Raises:
        DataError: a dialogue the chat template refuses, or nothing left.
    """
    report = PartReport("", "")
    problems = Problems(skip=settings.on_bad_row == "skip")
    builder = _Builder()
    for _, ids, mask in encode(dialogues, tokenizer, settings, report, problems):
        builder.add(ids, mask)
    problems.raise_if_any()
    report.dropped |= problems.by_code
    check_dropped(report, settings)
    return builder.done()


def _from_cache(arrays: dict[str, npt.NDArray[Any]], report: dict[str, Any]) -> Splits:
    def examples(name: str) -> Examples:
        return Examples(*(arrays[f"{name}.{field}"] for field in ("ids", "mask", "offsets")))

    count = sum(name.startswith("train") and name.endswith(".offsets") for name in arrays)
    validation = examples("validation") if "validation.offsets" in arrays else None
    train = [examples(f"train{index}") for index in range(count)]
    return Splits(train, validation, DataReport.from_dict(report))


def _cache_key(parts: Sequence[Part], tokenizer: ChatTokenizer, settings: DataSettings) -> str:
    total = hashlib.sha256(cache_files.code_digest().encode())
    values = {name: value for name, value in asdict(settings).items() if name != "mix"}
    total.update(repr((parts, sorted(values.items()))).encode())
    total.update(f"{tokenizer.digest} {tokenizer.template}".encode())
    for part in parts:
        function = locate(part.dataset).function
        if function:  # what files it reads is its own affair, so its rows themselves count
            call = call_of(part, function, settings)
            total.update(custom.digest(call, tokenizer).encode())
    for dataset in dict.fromkeys(part.dataset for part in parts):
        total.update(digest_of(dataset).encode())
    return total.hexdigest()[:32]


def _build(parts: Sequence[Part], tokenizer: ChatTokenizer, settings: DataSettings) -> Splits:
    problems = Problems(settings.on_bad_row == "skip")
    checked = [_check(part, tokenizer, settings, problems) for part in parts]
    problems.raise_if_any()
    train: list[Examples] = []
    validation: list[Examples] = []
    reports: list[PartReport] = []
    for part, prints in zip(parts, checked, strict=True):
        report = PartReport(part.dataset, part.split, read=len(prints.values))
        report.skipped = prints.skipped
        report.duplicates = len(prints.values) - len(np.unique(prints.values))
        held = held_out(prints.values, part.fraction)
        own = Problems(problems.skip)
        learned, validated = _encode_part(part, held, tokenizer, settings, report, own)
        problems.take(own)
        if own.total and not own.skip:
            continue
        report.dropped |= own.by_code
        check_dropped(report, settings)
        report.train, report.validation = len(learned), len(validated)
        reports.append(report)
        validation.append(validated)
        if not part.only_validates:
            if not len(learned):
                raise no_rows(part.dataset, own)
            train.append(learned)
    problems.raise_if_any()
    tokens = token_statistics([one.lengths for one in train], [one.supervised for one in train])
    joined = Examples.join(validation)
    return Splits(
        train,
        joined if len(joined) else None,
        DataReport(reports, _fingerprint([*train, joined]), tokens, settings.max_length),
    )


def _fingerprint(parts: Sequence[Examples]) -> str:
    """A hash of what is learned from, so that it stays when only the program has changed."""
    total = hashlib.sha256()
    for part in parts:
        for numbers in (part.ids, part.mask, part.offsets):
            total.update(np.ascontiguousarray(numbers).tobytes())
    return total.hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class _Checked:
    values: npt.NDArray[np.uint64]  # fingerprints of the usable dialogues
    skipped: dict[str, Tally]


def _check(
    part: Part, tokenizer: ChatTokenizer, settings: DataSettings, problems: Problems
) -> _Checked:
    """Read a part without encoding it; the fingerprints of its dialogues."""
    own = Problems(problems.skip)
    seed = split_seed(part.dataset, settings)
    dialogues = read_dialogues(part, settings, own, tokenizer)
    found = [fingerprint(one, seed) for one in dialogues]
    problems.take(own)
    if not found and (own.skip or not own.total):
        raise no_rows(part.dataset, own)
    return _Checked(np.array(found, dtype=np.uint64), own.by_code | own.left_out)


def _encode_part(
    part: Part,
    held: npt.NDArray[np.bool_],
    tokenizer: ChatTokenizer,
    settings: DataSettings,
    report: PartReport,
    problems: Problems,
) -> tuple[Examples, Examples]:
    """(training, validation) examples of one part; the rows were checked before."""
    learned, validated = _Builder(), _Builder()
    dialogues = read_dialogues(part, settings, Problems(skip=True), tokenizer)
    for number, ids, mask in encode(dialogues, tokenizer, settings, report, problems):
        (validated if held[number] else learned).add(ids, mask)
    return learned.done(), validated.done()
