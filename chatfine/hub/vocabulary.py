"""vocabulary.json: what a grown tokenizer can spell that the one before it could not.

It lies beside the grown tokenizer, in a tokenizer folder as in a model folder, and tells the model
side which rows are new and from which old ones they can start. JSON only; runs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatfine.errors import TokenizerError
from chatfine.i18n import t

FILE = "vocabulary.json"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The new pieces of a grown tokenizer, in the order of their ids."""

    old_size: int
    """the first new id"""
    pieces: tuple[str, ...]
    """spelling of each new id, as the tokenizer's own model spells it"""
    before: tuple[tuple[int, ...], ...]
    """old ids that each new piece was written with until now"""

    @property
    def new_size(self) -> int:
        """One more than the last new id."""
        return self.old_size + len(self.pieces)

    @property
    def ids(self) -> range:
        """The new ids."""
        return range(self.old_size, self.new_size)

    def check_tokenizer(self, known: Mapping[str, int], where: Path) -> None:
        """Hold it against the tokenizer's own table.

        Args:
            known: piece → id of the whole tokenizer, added tokens included.
            where: the folder both come from.

        Raises:
            TokenizerError: vocabulary-mismatch.
        """
        for number, piece in zip(self.ids, self.pieces, strict=True):
            if known.get(piece) != number:
                found = known.get(piece)
                raise _mismatch(where, t("{file} gives {piece} the id {id}, the tokenizer {found}",
                                         file=FILE, piece=repr(piece), id=number,
                                         found="-" if found is None else found))  # fmt: skip
        last = max(known.values(), default=-1)
        if last >= self.new_size:
            raise _mismatch(where, t("{file} ends at the id {last}, the tokenizer at {found}",
                                     file=FILE, last=self.new_size - 1, found=last))  # fmt: skip


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """The folder's vocabulary.json, None if there is none.

    Raises:
        TokenizerError: vocabulary-damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        old, new = int(values["old_size"]), int(values["new_size"])
        rows = [(int(number), str(piece), tuple(map(int, before)))
                for number, piece, before in values["pieces"]]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from None
    if old <= 0 or [number for number, _, _ in rows] != list(range(old, new)) or not rows:
        raise _damaged(path, t("its pieces must have the ids {first} to {last}, each once",
                               first=old, last=new - 1))  # fmt: skip
    for number, _, before in rows:
        if any(not 0 <= one < old for one in before):
            raise _damaged(path, t("the piece {id} comes from ids that are not old ones",
                                   id=number))  # fmt: skip
    return Vocabulary(old, tuple(row[1] for row in rows), tuple(row[2] for row in rows))


def _mismatch(where: Path, why: str) -> TokenizerError:
    return TokenizerError(
        "vocabulary-mismatch",
        t("{file} is of another tokenizer than the one beside it", file=FILE),
        where=str(where / FILE),
        why=why,
        fix=t("take both from one folder that {command} wrote", command="chatfine expand-vocab"),
    )


def _damaged(path: Path, why: str) -> TokenizerError:
    return TokenizerError(
        "vocabulary-damaged",
        t("{file} can't be used", file=FILE),
        where=str(path),
        why=why,
        fix=t("write it again: {command}", command="chatfine expand-vocab -m MODEL -o NEW_FOLDER"),
    )
