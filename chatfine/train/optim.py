"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from chatfine.model.bnb import bitsandbytes
from chatfine.train.distributed import is_slice, own
from chatfine.train.plan import EIGHT_BIT


def make_optimizer(
    parameters: Mapping[str, nn.Parameter],
    weight_decay: float,
    device: torch.device,
    kind: str = "adamw",
    kahan: bool = False,
    rows: Collection[str] = (),
    rows_factor: float = 1.0,
    rows_first: int = 0,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, 2019) over `parameters`, AnyPrecisionAdamW, or AdamW with 8-bit
    moments (Dettmers et al., 2022) of bitsandbytes; only matrices decay.

    betas 0.9, 0.95 would suit pre-training; fine-tuning keeps the paper's 0.9, 0.999. The learning
    rate is set by the loop before every step.

    Args:
        parameters: name → what learns.
        weight_decay: of matrices.
        device: where it computes.
        kind: adamw, anyprecision, adamw8bit or paged-adamw8bit.
        kahan: with anyprecision, keep the weights' rounding error.
        rows: names of new vocabulary rows, which learn `rows_factor` times as fast as the rest.
        rows_factor: see `rows`.
        rows_first: the rest begins to learn at this step.

    Raises:
        ResourceError: bitsandbytes is needed and does not load.
    """
    groups: list[dict[str, Any]] = []
    for named, scale, start in ((False, 1.0, rows_first), (True, rows_factor, 0)):
        these = [value for name, value in parameters.items() if (name in rows) == named]
        matrices = [value for value in these if value.ndim >= 2]
        others = [value for value in these if value.ndim < 2]
        pace = {"scale": scale, "start": start}
        groups += [{"params": matrices, "weight_decay": weight_decay, **pace},
                   {"params": others, "weight_decay": 0.0, **pace}]  # fmt: skip
    groups = [group for group in groups if group["params"]]
    if kind == "anyprecision":
        return AnyPrecisionAdamW(groups, kahan)
    if kind in EIGHT_BIT:
        return _eight_bit(groups, kind, device)
    fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=0.0, fused=fused)


def skips_not_finite(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `optimizer` can be told on the device, by `found_inf`, to leave all as it is."""
    return isinstance(optimizer, torch.optim.AdamW) and all(
        group["fused"] for group in optimizer.param_groups
    )


def _eight_bit(
    groups: list[dict[str, Any]], kind: str, device: torch.device
) -> torch.optim.Optimizer:
    """A scale for 256 numbers; tensors of less than 4,096 numbers keep float32 moments."""
    optim = bitsandbytes("optim", f"--optimizer {kind}")
    paged = kind.startswith("paged") and device.type == "cuda"  # nowhere else to go
    make = optim.PagedAdamW8bit if paged else optim.AdamW8bit
    optimizer: torch.optim.Optimizer = make(groups, lr=0.0)
    return optimizer


class AnyPrecisionAdamW(torch.optim.Optimizer):
    """AdamW whose moments are kept in bfloat16, a third of the usual memory under bf16 weights.

    bfloat16 has 8 bits of precision: with beta2 = 0.999 a second moment rounded to nearest would
    never change again, and neither would a weight by an update 300 times smaller than itself. So
    the arithmetic is float32 and what is stored is rounded stochastically (up or down in
    proportion, so right on average); with `kahan` the weights' rounding error is kept and added to
    the next update instead (Kahan, 1965). The idea of the number formats is that of torchdistx's
    optimizer of this name.
    """

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], kahan: bool = False,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
    ) -> None:  # fmt: skip
        super().__init__(
            [dict(group) for group in groups],
            {"lr": 0.0, "weight_decay": 0.0, "betas": betas, "eps": eps, "kahan": kahan},
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            names = ["exp_avg", "exp_avg_sq", *(["lost"] if group["kahan"] else [])]
            for name in names:
                state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        state["step"] += 1
        count = float(state["step"])
        weight, gradient = own(parameter), own(parameter.grad).float()  # type: ignore[arg-type]
        first, second = own(state["exp_avg"]), own(state["exp_avg_sq"])
        mean = first.float().mul_(beta1).add_(gradient, alpha=1 - beta1)
        square = second.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        store(first, mean)
        store(second, square)
        divisor = square.div_(1 - beta2**count).sqrt_().add_(group["eps"])
        change = mean.div_(divisor).mul_(-group["lr"] / (1 - beta1**count))
        change.add_(weight.float(), alpha=-group["lr"] * group["weight_decay"])
        if not group["kahan"]:
            store(weight, weight.float().add_(change))
            return
        lost = own(state["lost"])
        change.add_(lost.float())
        before = weight.float()
        weight.copy_(before + change)
        store(lost, change.sub_(weight.float() - before))


def store(target: torch.Tensor, value: torch.Tensor) -> None:
    """Write float32 `value` into `target`, rounded stochastically where that is bfloat16."""
    if target.dtype != torch.bfloat16:
        target.copy_(value)
        return
    bits = value.contiguous().view(torch.int32)  # the upper half of a float32 is a bfloat16
    noise = torch.randint_like(bits, 1 << 16)
    target.copy_(((bits + noise) & -(1 << 16)).view(torch.float32))


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

    def at(self, step: int, start: int = 0) -> float:
        """The learning rate of optimizer step `step` (0-based) for what begins to learn at `start`:
        0 before, then the whole curve in the steps that are left."""
        if step < start:
            return 0.0
        step, total = step - start, self.total - start
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        share = (step - self.warmup) / max(1, total - self.warmup)
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
        if not key.startswith("qmap")  # one table of bitsandbytes, the same for all
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """The inverse of `optimizer_tensors`."""
    make_state = getattr(optimizer, "init_state", None)
    if make_state is not None:
        _fill_state(optimizer, make_state, parameters, tensors)
        return
    for entry, value in tensors.items():
        name, key = entry.rsplit("|", 1)
        parameter = parameters[name]
        if value.ndim and is_slice(parameter):
            state = torch.zeros_like(parameter, dtype=value.dtype)
            own(state).copy_(value)
        else:
            state = value.to(parameter.device)
        optimizer.state[parameter][key] = state


@torch.no_grad()
def _fill_state(
    optimizer: torch.optim.Optimizer,
    make_state: Callable[..., None],
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Load the state of an optimizer of bitsandbytes, which makes its own buffers (a paged one is
    no ordinary tensor) and counts steps with a plain number."""
    saved: dict[str, dict[str, torch.Tensor]] = {}
    for entry, value in tensors.items():
        name, key = entry.rsplit("|", 1)
        saved.setdefault(name, {})[key] = value
    places = {
        one: (group, index, place)
        for index, group in enumerate(optimizer.param_groups)
        for place, one in enumerate(group["params"])
    }
    for name, values in saved.items():
        parameter = parameters[name]
        group, index, place = places[parameter]
        make_state(group, parameter, index, place)
        state = optimizer.state[parameter]
        for key, value in values.items():
            if isinstance(state[key], torch.Tensor):
                state[key].copy_(value)
            else:
                state[key] = value.item()
