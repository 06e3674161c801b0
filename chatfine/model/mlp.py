"""An MLP whose gate and up projection are one product, said in one place.

`model.joined` lets the layer that is called first compute for both; here nobody waits for anybody,
so that the MLP may go through pieces that are computed again (`model.chunked`). On fp8 weights it
is one operation altogether: nothing lies between its products but `model.swiglu_fp8`, which rounds
as it computes. The slow twin is the module's own forward on the same linears.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from chatfine.model import chunked, lora_fp8
from chatfine.model.fp8_rows import fp8_columns, fp8_rows
from chatfine.model.joined import TOGETHER, Joined, is_gated
from chatfine.model.lora_fp8 import (
    Group,
    Pair,
    a_unit,
    adapter_gradients,
    inner_gradient,
    row_factors,
)
from chatfine.model.storages import Packed, unpacked_again
from chatfine.model.swiglu_fp8 import swiglu_fp8, swiglu_fp8_back

SILU = ("SiLU", "SiLUActivation")


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
        a_gate, a_up, a_down, *b = (one.to(x.dtype) for one in weights)
        inner = F.linear(x, torch.cat((a_gate, a_up)))
        left = fp8_rows(x, inner, None, 1.0, first_tails[0].shape[1])
        both = lora_fp8.product(left, storages[0], first, first_tails[0], x)
        width = second_tails[0].shape[1]
        h, codes, own = swiglu_fp8(both, width)
        inner_down = F.linear(h, a_down)
        fp8_columns(codes, own, inner_down, 1.0, width)
        ctx.save_for_backward(x, inner, both, h, inner_down, first_tails[1], second_tails[1], *b,
                              *first, *second)  # fmt: skip
        ctx.scales, ctx.storages, ctx.count = scales, storages, len(first)
        return lora_fp8.product((codes, own), storages[1], second, second_tails[0], h)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Of x as products of 8-bit floats, of A and B exact."""
        x, inner, both, h, inner_down, tail, tail_down, *rest = ctx.saved_tensors
        b, packed = rest[:3], rest[3:]
        first, second = tuple(packed[: ctx.count]), tuple(packed[ctx.count :])
        (storage, storage_down), (scale, scale_down) = ctx.storages, ctx.scales
        second = unpacked_again(storage_down, second, grad)
        back_down = inner_gradient(grad, b[2:], scale_down)
        left = fp8_rows(
            grad, back_down, row_factors(storage_down, second), 1 / a_unit(h.shape[1]),
            tail_down.shape[1],
        )  # fmt: skip
        grad_h = lora_fp8.product_back(left, storage_down, second, tail_down, h)
        a_down, b_down = adapter_gradients(grad, back_down, h, inner_down, b[2:], scale_down)
        first = unpacked_again(storage, first, grad_h)
        width = tail.shape[1]
        grad_both, codes, own = swiglu_fp8_back(grad_h, both, row_factors(storage, first), width)
        back = inner_gradient(grad_both, b[:2], scale)
        fp8_columns(codes, own, back, 1 / a_unit(x.shape[1]), width)
        grad_x = lora_fp8.product_back((codes, own), storage, first, tail, x)
        a_gate, a_up, b_gate, b_up = adapter_gradients(grad_both, back, x, inner, b[:2], scale)
        return (grad_x, *[None] * 6, a_gate, a_up, a_down, b_gate, b_up, b_down)


def install(model: nn.Module) -> int:
    """Say it so in the MLPs of `model` whose gate and up are joined, for training; returns how
    many are. What is built in another way is left as it is."""
    count = 0
    for module in model.modules():
        kind = chunked.own_class(module)
        if not issubclass(kind, _Whole) and _pair(module) is not None and is_gated(module):
            # the class and not the method, see `model.lora`
            chunked.give_class(module, _whole(cast(Any, kind)))
            count += 1
    return count


def _pair(module: Any) -> Joined | None:
    """What computes gate and up, if it computes nothing else."""
    linears = [getattr(module, name, None) for name in TOGETHER[1]]
    groups: list[Any] = [getattr(one, "group", None) for one in linears]
    pair, other = groups
    if pair is None or pair is not other or len(pair.layers) != len(linears):
        return None
    return pair if all(_is_plain(one) for one in linears) else None


def _is_plain(linear: Any) -> bool:
    return bool(linear.is_fused() and linear.base_layer.bias is None)


class _Whole:
    """Comes before a module's own class."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """The same; on fp8 weights as `MlpFp8`."""
        pair = _pair(self) if self.training else None
        if pair is None:
            result: torch.Tensor = super().forward(x)  # type: ignore[misc]
            return result
        rows, down = x.reshape(-1, pair.in_features), self.down_proj
        group = getattr(down, "group", None)
        fp8 = isinstance(pair, Group) and isinstance(group, Group) and _is_plain(down)
        if fp8 and type(self.act_fn).__name__ in SILU:
            return _as_one(rows, pair, group).view(x.shape)
        gate, up = pair.product(rows).split_with_sizes(pair.outs, 1)
        y: torch.Tensor = down((self.act_fn(gate) * up).view(*x.shape[:-1], pair.outs[0]))
        return y


def _as_one(x: torch.Tensor, pair: Any, down: Any) -> torch.Tensor:
    a_gate, a_up, b_gate, b_up = pair.weights()
    a_down, b_down = down.weights()
    y: torch.Tensor = MlpFp8.apply(  # type: ignore[no-untyped-call]
        x, (pair.scale, down.scale), (pair.storage, down.storage),
        pair.packed, (pair.tail_b, pair.tail_a), down.packed, (down.tail_b, down.tail_a),
        a_gate, a_up, a_down, b_gate, b_up, b_down,
    )  # fmt: skip
    return y


@functools.cache
def _whole(kind: Any) -> Any:
    return type(f"Whole{kind.__name__}", (_Whole, kind), {})
