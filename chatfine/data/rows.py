"""A row of a data file: its values and its place, to the column."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Finder = Callable[[str, list[str], str, int], int]
"""(source text of a row, columns, one column, which occurrence) → where it begins; -1: nowhere."""


@dataclass(frozen=True, slots=True)
class Row:
    """One record and where it stands.

    `raw` is its source text, which begins at `line` and `column` of `path`; it is kept only to
    find columns for error messages. In a parquet file `line` is the number of the row.
    """

    path: str
    line: int
    values: dict[str, Any]
    raw: str = ""
    column: int = 1
    find: Finder | None = None

    @property
    def where(self) -> str:
        """file:line"""
        return f"{self.path}:{self.line}"

    def at(self, field: str, nth: int = 0) -> str:
        """file:line:column of the `nth` place where `field` stands in this row."""
        if self.find is None:
            return f"{self.where}:{field}"
        before = self.raw[: max(0, self.find(self.raw, list(self.values), field, nth))]
        lines = before.count("\n")
        column = len(before) - before.rfind("\n") if lines else self.column + len(before)
        return f"{self.path}:{self.line + lines}:{column}"
