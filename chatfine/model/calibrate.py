"""A frozen model packed layer by layer, each weight rounded to the inputs that it really gets.

One forward pass over texts of the training data does it all: when it comes to a decoder layer, the
layer's weights are read, multiplied exactly while the inputs of its linears are looked at, once the
inputs of the exact model and once those that come, corrected (`model.corrected`), rounded
(`model.rounding`), and the layer answers again with the rounded ones. So each layer makes up for
what rounding did before it, and there is never more than one layer in the full format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from chatfine.model.corrected import corrected
from chatfine.model.fast import model_inputs
from chatfine.model.frozen import FrozenLinear, frozen_linears
from chatfine.model.rounding import round_together
from chatfine.model.stream import StoredWeight
from chatfine.types import Batch

Report = Callable[[int, int], None]
PIECE = 4096
"""Tokens whose second moments are added up at a time."""
CORRECTED = ("nf4",)
"""Layouts whose weights are corrected before they are rounded; of fp8's small errors nothing is
left to gain."""
SAMPLE = 512
"""Tokens that tell which linears' answers are added to the stream."""


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
    streams = _Streams(_halves(batch))
    for done, layer in enumerate(layers, 1):
        tell = partial(report, done, len(layers))
        layer.forward = partial(_calibrated, layer, layer.forward, stored, streams, tell)
    try:
        if layers:
            model.get_decoder()(**model_inputs(batch))
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
    for linear, weight in stored.items():
        if linear.weight.is_meta:  # not in a layer
            linear.fill(weight.read().to(batch.ids.device))


@dataclass
class _Streams:
    """What goes from layer to layer beside the states of the rounded model.

    Attributes:
        halves: tokens of either half of the texts.
        exact: states of the exact model.
    """

    halves: tuple[torch.Tensor, torch.Tensor]
    exact: torch.Tensor | None = None


