"""The left factor of an fp8 product in one pass: a row's scale, its codes, and the columns of an
adapter behind them.

A row fits into the registers of one program, so it is read once: its largest magnitude, then the
codes. The twin in plain torch serves where there is no Triton.
"""

from __future__ import annotations

import torch

from chatfine.model.fp8 import E4M3, E4M3_MAX, FP8_SMALLEST
from chatfine.model.fp8_kernels import row_kernels

LONGEST_ROW = 65536
ROWS = 8
"""Of which one program writes an adapter's columns."""


@torch.library.custom_op("chatfine::fp8_rows", mutates_args=())
def fp8_rows(
    x: torch.Tensor, inner: torch.Tensor, factors: torch.Tensor | None, unit: float, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """[x · factors | hi(i) | lo(i) | hi(i) | 0] with i = unit · inner, as e4m3 times a row's scale.

    Args:
        x: (N, K), its rows in one piece.
        inner: (N, R); hi(i) is i as an 8-bit float, lo(i) what that leaves of it.
        factors: (K,) float32, of the columns of x, or None.
        unit: of `inner`.
        width: columns behind x, at least 3 R; the rest is zero.

    Returns:
        Codes (N, K + width) as bytes and float32 scales (N, 1).
    """
    programs = row_kernels() if x.is_cuda and x.shape[1] <= LONGEST_ROW else None
    if programs is None:
        return _plain(x, inner, factors, unit, width)
    rows, size = x.shape
    x, inner = x.contiguous(), inner.contiguous()
    codes = torch.empty(rows, size + width, dtype=torch.uint8, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = max(16, 1 << (size - 1).bit_length())
    programs.rows[(rows,)](
        x, inner, x if factors is None else factors, codes.view(E4M3), scales, size,
        inner.shape[1], width, unit, HAS_FACTORS=factors is not None, BLOCK=block,
        TAIL=max(16, 1 << (width - 1).bit_length()),
        num_warps=max(4, min(16, block // 2048)),  # 64 numbers a thread, up to rows of 32,768
    )  # fmt: skip
    return codes, scales


@fp8_rows.register_fake
def _(
    x: torch.Tensor, inner: torch.Tensor, factors: torch.Tensor | None, unit: float, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    codes = x.new_empty((x.shape[0], x.shape[1] + width), dtype=torch.uint8)
    return codes, x.new_empty((x.shape[0], 1), dtype=torch.float32)


@torch.library.custom_op("chatfine::fp8_columns", mutates_args=("codes",))
def fp8_columns(
    codes: torch.Tensor, scales: torch.Tensor, inner: torch.Tensor, unit: float, width: int
) -> None:
    """Write the columns of `fp8_rows` behind states that are codes already. What is larger than
    their scale allows, twice 448 of it, becomes that.

    Args:
        codes: (N, K + width) bytes, whose last columns are written.
        scales: (N, 1) of the rows.
        inner, unit, width: as of `fp8_rows`.
    """
    programs = row_kernels() if codes.is_cuda else None
    if programs is None:
        high, low = split(inner.float() * unit / scales)
        tail = torch.cat([one.view(torch.uint8) for one in (high, low, high)], 1)
        codes[:, -width:] = torch.nn.functional.pad(tail, (0, width - tail.shape[1]))
        return
    rows, stride = codes.shape
    rank = inner.shape[1]
    programs.columns[(-(-rows // ROWS),)](
        inner.contiguous(), codes.view(E4M3), scales, rows, stride, stride - width, rank, width,
        unit, ROWS=ROWS, TAIL=max(16, 1 << (width - 1).bit_length()),
    )  # fmt: skip


@fp8_columns.register_fake
def _(
    codes: torch.Tensor, scales: torch.Tensor, inner: torch.Tensor, unit: float, width: int
) -> None:
    return None


def split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x as the sum of two e4m3 numbers, as far as they reach."""
    high = x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return high, (x - high.float()).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def _plain(
    x: torch.Tensor, inner: torch.Tensor, factors: torch.Tensor | None, unit: float, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    wide, own = x.float(), inner.float() * unit
    if factors is not None:
        wide = wide * factors
    largest = torch.maximum(wide.abs().amax(1, keepdim=True), own.abs().amax(1, keepdim=True))
    scales = largest.clamp(min=FP8_SMALLEST) / E4M3_MAX
    codes = torch.zeros(len(x), x.shape[1] + width, dtype=torch.uint8, device=x.device)
    high, low = split(own / scales)
    begin = 0
    for part in (split(wide / scales)[0], high, low, high):
        codes[:, begin : begin + part.shape[1]] = part.view(torch.uint8)
        begin += part.shape[1]
    return codes, scales
