"""Rows that are tokens already → examples, checked: a label in the wrong place is learned
silently."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, cast

from chatfine.data.formats import missing_field
from chatfine.data.rows import Row
from chatfine.data.turns import bad
from chatfine.errors import DataError
from chatfine.i18n import t
from chatfine.types import IGNORE_INDEX, Example


def is_token_row(row: Row) -> bool:
    """Whether a row holds ids."""
    return "input_ids" in row.values


def to_example(row: Row, size: int) -> Example:
    """The example of one row; padding (attention_mask 0) is left out.

    Args:
        row: input_ids and labels, lists or tensors of one length; attention_mask may be absent.
        size: number of tokens in the vocabulary.

    Raises:
        DataError: a missing field, other lengths, an id beyond the vocabulary, a label that is
            neither -100 nor the id in its place.
    """
    ids = _numbers(row, "input_ids")
    labels = _numbers(row, "labels")
    attention = (
        _numbers(row, "attention_mask") if "attention_mask" in row.values else [1] * len(ids)
    )
    for name, found in (("labels", labels), ("attention_mask", attention)):
        if len(found) != len(ids):
            raise bad(
                "data-token-lengths",
                t("input_ids has {n} entries, {name} has {m}", n=len(ids), name=name, m=len(found)),
                row.where,
            )
    seen = [place for place, on in enumerate(attention) if on]
    ids, labels = [ids[place] for place in seen], [labels[place] for place in seen]
    for place, one in enumerate(ids):
        if not 0 <= one < size:
            raise _beyond(row, place, one, size)
    for place, (one, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (IGNORE_INDEX, one):
            raise _wrong_label(row, place, ids, labels)
    mask = bytes(label != IGNORE_INDEX for label in labels)
    return Example(array("i", ids), cast("Sequence[bool]", mask))


def _numbers(row: Row, name: str) -> list[int]:
    """One column as a list of whole numbers; a tensor of shape (1, n) is one row."""
    if name not in row.values:
        raise missing_field(row, name)
    value: Any = row.values[name]
    found = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(found, (list, tuple)) and len(found) == 1 and isinstance(found[0], (list, tuple)):
        found = found[0]
    numbers = list(found) if isinstance(found, (list, tuple, array)) else None
    if numbers is not None:
        numbers = [one.item() if hasattr(one, "item") else one for one in numbers]
    if numbers is None or not all(isinstance(one, int) for one in numbers):
        raise bad(
            "data-wrong-type",
            t("{name} must be a list of whole numbers, one row's", name=name),
            row.where,
        )
    return numbers


def _beyond(row: Row, place: int, found: int, size: int) -> DataError:
    return DataError(
        "data-token-beyond",
        t("input_ids[{place}] is {id}; the tokenizer has the ids 0 … {last}", place=place,
          id=found, last=size - 1),
        where=row.where,
        why=t("tokens were added to the tokenizer, or another one was used"),
        fix=t("use the tokenizer that the function is given, and add no tokens to it"),
    )  # fmt: skip


def _wrong_label(row: Row, place: int, ids: Sequence[int], labels: Sequence[int]) -> DataError:
    pairs = zip(labels, ids[1:], strict=False)
    shifted = all(label in (IGNORE_INDEX, following) for label, following in pairs)
    return DataError(
        "data-token-labels",
        t("labels[{place}] is {label}; it must be -100 or the id in that place, {id}",
          place=place, label=labels[place], id=ids[place]),
        where=row.where,
        why=t("the labels are shifted by one; the training itself does that") if shifted else None,
        fix=t("labels are a copy of input_ids with -100 where nothing is to be learned"),
    )  # fmt: skip
