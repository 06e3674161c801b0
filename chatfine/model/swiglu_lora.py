"""SwiGLU between two products with adapters, forward and back, which adds the adapters' part.

An adapter's second product is as large as the base's, and takes hardly any arithmetic: written by
itself it is one more tensor to write, to read and to add. Here it is computed where it is added,
tile after tile, so gate and up, and their gradients, are read once and written once.

The twins in plain torch serve where there is no Triton, and for ranks and formats that the programs
do not know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from chatfine.model.kernels import swiglu_lora_back_kernel, swiglu_lora_kernel

TILES = {
    torch.bfloat16: (32, 64, 4),
    torch.float16: (32, 64, 4),
    torch.float32: (16, 32, 4),
}
"""Rows and columns of a tile, and by how many warps it is computed; float32 products, which the
card computes number by number, need more registers."""
STRIP, STAGES = 4, 3
"""How many tiles a program computes one after the other, and how many of them are on their way at
once. With 1 and 1, and 64 rows, 0.22 and 0.38 ms for 8,192 rows of 11,008 on an H200; so 0.14 and
0.22, as long as it takes to read and write them."""
STAGED = 32
"""The largest rank whose weights leave room for several tiles at once in the fast memory of all
cards that can fetch ahead (99 KB; compute capability 8.0)."""
WIDEST = 128
"""The largest rank whose part of a tile fits beside it."""
NARROWEST = 16
"""What a product of the card sums over at least."""


@torch.library.custom_op("chatfine::swiglu_lora", mutates_args=())
def swiglu_lora(
    both: torch.Tensor, inner: torch.Tensor, b_gate: torch.Tensor, b_up: torch.Tensor
) -> torch.Tensor:
    """h = silu(gate) · up, where gate and up get their adapters' part first; rounded once.

    Args:
        both: [gate | up] (N, 2 I), without their adapters.
        inner: [x A_gateᵀ | x A_upᵀ] (N, r_gate + r_up), times the adapters' scale.
        b_gate: (I, r_gate).
        b_up: (I, r_up).

    Returns:
        (N, I), in the format of `both`.
    """
    counts = b_gate.shape[1], b_up.shape[1]
    program = _program(swiglu_lora_kernel, both, counts)
    if program is None:
        gate, up = _gate_and_up(both, inner, b_gate, b_up)
        return (torch.nn.functional.silu(gate) * up).to(both.dtype)
    h = both.new_empty(both.shape[0], both.shape[1] // 2)
    program(
        both.contiguous(), inner.contiguous(), b_gate.contiguous(), b_up.contiguous(), h, *h.shape
    )
    return h


@swiglu_lora.register_fake
def _(
    both: torch.Tensor, inner: torch.Tensor, b_gate: torch.Tensor, b_up: torch.Tensor
) -> torch.Tensor:
    return both.new_empty((both.shape[0], both.shape[1] // 2))


@torch.library.custom_op("chatfine::swiglu_lora_back", mutates_args=())
def swiglu_lora_back(
    grad: torch.Tensor,
    back: torch.Tensor,
    a_down: torch.Tensor,
    both: torch.Tensor,
    inner: torch.Tensor,
    b_gate: torch.Tensor,
    b_up: torch.Tensor,
) -> torch.Tensor:
    """The gradient of gate and up, which are computed again; rounded once.

    Args:
        grad: of h (N, I), without what comes through the adapter of the next product.
        back: the gradient of h A_downᵀ (N, r_down), times the adapter's scale.
        a_down: (r_down, I).
        both, inner, b_gate, b_up: as of `swiglu_lora`.

    Returns:
        (N, 2 I), in the format of `both`.
    """
    rows, size = grad.shape
    counts = a_down.shape[0], b_gate.shape[1], b_up.shape[1]
    program = _program(swiglu_lora_back_kernel, both, counts)
    if program is None:
        gate, up = _gate_and_up(both, inner, b_gate, b_up)
        wide = torch.addmm(grad.to(gate), back.to(gate), a_down.to(gate))
        share = torch.sigmoid(gate)
        parts = wide * up * share * (1 + gate * (1 - share)), wide * gate * share
        return torch.cat(parts, 1).to(both.dtype)
    found = both.new_empty(both.shape)
    program(
        grad.contiguous(), back.contiguous(), a_down.contiguous(), both.contiguous(),
        inner.contiguous(), b_gate.contiguous(), b_up.contiguous(), found, rows, size,
    )  # fmt: skip
    return found


@swiglu_lora_back.register_fake
def _(
    grad: torch.Tensor, back: torch.Tensor, a_down: torch.Tensor, both: torch.Tensor, *rest: Any
) -> torch.Tensor:
    return both.new_empty(both.shape)


def _program(
    kernel: Callable[[], Any], both: torch.Tensor, ranks: tuple[int, ...]
) -> Callable[..., Any] | None:
    """The program for all tiles and adapters of these ranks, or None where the twin computes."""
    known = both.is_cuda and both.dtype in TILES and max(ranks) <= WIDEST
    program = kernel() if known else None
    if program is None:
        return None
    rows, columns, warps = TILES[both.dtype]
    widths = [max(NARROWEST, 1 << (rank - 1).bit_length()) for rank in ranks]
    able = torch.cuda.get_device_capability(both.device) >= (8, 0)
    ahead = able and both.dtype != torch.float32 and max(widths) <= STAGED
    strip, stages = (STRIP, STAGES) if ahead else (1, 1)
    strips = -(-both.shape[0] // rows) * -(-both.shape[1] // 2 // (columns * strip))
    return lambda *tensors: program[(strips,)](
        *tensors,
        *ranks,
        *widths,
        ROWS=rows,
        COLUMNS=columns,
        STRIP=strip,
        STAGES=stages,
        num_warps=warps,
    )


def _gate_and_up(
    both: torch.Tensor, inner: torch.Tensor, b_gate: torch.Tensor, b_up: torch.Tensor
) -> list[torch.Tensor]:
    """Each (N, I) with its adapter, in a wide format."""
    wide = torch.promote_types(both.dtype, torch.float32)
    parts = inner.to(wide).split_with_sizes([b_gate.shape[1], b_up.shape[1]], 1)
    return [
        torch.addmm(base, part, b.to(wide).t())
        for base, part, b in zip(both.to(wide).chunk(2, 1), parts, (b_gate, b_up), strict=True)
    ]
