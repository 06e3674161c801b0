"""The frozen linear: a weight that never learns, stored small (`model.storages`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from chatfine.model.storages import EXACT, STORAGES, Packed, unpacked_again


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
        self.turned: torch.Tensor | None = None  # no buffers: they move nowhere and are not stored
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
        self.take(self.storage.pack(weight))

    def take(self, packed: Packed) -> None:
        """Take over codes and scales."""
        codes, scales = packed
        self.weight, self.scales = _frozen(codes), _frozen(scales)

    def keep_turned(self) -> None:
        """Keep the codes of an fp8 weight transposed too, for the backward product."""
        self.turned = self.weight.detach().t().contiguous()

    @property
    def packed(self) -> Packed:
        """What is stored: codes and scales, and what `keep_turned` added."""
        extra = () if self.turned is None else (self.turned,)
        return (self.weight, self.scales, *extra)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The rounded weight (out, in) in `dtype`, or in the model's format."""
        return self.storage.unpack(
            (self.weight, self.scales), self.in_features, dtype or self.compute_dtype
        )

    @property
    def multiplied(self) -> str:
        """The storage by which products are taken: in training perhaps one that rounds both."""
        name = self.storage.name
        return name if self.training else EXACT.get(name, name)

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
        rows = x.reshape(-1, self.in_features)
        y: torch.Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            rows, self.multiplied, self.in_features, *self.packed
        )
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """As of `nn.Linear`, and the storage."""
        return f"{super().extra_repr()}, storage={self.storage.name}"


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class _Product(torch.autograd.Function):
    """x Wᵀ that keeps the packed weight, and nothing else, for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, storage: str, in_features: int, *packed: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(*packed)
        ctx.storage, ctx.in_features = storage, in_features
        return STORAGES[storage].product(x, packed, in_features)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        packed = unpacked_again(ctx.storage, ctx.saved_tensors, grad)
        grad_x = STORAGES[ctx.storage].product_back(grad, packed, ctx.in_features)
        return (grad_x, None, None, *[None] * len(packed))


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


def keep_turned(model: nn.Module) -> None:
    """Let all fp8 weights of `model` keep their codes transposed too, which saves time."""
    for linear in frozen_linears(model):
        if linear.storage.name == "fp8":
            linear.keep_turned()


def choose_products(model: nn.Module, fp8: bool) -> None:
    """Let all nf4 weights of `model` be multiplied as 8-bit floats in training, or exactly."""
    others = {"nf4": "nf4-fp8"} if fp8 else {"nf4-e4m3": "nf4-e4m3-exact"}
    for linear in frozen_linears(model):
        linear.storage = STORAGES[others.get(linear.storage.name, linear.storage.name)]


def multiply_exactly(model: nn.Module) -> None:
    """Let no packed weight of `model` be multiplied as 8-bit floats, in training neither."""
    for linear in frozen_linears(model):
        linear.storage = STORAGES[EXACT.get(linear.storage.name, linear.storage.name)]
