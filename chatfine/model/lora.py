"""A LoRA forward without extra passes over the activations, behind PEFT's own layers and files.

PEFT's layer adds, for each linear, a scaled copy of the adapter's output to the base's output: two
more elementwise passes forward and two backward. Here the small product accumulates straight into
the large one (`addmm_`), forward and backward. The slow twin is PEFT's forward; it stays in charge
wherever something is not plain (DoRA, dropout, several adapters, biased bases). A packed base
(`model.frozen`) is unpacked for the forward product and again for the backward one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from chatfine.model.frozen import FrozenLinear
from chatfine.model.storages import PLAIN, STORAGES, Storage


def install(model: nn.Module) -> int:
    """Give every plain LoRA linear of `model` the fused forward; returns how many got it."""
    from peft.tuners.lora import Linear

    count = 0
    for module in model.modules():
        if isinstance(module, Linear) and _is_plain(module):
            module.forward = _Fused(module)  # type: ignore[method-assign]
            count += 1
    return count


def uninstall(model: nn.Module) -> None:
    """Give PEFT's own forward back."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), _Fused):
            del module.forward


def _is_plain(module: Any) -> bool:
    """Whether the layer is base + scale·B·A on a float or packed linear without bias or dropout."""
    kinds = (nn.Linear, FrozenLinear)
    if len(module.active_adapters) != 1 or type(module.base_layer) not in kinds:
        return False
    name = module.active_adapters[0]
    dropout = module.lora_dropout[name]
    return (
        module.base_layer.bias is None
        and not module.base_layer.weight.requires_grad
        and not module.lora_variant.get(name)
        and not module.lora_bias.get(name)
        and not module.fan_in_fan_out
        and (isinstance(dropout, nn.Identity) or dropout.p == 0)
    )


class _Fused:
    """The replacement forward of one layer; falls back to PEFT's when the layer is switched off."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.name = module.active_adapters[0]

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        module, name = self.module, self.name
        plain = not (module.disable_adapters or module.merged or args or kwargs)
        if not plain or module.active_adapters != [name]:
            result: torch.Tensor = type(module).forward(module, x, *args, **kwargs)
            return result
        a, b = module.lora_A[name].weight, module.lora_B[name].weight
        base = module.base_layer
        storage, packed = PLAIN.name, (base.weight,)
        if isinstance(base, FrozenLinear):
            storage, packed = base.storage.name, base.packed
        else:
            x = x.to(base.weight.dtype)
        fused: torch.Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
            x.reshape(-1, x.shape[-1]), a, b, module.scaling[name], storage, *packed
        )
        return fused.view(*x.shape[:-1], -1)


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
        y.addmm_(inner, b_low.t(), alpha=scale)
        ctx.save_for_backward(x, inner, a_low, b_low, *packed)
        ctx.scale, ctx.storage = scale, storage
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, inner, a_low, b_low, *packed = ctx.saved_tensors
        grad_inner = torch.mm(grad, b_low).mul_(ctx.scale)  # (N, rank)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _storage(ctx.storage).product_back(grad, tuple(packed), x.shape[1])
            grad_x.addmm_(grad_inner, a_low)
        wide = torch.promote_types(x.dtype, torch.float32)
        grad_a = torch.mm(grad_inner.t(), x).to(wide)
        grad_b = torch.mm(grad.t(), inner).to(wide).mul_(ctx.scale)
        return (grad_x, grad_a, grad_b, None, None, *[None] * len(packed))


def _storage(name: str) -> Storage:
    return STORAGES.get(name, PLAIN)
