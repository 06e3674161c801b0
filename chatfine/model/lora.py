"""A LoRA forward without extra passes over the activations, behind PEFT's own layers and files.

PEFT's layer adds, for each linear, a scaled copy of the adapter's output to the base's output: two
more elementwise passes forward and two backward. Here the small product accumulates straight into
the large one (`addmm_`), forward and backward. The slow twin is PEFT's forward; it stays in charge
wherever something is not plain (DoRA, dropout, several adapters, an adapter with a bias). A packed
base (`model.frozen`) is unpacked for the forward product and again for the backward one.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from chatfine.model.fp8 import multiplies_fp8
from chatfine.model.frozen import FrozenLinear
from chatfine.model.storages import EXACT, PLAIN, STORAGES, Packed, Storage, unpacked_again


def install(model: nn.Module) -> int:
    """Give every plain LoRA linear of `model` the fused forward; returns how many got it.

    The layer changes its class and not its `forward`: a compiler takes layers of one class to run
    one program, and would compile each method that hangs on an object by itself.
    """
    from peft.tuners.lora import Linear

    count = 0
    for module in model.modules():
        if type(module) is Linear and _is_plain(module):
            layer: Any = module
            layer.__class__ = _fused()
            layer.fused_adapter = layer.active_adapters[0]
            layer.group = None  # see `model.joined`
            count += 1
    return count


def uninstall(model: nn.Module) -> None:
    """Give PEFT's own forward back."""
    from peft.tuners.lora import Linear

    for module in model.modules():
        if isinstance(module, _fused()):
            module.__class__ = Linear


def on_fp8(model: nn.Module) -> list[Any]:
    """The fused layers of `model` whose weight the card multiplies in fp8."""
    found = []
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, FrozenLinear) and hasattr(module, "fused_adapter"):
            probe = torch.empty(0, dtype=base.compute_dtype, device=base.weight.device)
            if base.storage.name in EXACT and multiplies_fp8(
                probe, base.out_features, base.in_features
            ):
                found.append(module)
    return found


def _is_plain(module: Any) -> bool:
    """Whether the layer is base + scale·B·A on a float or packed linear without dropout."""
    kinds = (nn.Linear, FrozenLinear)
    if len(module.active_adapters) != 1 or type(module.base_layer) not in kinds:
        return False
    name = module.active_adapters[0]
    dropout = module.lora_dropout[name]
    return (
        not any(one.requires_grad for one in module.base_layer.parameters())
        and not module.lora_variant.get(name)
        and not module.lora_bias.get(name)
        and not module.fan_in_fan_out
        and (isinstance(dropout, nn.Identity) or dropout.p == 0)
    )


@functools.lru_cache(maxsize=1)
def _fused() -> Any:
    """The class of a layer with the fused forward; PEFT is only imported where there is one."""
    from peft.tuners.lora import Linear

    class FusedLinear(Linear):  # type: ignore[misc]
        """PEFT's LoRA linear; its own forward takes over when the layer is switched off."""

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            """See `_LoraLinear`."""
            if args or kwargs or not self.is_fused():
                result: torch.Tensor = super().forward(x, *args, **kwargs)
                return result
            alone = self.group is None or not self.training
            y = _forward(self, x) if alone else self.group.output(self, x)
            return y if self.base_layer.bias is None else y + self.base_layer.bias.to(y.dtype)

        def is_fused(self) -> bool:
            """Whether the adapter it was made for is the one in charge."""
            plain = not (self.disable_adapters or self.merged)
            return plain and self.active_adapters == [self.fused_adapter]

    return FusedLinear


def storage_of(base: nn.Module) -> str:
    """How a linear's weight is stored."""
    return base.storage.name if isinstance(base, FrozenLinear) else PLAIN.name


def product(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, storage: str, packed: Packed
) -> torch.Tensor:
    """See `_LoraLinear`."""
    y: torch.Tensor = _LoraLinear.apply(x, a, b, scale, storage, *packed)  # type: ignore[no-untyped-call]
    return y


def plus(large: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """large + left · right, in place where no compiler will see to it.

    Of products that are added a compiler makes an `addmm` into a copy of one of them. Added in
    float32, and rounded once, they become part of whatever reads the sum.
    """
    if torch.compiler.is_compiling():
        wide = torch.promote_types(large.dtype, torch.float32)
        return (large.to(wide) + (left @ right).to(wide)).to(large.dtype)
    return large.addmm_(left, right)


def _forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    name, base = module.fused_adapter, module.base_layer
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    storage, packed = PLAIN.name, cast(Packed, (base.weight,))
    if isinstance(base, FrozenLinear):
        storage, packed = base.multiplied, base.packed
    else:
        x = x.to(base.weight.dtype)
    y = product(x.reshape(-1, x.shape[-1]), a, b, module.scaling[name], storage, packed)
    return y.view(*x.shape[:-1], -1)


class _LoraLinear(torch.autograd.Function):
    """y = x Wᵀ + s (x Aᵀ) Bᵀ with x (N, in), W (out, in) frozen, A (rank, in), B (out, rank).

    Only what is packed is kept of W for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        storage: str,
        *packed: torch.Tensor,
    ) -> torch.Tensor:
        a_low, b_low = a.to(x.dtype), b.to(x.dtype)
        inner = F.linear(x, a_low)  # (N, rank)
        y = _storage(storage).product(x, packed, x.shape[1])
        y = plus(y, inner * scale, b_low.t())
        ctx.save_for_backward(x, inner, a_low, b_low, *packed)
        ctx.scale, ctx.storage = scale, storage
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, inner, a_low, b_low, *packed = ctx.saved_tensors
        grad_inner = torch.mm(grad, b_low) * ctx.scale  # (N, rank)
        grad_x = None
        # not every version of the compiler knows what needs a gradient; it drops what is unused
        if torch.compiler.is_compiling() or ctx.needs_input_grad[0]:
            again = unpacked_again(ctx.storage, tuple(packed), grad)
            grad_x = _storage(ctx.storage).product_back(grad, again, x.shape[1])
            grad_x = plus(grad_x, grad_inner, a_low)
        wide = torch.promote_types(x.dtype, torch.float32)
        grad_a = torch.mm(grad_inner.t(), x).to(wide)
        grad_b = torch.mm(grad.t(), inner).to(wide) * ctx.scale
        return (grad_x, grad_a, grad_b, None, None, *[None] * len(packed))


def _storage(name: str) -> Storage:
    return STORAGES.get(name, PLAIN)
