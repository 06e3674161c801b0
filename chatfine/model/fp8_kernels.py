"""The Triton programs that round to 8-bit floats; each works on a row, or on some rows.

`model.fp8_rows`, `model.swiglu_fp8` and `model.rounding` say what they compute, and have twins in
plain torch.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

from chatfine.model.fp8 import E4M3_MAX, FP8_SMALLEST


@functools.lru_cache(maxsize=1)
def row_kernels() -> Any:
    """The programs of `model.fp8_rows` by name, or None where Triton is missing."""
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    smallest, largest = tl.constexpr(FP8_SMALLEST), tl.constexpr(E4M3_MAX)

    @triton.jit  # type: ignore[untyped-decorator]
    def rows(  # type: ignore[no-untyped-def]
        x, inner, factors, codes, scales, size, rank, width, unit,
        HAS_FACTORS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < size
        numbers = tl.load(x + row * size + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_FACTORS:
            numbers *= tl.load(factors + column, mask=inside, other=0.0)
        place = tl.arange(0, TAIL)
        third = place // rank  # hi, lo, hi, nothing
        own = tl.load(
            inner + row * rank + place % rank, mask=third < 3, other=0.0
        ).to(tl.float32) * unit  # fmt: skip
        most = tl.maximum(tl.max(tl.abs(numbers)), tl.max(tl.abs(own)))
        scale = tl.maximum(most, smallest) / largest
        tl.store(scales + row, scale)
        begin = codes + row * (size + width)
        tl.store(begin + column, (numbers / scale).to(tl.float8e4nv), mask=inside)
        own = own / scale
        high = own.to(tl.float8e4nv)
        low = (own - high.to(tl.float32)).to(tl.float8e4nv)
        both = tl.where(third == 1, low.to(tl.float32), high.to(tl.float32))
        tl.store(begin + size + place, both.to(tl.float8e4nv), mask=place < width)

    @triton.jit  # type: ignore[untyped-decorator]
    def columns(  # type: ignore[no-untyped-def]
        inner, codes, scales, rows, stride, begin, rank, width, unit,
        ROWS: tl.constexpr, TAIL: tl.constexpr,
    ):  # fmt: skip
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        place = tl.arange(0, TAIL)[None, :]
        third = place // rank  # hi, lo, hi, nothing
        there = row < rows
        own = tl.load(inner + row * rank + place % rank, mask=there & (third < 3), other=0.0)
        own = own.to(tl.float32) * unit / tl.load(scales + row, mask=there, other=1.0)
        high = tl.minimum(tl.maximum(own, -largest), largest).to(tl.float8e4nv)
        low = tl.minimum(tl.maximum(own - high.to(tl.float32), -largest), largest)
        both = tl.where(third == 1, low, high.to(tl.float32)).to(tl.float8e4nv)
        tl.store(codes + row * stride + begin + place, both, mask=there & (place < width))

    return SimpleNamespace(rows=rows, columns=columns)


@functools.lru_cache(maxsize=1)
def swiglu_kernel() -> Any:
    """The program of `swiglu_fp8`, or None where Triton is missing."""
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

    return ahead


@functools.lru_cache(maxsize=1)
def swiglu_back_kernel() -> Any:
    """The program of `swiglu_fp8_back`, or None where Triton is missing."""
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    smallest = tl.constexpr(FP8_SMALLEST)

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

    return back


@functools.lru_cache(maxsize=1)
def e4m3_function() -> Any:
    """The nearest e4m3 numbers for `block_kernel`, or None where Triton is missing.

    In arithmetic: on an H200 Triton 3.6's own conversion made NaNs there, in half the rows of
    blocks whose width was no multiple of 16.
    """
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    largest = tl.constexpr(E4M3_MAX)

    @triton.jit  # type: ignore[untyped-decorator]
    def e4m3(part):  # type: ignore[no-untyped-def]
        part = tl.minimum(tl.maximum(part, -largest), largest)
        size = tl.abs(part)
        bits = size.to(tl.int32, bitcast=True)
        # to three bits of fraction, ties to even; a carry goes on into the exponent, whose bias
        # becomes 7 from 127
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        # below 2⁻⁶ multiples of 2⁻⁹: added to 2²³ they are its last bits
        small = (size * 512.0 + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
        code = tl.where(size < 0.015625, small, normal)
        exponent, fraction = code >> 3, code & 7
        wide = (((exponent + 120) << 23) | (fraction << 20)).to(tl.float32, bitcast=True)
        near = tl.where(exponent > 0, wide, fraction.to(tl.float32) * 0.001953125)
        sign = (part.to(tl.int32, bitcast=True) >> 24) & 128
        return (code | sign).to(tl.uint8), tl.where(sign > 0, -near, near)

    return e4m3


@functools.lru_cache(maxsize=1)
def block_kernel() -> Any:
    """The program of `rounding.round_block`, or None where Triton is missing.

    The columns of a row depend on each other, its rows do not: so it takes the columns of its rows
    in turn and keeps what is left of them in registers, where small operations would read and write
    it for every column.
    """
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    e4m3 = e4m3_function()

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
                    value = e4m3(value)[1]
                value *= unit
                tl.store(codes + row * width + j, code.to(tl.uint8), mask=there)
            else:
                near, value = e4m3(part)
                value *= scale
                tl.store(codes + row * width + j, near, mask=there)
            share = tl.load(inside + j * width + column, mask=column < width, other=0.0)
            error = (now - value) / tl.load(inside + j * width + j)
            tl.store(errors + row * width + j, error, mask=there)
            left -= error[:, None] * share[None, :]

    return block
