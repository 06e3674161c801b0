"""An MLP whose gate and up projection are one product, said in one place.

`model.joined` lets the layer that is called first compute for both; here nobody waits for anybody,
so that the MLP may go through pieces that are computed again (`model.chunked`). On fp8 weights it
is one operation altogether (`model.mlp_fp8`), and on plain ones too (`model.mlp_lora`). The slow
twin is the module's own forward on the same linears.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import nn

from chatfine.model import chunked
from chatfine.model.joined import TOGETHER, Joined, is_gated
from chatfine.model.lora import storage_of
from chatfine.model.lora_fp8 import Group
from chatfine.model.mlp_fp8 import MlpFp8, mlp_fp8_pieces
from chatfine.model.mlp_lora import MlpLora
from chatfine.model.storages import PLAIN

SILU = ("SiLU", "SiLUActivation")


def install(model: nn.Module) -> int:
    """Say it so in the MLPs of `model` whose gate and up are joined, for training; returns how
    many are. What is built in another way is left as it is."""
    count = 0
    for module in model.modules():
        kind = chunked.own_class(module)
        if not issubclass(kind, _Whole) and _pair(module) is not None and is_gated(module):
            # the class and not the method, see `model.lora`
            chunked.give_class(module, _class_of(_Whole, cast(Any, kind)))
            if chunked.in_pieces(module) and _fp8_groups(module) is not None:
                module.__class__ = _class_of(_Cut, cast(Any, type(module)))
            count += 1
    return count


def uninstall(model: nn.Module) -> None:
    """Give the modules' own classes back."""
    for module in model.modules():
        kind = chunked.own_class(module)
        if isinstance(module, _Cut):
            kind = type(module).__bases__[1].__bases__[1]
        if isinstance(module, (_Cut, _Whole)):
            chunked.give_class(module, kind.__bases__[1])


def _pair(module: Any) -> Joined | None:
    """What computes gate and up, if it computes nothing else."""
    linears = [getattr(module, name, None) for name in TOGETHER[1]]
    groups: list[Any] = [getattr(one, "group", None) for one in linears]
    pair, other = groups
    if pair is None or pair is not other or len(pair.layers) != len(linears):
        return None
    return pair if all(_is_plain(one) for one in linears) else None


def _fp8_groups(module: Any) -> tuple[Any, Any] | None:
    """What computes gate and up, and down, if `MlpFp8` can."""
    pair, down = _pair(module), getattr(module.down_proj, "group", None)
    fp8 = isinstance(pair, Group) and isinstance(down, Group) and _is_plain(module.down_proj)
    return (pair, down) if fp8 and type(module.act_fn).__name__ in SILU else None


def _plain_down(module: Any, pair: Joined, x: torch.Tensor) -> Any:
    """The layer behind `pair` if `MlpLora` can compute both for x, else None."""
    down = module.down_proj
    if pair.storage != PLAIN.name or type(module.act_fn).__name__ not in SILU:
        return None
    if not (hasattr(down, "fused_adapter") and _is_plain(down)):
        return None
    alike = x.dtype == pair.packed[0].dtype == down.base_layer.weight.dtype
    return down if alike and storage_of(down.base_layer) == PLAIN.name else None


def _is_plain(linear: Any) -> bool:
    return bool(linear.is_fused() and linear.base_layer.bias is None)


class _Whole:
    """Comes before a module's own class."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """The same; on fp8 weights as `MlpFp8`, on plain ones as `MlpLora`."""
        pair = _pair(self) if self.training else None
        if pair is None:
            result: torch.Tensor = super().forward(x)  # type: ignore[misc]
            return result
        rows, fp8 = x.reshape(-1, pair.in_features), _fp8_groups(self)
        if fp8 is not None:
            one: torch.Tensor = MlpFp8.apply(rows, *_inputs(*fp8))  # type: ignore[no-untyped-call]
            return one.view(x.shape)
        down = _plain_down(self, pair, x)
        if down is not None:
            two: torch.Tensor = MlpLora.apply(rows, *_plain_inputs(pair, down))  # type: ignore[no-untyped-call]
            return two.view(x.shape)
        gate, up = pair.product(rows).split_with_sizes(pair.outs, 1)
        y: torch.Tensor = self.down_proj((self.act_fn(gate) * up).view(*x.shape[:-1], pair.outs[0]))
        return y


class _Cut:
    """Comes before the class of a module that goes through pieces: on fp8 weights it cuts by
    itself. A compiler then sees one operation and not a copy of the MLP for each piece, and keeps
    what is read and nothing else."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """See `mlp_fp8_pieces`."""
        fp8 = _fp8_groups(self) if self.training else None
        if fp8 is None or x.shape[-2] <= self.piece_tokens:
            result: torch.Tensor = super().forward(x)  # type: ignore[misc]
            return result
        scales, storages, first, tails, second, more_tails, *weights = _inputs(*fp8)
        y: torch.Tensor = mlp_fp8_pieces(
            x.reshape(-1, fp8[0].in_features), self.piece_tokens, scales, ",".join(storages), first,
            second, (*tails, *more_tails), weights,
        )  # fmt: skip
        return y.view(x.shape)


def _inputs(pair: Any, down: Any) -> tuple[Any, ...]:
    """Those of `MlpFp8` behind x."""
    a_gate, a_up, b_gate, b_up = pair.weights()
    a_down, b_down = down.weights()
    return (
        (pair.scale, down.scale), (pair.storage, down.storage), pair.packed,
        (pair.tail_b, pair.tail_a), down.packed, (down.tail_b, down.tail_a),
        a_gate, a_up, a_down, b_gate, b_up, b_down,
    )  # fmt: skip


def _plain_inputs(pair: Joined, down: Any) -> tuple[Any, ...]:
    """Those of `MlpLora` behind x."""
    a_gate, a_up, b_gate, b_up = pair.weights()
    name = down.fused_adapter
    return (
        (pair.scale, down.scaling[name]), pair.packed[0], down.base_layer.weight,
        a_gate, a_up, down.lora_A[name].weight, b_gate, b_up, down.lora_B[name].weight,
    )  # fmt: skip


@functools.cache
def _class_of(before: type, kind: Any) -> Any:
    return type(f"{before.__name__.strip('_')}{kind.__name__}", (before, kind), {})
