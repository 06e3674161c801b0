"""Where new rows of an embedding or head start."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from chatfine.hub.vocabulary import Vocabulary

RULES = ("mean", "first", "random", "zero")
_BLOCK = 1024  # rows computed at a time in float32


def tail_rows(
    old: torch.Tensor, vocabulary: Vocabulary, rule: str, total: int, seed: int
) -> tuple[int, torch.Tensor]:
    """What a grown matrix holds after the rows it keeps.

    Args:
        old: (rows, width) matrix of the model as it was, in its own number format.
        vocabulary: the new pieces; their rows are found by `rule`.
        rule: mean, first, random or zero, see `model.rows`.
        total: rows of the grown matrix.
        seed: of `random`.

    Returns:
        The number of rows that stay, and (total - that, width) in the format of `old`. Rows that
        stand for no piece are the old matrix's own where it has them, else the mean of all rows.
    """
    rows, new = len(old), vocabulary.new_size
    keep = min(rows, vocabulary.old_size)
    mean, deviation = _columns(old[:keep])
    tail = mean.to(old.dtype).expand(total - keep, -1).clone()
    if rows > new:
        tail[new - keep : rows - keep] = old[new:]
    source = torch.Generator().manual_seed(seed)
    for begin in range(0, len(vocabulary.before), _BLOCK):
        block = vocabulary.before[begin : begin + _BLOCK]
        known = [[number for number in before if number < keep] for before in block]
        place = vocabulary.old_size - keep + begin
        if rule == "random":
            drawn = torch.randn(len(block), old.shape[1], generator=source)
            values = mean + deviation * drawn
        elif rule == "zero":
            values = torch.zeros(len(block), old.shape[1])
        else:
            used = [ids[:1] for ids in known] if rule == "first" else known
            values = _means(old, used, mean)
        tail[place : place + len(block)] = values.to(old.dtype)
    return keep, tail


def _columns(old: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (width,) of each column, in float32."""
    total = torch.zeros(old.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for block in old.split(_BLOCK):  # type: ignore[no-untyped-call]
        wide = block.double()
        total += wide.sum(0)
        squares += wide.square().sum(0)
    mean = total / len(old)
    return mean.float(), (squares / len(old) - mean.square()).clamp(min=0).sqrt().float()


def _means(
    old: torch.Tensor, ids: Sequence[Sequence[int]], otherwise: torch.Tensor
) -> torch.Tensor:
    """(len(ids), width): the mean in float32 of the rows `ids[i]`; `otherwise` where there are
    none."""
    flat = torch.tensor([number for row in ids for number in row], dtype=torch.long)
    owner = torch.tensor([i for i, row in enumerate(ids) for _ in row], dtype=torch.long)
    counts = torch.tensor([len(row) for row in ids], dtype=torch.float32)[:, None]
    sums = torch.zeros(len(ids), old.shape[1]).index_add_(0, owner, old[flat].float())
    return torch.where(counts > 0, sums / counts.clamp(min=1), otherwise)
