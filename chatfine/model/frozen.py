"""The frozen linear: a weight that never learns, stored small and unpacked where it is used.

Two storages so far; another one is another `Storage`:

    int8   a row's largest magnitude is 127; the layout of bitsandbytes' LLM.int8() without outliers
    nf4    4-bit codes of a normal distribution in blocks of 64 (QLoRA: Dettmers et al. 2023), made
           and read by bitsandbytes; 4.5 bits a weight with the blocks' scales

LLM.int8() (Dettmers et al. 2022) rounds the activations to 8 bits too and keeps columns with
outliers beyond a threshold apart. Here only the weight is rounded: the product is exact in the
activations' format, needs no threshold, and its gradient is that of the same product. A step of
training multiplies so many tokens that unpacking the weight costs little beside the product.

int8 is plain torch: bitsandbytes' quantiser takes only float16 on a GPU, and its two functions
write float32 copies of the weight where one pass does (tests hold both to be equal).
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from chatfine.errors import ResourceError
from chatfine.i18n import t

NF4_BLOCK = 64
Packed = tuple[torch.Tensor, torch.Tensor]


class Storage:
    """How a weight (out, in) is packed. Both tensors have a row for each row of the weight, so the
    packed form of some rows is those rows of the packed form: what FSDP2 slices stays whole.

    Codes and scales are integers and bytes, which neither `model.to(dtype)` nor FSDP2's mixed
    precision casts.
    """

    name: str

    def pack(self, weight: torch.Tensor) -> Packed:
        """Codes and scales of `weight` (out, in), whatever float format it is in."""
        raise NotImplementedError

    def unpack(self, packed: Packed, in_features: int, dtype: torch.dtype) -> torch.Tensor:
        """The rounded weight (rows, in) in `dtype`."""
        raise NotImplementedError

    def shapes(
        self, out_features: int, in_features: int
    ) -> tuple[tuple[int, int], torch.dtype, tuple[int, int]]:
        """Shape and number format of the codes, and the shape of the scales (always bytes)."""
        raise NotImplementedError


class Int8(Storage):
    """One byte a weight and a float32 scale a row."""

    name = "int8"

    def pack(self, weight: torch.Tensor) -> Packed:
        """Codes (out, in) int8, scales (out, 4) bytes: the largest magnitude of each row."""
        wide = weight.to(torch.float32, copy=True)  # the one copy: all else is done in place
        largest = torch.linalg.vector_norm(wide, math.inf, 1, keepdim=True)
        codes = wide.mul_(127 / largest.clamp(min=1e-30)).round_().to(torch.int8)
        return codes, largest.view(torch.uint8)

    def unpack(self, packed: Packed, in_features: int, dtype: torch.dtype) -> torch.Tensor:
        """One pass: the product is taken in float32 and rounded as it is written."""
        codes, scales = packed
        step = scales.view(torch.float32) / 127
        weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        return torch.mul(codes, step, out=weight)

    def shapes(
        self, out_features: int, in_features: int
    ) -> tuple[tuple[int, int], torch.dtype, tuple[int, int]]:
        """See `Storage.shapes`."""
        return (out_features, in_features), torch.int8, (out_features, 4)


class NF4(Storage):
    """Half a byte a weight and a float32 scale for 64 of them.

    Rows are filled up to whole blocks, so that no block belongs to two of them. The scales are not
    quantised a second time: that would save 0.37 bits of 4.5 and tie rows together.
    """

    name = "nf4"

    def pack(self, weight: torch.Tensor) -> Packed:
        """Codes (out, in / 2) uint8, scales (out, 4 · in / 64) bytes, in rounded up to 64."""
        rows = weight.shape[0]
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            weight = weight.float()
        padded = F.pad(weight, (0, -weight.shape[1] % NF4_BLOCK)).contiguous()
        codes, state = bitsandbytes().quantize_4bit(padded, blocksize=NF4_BLOCK, quant_type="nf4")
        return codes.view(rows, -1), state.absmax.view(rows, -1).view(torch.uint8)

    def unpack(self, packed: Packed, in_features: int, dtype: torch.dtype) -> torch.Tensor:
        """The weight as bitsandbytes unpacks it."""
        codes, scales = packed
        wide = dtype if dtype != torch.float64 else torch.float32  # which its kernels lack
        functional = bitsandbytes()
        state = functional.QuantState(
            scales.view(torch.float32).reshape(-1), (codes.shape[0], 2 * codes.shape[1]),
            dtype=wide, blocksize=NF4_BLOCK, quant_type="nf4",
        )  # fmt: skip
        # a column, because it transposes what comes from a single row
        weight: torch.Tensor = functional.dequantize_4bit(codes.reshape(-1, 1), state)
        return weight[:, :in_features].to(dtype)

    def shapes(
        self, out_features: int, in_features: int
    ) -> tuple[tuple[int, int], torch.dtype, tuple[int, int]]:
        """See `Storage.shapes`."""
        blocks = -(-in_features // NF4_BLOCK)
        return (out_features, blocks * NF4_BLOCK // 2), torch.uint8, (out_features, 4 * blocks)


STORAGES: dict[str, Storage] = {one.name: one for one in (Int8(), NF4())}


@functools.lru_cache(maxsize=1)
def bitsandbytes() -> Any:
    """bitsandbytes' functional part.

    Raises:
        ResourceError: it is not installed, or does not load on this machine.
    """
    # on some processors it fetches code from a hub at import if this package is there
    kernels = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        import bitsandbytes.functional as functional
    except Exception as error:  # a library that finds the wrong CUDA raises anything
        raise ResourceError(
            "no-bitsandbytes",
            t("--quantize nf4 needs the package bitsandbytes"),
            why=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            fix="pip install bitsandbytes",
        ) from error
    finally:
        if kernels is None:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = kernels
    return functional


class FrozenLinear(nn.Linear):
    """A linear layer whose weight is packed and never learns.

    It is an `nn.Linear` so that PEFT puts its adapters on it; `weight` holds the codes.

    Args:
        in_features, out_features: as of `nn.Linear`.
        storage: a name in `STORAGES`.
        bias: whether there is one; it stays in `dtype`.
        dtype: number format of the bias, and what `dequantize` gives unless told otherwise.
        device: where the (empty) tensors are made.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        storage: str,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "meta",
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.storage, self.compute_dtype = STORAGES[storage], dtype
        codes, kind, scales = self.storage.shapes(out_features, in_features)
        self.weight = _frozen(torch.empty(codes, dtype=kind, device=device))
        self.scales = _frozen(torch.empty(scales, dtype=torch.uint8, device=device))
        empty = torch.empty(out_features, dtype=dtype, device=device)
        self.register_parameter("bias", _frozen(empty) if bias else None)

    @classmethod
    def of(cls, linear: nn.Linear, storage: str, dtype: torch.dtype | None = None) -> FrozenLinear:
        """The packed form of `linear`, on its device; from the meta device an empty one."""
        dtype = dtype or linear.weight.dtype
        packed = cls(linear.in_features, linear.out_features, storage, linear.bias is not None,
                     dtype, linear.weight.device)  # fmt: skip
        if not linear.weight.is_meta:
            packed.fill(linear.weight.detach())
            if linear.bias is not None:
                packed.bias.data.copy_(linear.bias.detach())
        return packed

    def fill(self, weight: torch.Tensor) -> None:
        """Take over `weight` (out, in), rounded, on its own device."""
        codes, scales = self.storage.pack(weight)
        self.weight, self.scales = _frozen(codes), _frozen(scales)

    @property
    def packed(self) -> Packed:
        """What is stored: codes and scales."""
        return self.weight, self.scales

    def unpack(self, packed: Packed, dtype: torch.dtype) -> torch.Tensor:
        """The rounded weight of `packed` (all rows, or some) in `dtype`."""
        return self.storage.unpack(packed, self.in_features, dtype)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The rounded weight (out, in) in `dtype`, or in the model's format."""
        return self.unpack(self.packed, dtype or self.compute_dtype)

    @property
    def W_q(self) -> torch.Tensor:
        """The codes again: by this name PEFT's DoRA knows a layer that has `dequantize`."""
        return self.weight

    @property
    def stored_bytes(self) -> int:
        """What the packed weight takes."""
        return sum(one.numel() * one.element_size() for one in self.packed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x Wᵀ + b in the format of `x` (…, in), or of autocast; W is the rounded weight."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y: torch.Tensor = _Product.apply(x, bias, self.unpack, *self.packed)  # type: ignore[no-untyped-call]
        return y

    def extra_repr(self) -> str:
        """As of `nn.Linear`, and the storage."""
        return f"{super().extra_repr()}, storage={self.storage.name}"


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class _Product(torch.autograd.Function):
    """x Wᵀ + b that keeps the packed weight for the backward pass and unpacks it there again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        unpack: Callable[[Packed, torch.dtype], torch.Tensor],
        codes: torch.Tensor,
        scales: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.unpack = unpack
        return F.linear(x, unpack((codes, scales), x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        codes, scales = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0]
        grad_x = grad @ ctx.unpack((codes, scales), grad.dtype) if wanted else None
        return grad_x, None, None, None, None


def linears_to_freeze(model: Any) -> dict[str, nn.Linear]:
    """Name → layer of the linears that are packed: all plain ones but the head, whose rounding
    would fall on every logit."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head
    }


def frozen_linears(model: nn.Module) -> Iterator[FrozenLinear]:
    """All packed linears of `model`."""
    return (module for module in model.modules() if isinstance(module, FrozenLinear))
