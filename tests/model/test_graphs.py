"""Micro-batches replayed as CUDA graphs: recorded by a stand-in, and on a card in earnest."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from small_llama import LONGEST, TOKENS, batch_of, build

from chatfine.model import adapters
from chatfine.model.compiled import FixedInputs
from chatfine.model.fast import LossModel
from chatfine.model.graphs import WARM_RUNS, GraphedLoss


@pytest.mark.usefixtures("uncompiled", "rounds_both")
def test_a_graph_is_recorded_anew_when_weights_move() -> None:
    graphed = GraphedLoss(build("fp8"), FixedInputs(TOKENS, LONGEST))
    graphed.runs = WARM_RUNS
    for parameter in adapters.trained_parameters(graphed.model).values():
        parameter.data.mul_(1e5)
    with torch.no_grad():
        graphed.eval()(batch_of(5))
    assert graphed.groups.groups == []
    assert graphed.runs == 0
    assert graphed.graph is None


class Replayed:
    """Does what a recorded graph does: computes again and writes to the same places. On a card
    recording computes nothing; here it has, so the first time nothing is left to do."""

    def __init__(self, graphed: GraphedLoss) -> None:
        self.graphed, self.new = graphed, True

    def replay(self) -> None:
        graphed = self.graphed
        if self.new:
            self.new = False
            return
        if graphed.keeps_gradients:
            graphed._run(nullcontext)
            return
        for one in graphed.learning:
            one.grad = None
        graphed._run(nullcontext)
        for one, kept in zip(graphed.learning, graphed.gradients, strict=True):
            if kept is not None and one.grad is not None:
                kept.copy_(one.grad)
            one.grad = None


def steps_of(measure: LossModel, micro: int, device: str = "cpu") -> list[float]:
    """The losses of some steps of so many micro-batches, by AdamW; the last has more labels."""
    optimizer = torch.optim.AdamW(adapters.trained_parameters(measure.model).values(), lr=0.01)
    losses = []
    for step in range(WARM_RUNS + 4):
        total = 0.0
        for part in range(micro):
            batch = batch_of(5 + step % 3, 9, *[10, 20] * (step > WARM_RUNS + 2), 3 + part)
            total += measure.accumulate(batch.to(device), 20).item()
        torch.nn.utils.clip_grad_norm_(measure.model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=not measure.keeps_gradients)
        measure.stale = True
        losses.append(total)
    return losses


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("micro", [1, 2])
def test_replayed_gradients_are_those_of_their_own_step(
    micro: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(graphed: GraphedLoss, context: Any) -> Replayed:
        graphed._run(context)
        return Replayed(graphed)

    monkeypatch.setattr(GraphedLoss, "_aside", GraphedLoss._run)
    monkeypatch.setattr(GraphedLoss, "_record", record)
    graphed = GraphedLoss(build(), FixedInputs(TOKENS, LONGEST), adds=micro > 1).train()
    assert steps_of(graphed, micro) == pytest.approx(
        steps_of(LossModel(build()).train(), micro), rel=1e-4
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
@pytest.mark.parametrize("micro", [1, 2])
def test_a_card_replays_what_it_would_compute(micro: int) -> None:
    models = [build().cuda() for _ in range(2)]
    for model in models:
        for one in model.parameters():
            one.data = one.data.to(torch.float32 if one.requires_grad else torch.bfloat16)
    graphed = GraphedLoss(models[0], FixedInputs(TOKENS, LONGEST), adds=micro > 1).train()
    found = steps_of(graphed, micro, "cuda")
    assert graphed.replays
    wanted = steps_of(LossModel(models[1]).train(), micro, "cuda")
    assert found == pytest.approx(wanted, rel=0.02)
    assert abs(wanted[3] - wanted[0]) > 0.05 * wanted[0]  # the same texts, some steps later


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("adds", [False, True])
def test_what_cannot_be_recorded_is_computed(adds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is left of the gradients that were written down, and never computed."""

    def record(graphed: GraphedLoss, context: Any) -> None:
        for one in () if adds else graphed.learning:
            one.grad = torch.full_like(one, 1e3)
        raise RuntimeError("an operation of this model can't be recorded")

    monkeypatch.setattr(GraphedLoss, "_record", record)
    graphed, plain = (
        GraphedLoss(build(), FixedInputs(TOKENS, LONGEST), adds).train(),
        LossModel(build()).train(),
    )
    batch = batch_of(5, 9)
    graphed._fill(batch, 7)
    graphed.runs = WARM_RUNS
    losses = [model.accumulate(batch, 7).item() for model in (graphed, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert not graphed.replays
    found, wanted = (list(adapters.trained_parameters(m).values()) for m in (graphed, plain))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
