"""8-bit floats (e4m3) with a scale for each row, and the card's product of them."""

from __future__ import annotations

import torch

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
FP8_SMALLEST = 1e-12
"""A row smaller than this is as good as zero."""


def round_rows(x: torch.Tensor, room: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """x (N, K) as e4m3 numbers, the largest of a row 448 / `room`, and the float32 scales (N, 1) of
    its rows."""
    wide = x.float()
    scales = wide.abs().amax(1, keepdim=True).clamp(min=FP8_SMALLEST) * (room / E4M3_MAX)
    return (wide / scales).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scales


def multiplies_fp8(x: torch.Tensor, out_features: int, in_features: int) -> bool:
    """Whether the card's product of 8-bit floats takes such factors."""
    sizes = out_features % 16 == 0 and in_features % 16 == 0
    return x.is_cuda and x.dtype == torch.bfloat16 and sizes


def multiply_fp8(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """a bᵀ (N, M) of e4m3 a (N, K), b (M, K), rows scaled by (N, 1) and (M, 1) or (1, 1).

    On a CPU the same in float32: the twin.
    """
    if not a.is_cuda:
        return (a.float() @ b.float().t() * scale_a * scale_b.t()).to(dtype)
    columns = scale_b.expand(len(b), 1).t().contiguous()
    return torch._scaled_mm(
        a, b.t(), scale_a=scale_a, scale_b=columns, out_dtype=dtype, use_fast_accum=True
    )


def multiply_back(grad: torch.Tensor, turned: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """grad W (N, in) of grad (N, out), in its format, where W has the e4m3 codes `turned` (in, out)
    and the scales (out, 1).

    A row's scale of W belongs to a column of the gradient here, which is multiplied by it before it
    is rounded.
    """
    rounded, own = round_rows(grad.float() * scales.t())
    return multiply_fp8(rounded, turned, own, torch.ones_like(own[:1]), grad.dtype)
