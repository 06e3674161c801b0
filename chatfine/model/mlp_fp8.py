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
Back = tuple[torch.Tensor, torch.Tensor]
"""The codes of a weight for a backward product, and the factors of a gradient before it."""


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
        (tail, tail_back), (tail_down, tail_down_back) = first_tails, second_tails
        y, kept = _ahead(
            x,
            low[:3],
            lambda: lora_fp8.right_of(storages[0], first, tail, len(tail_back)),
            lambda: lora_fp8.right_of(storages[1], second, tail_down, len(tail_down_back)),
            (tail.shape[1], tail_down.shape[1]),
        )
        ctx.save_for_backward(x, *kept, tail_back, tail_down_back, *low[3:], *first, *second)
        ctx.scales, ctx.storages, ctx.count = scales, storages, len(first)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Of x as products of 8-bit floats, of A and B exact."""
        x, inner, both, h, inner_down, tail, tail_down, *rest = ctx.saved_tensors
        b, packed = rest[:3], rest[3:]
        first, second = tuple(packed[: ctx.count]), tuple(packed[ctx.count :])
        names = ctx.storages
        grad_x, *found = _back(
            grad,
            x,
            (inner, both, h, inner_down),
            b,
            lambda g: _right_back(names[0], unpacked_again(names[0], first, g), tail),
            lambda g: _right_back(names[1], unpacked_again(names[1], second, g), tail_down),
            (tail.shape[1], tail_down.shape[1]),
            ctx.scales,
        )
        return (grad_x, *[None] * 6, *found)


def _ahead(
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    first: Callable[[], Pair],
    second: Callable[[], Pair],
    widths: tuple[int, int],
) -> tuple[torch.Tensor, Kept]:
    """y of x, and what its backward pass needs.

    Args:
        x: (N, in).
        a: of gate, up and down, in the format of x.
        first, second: the weights of both products, asked for when they are needed.
        widths: how many columns adapters add to them.
    """
    inner = F.linear(x, torch.cat((a[0], a[1])))
    both = lora_fp8.product(fp8_rows(x, inner, None, 1.0, widths[0]), first(), x)
    h, codes, own = swiglu_fp8(both, widths[1])
    inner_down = F.linear(h, a[2])
    fp8_columns(codes, own, inner_down, 1.0, widths[1])
    return lora_fp8.product((codes, own), second(), h), (inner, both, h, inner_down)


def _right_back(storage: str, packed: Packed, tail: torch.Tensor) -> Back:
    return lora_fp8.right_back_of(storage, packed, tail, len(tail)), row_factors(storage, packed)


def _back(
    grad: torch.Tensor,
    x: torch.Tensor,
    kept: Kept,
    b: Sequence[torch.Tensor],
    first: Callable[[torch.Tensor], Back],
    second: Callable[[torch.Tensor], Back],
    widths: tuple[int, int],
    scales: tuple[float, float],
) -> list[torch.Tensor]:
    """The gradients of x, of A of gate, up and down, and of their B, for that of y; `first` and
    `second` are told by which gradient they will be multiplied."""
    inner, both, h, inner_down = kept
    right, factors = second(grad)
    back_down = inner_gradient(grad, b[2:], scales[1])
    left = fp8_rows(grad, back_down, factors, 1 / a_unit(h.shape[1]), widths[1])
    grad_h = lora_fp8.product_back(left, right, h)
    a_down, b_down = adapter_gradients(grad, back_down, h, inner_down, b[2:], scales[1])
    right, factors = first(grad_h)
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
def _(x: torch.Tensor, *rest: Any) -> torch.Tensor:
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
    first_right, second_right = (
        _right_back(name, some, tail)
        for name, some, tail in zip(names, packed, (tails[1], tails[3]), strict=True)
    )
    widths, factors = (tails[1].shape[1], tails[3].shape[1]), (scales[0], scales[1])
    parts, sums = [], [torch.zeros_like(one, dtype=torch.float32) for one in weights]
    for some, from_above in zip(torch.split(x, piece), torch.split(grad, piece), strict=True):
        part, *found = _back(
            from_above, some, ahead(some)[1], b, lambda _: first_right, lambda _: second_right,
            widths, factors,
        )  # fmt: skip
        parts.append(part)
        for total, one in zip(sums, found, strict=True):
            total += one
    return [torch.cat(parts), *(a.to(b.dtype) for a, b in zip(sums, weights, strict=True))]


@_pieces_back.register_fake
def _(grad: torch.Tensor, x: torch.Tensor, *rest: Any) -> list[torch.Tensor]:
    return [x.new_empty(x.shape), *(one.new_empty(one.shape) for one in rest[-1])]


def _ahead_of(
    x: torch.Tensor,
    storages: str,
    first: Sequence[torch.Tensor],
    second: Sequence[torch.Tensor],
    tails: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
) -> Callable[[torch.Tensor], tuple[torch.Tensor, Kept]]:
    """`_ahead` for pieces of x; what is unpacked for it is unpacked once."""
    names = storages.split(",")
    first_right = lora_fp8.right_of(names[0], tuple(first), tails[0], len(tails[1]))
    second_right = lora_fp8.right_of(names[1], tuple(second), tails[2], len(tails[3]))
    low, widths = [one.to(x.dtype) for one in weights[:3]], (tails[0].shape[1], tails[2].shape[1])
    return lambda some: _ahead(some, low, lambda: first_right, lambda: second_right, widths)


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
