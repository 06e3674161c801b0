"""Compiled decoder layers and micro-batches of fixed shapes, against layers as they are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from chatfine.data.batches import collate
from chatfine.model import adapters, attention, chunked, cross_entropy, lora, recompute, storages
from chatfine.model.compiled import MIN_DOCUMENTS, CompiledLoss, FixedInputs, supports
from chatfine.model.fast import LossModel, causal_model
from chatfine.model.frozen import FrozenLinear, linears_to_freeze
from chatfine.model.graphs import WARM_RUNS, GraphedLoss
from chatfine.types import IGNORE_INDEX, Batch, Example

TOKENS, LONGEST = 64, 32


@pytest.fixture
def rounds_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply 8-bit floats on a CPU too, by the twin of the card's product."""
    for module in (storages, lora):
        monkeypatch.setattr(module, "multiplies_fp8", lambda x, out, size: not (out | size) % 16)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the compiler."""
    monkeypatch.setattr(nn.Module, "compile", lambda *args, **kwargs: None)
    monkeypatch.setattr(
        cross_entropy, "_compiled_gradient", lambda: cross_entropy._softmax_gradient
    )


def build(storage: str | None = None, b: float = 0.1) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1,
        )
    )  # fmt: skip
    attention.install(model)
    for name, layer in linears_to_freeze(model).items() if storage else ():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, FrozenLinear.of(layer, storage))
    model = adapters.attach(model, "lora", rank=4)
    for name, parameter in adapters.trained_parameters(model).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=b)
    return model


def batch_of(*lengths: int) -> Batch:
    drawn = torch.Generator().manual_seed(sum(lengths))
    rows = [torch.randint(3, 96, (length,), generator=drawn).tolist() for length in lengths]
    return collate([Example(row, [i > 1 for i in range(len(row))]) for row in rows])


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
        if not graphed.keeps_gradients:
            graphed.gradients = [one.grad for one in graphed.learning]
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


# -- the cross entropy -----------------------------------------------------------------------------


def drawn(vocabulary: Sequence[int]) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(sum(vocabulary))
    hidden = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    parts = [torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in vocabulary]
    labels = torch.randint(0, sum(vocabulary), (11,))
    labels[[0, 4, 10]] = torch.tensor([IGNORE_INDEX, -1, IGNORE_INDEX])
    return hidden, parts, labels


@pytest.mark.parametrize("vocabulary", [(9,), (5, 4), (3, 1, 7)])
@pytest.mark.parametrize("compiled", [False, True])
def test_labels_below_zero_count_nothing(
    vocabulary: tuple[int, ...], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        cross_entropy, "_compiled_gradient", lambda: cross_entropy._softmax_gradient
    )
    hidden, parts, labels = drawn(vocabulary)
    ours = cross_entropy.linear_cross_entropy(hidden, parts, labels, compiled)
    counts = labels >= 0
    slow = F.cross_entropy(hidden[counts] @ torch.cat(parts).t(), labels[counts], reduction="sum")
    torch.testing.assert_close(ours, slow)
    inputs = (hidden, *parts)
    got = torch.autograd.grad(2 * ours, inputs)
    wanted = torch.autograd.grad(2 * slow, inputs)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
    assert not got[0][~counts].any()


def test_both_ways_to_the_gradient_of_the_logits_agree() -> None:
    hidden, (weight,), labels = drawn((9,))
    with torch.no_grad():
        loss, (gradient,) = cross_entropy._gradients(hidden, [weight], labels, True)
        other, again = cross_entropy._softmax_gradient(F.linear(hidden, weight), labels)
    torch.testing.assert_close(loss, other)
    torch.testing.assert_close(gradient, again)
    assert not gradient[labels < 0].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocabulary", [7, 100, 4096, 49152])
@pytest.mark.parametrize("ignored", [0, 5, 13])
def test_the_program_for_the_gradient_of_the_logits_is_its_twin(
    dtype: torch.dtype, vocabulary: int, ignored: int
) -> None:
    torch.manual_seed(vocabulary)
    logits = (10 * torch.randn(13, vocabulary)).to("cuda", dtype)
    labels = torch.randint(0, vocabulary, (13,), device="cuda")
    labels[torch.randperm(13)[:ignored]] = IGNORE_INDEX
    wanted_loss, wanted = cross_entropy._softmax_gradient(logits.clone(), labels)
    loss, gradient = cross_entropy.softmax_gradient(logits, labels)
    assert (loss.dtype, gradient.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-5)
    rtol = 1e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(gradient, wanted, rtol=rtol, atol=1e-5)
    assert not gradient[labels < 0].any()
    assert gradient.data_ptr() == logits.data_ptr()


def test_nothing_but_labels_that_count_nothing_is_no_loss() -> None:
    hidden, parts, labels = drawn((9,))
    loss = cross_entropy.linear_cross_entropy(hidden, parts, torch.full_like(labels, IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()
