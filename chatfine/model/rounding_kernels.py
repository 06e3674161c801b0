"""The Triton program that rounds a block of columns, some rows at a time.

`model.rounding` says what it computes, and has its twin in plain torch. The columns of a row depend
on each other, its rows do not; so one program takes the columns of its rows in turn and keeps what
is left of them in registers, where small operations would read and write it for every column.
"""

from __future__ import annotations

import functools
from typing import Any

from chatfine.model.fp8 import E4M3_MAX


@functools.lru_cache(maxsize=1)
def block_kernel() -> Any:
    """The program of `rounding.round_block`, or None where Triton is missing."""
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    largest = tl.constexpr(E4M3_MAX)

    @triton.jit  # type: ignore[untyped-decorator]
    def block(  # type: ignore[no-untyped-def]
        weight, inside, scales, owners, levels, between, units, codes, errors, rows, width, groups,
        LEVELS: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        column = tl.arange(0, BLOCK)
        there = row < rows
        unit = tl.load(units + row, mask=there, other=1.0) if UNITS else 1.0
        left = tl.load(
            weight + row[:, None] * width + column[None, :],
            mask=there[:, None] & (column < width)[None, :], other=0.0,
        )  # fmt: skip
        for j in range(width):
            now = tl.sum(tl.where((column == j)[None, :], left, 0.0), 1)
            scale = tl.load(scales + row * groups + tl.load(owners + j), mask=there, other=1.0)
            part = now / scale
            if LEVELS > 0:
                code = tl.zeros([ROWS], tl.int32)
                for k in tl.static_range(LEVELS - 1):
                    code += (part > tl.load(between + k)).to(tl.int32)
                value = tl.load(levels + code) * (scale / unit)
                if UNITS:
                    value = value.to(tl.float8e4nv).to(tl.float32)
                value *= unit
                tl.store(codes + row * width + j, code.to(tl.uint8), mask=there)
            else:
                near = tl.minimum(tl.maximum(part, -largest), largest).to(tl.float8e4nv)
                value = near.to(tl.float32) * scale
                tl.store(codes + row * width + j, near, mask=there)
            share = tl.load(inside + j * width + column, mask=column < width, other=0.0)
            error = (now - value) / tl.load(inside + j * width + j)
            tl.store(errors + row * width + j, error, mask=there)
            left -= error[:, None] * share[None, :]

    return block
