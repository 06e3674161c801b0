"""LoRA linears that read the same states (query, key and value; gate and up) as one product.

Their weights lie on top of each other, so the states are read once, forward, and backward their
gradients come out of one product instead of a sum over several. The adapters become one as well,
whose B has a block for each:

    [y₁ | y₂] = x [W₁; W₂]ᵀ + s (x [A₁; A₂]ᵀ) diag(B₁, B₂)ᵀ

The slow twin is each layer by itself, in `model.lora`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import nn

from chatfine.model import chunked, lora
from chatfine.model.storages import PLAIN, Packed

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of linears that read the same states, in the order in which they are called."""
GATED = "self.down_proj(self.act_fn(self.gate_proj(x))*self.up_proj(x))"
"""What the forward of most MLPs says, without spaces."""


class Joined:
    """Layers of `model.lora` as one product, in training. Each layer's weight becomes a view of the
    whole; the layer that is called first computes for all."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = list(layers)
        bases = [layer.base_layer for layer in layers]
        self.scale = layers[0].scaling[layers[0].fused_adapter]
        self.in_features = bases[0].in_features
        self.outs = [base.out_features for base in bases]
        self.ranks = [layer.r[layer.fused_adapter] for layer in layers]
        self.storage = lora.storage_of(bases[0])
        self.waiting: list[torch.Tensor] = []
        self.packed: Packed = self._pack(bases)
        for layer in layers:
            layer.group = self

    def _pack(self, bases: Sequence[Any]) -> Packed:
        """What `storage` multiplies with, in one piece."""
        whole = torch.cat([base.weight.detach() for base in bases])
        for base, part in zip(bases, whole.split_with_sizes(self.outs), strict=True):
            base.weight.data = part
        return (whole,)

    def output(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        """The output (…, out) of one of the layers for states (…, in)."""
        if layer is self.layers[0]:
            y = self.product(x.reshape(-1, self.in_features))
            rotated = len(self.layers) > 2
            parts = _Apart.apply(y, self.outs) if rotated else y.split_with_sizes(self.outs, 1)  # type: ignore[no-untyped-call]
            self.waiting = list(parts)
        found = self.waiting.pop(0)
        return found.view(*x.shape[:-1], found.shape[1])

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """All outputs (N, Σ out) for states (N, in)."""
        weights, count = self.weights(), len(self.layers)
        x = x.to(self.packed[0].dtype)
        a, b = torch.cat(weights[:count]), torch.block_diag(*weights[count:])  # type: ignore[no-untyped-call]
        return lora.product(x, a, b, self.scale, self.storage, self.packed)

    def weights(self) -> list[torch.Tensor]:
        """All A, then all B."""
        names = [(layer, layer.fused_adapter) for layer in self.layers]
        return [layer.lora_A[name].weight for layer, name in names] + [
            layer.lora_B[name].weight for layer, name in names
        ]

    def drop(self) -> None:
        """Let each layer compute for itself again."""
        for layer in self.layers:
            layer.group = None


class _Apart(torch.autograd.Function):
    """Query, key and value out of the product of all.

    Each is a tensor of its own: the value is kept for attention's backward pass, and as a view it
    would keep all. A compiler makes query and key part of what rotates them.
    """

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, outs: Sequence[int]) -> tuple[torch.Tensor, ...]:
        return tuple(part.clone() for part in y.split_with_sizes(list(outs), 1))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return side_by_side(grads), None


@torch.library.custom_op("chatfine::side_by_side", mutates_args=())
def side_by_side(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """`parts` (N, some) as one (N, all of them).

    A compiler would compute the gradients of query and key, whose rotation reads in two places, in
    the same pass as this, and for each number all three: 119 µs where 31 MB were to be written on
    an H200.
    """
    return torch.cat(list(parts), 1)


@side_by_side.register_fake
def _(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0].new_empty((len(parts[0]), sum(one.shape[1] for one in parts)))


def join(model: nn.Module) -> list[Joined]:
    """Join the layers of `model.lora` whose weight is not packed; unpacking several at once would
    take more memory."""
    layers = [
        module
        for module in model.modules()
        if hasattr(module, "fused_adapter") and module.group is None
        and lora.storage_of(cast(Any, module).base_layer) == PLAIN.name
    ]  # fmt: skip
    return [Joined(some) for some in together(model, layers) if len(some) > 1]


def together(model: nn.Module, layers: Iterable[Any]) -> list[list[Any]]:
    """`layers` of `model`, in groups of those that can be one product, else alone."""
    rest, found = list(layers), []
    for parent in model.modules():
        for names in TOGETHER:
            some = [getattr(parent, name, None) for name in names]
            # what one of them leaves for the next is nothing that a piece could compute again
            apart = chunked.in_pieces(parent) and not is_gated(parent)
            alike = all(one in rest for one in some) and len({_kind(one) for one in some}) == 1
            if alike and not apart:
                found.append(some)
                rest = [one for one in rest if one not in some]
    return found + [[one] for one in rest]


def is_gated(module: nn.Module) -> bool:
    """Whether its own forward, as written, is down(act(gate(x)) · up(x)), for which `model.mlp` has
    another way to say it."""
    try:
        written = inspect.getsource(chunked.own_class(module).forward)
    except (OSError, TypeError):
        return False
    return GATED in "".join(written.split())


def _kind(layer: Any) -> tuple[Any, ...]:
    """What layers must have in common."""
    base = layer.base_layer
    own = base.weight.dtype, getattr(base, "turned", None) is None
    return base.in_features, lora.storage_of(base), layer.scaling[layer.fused_adapter], *own
