"""Fill rows of a fixed length with several examples: best fit, longest first.

Each example, longest first, goes into the fullest row that still has room, else into a new one.
Rows are found by their free space through a two-level bitmap, and examples of equal length are
placed together, so a million lengths take about a second in plain Python.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

WORD_BITS = 1024
"""Bits a word of the bitmap has; 128 words cover 131,072 tokens."""


def pack(lengths: Sequence[int] | npt.NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Place examples into rows of `capacity` tokens.

    Examples of equal length are placed in the order given, so how the rows are filled depends on
    the multiset of lengths alone. Takes O(n log n).

    Args:
        lengths: tokens of each example, at least 1.
        capacity: tokens a row holds.

    Returns:
        For each row the indices of its examples.

    Raises:
        ValueError: an example is longer than a row, or has no tokens.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if not len(sizes):
        return []
    if sizes.max() > capacity or sizes.min() < 1:
        raise ValueError(f"lengths must lie between 1 and {capacity}")
    order = np.argsort(-sizes, kind="stable")
    descending = sizes[order]
    starts = np.flatnonzero(np.r_[True, descending[1:] != descending[:-1]])
    ends = np.r_[starts[1:], len(sizes)]
    rows: list[list[int]] = []
    space = _FreeSpace(capacity)
    items = order.tolist()
    for size, start, end in zip(
        descending[starts].tolist(), starts.tolist(), ends.tolist(), strict=True
    ):
        _place(items[start:end], size, rows, space, capacity)
    return rows


def _place(
    items: list[int], size: int, rows: list[list[int]], space: _FreeSpace, capacity: int
) -> None:
    """Put examples of one size into the fullest rows that take them, then into new ones."""
    done = 0
    while done < len(items):
        free, row = space.take(size)
        if row < 0:
            free, row = capacity, len(rows)
            rows.append([])
        taken = items[done : done + free // size]  # the row stays the best fit until it is full
        rows[row] += taken
        done += len(taken)
        space.put(free - size * len(taken), row)


class _FreeSpace:
    """Rows by free space; finds the one with the least space that is at least so much."""

    def __init__(self, capacity: int) -> None:
        self._rows: list[list[int]] = [[] for _ in range(capacity + 1)]
        self._words = [0] * (capacity // WORD_BITS + 1)  # bit f % 1024: some row has f free
        self._index = 0  # bit w: word w is not zero

    def put(self, free: int, row: int) -> None:
        """Note a row; a full one is forgotten."""
        if free == 0:
            return
        self._rows[free].append(row)
        word, bit = divmod(free, WORD_BITS)
        self._words[word] |= 1 << bit
        self._index |= 1 << word

    def take(self, size: int) -> tuple[int, int]:
        """(free space, row) of the best fit, removed from here; row −1 when nothing fits."""
        word, bit = divmod(size, WORD_BITS)
        above = self._words[word] >> bit if word < len(self._words) else 0
        if above:
            free = size + _lowest(above)
        else:
            later = self._index >> (word + 1)
            if not later:
                return 0, -1
            word += 1 + _lowest(later)
            free = word * WORD_BITS + _lowest(self._words[word])
        rows = self._rows[free]
        row = rows.pop()
        if not rows:
            self._words[word] &= ~(1 << (free % WORD_BITS))
            if not self._words[word]:
                self._index &= ~(1 << word)
        return free, row


def _lowest(bits: int) -> int:
    """Position of the lowest set bit."""
    return (bits & -bits).bit_length() - 1
