"""A frozen model packed layer by layer, each weight rounded to the inputs that it really gets.

One forward pass over texts of the training data does it all: when it comes to a decoder layer, the
layer's weights are read, multiplied exactly while the inputs of its linears are looked at, rounded
(`model.rounding`), and the layer answers again with the rounded ones. So each layer makes up for
what rounding did before it, and there is never more than one layer in the full format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from chatfine.model.fast import model_inputs
from chatfine.model.frozen import FrozenLinear, frozen_linears
from chatfine.model.rounding import round_together
from chatfine.model.stream import StoredWeight
from chatfine.types import Batch

Report = Callable[[int, int], None]
PIECE = 4096
"""Tokens whose second moments are added up at a time."""


def supports(model: Any) -> bool:
    """Whether the model reads packed documents and has decoder layers to go through."""
    return bool(getattr(model, "_supports_attention_backend", False)) and hasattr(
        model.get_decoder(), "layers"
    )


@torch.no_grad()
def fill_calibrated(
    model: Any,
    stored: Mapping[FrozenLinear, StoredWeight],
    batch: Batch,
    report: Report = lambda done, layers: None,
) -> None:
    """Fill packed linears of the decoder layers from their stored weights.

    Args:
        model: all other weights are in place.
        stored: empty linears → where their weights are.
        batch: packed texts, on the device of the model.
        report: hears of every layer that is done, and how many there are.
    """
    layers = model.get_decoder().layers if supports(model) else []
    for done, layer in enumerate(layers, 1):
        tell = partial(report, done, len(layers))
        layer.forward = partial(_calibrated, layer, layer.forward, stored, batch.ids.device, tell)
    try:
        if layers:
            model.get_decoder()(**model_inputs(batch))
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
    for linear, weight in stored.items():
        if linear.weight.is_meta:  # not in a layer
            linear.fill(weight.read().to(batch.ids.device))


def _calibrated(
    layer: nn.Module,
    forward: Any,
    stored: Mapping[FrozenLinear, StoredWeight],
    device: torch.device,
    tell: Callable[[], None],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """What the layer answers after its weights have been rounded."""
    weights = {one: stored[one].read().to(device) for one in frozen_linears(layer)}
    groups: list[_Group] = []
    for linear, weight in weights.items():
        linear.forward = partial(_exact, linear, weight, groups)  # type: ignore[method-assign]
    try:
        forward(*args, **kwargs)
    finally:
        for linear in weights:
            vars(linear).pop("forward", None)
    for group in groups:
        group.inputs = None
        own = [weights.pop(linear) for linear in group.linears]
        packed = round_together(own, group.moments, group.linears[0].storage.name)
        for linear, one in zip(group.linears, packed, strict=True):
            linear.take(one)
    for linear, weight in weights.items():
        linear.fill(weight)  # nothing came to it, as to some of many experts
    tell()
    return forward(*args, **kwargs)


@dataclass
class _Group:
    """Linears that read the same inputs, and Xᵀ X (in, in) of these."""

    inputs: torch.Tensor | None
    moments: torch.Tensor
    linears: list[FrozenLinear]


def _exact(
    linear: FrozenLinear, weight: torch.Tensor, groups: list[_Group], x: torch.Tensor
) -> torch.Tensor:
    """x Wᵀ + b with the exact weight; what came in is added to the moments."""
    mine = next((group for group in groups if linear in group.linears), None)
    if mine is not None:
        if mine.linears[0] is linear:
            mine.moments += _moments(x)
    elif groups and groups[-1].inputs is x:
        groups[-1].linears.append(linear)
    else:
        groups.append(_Group(x, _moments(x), [linear]))
    return F.linear(x, weight.to(x.dtype), linear.bias)


def _moments(x: torch.Tensor) -> torch.Tensor:
    """Xᵀ X (in, in) in float32 of x (…, in)."""
    rows = x.reshape(-1, x.shape[-1])
    total = torch.zeros(rows.shape[1], rows.shape[1], device=x.device)
    # TF32 holds a bf16 number exactly
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = x.dtype == torch.bfloat16
    try:
        for start in range(0, len(rows), PIECE):
            wide = rows[start : start + PIECE].float()
            total.addmm_(wide.t(), wide)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return total
