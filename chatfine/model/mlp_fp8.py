"""A SwiGLU MLP with adapters on fp8 weights as one operation, whole or in pieces.

Its two products are those of `model.lora_fp8`; as one operation nothing lies between them but
`model.swiglu_fp8`, which rounds as it computes. Its slow twin is an MLP of these linears.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from chatfine.model import lora_fp8
from chatfine.model.fp8_rows import fp8_columns, fp8_rows
from chatfine.model.lora_fp8 import Pair, a_unit, adapter_gradients, inner_gradient, row_factors
from chatfine.model.storages import Packed, unpacked_again
from chatfine.model.swiglu_fp8 import swiglu_fp8, swiglu_fp8_back

Kept = tuple[torch.Tensor, ...]
"""What the backward pass of some tokens needs: inner, both, h, inner_down (see `_ahead`)."""


class MlpFp8(torch.autograd.Function):
    """y = down(silu(gate(x)) · up(x)) of x (N, in), each linear with its adapter.

    `first` and `second` are what is packed of gate and up together, and of down, each with its
    `tail_b` and `tail_a`; `weights` are A of gate, up and down, then their B.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scales: tuple[float, float],
        storages: tuple[str, str],
        first: Packed,
        first_tails: Pair,
        second: Packed,
        second_tails: Pair,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        """See the class; kept are the inputs of both products, and what comes out of the first."""
        low = [one.to(x.dtype) for one in weights]
        inside = len(second_tails[1])
        rights = (
            lora_fp8.right_of(storages[0], first, first_tails[0], x.shape[1]),
            lora_fp8.right_of(storages[1], second, second_tails[0], inside),
        )
        y, kept = _ahead(x, low[:3], rights, (first_tails[0].shape[1], second_tails[0].shape[1]))
        ctx.save_for_backward(x, *kept, first_tails[1], second_tails[1], *low[3:], *first, *second)
        ctx.scales, ctx.storages, ctx.count = scales, storages, len(first)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Of x as products of 8-bit floats, of A and B exact."""
        x, inner, both, h, inner_down, tail, tail_down, *rest = ctx.saved_tensors
        b, packed = rest[:3], rest[3:]
        first, second = tuple(packed[: ctx.count]), tuple(packed[ctx.count :])
        second = unpacked_again(ctx.storages[1], second, grad)
        first = unpacked_again(ctx.storages[0], first, grad)
        rights = _rights_back(ctx.storages, (first, second), (tail, tail_down))
        kept = inner, both, h, inner_down
        grad_x, *found = _back(
            grad, x, kept, b, rights, (tail.shape[1], tail_down.shape[1]), ctx.scales
        )
        return (grad_x, *[None] * 6, *found)


def _ahead(
    x: torch.Tensor, a: Sequence[torch.Tensor], rights: tuple[Pair, Pair], widths: tuple[int, int]
) -> tuple[torch.Tensor, Kept]:
    """y of x, and what its backward pass needs.

    Args:
        a: of gate, up and down, in the format of x.
        rights: the weights of both products.
        widths: how many columns adapters add to them.
    """
    inner = F.linear(x, torch.cat((a[0], a[1])))
    both = lora_fp8.product(fp8_rows(x, inner, None, 1.0, widths[0]), rights[0], x)
    h, codes, own = swiglu_fp8(both, widths[1])
    inner_down = F.linear(h, a[2])
    fp8_columns(codes, own, inner_down, 1.0, widths[1])
    return lora_fp8.product((codes, own), rights[1], h), (inner, both, h, inner_down)


Back = tuple[torch.Tensor, torch.Tensor]
"""The codes of a weight for a backward product, and the factors of a gradient before it."""


def _rights_back(
    storages: Sequence[str], packed: Sequence[Packed], tails: Sequence[torch.Tensor]
) -> tuple[Back, Back]:
    one, two = (
        (lora_fp8.right_back_of(name, some, tail, len(tail)), row_factors(name, some))
        for name, some, tail in zip(storages, packed, tails, strict=True)
    )
    return one, two


def _back(
    grad: torch.Tensor,
    x: torch.Tensor,
    kept: Kept,
    b: Sequence[torch.Tensor],
    rights: tuple[Back, Back],
    widths: tuple[int, int],
    scales: tuple[float, float],
) -> list[torch.Tensor]:
    """The gradients of x, of A of gate, up and down, and of their B, for that of y."""
    inner, both, h, inner_down = kept
    (right, factors), (right_down, factors_down) = rights
    back_down = inner_gradient(grad, b[2:], scales[1])
    left = fp8_rows(grad, back_down, factors_down, 1 / a_unit(h.shape[1]), widths[1])
    grad_h = lora_fp8.product_back(left, right_down, h)
    a_down, b_down = adapter_gradients(grad, back_down, h, inner_down, b[2:], scales[1])
    grad_both, codes, own = swiglu_fp8_back(grad_h, both, factors, widths[0])
    back = inner_gradient(grad_both, b[:2], scales[0])
    fp8_columns(codes, own, back, 1 / a_unit(x.shape[1]), widths[0])
    grad_x = lora_fp8.product_back((codes, own), right, x)
    a_gate, a_up, b_gate, b_up = adapter_gradients(grad_both, back, x, inner, b[:2], scales[0])
    return [grad_x, a_gate, a_up, a_down, b_gate, b_up, b_down]


@torch.library.custom_op("chatfine::mlp_fp8_pieces", mutates_args=())
def mlp_fp8_pieces(
    x: torch.Tensor,
    piece: int,
    scales: Sequence[float],
    storages: str,
    first: Sequence[torch.Tensor],
    second: Sequence[torch.Tensor],
    tails: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
) -> torch.Tensor:
    """`MlpFp8`, so many tokens at a time, and again in the backward pass: only x is kept.

    Args:
        x: (N, in).
        piece: of how many tokens.
        scales, storages, first, second, weights: as of `MlpFp8`; the storages with a comma.
        tails: `tail_b` and `tail_a` of first, then of second.

    Returns:
        (N, in)
    """
    ahead = _ahead_of(x, storages, first, second, tails, weights)
    return torch.cat([ahead(some)[0] for some in torch.split(x, piece)])


@mlp_fp8_pieces.register_fake
def _(
    x: torch.Tensor,
    piece: int,
    scales: Sequence[float],
    storages: str,
    first: Sequence[torch.Tensor],
    second: Sequence[torch.Tensor],
    tails: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("chatfine::mlp_fp8_pieces_back", mutates_args=())
def _pieces_back(
    grad: torch.Tensor,
    x: torch.Tensor,
    piece: int,
    scales: Sequence[float],
    storages: str,
    first: Sequence[torch.Tensor],
    second: Sequence[torch.Tensor],
    tails: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """The gradients of x and of the weights."""
    ahead = _ahead_of(x, storages, first, second, tails, weights)
    b = [one.to(x.dtype) for one in weights[3:]]
    packed, names = (tuple(first), tuple(second)), storages.split(",")
    rights = _rights_back(names, packed, (tails[1], tails[3]))
    widths, factors = (tails[1].shape[1], tails[3].shape[1]), (scales[0], scales[1])
    parts, sums = [], [torch.zeros_like(one, dtype=torch.float32) for one in weights]
    for some, from_above in zip(torch.split(x, piece), torch.split(grad, piece), strict=True):
        part, *found = _back(from_above, some, ahead(some)[1], b, rights, widths, factors)
        parts.append(part)
        for total, one in zip(sums, found, strict=True):
            total += one
    return [torch.cat(parts), *(a.to(b.dtype) for a, b in zip(sums, weights, strict=True))]


@_pieces_back.register_fake
def _(
    grad: torch.Tensor,
    x: torch.Tensor,
    piece: int,
    scales: Sequence[float],
    storages: str,
    first: Sequence[torch.Tensor],
    second: Sequence[torch.Tensor],
    tails: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    return [x.new_empty(x.shape), *(one.new_empty(one.shape) for one in weights)]


def _ahead_of(
    x: torch.Tensor,
    storages: str,
    first: Sequence[torch.Tensor],
    second: Sequence[torch.Tensor],
    tails: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
) -> Callable[[torch.Tensor], tuple[torch.Tensor, Kept]]:
    """`_ahead` for pieces of x; what is unpacked for it is unpacked once."""
    names, inside = storages.split(","), len(tails[3])
    rights = (
        lora_fp8.right_of(names[0], tuple(first), tails[0], x.shape[1]),
        lora_fp8.right_of(names[1], tuple(second), tails[2], inside),
    )
    low, widths = [one.to(x.dtype) for one in weights[:3]], (tails[0].shape[1], tails[2].shape[1])
    return lambda some: _ahead(some, low, rights, widths)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, ctx.piece, ctx.scales, ctx.storages, first, second, tails, weights = inputs
    ctx.counts = len(first), len(second), len(tails), len(weights)
    ctx.save_for_backward(x, *first, *second, *tails, *weights)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    lists = []
    for count in ctx.counts:
        lists.append(rest[:count])
        rest = rest[count:]
    grad_x, *found = torch.ops.chatfine.mlp_fp8_pieces_back(
        grad.contiguous(), x, ctx.piece, ctx.scales, ctx.storages, *lists
    )
    nothing = ([None] * count for count in ctx.counts[:3])
    return (grad_x, None, None, None, *nothing, found)


mlp_fp8_pieces.register_autograd(_gradients, setup_context=_keep)
