"""The page everyone reads: what one optimizer step is, and in which order a run does things.

LoRA, full fine-tuning, one device or many differ only in the objects handed in.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from chatfine.errors import Stopped
from chatfine.i18n import t
from chatfine.model.fast import LossModel
from chatfine.train.distributed import Group, whole
from chatfine.train.optim import Schedule, skips_not_finite
from chatfine.train.rng import rng_tensors, set_rng_tensors
from chatfine.types import Batch, StepReport


class BatchSource(Protocol):
    """What the loop needs of `data.batches.Batches`."""

    def step(self, index: int) -> list[Batch]:
        """This rank's micro-batches of optimizer step `index`."""

    def supervised(self, index: int) -> int:
        """Labels in that step over all ranks."""


@dataclass(slots=True)
class Progress:
    """Where a run stands; plain numbers, saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0

    def as_dict(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)

    def note_evaluation(self, val_loss: float) -> bool:
        """Record an evaluation at the present step; True if it is the best so far."""
        if math.isfinite(val_loss) and (self.best_loss is None or val_loss < self.best_loss):
            self.best_loss, self.best_step = val_loss, self.step
            self.evaluations_without_gain = 0
            return True
        self.evaluations_without_gain += 1
        return False


class Precision:
    """Autocast and loss scaling for the number format of the products.

    float32 master weights under bf16 or fp16 products need autocast; an adapter on a bf16 base
    casts inside its own forward and needs none. Only fp16 needs its loss scaled against underflow.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, autocast: bool) -> None:
        self.device, self.dtype = device, dtype
        self.autocast = autocast and dtype != torch.float32
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """The context of the forward pass."""
        if not self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


Moment = float | torch.cuda.Event
"""On this side's clock, or on that of a GPU, which is asked once it has come by."""


def _seconds(begin: Any, end: Any) -> float:
    """Between two moments of one clock."""
    if isinstance(begin, float):
        return float(end) - begin
    return float(begin.elapsed_time(end)) / 1000


@dataclass(frozen=True, slots=True)
class _Given:
    """What a step that the device was given has still to say."""

    step: int  # counted from 1
    loss: float | torch.Tensor
    norm: torch.Tensor
    learning_rate: float
    tokens: float
    began: Moment
    arrived: torch.cuda.Event | None  # when the numbers are there; None: they are


