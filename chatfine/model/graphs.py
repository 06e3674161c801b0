"""A whole micro-batch, forward and back, as one CUDA graph.

A small model's operations take less time than launching them: of a step of a 135M model on an
H100, 126 ms, the card worked a third. Between those of a large one are gaps of a microsecond. With
fixed shapes (`model.compiled`) every micro-batch launches the same operations on the same
addresses, so they are recorded once and replayed as one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from chatfine.model.compiled import CompiledLoss, FixedInputs
from chatfine.model.fast import labelled, loss_at
from chatfine.types import IGNORE_INDEX, Batch

WARM_RUNS = 3
"""Runs before recording: compilers and libraries do their first-time work."""
LABEL_STEPS = 8
"""Room for labels grows in so many steps up to the number of tokens."""


class GraphedLoss(CompiledLoss):
    """`CompiledLoss` that replays its micro-batches. What it computes is what that computes.

    Args:
        model, fixed: as of `CompiledLoss`.
        adds: a step has several micro-batches. Gradients stay where they are then: whoever takes a
            step empties them in place (`keeps_gradients`). Of a single one they are written and
            not added, which spares emptying and reading them.
    """

    def __init__(self, model: Any, fixed: FixedInputs, adds: bool = True) -> None:
        super().__init__(model, fixed)
        self.keeps_gradients = adds
        self.inputs: dict[str, Any] = {}
        self.graph: torch.cuda.CUDAGraph | None = None
        self.replays = True
        self.runs = 0
        self.room = 0  # labels that fit
        self.learning = [one for one in model.parameters() if one.requires_grad]
        self.gradients: list[torch.Tensor | None] = []

    def accumulate(
        self,
        batch: Batch,
        labels: int,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        scaled: Callable[[torch.Tensor], torch.Tensor] = lambda loss: loss,
    ) -> torch.Tensor:
        """As of `LossModel`."""
        if self.fixed is None or not self.replays:
            return super().accumulate(batch, labels, context, scaled)
        self.refresh()
        self._fill(batch, labels)
        if self.keeps_gradients:
            self._hold_gradients()
        if self.runs < WARM_RUNS:
            self.runs += 1
            self._aside(context)
            return self.loss
        if self.graph is None:
            self.graph = self._try_to_record(context)
            if self.graph is None:
                return super().accumulate(batch, labels, context, scaled)
        self.graph.replay()
        if not self.keeps_gradients:
            self._give_gradients()
        return self.loss

    def drop_groups(self) -> None:
        """As of `CompiledLoss`; the graph reads what is gone, so it is recorded anew."""
        super().drop_groups()
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.graph, self.runs = None, 0
        if not self.keeps_gradients:
            self.gradients = []  # they are the graph's

    def _fill(self, batch: Batch, labels: int) -> None:
        """Write the micro-batch where the graph reads it; larger shapes begin anew."""
        assert self.fixed is not None
        documents = self.fixed.documents
        inputs = self.fixed(batch)
        where = labelled(batch)
        if len(where) > self.room or documents != self.fixed.documents or not self.inputs:
            step = -(-self.fixed.tokens // LABEL_STEPS)
            self.room = max(self.room, -(-len(where) // step) * step)
            device = batch.ids.device
            self.inputs = inputs
            self.where = torch.zeros(self.room, dtype=torch.int64, device=device)
            self.labels = torch.full_like(self.where, IGNORE_INDEX)
            self.factor, self.loss = torch.ones(2, device=device).unbind()
            self._begin_anew()
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor) and value is not self.inputs[name]:
                self.inputs[name].copy_(value)
        self.where.zero_()[: len(where)] = where
        self.labels.fill_(IGNORE_INDEX)[: len(where)] = batch.labels[where]
        self.factor.fill_(1 / labels)

    def _hold_gradients(self) -> None:
        """Give every parameter the gradient that the graph adds to."""
        if not self.gradients:
            self.gradients = [torch.zeros_like(one) for one in self.learning]
        for parameter, gradient in zip(self.learning, self.gradients, strict=True):
            if gradient is not None and parameter.grad is not gradient:
                parameter.grad = gradient.zero_()

    def _give_gradients(self) -> None:
        """Give every parameter the gradient that the graph writes."""
        for parameter, gradient in zip(self.learning, self.gradients, strict=True):
            parameter.grad = gradient

    def _run(self, context: Callable[[], AbstractContextManager[Any]]) -> None:
        with context():
            total = loss_at(self.model, self.inputs, self.where, self.labels, compiled=True)
            loss = total * self.factor
        loss.backward()  # type: ignore[no-untyped-call]
        self.loss.copy_(loss.detach())

    def _aside(self, context: Callable[[], AbstractContextManager[Any]]) -> None:
        """Run on a stream of its own, as recording will."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run(context)
        torch.cuda.current_stream().wait_stream(stream)

    def _try_to_record(
        self, context: Callable[[], AbstractContextManager[Any]]
    ) -> torch.cuda.CUDAGraph | None:
        """A graph; None where this model can't be recorded. Nothing of it was computed then, so no
        gradient may stay of what was written down."""
        try:
            graph = self._record(context)
        except RuntimeError:
            self.replays = False
            for one in () if self.keeps_gradients else self.learning:
                one.grad = None
            return None
        if not self.keeps_gradients:
            self.gradients = [one.grad for one in self.learning]
        return graph

    def _record(self, context: Callable[[], AbstractContextManager[Any]]) -> torch.cuda.CUDAGraph:
        torch.cuda.empty_cache()  # what the runs so far used is not the graph's
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run(context)
        return graph
