"""Compiled decoder layers and micro-batches of fixed shapes, against layers as they are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from small_llama import LONGEST, TOKENS, batch_of, build
from torch import nn
from torch._dynamo.utils import counters

from chatfine.data.batches import collate
from chatfine.model import adapters, chunked, recompute
from chatfine.model.compiled import MIN_DOCUMENTS, CompiledLoss, FixedInputs, supports
from chatfine.model.fast import LossModel, causal_model
from chatfine.types import IGNORE_INDEX, Batch, Example


def learned(model: Any) -> dict[str, torch.Tensor]:
    return {name: one.grad for name, one in adapters.trained_parameters(model).items()}


def agree(ours: LossModel, plain: LossModel, batch: Batch, tolerance: float) -> None:
    """One micro-batch through both: its loss and all gradients."""
    losses = []
    for one in (ours, plain):
        one.model.zero_grad()
        losses.append(one.accumulate(batch, 50).item())
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    wanted = learned(plain.model)
    for name, grad in learned(ours.model).items():
        assert ((grad - wanted[name]).norm() / wanted[name].norm()).item() < tolerance, name


# -- fixed shapes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(20, 30), (32, 32), (1,), (5, 6, 7, 8, 9, 10), (2,) * 9])
def test_every_micro_batch_fills_the_same_shapes(lengths: tuple[int, ...]) -> None:
    fixed = FixedInputs(TOKENS, LONGEST)
    batch = batch_of(*lengths)
    inputs = fixed(batch)
    size = sum(lengths)
    assert inputs["input_ids"].shape == inputs["position_ids"].shape == (1, TOKENS)
    assert torch.equal(inputs["input_ids"][0, :size], batch.ids)
    assert not inputs["input_ids"][0, size:].any()
    assert torch.equal(inputs["position_ids"][0, :size], batch.positions)
    offsets = inputs["document_offsets"].tolist()
    assert inputs["document_offsets"].dtype == torch.int32
    assert len(offsets) == fixed.documents + 1
    assert offsets[: len(batch.bounds)] == list(batch.bounds)
    assert offsets[-1] == TOKENS
    gaps = [b - a for a, b in itertools.pairwise(offsets)]
    assert 0 <= min(gaps) <= max(gaps) <= LONGEST  # the fill too is made of documents


def test_room_for_documents_doubles_and_stays() -> None:
    fixed = FixedInputs(TOKENS, LONGEST)
    for lengths, room in [((20, 20), 4), ((32, 32), 4), ((9, 9, 9, 9, 9), 8), ((60,), 8)]:
        assert len(fixed(batch_of(*lengths))["document_offsets"]) == room + 1
    assert MIN_DOCUMENTS == 4


def test_what_does_not_fit_is_an_error() -> None:
    fixed = FixedInputs(TOKENS, LONGEST)
    with pytest.raises(ValueError, match="65 tokens"):
        fixed(batch_of(30, 30, 5))
    shared = collate([Example([5, 6, 7, *[i] * 4], [False] * 3 + [True] * 4) for i in (8, 9)])
    shared.shared = 3
    with pytest.raises(ValueError, match="3 shared"):
        fixed(shared)


def test_only_plain_attention_is_supported() -> None:
    model = build()
    assert supports(model)
    model.get_base_model().config.attention_dropout = 0.1
    assert not supports(model)


# -- the loss --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("storage", [None, "int8", "nf4"])
def test_fixed_shapes_change_neither_loss_nor_gradients(storage: str | None) -> None:
    ours = CompiledLoss(build(storage), FixedInputs(TOKENS, LONGEST)).train()
    plain = LossModel(build(storage)).train()
    for lengths in [(20, 30), (32, 32), (5, 6, 7, 8, 9, 10), (3,)]:
        agree(ours, plain, batch_of(*lengths), 1e-4)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("storage", ["fp8", "nf4-fp8"])
@pytest.mark.parametrize("lengths", [(20, 30), (5, 6, 7, 8, 9, 10)])
def test_adapters_inside_fp8_products_are_as_near_as_beside_them(
    storage: str, lengths: tuple[int, ...], request: pytest.FixtureRequest
) -> None:
    """Against the same rounded weights with nothing else rounded."""
    batch = batch_of(*lengths)
    exact = LossModel(build(storage)).train()
    losses = [exact.accumulate(batch, 50).item()]
    request.getfixturevalue("rounds_both")
    ours = CompiledLoss(build(storage), FixedInputs(TOKENS, LONGEST)).train()
    assert len(ours.groups.groups) == 2 * 4  # q k v, o, gate up, down of two layers
    plain = LossModel(build(storage)).train()
    losses += [one.accumulate(batch, 50).item() for one in (ours, plain)]
    assert losses == pytest.approx([losses[0]] * 3, rel=0.01)
    wanted, *found = (
        torch.cat([grad.flatten() for grad in learned(one.model).values()])
        for one in (exact, ours, plain)
    )
    inside, beside = (((one - wanted).norm() / wanted.norm()).item() for one in found)
    assert inside < 1.5 * beside < 0.2


def trained(model: LossModel, batches: Sequence[Batch], steps: int) -> list[float]:
    """Losses of optimizer steps, taken as `train.loop.Trainer` takes them."""
    optimizer = torch.optim.AdamW(adapters.trained_parameters(model.model).values(), lr=2e-2)
    model.train()
    labels = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches)
    losses = []
    for _ in range(steps):
        losses.append(sum(model.accumulate(batch, labels).item() for batch in batches))
        optimizer.step()
        model.stale = True
        optimizer.zero_grad()
    return losses


@pytest.mark.usefixtures("uncompiled", "rounds_both")
@pytest.mark.parametrize("storage", ["fp8", "nf4-fp8"])
def test_training_sees_what_the_optimizer_changed(storage: str) -> None:
    """The loss falls as it does without groups, whose columns are a copy of the adapter."""
    batches = [batch_of(20, 30), batch_of(9, 9, 9, 9, 9)]
    ours = CompiledLoss(build(storage, b=0.0), FixedInputs(TOKENS, LONGEST))
    plain = LossModel(build(storage, b=0.0))
    found, wanted = trained(ours, batches, 12), trained(plain, batches, 12)
    assert wanted[-1] < wanted[0] - 1
    assert found == pytest.approx(wanted, rel=0.06)  # a step behind would be 0.08
    both = []
    for model in (ours, plain):
        model.eval()
        with torch.no_grad():
            both.append(sum(model(batch).item() for batch in batches))
    assert both[0] == pytest.approx(both[1], rel=0.06)


@pytest.mark.usefixtures("uncompiled", "rounds_both")
def test_an_evaluation_notices_a_loaded_adapter_and_one_too_large() -> None:
    ours, plain = CompiledLoss(build("fp8"), FixedInputs(TOKENS, LONGEST)), LossModel(build("fp8"))
    batch = batch_of(20, 30)
    ours.train()(batch)
    for size in (0.3, 1e4):
        for model in (ours, plain):
            torch.manual_seed(3)
            for name, parameter in adapters.trained_parameters(model.model).items():
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=size)
            model.eval()
        with torch.no_grad():
            assert ours(batch).item() == pytest.approx(plain(batch).item(), rel=0.05)
    assert ours.groups.groups == []


@pytest.mark.usefixtures("uncompiled")
def test_layers_before_the_first_that_learns_keep_nothing() -> None:
    model = build()
    layers = model.get_base_model().get_decoder().layers
    layers[0].requires_grad_(False)
    measure = CompiledLoss(model, FixedInputs(TOKENS, LONGEST)).train()
    seen: list[bool] = []
    layers[1].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].requires_grad))
    measure(batch_of(5, 9)).backward()
    assert seen == [False]


@pytest.mark.usefixtures("rounds_both")
def test_compiled_it_is_the_same_and_one_program_serves_all_layers() -> None:
    before = counters["stats"]["unique_graphs"]
    ours, plain = (
        CompiledLoss(build(), FixedInputs(TOKENS, LONGEST)).train(),
        LossModel(build()).train(),
    )
    for lengths in [(20, 30), (32, 32), (10, 20, 7)]:
        agree(ours, plain, batch_of(*lengths), 1e-4)
    assert 1 <= counters["stats"]["unique_graphs"] - before <= 2  # a layer, the cross entropy
    for model in (ours, plain):
        model.eval()
    with torch.no_grad():  # an evaluation's shapes are any, and nothing is compiled for them
        batch = batch_of(3, 50)
        assert ours(batch).item() == pytest.approx(plain(batch).item(), rel=1e-5)
    assert counters["stats"]["unique_graphs"] - before <= 2
    ours.train().give_up()
    agree(ours, plain.train(), batch_of(5, 9), 1e-4)


@pytest.mark.usefixtures("rounds_both")
@pytest.mark.parametrize("storage", [None, "nf4-fp8"])
def test_compiled_layers_that_are_recomputed_in_pieces_learn_the_same(storage: str | None) -> None:
    """Step after step: nothing may stay behind in one that the next would find."""
    ours, whole = (
        CompiledLoss(build(storage), FixedInputs(TOKENS, TOKENS)).train() for _ in range(2)
    )
    for layer in causal_model(whole.model).get_decoder().layers:
        layer._compiled_call_impl = None
    recompute.install(causal_model(ours.model), 2)
    assert chunked.install(ours.model, TOKENS // 4)
    for _ in range(4):
        agree(ours, whole, batch_of(TOKENS), 1e-3)
