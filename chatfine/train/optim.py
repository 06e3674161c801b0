"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], weight_decay: float, device: torch.device
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2019) over `parameters`; only matrices decay.

    betas 0.9, 0.95 would suit pre-training; fine-tuning keeps the paper's 0.9, 0.999. The learning
    rate is set by the loop before every step.
    """
    matrices = [value for value in parameters.values() if value.ndim >= 2]
    others = [value for value in parameters.values() if value.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=0.0,
        fused=device.type in ("cpu", "cuda"),
    )


@dataclass(frozen=True, slots=True)
class Schedule:
    """Learning rate as a pure function of the step, so that resuming needs no state of it.

    Linear warm-up over `warmup` steps to `peak`, then cosine or linear to 0 at `total`, or
    constant.
    """

    kind: str
    peak: float
    warmup: int
    total: int

    def at(self, step: int) -> float:
        """The learning rate of optimizer step `step` (0-based)."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        share = (step - self.warmup) / max(1, self.total - self.warmup)
        if self.kind == "cosine":
            return self.peak * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
        if self.kind == "linear":
            return self.peak * max(0.0, 1 - share)
        return self.peak


def warmup_steps(warmup: float, total: int) -> int:
    """`warmup` as steps: a share of `total` below 1, else a number of steps."""
    return min(total, math.ceil(warmup * total) if warmup < 1 else round(warmup))


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    """The optimizer's state as named tensors (`name|exp_avg`, …), for the checkpoint store."""
    return {
        f"{name}|{key}": value if torch.is_tensor(value) else torch.tensor(value)
        for name, parameter in parameters.items()
        for key, value in sorted(optimizer.state.get(parameter, {}).items())
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """The inverse of `optimizer_tensors`."""
    for entry, value in tensors.items():
        name, key = entry.rsplit("|", 1)
        parameter = parameters[name]
        place = "cpu" if key == "step" and parameter.device.type == "cpu" else parameter.device
        optimizer.state[parameter][key] = value.to(place)
