"""An adapter inside the product of its fp8 weight: no pass over the activations is its own.

    y = s_x s_w ([x8 | hi(i) lo(i) hi(i)] [W8 | hi(b) hi(b) lo(b)]ᵀ)

x8 and W8 are 8-bit floats with their rows' scales, i = x Aᵀ the adapter's small product and b its
B, both in units of those scales. One 8-bit float holds 4 significant bits, and two of them, a
number and what its rounding lost, hold 8, as bf16 does; the fourth product, lo(i) lo(b), lies below
that. So 3 · rank more columns stand for the adapter's whole second product, forward, and in the
same way backward for the part of the gradient that comes through A. The adapter's own gradients
are taken in bf16 as ever.

The slow twin is `model.lora`: its small products read and write the large result once more. The
columns of the weight's side change with the adapter: `Tails.refresh` writes them anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from chatfine.model.storages import (
    E4M3,
    E4M3_MAX,
    FP8_SMALLEST,
    STORAGES,
    Fp8,
    Packed,
    multiply_fp8,
)

ALIGNMENT = 16
A_UNIT = 28.0
"""A starts within ± 1/√in (Kaiming) and is stored in units that make this ± 28: far from both ends
of what 8-bit floats hold (448, 0.002)."""


def columns(rank: int) -> int:
    """How many columns an adapter of this rank adds to a product."""
    return -(-3 * rank // ALIGNMENT) * ALIGNMENT


def split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x as the sum of two e4m3 numbers, as far as they reach."""
    high = x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return high, (x - high.float()).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


class LoraFp8(torch.autograd.Function):
    """y = x Wᵀ + s (x Aᵀ) Bᵀ as one product; x (N, in), A (rank, in), B (out, rank).

    `packed` is what the storage keeps of W, codes and turned codes with the adapter's columns
    behind them where they are kept as they are; `tail_b` (out, T) and `tail_a` (in, T) are these
    columns.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        storage: str,
        tail_b: torch.Tensor,
        tail_a: torch.Tensor,
        *packed: torch.Tensor,
    ) -> torch.Tensor:
        a_low, b_low = a.to(x.dtype), b.to(x.dtype)
        inner = F.linear(x, a_low)  # (N, rank)
        left, own = _left(x.float(), inner.float(), tail_b.shape[1])
        right, scales = _right(storage, packed, tail_b, x.shape[1])
        ctx.save_for_backward(x, inner, b_low, tail_a, *packed)
        ctx.scale, ctx.storage = scale, storage
        return multiply_fp8(left, right, own, scales, x.dtype)

    @staticmethod
    def backward(  # type: ignore[override]  # noqa: D102
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        x, inner, b_low, tail_a, *packed = ctx.saved_tensors
        grad_inner = torch.mm(grad, b_low) * ctx.scale  # (N, rank)
        right, scales = _right_back(ctx.storage, tuple(packed), tail_a, x.shape[1])
        through = grad_inner.float() / a_unit(x.shape[1])
        left, own = _left(grad.float() * scales.t(), through, tail_a.shape[1])
        grad_x = multiply_fp8(left, right, own, torch.ones_like(own[:1]), grad.dtype)
        wide = torch.promote_types(x.dtype, torch.float32)
        grad_a = torch.mm(grad_inner.t(), x).to(wide)
        grad_b = torch.mm(grad.t(), inner).to(wide) * ctx.scale
        return (grad_x, grad_a, grad_b, None, None, None, None, *[None] * len(packed))


def a_unit(in_features: int) -> float:
    """By what A is multiplied to become 8-bit floats."""
    return A_UNIT * math.sqrt(in_features)


def _left(x: torch.Tensor, inner: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[x | hi lo hi of inner | zeros] (N, K + width) as e4m3, and the scales (N, 1)."""
    largest = torch.maximum(x.abs().amax(1, keepdim=True), inner.abs().amax(1, keepdim=True))
    scales = largest.clamp(min=FP8_SMALLEST) / E4M3_MAX
    high, low = split(inner / scales)
    parts = [(x / scales).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), high, low, high]
    spare = width - 3 * inner.shape[1]
    if spare:
        parts.append(torch.zeros(len(x), spare, device=x.device).to(E4M3))
    return torch.cat([part.view(torch.uint8) for part in parts], 1).view(E4M3), scales


