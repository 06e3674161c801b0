"""SwiGLU between two fp8 products, forward and back, with the rounding of what it makes.

What comes out of the gate's and the up projection's product is read once and written as the next
product wants it: codes of 8-bit floats, their rows' scales, and room behind them for an adapter's
columns (`fp8_rows.fp8_columns`). On its own the activation would be one pass and the rounding
another; of a 7B model's step on an H100 the second took 6 of 302 ms. A row's scale is that of its
states alone, since the adapter's columns need these first; so some room above is left for them.

The twins in plain torch serve where there is no Triton.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from chatfine.model.fp8 import E4M3, E4M3_MAX, FP8_SMALLEST

ROOM = 16
"""States end at 448 / ROOM: their product with a row of A is rarely larger than a few of them."""
ROOM_BACK = 64
"""The same for gradients, whose product with B may be larger. e4m3 numbers are floats: room costs
precision only where a number is a thousandth of its row's largest."""
PIECE = 4096
"""Columns that one program of the backward pass has in its registers at once."""


@torch.library.custom_op("chatfine::swiglu_fp8", mutates_args=())
def swiglu_fp8(both: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h = silu(gate) · up, and its rows as 8-bit floats.

    Args:
        both: [gate | up] (N, 2 I), its rows in one piece.
        width: columns left free behind the codes.

    Returns:
        h (N, I), codes (N, I + width) as bytes, those behind not written, and scales (N, 1).
    """
    rows, size = both.shape[0], both.shape[1] // 2
    kernels = _kernels() if both.is_cuda else None
    if kernels is None:
        codes = torch.zeros(rows, size + width, dtype=torch.uint8, device=both.device)
        gate, up = both.float().chunk(2, 1)
        h = (torch.nn.functional.silu(gate) * up).to(both)
        return h, codes, _round_into(codes, h.float(), ROOM)
    codes = torch.empty(rows, size + width, dtype=torch.uint8, device=both.device)
    h = both.new_empty(rows, size)
    scales = both.new_empty(rows, 1, dtype=torch.float32)
    block = 1 << (size - 1).bit_length()
    kernels[0][(rows,)](
        both.contiguous(), h, codes.view(E4M3), scales, size, size + width, BLOCK=block,
        TOP=E4M3_MAX / ROOM, num_warps=max(4, min(16, block // 1024)),
    )  # fmt: skip
    return h, codes, scales


@swiglu_fp8.register_fake
def _(both: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, size = both.shape[0], both.shape[1] // 2
    codes = both.new_empty((rows, size + width), dtype=torch.uint8)
    return both.new_empty((rows, size)), codes, both.new_empty((rows, 1), dtype=torch.float32)


@torch.library.custom_op("chatfine::swiglu_fp8_back", mutates_args=())
def swiglu_fp8_back(
    grad: torch.Tensor, both: torch.Tensor, factors: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient of `swiglu_fp8`, and its rows times `factors` as 8-bit floats.

    Args:
        grad: of h (N, I).
        both: as of `swiglu_fp8`.
        factors: (2 I,) float32, of the columns.
        width: columns left free behind the codes.

    Returns:
        The gradient (N, 2 I), codes (N, 2 I + width) and scales (N, 1).
    """
    rows, size = grad.shape
    kernels = _kernels() if both.is_cuda else None
    if kernels is None:
        codes = torch.zeros(rows, 2 * size + width, dtype=torch.uint8, device=both.device)
        gate, up = both.float().chunk(2, 1)
        share = torch.sigmoid(gate)
        wide = grad.float()
        parts = wide * up * share * (1 + gate * (1 - share)), wide * gate * share
        found = torch.cat(parts, 1).to(both)
        return found, codes, _round_into(codes, found.float() * factors, ROOM_BACK)
    codes = torch.empty(rows, 2 * size + width, dtype=torch.uint8, device=both.device)
    found = torch.empty_like(both)
    scales = both.new_empty(rows, 1, dtype=torch.float32)
    kernels[1][(rows,)](
        grad.contiguous(), both.contiguous(), factors.contiguous(), found, codes.view(E4M3), scales,
        size, 2 * size + width, PIECE=PIECE, TOP=E4M3_MAX / ROOM_BACK, num_warps=8,
    )  # fmt: skip
    return found, codes, scales


@swiglu_fp8_back.register_fake
def _(
    grad: torch.Tensor, both: torch.Tensor, factors: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, size = both.shape
    codes = both.new_empty((rows, size + width), dtype=torch.uint8)
    return torch.empty_like(both), codes, both.new_empty((rows, 1), dtype=torch.float32)


def _round_into(codes: torch.Tensor, wide: torch.Tensor, room: int) -> torch.Tensor:
    """Write float32 rows (N, K) to the first columns of `codes`; returns their scales (N, 1)."""
    scales = wide.abs().amax(1, keepdim=True).clamp(min=FP8_SMALLEST) * (room / E4M3_MAX)
    codes[:, : wide.shape[1]] = (wide / scales).to(E4M3).view(torch.uint8)
    return scales


@functools.lru_cache(maxsize=1)
def _kernels() -> Any:
    """The Triton programs forward and back, or None where Triton is missing."""
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    smallest = tl.constexpr(FP8_SMALLEST)

    @triton.jit  # type: ignore[untyped-decorator]
    def ahead(  # type: ignore[no-untyped-def]
        both, h, codes, scales, size, stride, BLOCK: tl.constexpr, TOP: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < size
        begin = both + row * 2 * size
        gate = tl.load(begin + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(begin + size + column, mask=inside, other=0.0).to(tl.float32)
        kept = (gate * tl.sigmoid(gate) * up).to(h.dtype.element_ty)
        tl.store(h + row * size + column, kept, mask=inside)
        wide = kept.to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(wide)), smallest) / TOP
        tl.store(scales + row, scale)
        tl.store(codes + row * stride + column, (wide / scale).to(tl.float8e4nv), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator]
    def back(  # type: ignore[no-untyped-def]
        grad, both, factors, found, codes, scales, size, stride,
        PIECE: tl.constexpr, TOP: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, PIECE)
        grad += row * size
        both += row * 2 * size
        found += row * 2 * size
        codes += row * stride
        most = tl.zeros([PIECE], tl.float32)
        for start in range(0, size, PIECE):
            place = start + column
            inside = place < size
            wide = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
            gate = tl.load(both + place, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(both + size + place, mask=inside, other=0.0).to(tl.float32)
            share = tl.sigmoid(gate)
            of_gate = (wide * up * share * (1 + gate * (1 - share))).to(found.dtype.element_ty)
            of_up = (wide * gate * share).to(found.dtype.element_ty)
            tl.store(found + place, of_gate, mask=inside)
            tl.store(found + size + place, of_up, mask=inside)
            left = tl.load(factors + place, mask=inside, other=0.0)
            right = tl.load(factors + size + place, mask=inside, other=0.0)
            larger = tl.maximum(
                tl.abs(of_gate.to(tl.float32) * left), tl.abs(of_up.to(tl.float32) * right)
            )
            most = tl.maximum(most, larger)
        scale = tl.maximum(tl.max(most), smallest) / TOP
        tl.store(scales + row, scale)
        tl.debug_barrier()  # what is read now other threads may have written
        for start in range(0, 2 * size, PIECE):
            place = start + column
            inside = place < 2 * size
            wide = tl.load(found + place, mask=inside, other=0.0).to(tl.float32)
            wide *= tl.load(factors + place, mask=inside, other=0.0)
            tl.store(codes + place, (wide / scale).to(tl.float8e4nv), mask=inside)

    return ahead, back
