"""Examples → batches. Which examples a step learns from is a pure function of (seed, step).

An epoch's examples are shuffled, packed if wanted, and dealt out in global batches of
rows × accumulate × world units (a unit is an example, or a packed row). Only then are the units of
a global batch divided over ranks and micro-batches, so 1×8, 8×1 and 2 ranks×4 learn from the same
examples in every step. The random bits come from numpy's Philox and SeedSequence, whose streams
numpy promises to keep; its shuffling routines carry no such promise.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from chatfine.data.examples import Examples
from chatfine.data.packing import pack
from chatfine.types import IGNORE_INDEX, Batch, Example

Indices = npt.NDArray[np.int64]
SHUFFLE, SHUFFLE_ROWS, CYCLE = 0, 1, 2  # what a permutation is for
MIN_SHARED_TOKENS = 8


def permutation(count: int, seed: int, *words: int) -> Indices:
    """A random order of `count` things that depends on `seed` and `words` alone."""
    source = np.random.Philox(np.random.SeedSequence([seed % 2**64, *words]))
    return np.argsort(source.random_raw(count), kind="stable")


@dataclass(frozen=True, slots=True)
class _Epoch:
    """The units of an epoch: unit u holds examples `flat[starts[u] : starts[u + 1]]`."""

    flat: Indices
    starts: Indices

    @property
    def units(self) -> int:
        return len(self.starts) - 1


class Batches:
    """The batches of a whole run, addressed by optimizer step.

    Args:
        parts: one Examples a data set.
        weights: shares of the data sets; empty = all examples once an epoch. With weights an epoch
            has as many examples in all, part i giving round(total × w_i / Σw) of them and going
            through its own examples in reshuffled rounds that carry on from epoch to epoch.
        seed: of the order.
        rows: units in a micro-batch.
        accumulate: micro-batches in an optimizer step.
        packing: whether a unit is a row of at most `capacity` tokens filled with several examples.
        capacity: tokens of a packed row; no example may be longer.
        rank: this process.
        world: number of processes.
        share: put what all examples of a micro-batch begin with into it once.

    Raises:
        ValueError: no examples, or an example longer than a packed row.
    """

    def __init__(
        self,
        parts: Sequence[Examples],
        weights: Sequence[float] = (),
        seed: int = 0,
        rows: int = 1,
        accumulate: int = 1,
        packing: bool = False,
        capacity: int = 0,
        rank: int = 0,
        world: int = 1,
        share: bool = False,
    ) -> None:
        if not parts or not all(len(part) for part in parts):
            raise ValueError("every data set needs at least one example")
        if weights and (len(weights) != len(parts) or min(weights) <= 0):
            raise ValueError(f"{len(parts)} data sets need as many weights above 0")
        self._parts = list(parts)
        self._firsts = np.cumsum([0, *(len(part) for part in parts)])
        self._lengths = np.concatenate([part.lengths for part in parts])
        self._labels = np.concatenate([part.supervised for part in parts])
        self._weights = tuple(weights)
        self._seed = seed
        self._rows = rows
        self._packing = packing
        self._capacity = capacity
        self._rank, self._world = rank, world
        self._share = share
        self._global = rows * accumulate * world
        self._pattern: _Epoch | None = None
        self._epochs: dict[int, _Epoch] = {}
        self._steps_before = [0]  # optimizer steps before epoch e

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of the first epoch.

        Without weights all epochs have as many. With weights and packing later ones may differ by a
        few, since each draws other examples.
        """
        return self._first_step(1)

    @property
    def examples_per_epoch(self) -> int:
        """Examples learned from in an epoch."""
        return len(self._epoch(0).flat)

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens the model reads in the first epoch."""
        return int(self._lengths[self._epoch(0).flat].sum())

    @property
    def efficiency(self) -> float:
        """Share of the packed rows' room that holds tokens; 1 without packing, which never pads."""
        if not self._packing:
            return 1.0
        return self.tokens_per_epoch / (self._epoch(0).units * self._capacity)

    def step(self, index: int) -> list[Batch]:
        """This rank's micro-batches of optimizer step `index`, counted from 0 over the whole run.

        The last step of an epoch may be smaller. Units are dealt to the ranks in turn, so their
        shares differ by at most one unit. Every rank gets as many micro-batches, because ranks that
        share a model's weights must run it equally often: where units are lacking, ones without a
        label.
        """
        epoch, units = self._units(index)
        mine = units[self._rank :: self._world]
        most = -(-len(units) // self._world)  # units of the first rank, which never has fewer
        groups = [mine[start : start + self._rows] for start in range(0, most, self._rows)]
        return [
            self._batch(self._members(epoch, group)) if len(group) else self._idle(epoch, units)
            for group in groups
        ]

    def _idle(self, epoch: _Epoch, units: Indices) -> Batch:
        """A micro-batch from which nothing is learned."""
        return without_labels(self._batch(self._members(epoch, units[:1])[:1]))

    def supervised(self, index: int) -> int:
        """Labels of optimizer step `index` over all micro-batches of all ranks."""
        epoch, units = self._units(index)
        return int(self._labels[self._members(epoch, units)].sum())

    def longest(self) -> Batch:
        """A micro-batch at least as long as any: the longest units together, those with most labels
        first among equals. For the memory probe."""
        epoch = self._epoch(0)
        tokens = np.add.reduceat(self._lengths[epoch.flat], epoch.starts[:-1])
        labels = np.add.reduceat(self._labels[epoch.flat], epoch.starts[:-1])
        chosen = np.lexsort((-labels, -tokens))[: self._rows]
        return self._batch(self._members(epoch, chosen))

    @property
    def most_documents(self) -> int:
        """Examples in the micro-batch of the first epoch that has the most. Best fit puts the short
        ones together, so that is far more than the usual number."""
        counts = np.diff(self._epoch(0).starts)[self._rank :: self._world]
        sums = np.r_[0, np.cumsum(counts)]
        size = min(self._rows, len(counts))
        return int((sums[size:] - sums[: len(sums) - size]).max(initial=0))

    # -- order -----------------------------------------------------------------------------------

    def _units(self, index: int) -> tuple[_Epoch, Indices]:
        if self._weights:
            while self._first_step(len(self._steps_before)) <= index:
                pass  # each call counts one epoch more
            number = bisect.bisect_right(self._steps_before, index) - 1
        else:
            number = index // self._first_step(1)
        epoch = self._epoch(number)
        start = (index - self._first_step(number)) * self._global
        return epoch, np.arange(start, min(start + self._global, epoch.units))

    def _first_step(self, epoch: int) -> int:
        """Optimizer steps before an epoch."""
        if not self._weights:
            return epoch * -(-self._epoch(0).units // self._global)
        while len(self._steps_before) <= epoch:
            units = self._epoch(len(self._steps_before) - 1).units
            self._steps_before.append(self._steps_before[-1] + -(-units // self._global))
        return self._steps_before[epoch]

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            # epoch 0 stays, for its counts; of the others the last two
            for old in sorted(self._epochs)[1:-1]:
                del self._epochs[old]
            self._epochs[number] = self._make_epoch(number)
        return self._epochs[number]

    def _make_epoch(self, number: int) -> _Epoch:
        drawn = self._draw(number)
        drawn = drawn[permutation(len(drawn), self._seed, SHUFFLE, number)]
        if not self._packing:
            return _Epoch(drawn, np.arange(len(drawn) + 1))
        by_length = drawn[np.argsort(-self._lengths[drawn], kind="stable")]
        pattern = self._pattern
        if pattern is None:
            rows = pack(self._lengths[by_length], self._capacity)
            counts = np.array([len(row) for row in rows])
            ranks = np.fromiter(itertools.chain.from_iterable(rows), np.int64, len(drawn))
            pattern = _Epoch(ranks, _starts(counts))
            if not self._weights:  # every epoch has the same lengths, so the same rows fit
                self._pattern = pattern
        order = permutation(pattern.units, self._seed, SHUFFLE_ROWS, number)
        counts = np.diff(pattern.starts)[order]
        starts = _starts(counts)
        shift = np.repeat(pattern.starts[order] - starts[:-1], counts)
        return _Epoch(by_length[pattern.flat[np.arange(len(drawn)) + shift]], starts)

    def _draw(self, number: int) -> Indices:
        """The examples of an epoch, unshuffled, as indices over all parts."""
        total = int(self._firsts[-1])
        if not self._weights:
            return np.arange(total)
        drawn = []
        for place, weight in enumerate(self._weights):
            count = max(1, round(total * weight / sum(self._weights)))
            size = len(self._parts[place])
            stream = np.arange(number * count, (number + 1) * count)
            rounds, within = np.divmod(stream, size)
            chosen = np.empty(count, dtype=np.int64)
            for one in np.unique(rounds).tolist():
                order = permutation(size, self._seed, CYCLE, place, one)
                chosen[rounds == one] = order[within[rounds == one]]
            drawn.append(chosen + self._firsts[place])
        return np.concatenate(drawn)

    # -- contents --------------------------------------------------------------------------------

    @staticmethod
    def _members(epoch: _Epoch, units: Indices) -> Indices:
        """The examples of some units."""
        pieces = [epoch.flat[epoch.starts[u] : epoch.starts[u + 1]] for u in units.tolist()]
        return np.concatenate([np.zeros(0, dtype=np.int64), *pieces])

    def _batch(self, members: Indices) -> Batch:
        places = np.searchsorted(self._firsts, members, side="right") - 1
        examples = [
            self._parts[place][member - int(self._firsts[place])]
            for place, member in zip(places.tolist(), members.tolist(), strict=True)
        ]
        return collate(examples, tuple(members.tolist()), self._share)


def _starts(counts: Indices) -> Indices:
    """Offsets of stretches laid end to end, their end included."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])


def collate(examples: Sequence[Example], index: Sequence[int] = (), share: bool = False) -> Batch:
    """Lay examples end to end in one batch without padding.

    A position's label is the next token of the same document where that one is trained on, else
    IGNORE_INDEX; so no label reaches across a bound. With `share`, what all examples begin with
    stands in the row once (see `types.Batch`).
    """
    import torch

    ids = [np.asarray(example.ids, dtype=np.int64) for example in examples]
    masks = [np.asarray(example.mask, dtype=np.bool_) for example in examples]
    shared = _common_beginning(ids, masks) if share else 0
    head = ids[0][:shared]
    ids = [one[shared:] for one in ids]
    lengths = np.array([len(one) for one in ids], dtype=np.int64)
    bounds = shared + np.concatenate([[0], np.cumsum(lengths)])
    row = np.concatenate([head, *ids])
    mask = np.concatenate([np.zeros(shared, np.bool_), *(one[shared:] for one in masks)])
    mask[bounds[:-1]] = False  # nothing predicts the first token of a document
    labels = np.full(len(row), IGNORE_INDEX, dtype=np.int64)
    labels[:-1] = np.where(mask[1:], row[1:], IGNORE_INDEX)
    own = np.arange(len(row) - shared) - np.repeat(bounds[:-1] - shared, lengths)
    return Batch(
        torch.from_numpy(row),
        torch.from_numpy(labels),
        torch.from_numpy(np.concatenate([np.arange(shared), shared + own])),
        tuple(bounds.tolist()),
        int(mask.sum()),
        tuple(index),
        shared,
    )


def _common_beginning(ids: Sequence[Indices], masks: Sequence[npt.NDArray[np.bool_]]) -> int:
    """Tokens that all documents begin with, short of the first label and of any document's end.

    0 where it is not worth the copies of keys and values that attention then makes.
    """
    if len(ids) < 2:
        return 0
    limit = min(len(one) - 1 for one in ids)
    for mask in masks:
        trained = np.flatnonzero(mask[: limit + 1])
        trained = trained[trained > 0]  # the first token is never a label
        limit = min(limit, int(trained[0]) - 1) if len(trained) else limit
    same = np.ones(max(0, limit), dtype=np.bool_)
    for one in ids[1:]:
        same &= one[: len(same)] == ids[0][: len(same)]
    length = len(same) if same.all() else int(np.argmin(same))
    return length if length >= MIN_SHARED_TOKENS else 0


def in_order(
    examples: Examples, capacity: int, rank: int = 0, world: int = 1, share: bool = False
) -> Iterator[Batch]:
    """Batches for evaluation: examples in order, each batch up to `capacity` tokens or one example.

    Every `world`-th batch belongs to a rank; all ranks together see each example once. All get as
    many, if need be one without a label (see `Batches.step`).
    """
    groups: list[list[int]] = []
    room = 0
    for number, length in enumerate(examples.lengths.tolist()):
        if length > room:
            groups.append([])
            room = capacity
        groups[-1].append(number)
        room -= length
    for group in groups[rank::world]:
        yield collate([examples[number] for number in group], group, share)
    if rank >= len(groups) % world > 0:
        yield without_labels(collate([examples[0]]))


def without_labels(batch: Batch) -> Batch:
    """The same batch, from which nothing is learned."""
    batch.labels.fill_(IGNORE_INDEX)
    return dataclasses.replace(batch, supervised=0, index=())
