"""Order, packing and collation: invariants over seeds, ranks and shapes."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch

from chatfine.data.batches import Batches, collate, in_order
from chatfine.data.examples import Examples
from chatfine.data.packing import pack
from chatfine.types import IGNORE_INDEX, Batch


def examples(count: int, seed: int = 0, longest: int = 60) -> Examples:
    """Random examples whose ids name them, with at least one label each."""
    chance = np.random.default_rng(seed)
    lengths = chance.integers(2, longest + 1, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    mask = chance.random(offsets[-1]) < 0.5
    mask[offsets[1:] - 1] = True
    ids = np.repeat(np.arange(count), lengths) * 100 + chance.integers(0, 100, offsets[-1])
    return Examples(ids.astype(np.int32), mask, offsets)


def learned(batches: list[Batch]) -> list[int]:
    return sorted(number for batch in batches for number in batch.index)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("weights", [(), (2.0, 1.0)])
def test_a_step_learns_the_same_however_it_is_divided(
    packing: bool, weights: tuple[float, ...]
) -> None:
    parts = [examples(75, 1), examples(42, 2)]

    def steps(rows: int, accumulate: int, world: int) -> list[list[int]]:
        ranks = [
            Batches(parts, weights, 5, rows, accumulate, packing, 64, rank, world)
            for rank in range(world)
        ]
        wanted = 3 * ranks[0].steps_per_epoch
        found = []
        for index in range(wanted):
            shares = [rank.step(index) for rank in ranks]
            flat = [batch for share in shares for batch in share]
            assert max(map(len, shares)) <= accumulate
            total = sum(batch.supervised for batch in flat)
            assert total == ranks[0].supervised(index) == ranks[-1].supervised(index)
            found.append(learned(flat))
        return found

    expected = steps(8, 1, 1)
    for division in ((1, 8, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2), (1, 1, 8)):
        assert steps(*division) == expected


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_holds_every_example_once_and_epochs_differ(packing: bool) -> None:
    parts = [examples(101), examples(30, 3)]
    batches = Batches(parts, seed=1, rows=3, accumulate=2, packing=packing, capacity=80)
    length = batches.steps_per_epoch
    orders = []
    for epoch in range(3):
        steps = [batches.step(index) for index in range(epoch * length, (epoch + 1) * length)]
        flat = [number for step in steps for batch in step for number in batch.index]
        assert sorted(flat) == list(range(131))
        orders.append(flat)
    assert len({tuple(order) for order in orders}) == 3
    assert orders[0] != sorted(orders[0])


def test_steps_are_a_pure_function_of_seed_and_index() -> None:
    parts = [examples(90)]

    def make(seed: int) -> Batches:
        return Batches(parts, (1.0,), seed, rows=2, packing=True, capacity=70)

    forward = make(3)
    expected = [learned(forward.step(index)) for index in range(80)]
    places = list(range(80))
    random.Random(0).shuffle(places)
    jumping = make(3)
    for index in places:  # as after a resume, in any order
        assert learned(jumping.step(index)) == expected[index]
    assert [learned(make(4).step(index)) for index in range(5)] != expected[:5]
    assert [learned(make(-1).step(index)) for index in range(5)] != expected[:5]


def test_the_order_is_frozen() -> None:
    """Golden: made by this code; a change here breaks every resume across versions."""
    batches = Batches([examples(10)], seed=42, rows=10)
    assert [batches.step(i)[0].index for i in range(2)] == [
        (0, 1, 4, 2, 6, 8, 5, 9, 7, 3),
        (9, 8, 6, 1, 5, 0, 4, 2, 7, 3),
    ]


def test_weights_set_the_shares_and_small_sets_come_round_evenly() -> None:
    parts = [examples(100), examples(10, 1)]
    batches = Batches(parts, (1.0, 3.0), seed=0, rows=1)
    assert batches.examples_per_epoch == round(110 / 4) + round(330 / 4)
    counts = np.zeros(110, dtype=int)
    for index in range(4 * batches.steps_per_epoch):
        counts[list(batches.step(index)[0].index)] += 1
    assert counts[:100].sum() == 4 * round(110 / 4)
    assert counts[:100].max() - counts[:100].min() <= 1, "no example twice before each came once"
    assert counts[100:].max() - counts[100:].min() <= 1


def test_weighted_epochs_walk_without_gaps() -> None:
    parts = [examples(50), examples(40, 1)]
    batches = Batches(parts, (1.0, 1.0), seed=0, rows=2, packing=True, capacity=64)
    per_epoch = batches.examples_per_epoch
    seen, index = 0, 0
    while seen < 5 * per_epoch:
        seen += len(batches.step(index)[0].index)
        index += 1
    assert seen == 5 * per_epoch, "epochs end at step bounds"


def test_a_rank_without_units_still_runs_the_model_as_often() -> None:
    parts = [examples(3)]
    shares = [Batches(parts, rows=2, rank=rank, world=4).step(0) for rank in range(4)]
    assert [len(share) for share in shares] == [1, 1, 1, 1]
    assert [share[0].supervised > 0 for share in shares] == [True, True, True, False]
    idle = shares[3][0]
    assert len(idle.ids) > 0
    assert idle.index == ()
    assert (idle.labels == IGNORE_INDEX).all()


def test_labels_bounds_and_positions_against_a_plain_loop() -> None:
    parts = examples(40)
    batch = collate([parts[i] for i in range(40)], range(40))
    assert batch.bounds == tuple(parts.offsets.tolist())
    assert batch.ids.dtype == batch.labels.dtype == batch.positions.dtype == torch.int64
    place = 0
    for one in parts:
        ids, mask = list(one.ids), list(one.mask)
        for i in range(len(ids)):
            label = ids[i + 1] if i + 1 < len(ids) and mask[i + 1] else IGNORE_INDEX
            assert batch.labels[place] == label
            assert batch.ids[place] == ids[i]
            assert batch.positions[place] == i
            place += 1
    assert batch.tokens == place
    assert batch.supervised == int((batch.labels != IGNORE_INDEX).sum()) == parts.supervised.sum()


@pytest.mark.parametrize("packing", [False, True])
def test_longest_is_at_least_as_long_as_any(packing: bool) -> None:
    batches = Batches([examples(200)], rows=4, packing=packing, capacity=100)
    most = max(b.tokens for i in range(3 * batches.steps_per_epoch) for b in batches.step(i))
    assert most <= batches.longest().tokens <= (400 if packing else 240)


@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_most_documents_is_what_the_fullest_micro_batch_of_an_epoch_has(rows: int) -> None:
    batches = Batches([examples(200)], rows=rows, packing=True, capacity=100)
    counts = [len(one.index) for i in range(batches.steps_per_epoch) for one in batches.step(i)]
    assert max(counts) <= batches.most_documents <= 200
    if rows != 4:  # windows that begin between micro-batches count too
        assert batches.most_documents == max(counts)


def test_examples_longer_than_a_row_are_refused() -> None:
    with pytest.raises(ValueError, match="between 1 and 10"):
        _ = Batches([examples(9)], packing=True, capacity=10).steps_per_epoch
    with pytest.raises(ValueError, match="at least one example"):
        Batches([examples(9), Examples(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(1, int))])


def best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Fill of each row by the textbook's quadratic best fit, longest first."""
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [row for row in range(len(rows)) if rows[row] + length <= capacity]
        if fits:
            rows[max(fits, key=rows.__getitem__)] += length
        else:
            rows.append(length)
    return sorted(rows)


