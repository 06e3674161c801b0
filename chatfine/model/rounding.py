"""Weights rounded so that what their layer answers changes least (GPTQ: Frantar et al. 2022).

Each column of a weight is rounded in turn, and what that costs the answers is made up for by the
columns not yet rounded, as far as the inputs tell how: their second moments Xᵀ X say which
columns move together. The largest columns come first. Codes and scales are as of `model.storages`:
reading and multiplying them costs what it costs anyway.

The scales of NF4's blocks are not their largest magnitudes here, but those that leave the smallest
squared error, each column weighted by the size of its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from chatfine.model.fp8 import E4M3, E4M3_MAX, round_rows
from chatfine.model.fp8_kernels import block_kernel
from chatfine.model.storages import FP8_ROOM, NF4_BLOCK, NF4_LEVELS, NF4E4m3, Packed

CALIBRATED = ("fp8", "nf4")
"""Storages that gain by it; int8 rounds so little that nothing is left to gain."""
DAMPING = 0.01
"""Part of each second moment that is added to it, and a hundredth of that of their mean: what few
tokens say of the inputs would be taken for certain without it."""
COLUMNS = 128
"""Columns rounded before the rest of the weight hears of them."""
ROWS = 16
"""Of which one program rounds the columns."""
SHRINK = (0.6, 1.0, 17)
"""Tried scales of a block, in parts of its largest magnitude: from, to, how many."""


class Grid(Protocol):
    """The numbers that a weight (out, in) can be rounded to.

    Attributes:
        scales: (out, groups) float32.
        width: columns that share a scale.
        levels: (n,) float32 in rising order, of which a code is the number; None for e4m3.
        units: (out,) float32, in which levels times scales are e4m3 numbers; None if they are not.
    """

    scales: torch.Tensor
    width: int
    levels: torch.Tensor | None
    units: torch.Tensor | None

    def nearest(self, column: torch.Tensor, at: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and values (out,) float32 nearest to `column` (out,), which is number `at`."""
        ...

    def packed(self, codes: torch.Tensor) -> Packed:
        """Codes (out, in) and the scales, as the storage keeps them."""
        ...


