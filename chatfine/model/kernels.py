"""The Triton programs that write the format they read; each works on a row, or on tiles of some.
Those that round to 8-bit floats are in `model.fp8_kernels`.

`model.swiglu_lora` and `model.cross_entropy` say what they compute, and have twins in plain torch.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any


@functools.lru_cache(maxsize=1)
def _adapter_tiles() -> Any:
    """What the programs below read of adapters, or None where Triton is missing: some rows of an
    inner product, and some columns of the weight that it is multiplied with.

    Ranks are known when it is compiled: of rows of a known length it reads several numbers at once.
    """
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    @triton.jit  # type: ignore[untyped-decorator]
    def left(  # type: ignore[no-untyped-def]
        inner, row, rows, STRIDE: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr
    ):
        place = tl.arange(0, WIDTH)
        there = (place < RANK)[None, :] & (row < rows)[:, None]
        return tl.load(inner + row[:, None] * STRIDE + place[None, :], mask=there, other=0.0)

    @triton.jit  # type: ignore[untyped-decorator]
    def right(  # type: ignore[no-untyped-def]
        weight, column, size, down, beside, RANK: tl.constexpr, WIDTH: tl.constexpr
    ):
        place = tl.arange(0, WIDTH)
        there = (place < RANK)[:, None] & (column < size)[None, :]
        where = weight + place[:, None] * down + column[None, :] * beside
        return tl.load(where, mask=there, other=0.0)

    return SimpleNamespace(left=left, right=right)


@functools.lru_cache(maxsize=1)
def swiglu_lora_kernel() -> Any:
    """The program of `swiglu_lora`, or None where Triton is missing.

    It takes a strip of tiles, so that the next ones are on their way while one is computed.
    """
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    left, right = _adapter_tiles().left, _adapter_tiles().right

    @triton.jit  # type: ignore[untyped-decorator]
    def ahead(  # type: ignore[no-untyped-def]
        both, inner, b_gate, b_up, h, rows, size,
        GATE: tl.constexpr, UP: tl.constexpr, GATE_WIDTH: tl.constexpr, UP_WIDTH: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIP: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        strip, across = tl.program_id(0), tl.cdiv(size, COLUMNS * STRIP)
        row = (strip // across * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        first = strip % across * STRIP
        of_gate = left(inner, row, rows, GATE + UP, GATE, GATE_WIDTH)
        of_up = left(inner + GATE, row, rows, GATE + UP, UP, UP_WIDTH)
        for tile in tl.range(0, STRIP, num_stages=STAGES):
            column = (first + tile) * COLUMNS + tl.arange(0, COLUMNS)
            there = (row < rows)[:, None] & (column < size)[None, :]
            begin = both + row[:, None] * 2 * size + column[None, :]
            gate = tl.load(begin, mask=there, other=0.0).to(tl.float32)
            up = tl.load(begin + size, mask=there, other=0.0).to(tl.float32)
            b = right(b_gate, column, size, 1, GATE, GATE, GATE_WIDTH)
            gate += tl.dot(of_gate, b, input_precision="ieee")
            b = right(b_up, column, size, 1, UP, UP, UP_WIDTH)
            up += tl.dot(of_up, b, input_precision="ieee")
            found = (gate * tl.sigmoid(gate) * up).to(h.dtype.element_ty)
            tl.store(h + row[:, None] * size + column[None, :], found, mask=there)

    return ahead


@functools.lru_cache(maxsize=1)
def swiglu_lora_back_kernel() -> Any:
    """The program of `swiglu_lora_back`, in strips as well, or None where Triton is missing."""
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    left, right = _adapter_tiles().left, _adapter_tiles().right

    @triton.jit  # type: ignore[untyped-decorator]
    def back(  # type: ignore[no-untyped-def]
        grad, from_down, a_down, both, inner, b_gate, b_up, found, rows, size,
        DOWN: tl.constexpr, GATE: tl.constexpr, UP: tl.constexpr,
        DOWN_WIDTH: tl.constexpr, GATE_WIDTH: tl.constexpr, UP_WIDTH: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIP: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        strip, across = tl.program_id(0), tl.cdiv(size, COLUMNS * STRIP)
        row = (strip // across * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        first = strip % across * STRIP
        of_down = left(from_down, row, rows, DOWN, DOWN, DOWN_WIDTH)
        of_gate = left(inner, row, rows, GATE + UP, GATE, GATE_WIDTH)
        of_up = left(inner + GATE, row, rows, GATE + UP, UP, UP_WIDTH)
        for tile in tl.range(0, STRIP, num_stages=STAGES):
            column = (first + tile) * COLUMNS + tl.arange(0, COLUMNS)
            there = (row < rows)[:, None] & (column < size)[None, :]
            begin = grad + row[:, None] * size + column[None, :]
            wide = tl.load(begin, mask=there, other=0.0).to(tl.float32)
            begin = both + row[:, None] * 2 * size + column[None, :]
            gate = tl.load(begin, mask=there, other=0.0).to(tl.float32)
            up = tl.load(begin + size, mask=there, other=0.0).to(tl.float32)
            a = right(a_down, column, size, size, 1, DOWN, DOWN_WIDTH)
            wide += tl.dot(of_down, a, input_precision="ieee")
            b = right(b_gate, column, size, 1, GATE, GATE, GATE_WIDTH)
            gate += tl.dot(of_gate, b, input_precision="ieee")
            b = right(b_up, column, size, 1, UP, UP, UP_WIDTH)
            up += tl.dot(of_up, b, input_precision="ieee")
            share = tl.sigmoid(gate)
            begin = found + row[:, None] * 2 * size + column[None, :]
            kept = (wide * up * share * (1 + gate * (1 - share))).to(found.dtype.element_ty)
            tl.store(begin, kept, mask=there)
            tl.store(begin + size, (wide * gate * share).to(found.dtype.element_ty), mask=there)

    return back


@functools.lru_cache(maxsize=1)
def softmax_gradient_kernel() -> Any:
    """The program of `cross_entropy.softmax_gradient`, or None where Triton is missing.

    It reads a row twice, the second time from the card's cache, and writes over it.
    """
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    @triton.jit  # type: ignore[untyped-decorator]
    def gradient(  # type: ignore[no-untyped-def]
        logits, labels, losses, size, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        logits += row * size
        label = tl.load(labels + row)
        counts = label >= 0
        # before it is overwritten; a label that is no column is seen in the loss
        own = tl.load(logits + label, mask=counts & (label < size), other=float("nan"))
        most = tl.full([BLOCK], -3e38, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, size, BLOCK):
            place = start + column
            number = tl.load(logits + place, mask=place < size, other=-float("inf")).to(tl.float32)
            # of the sum so far and the new number the smaller shrinks: one exponential for both
            above = number - most
            shrink = tl.exp(-tl.abs(above))
            total = tl.where(above > 0, total * shrink + 1, total + shrink)
            most = tl.maximum(most, number)
        top = tl.max(most)
        log_norm = top + tl.log(tl.sum(total * tl.exp(most - top)))
        tl.store(losses + row, tl.where(counts, log_norm - own.to(tl.float32), 0.0))
        tl.debug_barrier()  # what is written now other threads may have had to read
        for start in range(0, size, BLOCK):
            place = start + column
            inside = place < size
            number = tl.load(logits + place, mask=inside, other=0.0).to(tl.float32)
            found = tl.exp(number - log_norm) - tl.where(place == label, 1.0, 0.0)
            found = tl.where(counts, found, 0.0).to(logits.dtype.element_ty)
            tl.store(logits + place, found, mask=inside)

    return gradient