@pytest.mark.parametrize("capacity", [7, 64, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("seed", range(5))
def test_packing_loses_nothing_and_equals_the_textbook(capacity: int, seed: int) -> None:
    chance = random.Random(seed)
    top = chance.choice([capacity, max(1, capacity // 3)])
    lengths = [chance.randint(1, top) for _ in range(chance.randint(0, 300))]
    rows = pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    fills = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < fill <= capacity for fill in fills)
    assert sorted(fills) == best_fit(lengths, capacity)
    shuffled = chance.sample(lengths, len(lengths))
    assert len(pack(shuffled, capacity)) == len(rows)


def test_packing_is_fast_and_full() -> None:
    lengths = np.random.default_rng(0).lognormal(5.5, 0.8, 100_000).clip(4, 2048).astype(np.int64)
    start = time.perf_counter()
    rows = pack(lengths, 2048)
    assert time.perf_counter() - start < 5  # about 0.06 s; quadratic would take minutes
    assert lengths.sum() / (len(rows) * 2048) > 0.99


@pytest.mark.parametrize("world", [1, 3])
def test_in_order_shows_each_example_once(world: int) -> None:
    parts = examples(50, longest=90)
    found = [batch for rank in range(world) for batch in in_order(parts, 64, rank, world)]
    assert learned(found) == list(range(50))
    assert all(batch.tokens <= 64 or len(batch.index) <= 1 for batch in found)
    assert len(found) % world == 0, "all ranks run the model equally often"
    if world == 1:
        assert [n for batch in found for n in batch.index] == list(range(50))
