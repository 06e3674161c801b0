"""Collects what is wrong with the rows of a data set, so that one run shows all of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from chatfine.errors import DataError
from chatfine.i18n import t

SHOWN = 20
"""How many problems one error spells out; the rest is counted."""

OnBad = Callable[[DataError], None]
"""What a reader does with a row it can't use."""


@dataclass(slots=True)
class Tally:
    """How often something happened and where first (`file:line`)."""

    count: int = 0
    first: str = ""

    def add(self, where: str | None) -> None:
        """One more, seen at `where`."""
        self.first = self.first or where or ""
        self.count += 1


def raise_it(error: DataError) -> None:
    """The strictest `OnBad`: the first problem ends the reading."""
    raise error


class Problems:
    """All problems of one reading; with `skip` they are only counted."""

    def __init__(self, skip: bool = False) -> None:
        self.skip = skip
        self.by_code: dict[str, Tally] = {}
        self.left_out: dict[str, Tally] = {}
        self._first: list[DataError] = []
        self._fatal = False

    @property
    def total(self) -> int:
        """How many rows can't be used."""
        return sum(tally.count for tally in self.by_code.values())

    def add(self, error: DataError) -> None:
        """Note one row that can't be used."""
        self.by_code.setdefault(error.code, Tally()).add(error.where)
        if len(self._first) < SHOWN:
            self._first.append(error)

    def leave_out(self, error: DataError) -> None:
        """Note one row of a published set that is passed over, as `skip` would."""
        self.left_out.setdefault(error.code, Tally()).add(error.where)

    def add_fatal(self, error: DataError) -> None:
        """Note an error that ends the reading of a file; with `skip`, raise it."""
        if self.skip:
            raise error
        self._fatal = True
        self.add(error)

    def take(self, other: Problems) -> None:
        """Add all that `other` noted."""
        for code, tally in other.by_code.items():
            own = self.by_code.setdefault(code, Tally())
            own.first = own.first or tally.first
            own.count += tally.count
        self._first = [*self._first, *other._first][:SHOWN]
        self._fatal |= other._fatal

    def raise_if_any(self) -> None:
        """Raise everything noted as one DataError, unless rows are to be skipped."""
        if self.skip or not self._first:
            return
        skip = () if self._fatal else (t("or leave such rows out: --on-bad-row skip"),)
        fixes = list(dict.fromkeys(fix for error in self._first for fix in error.fix))
        if self.total == 1:
            error = self._first[0]
            error.fix = (*error.fix, *skip)
            raise error
        lines = [t("{count} problems in the data:", count=self.total)]
        for error in self._first:
            why = f" ({error.why})" if error.why else ""
            lines.append(f"  {error.where}: {error.what}{why}")
        if self.total > len(self._first):
            lines.append(t("  … and {count} more", count=self.total - len(self._first)))
        codes = set(self.by_code)
        raise DataError(
            codes.pop() if len(codes) == 1 else "data-bad-rows",
            "\n".join(lines),
            where=self._first[0].where,
            fix=[*fixes[:5], *skip],
        )
