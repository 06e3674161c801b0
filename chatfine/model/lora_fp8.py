"""Adapters inside the product of their fp8 weight: no pass over the activations is their own.

    y = s_x s_w ([x8 | hi(i) lo(i) hi(i)] [W8 | hi(b) hi(b) lo(b)]ᵀ)

x8 and W8 are 8-bit floats with their rows' scales, i = x Aᵀ the adapter's small product and b its
B, both in units of those scales. One 8-bit float holds 4 significant bits, and two of them, a
number and what its rounding lost, hold 8, as bf16 does; the fourth product, lo(i) lo(b), lies below
that. So 3 · rank more columns stand for the adapter's whole second product, forward, and in the
same way backward for the part of the gradient that comes through A. The adapter's own gradients
are taken in bf16 as ever.

Linears that read the same states are one product (`model.joined`). The slow twin is `model.lora`:
its small products read and write the large result once more. The columns of the weight's side
change with the adapter: `Groups.refresh` writes them anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from chatfine.model.fp8 import E4M3, E4M3_MAX, multiply_fp8
from chatfine.model.fp8_rows import fp8_rows, split
from chatfine.model.joined import Joined, together
from chatfine.model.storages import STORAGES, Fp8, Packed, unpacked_again

ALIGNMENT = 64
"""Of the summed dimension: with less, products ran at 1,000 TFLOP/s on an H100 instead of 1,280."""
A_UNIT = 28.0
"""A starts within ± 1/√in (Kaiming) and is stored in units that make this ± 28: far from both ends
of what 8-bit floats hold (448, 0.002)."""
Pair = tuple[torch.Tensor, torch.Tensor]
"""Codes and their rows' scales; or the columns of an adapter's B and A."""


def tail_width(size: int, rank: int) -> int:
    """How many columns adapters of this rank in all add to a product over `size`."""
    return -(-(size + 3 * rank) // ALIGNMENT) * ALIGNMENT - size


def a_unit(in_features: int) -> float:
    """By what A is multiplied to become 8-bit floats."""
    return A_UNIT * math.sqrt(in_features)


class LoraFp8(torch.autograd.Function):
    """[x W₁ᵀ + s (x A₁ᵀ) B₁ᵀ | x W₂ᵀ + …] as one product.

    x is (N, in), Aᵢ (rank, in) and Bᵢ (outᵢ, rank).
    `packed` is what the storage keeps of the W on top of each other: codes, scales, and perhaps the
    codes turned, with the adapters' columns behind them where they are kept as they are; `tail_b`
    (Σ out, T) and `tail_a` (in, T') are these columns. Aᵢ and Bᵢ follow as `weights`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scale: float,
        storage: str,
        packed: Packed,
        tail_b: torch.Tensor,
        tail_a: torch.Tensor,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        """See the class; what it keeps of the weight is what is packed."""
        count = len(weights) // 2
        inner = F.linear(x, torch.cat(weights[:count]).to(x.dtype))  # (N, Σ rank)
        b = [one.to(x.dtype) for one in weights[count:]]
        left = fp8_rows(x, inner, None, 1.0, tail_b.shape[1])
        ctx.save_for_backward(x, inner, tail_a, *b, *packed)
        ctx.scale, ctx.storage, ctx.count = scale, storage, count
        return product(left, right_of(storage, packed, tail_b, x.shape[1]), x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Of x as one product of 8-bit floats, of A and B exact."""
        x, inner, tail_a, *rest = ctx.saved_tensors
        b = rest[: ctx.count]
        packed = unpacked_again(ctx.storage, tuple(rest[ctx.count :]), grad)
        grad_inner = inner_gradient(grad, b, ctx.scale)
        left = fp8_rows(
            grad, grad_inner, row_factors(ctx.storage, packed), 1 / a_unit(x.shape[1]),
            tail_a.shape[1],
        )  # fmt: skip
        grad_x = product_back(left, right_back_of(ctx.storage, packed, tail_a, x.shape[1]), x)
        found = adapter_gradients(grad, grad_inner, x, inner, b, ctx.scale)
        return (grad_x, None, None, None, None, None, *found)


def product(left: Pair, right: Pair, x: torch.Tensor) -> torch.Tensor:
    """The output (N, Σ out) of x (N, in), of which `left` is the codes, with the adapter's columns
    behind them, and their rows' scales; `right` is the same of the weight."""
    return multiply_fp8(left[0].view(E4M3), right[0], left[1], right[1], x.dtype)


def product_back(left: Pair, right: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The gradient of x (N, in), where `left` is the output's, and `right` codes alone."""
    ones = torch.ones(1, 1, device=x.device)
    return multiply_fp8(left[0].view(E4M3), right, left[1], ones, x.dtype)


def right_of(storage: str, packed: Packed, tail_b: torch.Tensor, in_features: int) -> Pair:
    """The weight as `product` wants it: codes (Σ out, in + T) and scales (Σ out, 1)."""
    codes, scales = _storage(storage).fp8(packed, in_features)
    if codes.shape[1] == in_features:  # unpacked just now
        codes = torch.cat((codes.view(torch.uint8), tail_b), 1).view(E4M3)
    return codes, scales


def right_back_of(
    storage: str, packed: Packed, tail_a: torch.Tensor, in_features: int
) -> torch.Tensor:
    """The weight as `product_back` wants it: codes (in, Σ out + T')."""
    if len(packed) > 2:
        return packed[2].view(E4M3)
    codes, _ = _storage(storage).fp8(packed, in_features)
    turned = codes[:, :in_features].view(torch.uint8).t()
    return torch.cat((turned, tail_a), 1).view(E4M3)


def inner_gradient(grad: torch.Tensor, b: Sequence[torch.Tensor], scale: float) -> torch.Tensor:
    """Of all x Aᵢᵀ (N, Σ rank), from that of the outputs."""
    grads = grad.split_with_sizes([len(one) for one in b], 1)
    return torch.cat([torch.mm(g, one) for g, one in zip(grads, b, strict=True)], 1) * scale


def adapter_gradients(
    grad: torch.Tensor, grad_inner: torch.Tensor, x: torch.Tensor, inner: torch.Tensor,
    b: Sequence[torch.Tensor], scale: float,
) -> list[torch.Tensor]:  # fmt: skip
    """Of all A, then of all B."""
    wide = torch.promote_types(x.dtype, torch.float32)
    ranks = [one.shape[1] for one in b]
    grads = grad.split_with_sizes([len(one) for one in b], 1)
    pairs = zip(grads, inner.split_with_sizes(ranks, 1), strict=True)
    of_a = torch.mm(grad_inner.t(), x).to(wide).split_with_sizes(ranks)
    return [*of_a, *(torch.mm(g.t(), i).to(wide) * scale for g, i in pairs)]


def row_factors(storage: str, packed: Packed) -> torch.Tensor:
    """By what a gradient's columns are multiplied before it is rounded: the weight's scales."""
    return _storage(storage).fp8_scales(packed)[:, 0]


def _storage(name: str) -> Fp8:
    found = STORAGES[name]
    assert isinstance(found, Fp8)
    return found


class Group(Joined):
    """`Joined` layers (or one) on fp8 weights, whose codes get the adapters' columns."""

    def _pack(self, bases: Sequence[Any]) -> Packed:
        codes = torch.cat([base.weight.detach() for base in bases])
        scales = torch.cat([base.scales.detach() for base in bases])
        width = tail_width(self.in_features, sum(self.ranks))
        if self.storage == "fp8":
            codes = F.pad(codes, (0, width))
            self.tail_b = codes[:, self.in_features :]
        else:
            self.tail_b = scales.new_zeros(len(codes), width)
        packed: Packed = (codes, scales)
        width = tail_width(sum(self.outs), sum(self.ranks))
        if bases[0].turned is not None:
            turned = F.pad(torch.cat([base.turned for base in bases], 1), (0, width))
            self.tail_a = turned[:, sum(self.outs) :]
            packed += (turned,)
        else:
            self.tail_a = scales.new_zeros(self.in_features, width)
        parts = codes.split_with_sizes(self.outs), scales.split_with_sizes(self.outs)
        for base, some_codes, some_scales in zip(bases, *parts, strict=True):
            base.weight.data = some_codes[:, : base.weight.shape[1]]
            base.scales.data = some_scales
            base.turned = None
        return packed

    @property
    def shape(self) -> tuple[Any, ...]:
        """What groups have in common whose columns can be written together."""
        return self.storage, self.in_features, *self.outs, *self.ranks, self.scale

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """See `LoraFp8`."""
        y: torch.Tensor = LoraFp8.apply(  # type: ignore[no-untyped-call]
            x, self.scale, self.storage, self.packed, self.tail_b, self.tail_a, *self.weights()
        )
        return y

    def drop(self) -> None:
        """Give the layers back to `model.lora`, which can hold any number."""
        super().drop()
        for layer in self.layers:
            layer.base_layer.weight.data = layer.base_layer.weight.data.contiguous()


class Groups:
    """All groups of a model.

    Args:
        model: with adapters of `model.lora`.
        layers: those of its layers whose weight is multiplied in fp8.
    """

    def __init__(self, model: nn.Module, layers: Iterable[Any]) -> None:
        self.groups = [Group(some) for some in together(model, layers)]
        self.alike: dict[tuple[Any, ...], list[Group]] = {}
        for group in self.groups:
            self.alike.setdefault(group.shape, []).append(group)

    @torch.no_grad()
    def refresh(self) -> None:
        """Write the adapters' columns anew."""
        for groups in self.alike.values():
            for numbers, tails in zip(
                _columns(groups),
                ([one.tail_b for one in groups], [one.tail_a for one in groups]),
                strict=True,
            ):
                high, low = split(numbers)
                found = torch.cat([one.view(torch.uint8) for one in (high, high, low)], 2)
                width = found.shape[2]
                torch._foreach_copy_([tail[:, :width] for tail in tails], found.unbind())

    @torch.no_grad()
    def fits(self) -> bool:
        """Whether all numbers lie within what 8-bit floats hold; training keeps them far inside."""
        largest = [one.abs().max() for groups in self.alike.values() for one in _columns(groups)]
        return not largest or float(torch.stack(largest).max()) <= E4M3_MAX

    def drop(self) -> None:
        """Do without any."""
        for group in self.groups:
            group.drop()
        self.groups, self.alike = [], {}


def _columns(groups: Sequence[Group]) -> tuple[torch.Tensor, torch.Tensor]:
    """b (L, Σ out, Σ rank), a block for each layer, and a (L, in, Σ rank) of L groups of one shape,
    in units of e4m3; all at once, since each alone would be a hundred small operations."""
    first = groups[0]
    count = len(first.layers)
    weights = [group.weights() for group in groups]
    b = groups[0].tail_b.new_zeros(
        len(groups), sum(first.outs), sum(first.ranks), dtype=torch.float32
    )
    row = column = 0
    for i, (out, rank) in enumerate(zip(first.outs, first.ranks, strict=True)):
        b[:, row : row + out, column : column + rank] = torch.stack([w[count + i] for w in weights])
        row, column = row + out, column + rank
    storage = _storage(first.storage)
    scales = [storage.fp8_scales(group.packed) for group in groups]
    a = torch.stack([torch.cat(w[:count]) for w in weights]).float().transpose(1, 2)
    return b * first.scale / torch.stack(scales), a * a_unit(first.in_features)