class Fp8Grid:
    """e4m3 numbers with a scale for each row, as of `storages.Fp8`."""

    def __init__(self, weight: torch.Tensor, importance: torch.Tensor) -> None:
        self.scales = round_rows(weight, FP8_ROOM)[1]  # (out, 1)
        self.width = weight.shape[1]
        self.levels: torch.Tensor | None = None
        self.units: torch.Tensor | None = None

    def nearest(self, column: torch.Tensor, at: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Grid.nearest`."""
        scales = self.scales[:, 0]
        rounded = (column / scales).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
        return rounded.view(torch.uint8), rounded.float() * scales

    def packed(self, codes: torch.Tensor) -> Packed:
        """See `Grid.packed`."""
        return codes, self.scales.view(torch.uint8)


class NF4Grid:
    """Sixteen levels and a scale for each block of 64 columns, as of `storages.NF4`.

    Args:
        weight: (out, in) float32.
        importance: (in,), how much a column's error counts.
    """

    def __init__(self, weight: torch.Tensor, importance: torch.Tensor) -> None:
        self.width = NF4_BLOCK
        self._table = torch.tensor(NF4_LEVELS, device=weight.device)
        self.levels: torch.Tensor | None = self._table
        self._between = between(self._table)
        fill = -weight.shape[1] % NF4_BLOCK
        blocks = F.pad(weight, (0, fill)).view(len(weight), -1, NF4_BLOCK)
        counts = F.pad(importance, (0, fill)).view(1, -1, NF4_BLOCK)
        self.scales = self._best_scales(blocks, counts)  # (out, blocks)
        self.units: torch.Tensor | None = None

    def _best_scales(self, blocks: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        largest = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        best, least = largest, torch.full_like(largest, torch.inf)
        for part in torch.linspace(*SHRINK).tolist():
            level = self._table[torch.bucketize(blocks / (largest * part), self._between)]
            # of these codes the scale with the smallest weighted error
            scale = (counts * blocks * level).sum(-1, keepdim=True)
            scale = scale / (counts * level.square()).sum(-1, keepdim=True).clamp(min=1e-30)
            error = (counts * (blocks - scale * level).square()).sum(-1, keepdim=True)
            better = (error < least) & (scale > 0)
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
        return best.squeeze(-1)

    def nearest(self, column: torch.Tensor, at: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Grid.nearest`."""
        scales = self.scales[:, at // NF4_BLOCK]
        codes = torch.bucketize(column / scales, self._between)
        if self.units is None:
            return codes.to(torch.uint8), self._table[codes] * scales
        near = (self._table[codes] * (scales / self.units)).to(E4M3)
        return codes.to(torch.uint8), near.float() * self.units

    def packed(self, codes: torch.Tensor) -> Packed:
        """See `Grid.packed`; the first of two codes is in the high bits."""
        zero = NF4_LEVELS.index(0.0)
        pairs = F.pad(codes, (0, -codes.shape[1] % NF4_BLOCK), value=zero).view(len(codes), -1, 2)
        scales = self.scales.contiguous().view(torch.uint8)
        return (pairs[..., 0] << 4) | pairs[..., 1], scales


class NF4E4m3Grid(NF4Grid):
    """The same levels and scales, of which e4m3 numbers are made, as of `storages.NF4E4m3`."""

    def __init__(self, weight: torch.Tensor, importance: torch.Tensor) -> None:
        super().__init__(weight, importance)
        storage = NF4E4m3()
        codes = torch.empty(len(weight), 0, dtype=torch.uint8, device=weight.device)
        self.units = storage.fp8_scales((codes, self.scales.contiguous().view(torch.uint8)))[:, 0]


def between(levels: torch.Tensor) -> torch.Tensor:
    """Where the nearest level changes, (n − 1,) of (n,)."""
    return (levels[1:] + levels[:-1]) / 2


GRIDS: dict[str, Callable[[torch.Tensor, torch.Tensor], Grid]] = {
    "fp8": Fp8Grid, "nf4": NF4Grid, "nf4-e4m3": NF4E4m3Grid,
}  # fmt: skip


@torch.no_grad()
def round_together(
    weights: Sequence[torch.Tensor], moments: torch.Tensor, storage: str
) -> list[Packed]:
    """The packed forms of weights (outᵢ, in) that read the same inputs.

    Args:
        weights: in any float format.
        moments: Xᵀ X (in, in) float32 of their inputs X.
        storage: a name in `GRIDS`.
    """
    whole = torch.cat([weight.to(moments.device, torch.float32) for weight in weights])
    grid = GRIDS[storage](whole, moments.diagonal())
    codes = _round_columns(whole, moments, grid)
    sizes = [len(weight) for weight in weights]
    shares = (torch.split(one, sizes) for one in grid.packed(codes))
    return [tuple(one.clone() for one in share) for share in zip(*shares, strict=True)]


def _round_columns(weight: torch.Tensor, moments: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The codes (out, in)."""
    order = moments.diagonal().argsort(descending=True)
    factor = _factor(moments[order][:, order])
    weight = weight[:, order]
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, len(order), COLUMNS):
        end = min(start + COLUMNS, len(order))
        places, inside = order[start:end], factor[start:end, start:end].contiguous()
        codes[:, places], errors = round_block(weight[:, start:end], inside, places, grid)
        weight[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    return codes


def round_block(
    block: torch.Tensor, inside: torch.Tensor, places: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns that hear of each other at once.

    Args:
        block: (out, n) float32.
        inside: (n, n), their part of the factor.
        places: (n,), where in the weight they are.
        grid: of the whole weight.

    Returns:
        Codes (out, n), and what each column's rounding costs (out, n) in units of the factor.
    """
    program = block_kernel() if block.is_cuda else None
    if program is None:
        return _plain_block(block.clone(), inside, places, grid)
    (rows, width), groups = block.shape, grid.scales.shape[1]
    block = block.contiguous()
    codes = torch.empty(rows, width, dtype=torch.uint8, device=block.device)
    errors = torch.empty_like(block)
    levels = block[0, :0] if grid.levels is None else grid.levels
    program[(-(-rows // ROWS),)](
        block, inside, grid.scales.contiguous(), places // grid.width, levels, between(levels),
        block if grid.units is None else grid.units, codes, errors, rows, width, groups,
        LEVELS=len(levels), UNITS=grid.units is not None, ROWS=ROWS,
        BLOCK=max(16, 1 << (width - 1).bit_length()),
    )  # fmt: skip
    return codes, errors


def _plain_block(
    block: torch.Tensor, inside: torch.Tensor, places: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    codes, errors = torch.empty_like(block, dtype=torch.uint8), torch.empty_like(block)
    for j, place in enumerate(places.tolist()):
        column = block[:, j]
        codes[:, j], value = grid.nearest(column, place)
        errors[:, j] = (column - value) / inside[j, j]
        block[:, j + 1 :].addr_(errors[:, j], inside[j, j + 1 :], alpha=-1)
    return codes, errors


def _factor(moments: torch.Tensor) -> torch.Tensor:
    """The upper triangle U with Uᵀ U = moments⁻¹, for which they are damped until there is one."""
    diagonal = moments.diagonal()
    # an input that never was has no say, and its column is rounded as it is
    diagonal[diagonal == 0] = diagonal.mean().clamp(min=1e-30)
    step = DAMPING * (diagonal + diagonal.mean() / 100)
    for _ in range(8):
        diagonal += step
        lower: torch.Tensor
        upper: torch.Tensor
        lower, failed = torch.linalg.cholesky_ex(moments)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        step = step * 4
    return torch.eye(len(moments), device=moments.device)  # nothing is known of the inputs