def _storage(name: str) -> Fp8:
    found = STORAGES[name]
    assert isinstance(found, Fp8)
    return found


def _right(
    storage: str, packed: Packed, tail: torch.Tensor, in_features: int
) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = _storage(storage).fp8(packed, in_features)
    if codes.shape[1] == in_features:  # unpacked just now
        codes = torch.cat((codes.view(torch.uint8), tail), 1).view(E4M3)
    return codes, scales


def _right_back(
    storage: str, packed: Packed, tail: torch.Tensor, in_features: int
) -> tuple[torch.Tensor, torch.Tensor]:
    if len(packed) > 2:
        return packed[2].view(E4M3), packed[1].view(torch.float32)
    codes, scales = _storage(storage).fp8(packed, in_features)
    turned = codes[:, :in_features].view(torch.uint8).t()
    return torch.cat((turned, tail), 1).view(E4M3), scales


class Tails:
    """The adapter's columns of many layers.

    Args:
        layers: LoRA linears of `model.lora` on fp8 weights; each gets columns for its adapter.
    """

    def __init__(self, layers: Iterable[Any]) -> None:
        self.layers = list(layers)
        self.groups: dict[tuple[Any, ...], list[Any]] = {}
        self.versions: tuple[int, ...] = ()
        for layer in self.layers:
            name, base = layer.fused_adapter, layer.base_layer
            base.widen(columns(layer.r[name]))
            key = (base.in_features, base.out_features, layer.r[name], layer.scaling[name])
            self.groups.setdefault(key, []).append(layer)

    def refresh(self) -> None:
        """Write the columns anew, if an adapter has changed."""
        versions = tuple(one._version for layer in self.layers for one in _weights(layer))
        if versions != self.versions:
            with torch.no_grad():
                for group in self.groups.values():
                    self._write(group)
            self.versions = versions

    def fits(self) -> bool:
        """Whether all numbers lie within what 8-bit floats hold; training keeps them far inside."""
        with torch.no_grad():
            largest = [
                torch.stack([one.abs().max() for one in self._columns(group)]).max()
                for group in self.groups.values()
            ]
        return not largest or float(torch.stack(largest).max()) <= E4M3_MAX

    def drop(self) -> None:
        """Give the layers back to `model.lora`."""
        for layer in self.layers:
            layer.base_layer.narrow()
        self.layers, self.groups = [], {}

    def _columns(self, layers: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """b (L, out, rank) and a (L, in, rank) of layers of one shape, in units of e4m3."""
        first = layers[0]
        pairs = [_weights(layer) for layer in layers]
        scales = torch.stack([layer.base_layer.fp8_scales for layer in layers])
        b = torch.stack([b for _, b in pairs]).float() * first.scaling[first.fused_adapter] / scales
        a = torch.stack([a for a, _ in pairs]).float() * a_unit(first.base_layer.in_features)
        return b, a.transpose(1, 2)

    def _write(self, layers: Sequence[Any]) -> None:
        b, a = self._columns(layers)
        for numbers, tails in (
            (b, [layer.base_layer.tail_b for layer in layers]),
            (a, [layer.base_layer.tail_a for layer in layers]),
        ):
            high, low = split(numbers)
            found = torch.cat([one.view(torch.uint8) for one in (high, high, low)], 2)
            torch._foreach_copy_([tail[:, : found.shape[2]] for tail in tails], found.unbind())


def _weights(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    name = layer.fused_adapter
    return layer.lora_A[name].weight, layer.lora_B[name].weight