def _halves(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of every other document, and the others; of one document its two halves."""
    second = torch.zeros(len(batch.ids), dtype=torch.bool)
    if len(batch.bounds) == 2:
        second[len(second) // 2 :] = True
    for start, end in zip(batch.bounds[1:-1:2], batch.bounds[2::2], strict=True):
        second[start:end] = True
    found = (~second).nonzero()[:, 0], second.nonzero()[:, 0]
    return found[0].to(batch.ids.device), found[1].to(batch.ids.device)


def _calibrated(
    layer: nn.Module,
    forward: Any,
    stored: Mapping[FrozenLinear, StoredWeight],
    streams: _Streams,
    tell: Callable[[], None],
    states: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """What the layer answers to `states` after its weights have been rounded."""
    weights = {one: stored[one].read().to(states.device) for one in frozen_linears(layer)}
    moved, exact, missing = _Pass(weights), None, {}
    if streams.exact is None or not any(one.storage.layout in CORRECTED for one in weights):
        # nothing has been rounded yet, or nothing is corrected and nobody asks for it
        streams.exact = moved.run(forward, states, *args, **kwargs)
    else:
        exact, before = _Pass(weights), streams.exact
        streams.exact = exact.run(forward, before, *args, **kwargs)
        moved.run(forward, states, *args, **kwargs)
        missing = _missing(exact, moved, before, states, streams.exact)
    for group in moved.groups():
        same = None if exact is None or group[0] not in exact.inputs else exact.take(group)
        alone = missing.get(group[0]) if len(group) == 1 else None
        _round(group, weights, moved.take(group), same, alone, streams.halves)
    for linear, weight in weights.items():
        if linear.weight.is_meta:  # nothing came to it, as to some of many experts
            linear.fill(weight)
    tell()
    return forward(states, *args, **kwargs)


class _Pass:
    """What the linears of a layer read and answer, multiplied with their exact weights.

    Attributes:
        inputs: a linear → what it read, each time that it was asked.
        answers: the same for those whose answer has the shape of the layer's.
    """

    def __init__(self, weights: Mapping[FrozenLinear, torch.Tensor]) -> None:
        self.weights = weights
        self.inputs: dict[FrozenLinear, list[torch.Tensor]] = {}
        self.answers: dict[FrozenLinear, torch.Tensor] = {}

    def run(self, forward: Any, states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer's states after it, for those before it."""
        for linear in self.weights:
            linear.forward = partial(self._exact, linear, states.shape)  # type: ignore[method-assign]
        try:
            found = forward(states, *args, **kwargs)
        finally:
            for linear in self.weights:
                vars(linear).pop("forward", None)
        after: torch.Tensor = found if isinstance(found, torch.Tensor) else found[0]
        return after

    def _exact(self, linear: FrozenLinear, shape: torch.Size, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.weights[linear].to(x.dtype), linear.bias)
        self.inputs.setdefault(linear, []).append(x)
        if y.shape == shape:
            self.answers[linear] = y
        return y

    def groups(self) -> list[list[FrozenLinear]]:
        """The linears that read the same inputs, in the order in which they were asked."""
        found: list[list[FrozenLinear]] = []
        for linear, (first, *_) in self.inputs.items():
            if found and self.inputs[found[-1][0]][0] is first:
                found[-1].append(linear)
            else:
                found.append([linear])
        return found

    def take(self, group: Sequence[FrozenLinear]) -> torch.Tensor:
        """All that a group has read (N, in); it is let go."""
        found, *_ = [self.inputs.pop(linear, []) for linear in group]
        return torch.cat([one.reshape(-1, one.shape[-1]) for one in found])


def _missing(
    exact: _Pass, moved: _Pass, before: torch.Tensor, states: torch.Tensor, after: torch.Tensor
) -> dict[FrozenLinear, torch.Tensor]:
    """For linears whose answer is added to the states: what should be added besides (N, out).

    Which ones these are the numbers tell: of which answers the layer's change is the sum.

    Args:
        exact, moved: the layer on exact states, and on those that come.
        before, states: these states.
        after: the exact states behind the layer.
    """
    answers = {one: exact.answers[one] for one in exact.answers if one in moved.answers}
    if not answers:
        return {}
    some = slice(None, None, -(-before.numel() // before.shape[-1] // SAMPLE))

    def sample(states: torch.Tensor) -> torch.Tensor:
        return states.reshape(-1, states.shape[-1])[some].float().flatten()

    change = sample(after) - sample(before)
    parts = torch.stack([sample(one) for one in answers.values()], 1)
    factors = torch.linalg.pinv(parts.t() @ parts) @ (parts.t() @ change)
    if (change - parts @ factors).norm() > 0.3 * change.norm():
        return {}  # not a sum, as where they are normalised first
    gap, found = (before.float() - states.float()).flatten(0, -2), {}
    for linear, factor in zip(answers, factors.tolist(), strict=True):
        if abs(factor) < 0.05:
            continue
        found[linear] = gap / factor
        more = answers[linear].float() - moved.answers[linear].float()
        gap = gap + factor * more.flatten(0, -2)
    return found


def _round(
    group: Sequence[FrozenLinear],
    weights: Mapping[FrozenLinear, torch.Tensor],
    came: torch.Tensor,
    exact: torch.Tensor | None,
    missing: torch.Tensor | None,
    halves: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Fill linears that read the same inputs.

    Args:
        group: the linears.
        weights: their exact weights, and others.
        came: their inputs (N, in).
        exact: those of the exact model, where there are others.
        missing: (N, out), what the one linear should answer besides.
        halves: of all tokens.
    """
    whole = torch.cat([weights[linear].float() for linear in group])
    if len(came) != sum(map(len, halves)):  # some of the tokens, or all of them more than once
        halves, exact = (torch.arange(len(came), device=came.device), halves[1][:0]), None
    inputs = _products(came, None, came, halves)
    if exact is not None and exact.shape == came.shape:
        wanted = whole @ _products(exact, came, came, halves)
        if missing is not None:
            wanted += _products(missing, None, came, halves)
        whole = corrected(whole, inputs, wanted)
    parts = torch.split(whole, [linear.out_features for linear in group])
    packed = round_together(parts, inputs.sum(0), group[0].storage.name)
    for linear, one in zip(group, packed, strict=True):
        linear.take(one)


def _products(
    left: torch.Tensor,
    less: torch.Tensor | None,
    right: torch.Tensor,
    halves: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """(left − less)ᵀ right (2, l, r) in float32 over the tokens of each half."""
    total = torch.zeros(2, left.shape[1], right.shape[1], device=left.device)
    # TF32 holds a bf16 number exactly
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = right.dtype == torch.bfloat16
    try:
        for half, places in zip(total, halves, strict=True):
            for some in torch.split(places, PIECE):
                wide = left[some].float()
                if less is not None:
                    wide = wide - less[some].float()
                half.addmm_(wide.t(), right[some].float())
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return total