@dataclass(slots=True)
class Trainer:
    """The objects of one run and the loop over them."""

    model: LossModel
    parameters: Mapping[str, nn.Parameter]
    batches: BatchSource
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    precision: Precision
    progress: Progress
    device: torch.device
    group: Group
    clip: float
    evaluate: Callable[[], float | None]
    save: Callable[[], None]
    report: Callable[[StepReport], None]
    stop_requested: Callable[[], bool]
    eval_every: int
    save_every: int
    early_stop: int = 0
    _ahead: tuple[int, list[Batch]] = field(default=(-1, []), init=False)
    _since: Moment | None = field(default=None, init=False)  # when the last step ended, if just now
    _given: _Given | None = field(default=None, init=False)

    def run(self) -> str:
        """Train to the schedule's end; returns why it ended: done, early or stopped."""
        self.model.train()
        progress, total = self.progress, self.schedule.total
        while progress.step < total and not self._early():
            with self.group.in_step():
                going = self.step()
            if not going:
                self.save()
                return "stopped"
            last = progress.step == total
            evaluated = progress.step % self.eval_every == 0 or last
            saved = progress.step % self.save_every == 0 or last or evaluated
            if saved:
                self._settle()
            if evaluated:
                self._evaluate()
            if saved:
                self.save()
                self._since = None
        return "early" if progress.step < total else "done"

    def _early(self) -> bool:
        """Whether validation has not improved for long enough."""
        return 0 < self.early_stop <= self.progress.evaluations_without_gain

    def step(self) -> bool:
        """One optimizer step; False if a stop was requested in it (then nothing has changed).

        A GPU that can skip a step by itself is given all of it, and the next one's first
        micro-batch, before anyone asks for a number: so it does not wait for the loop.
        """
        began, progress = self._mark() or time.perf_counter(), self.progress
        before = rng_tensors(self.device)
        labels = self.batches.supervised(progress.step)
        loss: float | torch.Tensor = 0.0
        tokens, stopping = 0.0, 0.0
        for batch in self._micro_batches(progress.step):
            stopping = stopping or self.stop_requested()
            if stopping and self.group.alone:  # several stop together, after the sums
                break
            loss = loss + self._accumulate(batch, labels)
            tokens += batch.tokens if batch.supervised else 0  # 0: only there to keep step
            self.group.tick()
            self._settle()  # the step before
        self._settle()  # if this one was stopped before it began
        if not self.group.alone:
            loss, tokens, stopping = self.group.sums(float(loss), tokens, stopping)
        if stopping:
            self._forget()
            set_rng_tensors(before, self.device)
            return False
        learning_rate = self.schedule.at(progress.step)
        norm = self._update(loss, learning_rate)
        progress.step += 1
        arrived = None
        if self._works_ahead():
            loss, norm = (torch.as_tensor(one).to("cpu", non_blocking=True) for one in (loss, norm))
            arrived = self._mark()
        self._given = _Given(progress.step, loss, norm, learning_rate, tokens, began, arrived)
        if arrived is None:
            self._settle()
        return True

    def _skips(self) -> bool:
        """Whether the optimizer leaves all as it is, by itself, where a number is not finite."""
        plain = self.group.alone and not self.precision.scaler.is_enabled()
        return plain and skips_not_finite(self.optimizer)

    def _works_ahead(self) -> bool:
        """Whether the device is told what to do before it is asked what came of it."""
        return self.device.type == "cuda" and self._skips()

    def _mark(self) -> torch.cuda.Event | None:
        """The moment when a GPU that works ahead comes to this."""
        if not self._works_ahead():
            return None
        mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        mark.record()  # type: ignore[no-untyped-call]
        return mark

    def _settle(self) -> None:
        """Read, check and report the numbers of the last step, once."""
        given, self._given = self._given, None
        if given is None:
            return
        if given.arrived is not None:
            given.arrived.synchronize()  # type: ignore[no-untyped-call]
        loss, norm, progress = float(given.loss), float(given.norm), self.progress
        now = given.arrived or time.perf_counter()
        if self._skips():  # else they were looked at before
            progress.step = given.step - 1  # there it stands if this one was not taken
            self._check(loss, norm, given.step)
            progress.step = given.step
        seconds, self._since = _seconds(self._since or given.began, now), now
        progress.tokens += int(given.tokens)
        progress.seconds += seconds
        self.report(
            StepReport(
                step=given.step, loss=loss, learning_rate=given.learning_rate, grad_norm=norm,
                tokens=progress.tokens, tokens_per_second=given.tokens / seconds,
                seconds=progress.seconds,
            )
        )  # fmt: skip

    def _micro_batches(self, index: int) -> list[Batch]:
        """This rank's micro-batches of a step, on the device."""
        if self._ahead[0] != index:
            self._ahead = index, [batch.to(self.device) for batch in self.batches.step(index)]
        return self._ahead[1]

    def _accumulate(self, batch: Batch, labels: int) -> torch.Tensor:
        """Add the gradients of one micro-batch; returns its part of the step's mean loss."""
        precision = self.precision
        # a graph writes every loss to the same place
        return self.model.accumulate(
            batch, labels, precision.context, precision.scaler.scale
        ).clone()

    def _update(self, loss: float | torch.Tensor, learning_rate: float) -> torch.Tensor:
        """Clip, step, clear; returns the gradient's norm. Nothing is updated if that or the loss is
        not finite."""
        scaler, optimizer = self.precision.scaler, self.optimizer
        self.group.sum_gradients(self.parameters.values())
        self._hold_back()
        scaler.unscale_(optimizer)
        norm = whole(
            nn.utils.clip_grad_norm_(
                self.parameters.values(), self.clip or math.inf, foreach=self.device.type != "mps"
            )
        )
        if self._skips():  # it looks for itself, so the device is not waited for
            optimizer.found_inf = (~torch.isfinite(norm + loss)).float()  # type: ignore[attr-defined]
        else:
            self._check(float(loss), float(norm), self.progress.step + 1)
        for group in optimizer.param_groups:
            start = group.get("start", 0)
            rate = self.schedule.at(self.progress.step, start) if start else learning_rate
            group["lr"] = group.get("scale", 1.0) * rate
        scaler.step(optimizer)
        scaler.update()
        self._forget()
        if self.progress.step + 1 < self.schedule.total:
            self._micro_batches(self.progress.step + 1)
        return norm

    def _check(self, loss: float, norm: float, step: int) -> None:
        """Refuse to go on from numbers of a step that are not finite. In fp16 the scaler skips such
        a step and halves its scale, which a real fault outlasts."""
        scaler = self.precision.scaler
        if not math.isfinite(loss):
            raise self._not_finite(t("the loss"), loss, step)
        if not math.isfinite(norm) and (not scaler.is_enabled() or scaler.get_scale() < 1):
            raise self._not_finite(t("the gradient"), norm, step)

    def _forget(self) -> None:
        """Empty the gradients, and tell the model that what learns has changed."""
        self.optimizer.zero_grad(set_to_none=not self.model.keeps_gradients)
        self.model.stale = True
        self.model.refresh()  # now, while a GPU still has work and nobody waits for it

    def _hold_back(self) -> None:
        """Forget the gradients of what does not learn yet, before clipping and moments see them."""
        for group in self.optimizer.param_groups:
            if self.progress.step < group.get("start", 0):
                for parameter in group["params"]:
                    parameter.grad = None

    def _evaluate(self) -> None:
        val_loss = self.evaluate()
        if val_loss is not None:
            self.progress.note_evaluation(val_loss)
            self.report(StepReport(step=self.progress.step, val_loss=val_loss))

    def _not_finite(self, what: str, value: float, step: int) -> Stopped:
        examples = [i for batch in self.batches.step(step - 1) for i in batch.index]
        return Stopped(
            "not-finite",
            t("{what} of step {step} is {value}; the weights were not touched", what=what,
              step=step, value=value),
            where=t("examples {numbers}", numbers=", ".join(map(str, examples[:8]))),
            why=t("the learning rate is too high, or an example or the base model is broken"),
            fix=(
                t("try a lower --learning-rate (now {value:g})", value=self.schedule.peak),
                t("look at the examples: chatfine data show"),
                t("with --dtype fp16: use bf16 or fp32"),
            ),
        )  # fmt: skip
