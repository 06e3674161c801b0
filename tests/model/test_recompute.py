"""Recomputed layers: the same gradients, less that is kept, and only where something is kept."""

from __future__ import annotations

import gc
import itertools
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from chatfine.data.batches import collate
from chatfine.model import adapters, fast, recompute
from chatfine.model.load import load_model
from chatfine.types import Batch, Example

LAYERS = 5


@pytest.fixture(scope="module")
def deep(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with more layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("deep") / "model"
    shutil.copytree(tiny, folder)
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(tiny, num_hidden_layers=LAYERS)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def batch_of(lengths: tuple[int, ...] = (20, 9, 31), seed: int = 0) -> Batch:
    numbers = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 400, (n,), generator=numbers).tolist() for n in lengths]
    return collate([Example(one, [True] * len(one)) for one in ids])


def model_of(path: Path, method: str = "lora", storage: str = "none", **options: Any) -> Any:
    torch.manual_seed(5)
    model = adapters.attach(load_model(path, torch.float32, quantize=storage), method, **options)
    for name, parameter in adapters.trained_parameters(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def gradients(model: Any, batch: Batch, seed: int = 3) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    fast.loss_sum(model, batch).backward()  # type: ignore[no-untyped-call]
    learned = adapters.trained_parameters(model)
    return {n: p.grad.clone() for n, p in learned.items() if p.grad is not None}


def layers_of(model: Any) -> Any:
    return fast.causal_model(model).get_decoder().layers


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("layers", [0, 1, 3, LAYERS, 99])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradients_are_the_same_bits(deep: Path, method: str, layers: int, offload: bool) -> None:
    model, batch = model_of(deep, method), batch_of()
    exact = gradients(model, batch)
    assert recompute.install(fast.causal_model(model), layers, offload) == min(layers, LAYERS)
    assert same(exact, gradients(model, batch))
    assert same(exact, gradients(model, batch)), "and in every pass"


@pytest.mark.parametrize(("method", "options", "storage"), [
    ("lora", {"dropout": 0.3}, "none"), ("dora", {"dropout": 0.3}, "int8"),
    ("freeze", {"freeze_layers": 2}, "none"), ("llama-adapter", {"adapter_layers": 3}, "none"),
    ("lora", {"adapter_layers": 2}, "int8"),
])  # fmt: skip
def test_every_method_and_the_numbers_of_dropout(
    deep: Path, method: str, options: dict[str, Any], storage: str
) -> None:
    model, batch = model_of(deep, method, storage, **options), batch_of()
    exact = gradients(model, batch)
    assert not options.get("dropout") or not same(exact, gradients(model, batch, seed=4))
    recompute.install(fast.causal_model(model), LAYERS)
    assert same(exact, gradients(model, batch))


def kept_by(model: Any, batch: Batch) -> int:
    """How many tensors the forward pass keeps outside of recomputed layers."""
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        fast.loss_sum(model, batch)
    return len(kept)


def test_each_layer_keeps_one_tensor_instead_of_many(deep: Path) -> None:
    model, batch = model_of(deep), batch_of()
    causal = fast.causal_model(model)
    found = []
    for layers in range(LAYERS + 1):
        recompute.install(causal, layers)
        found.append(kept_by(model, batch))
    saved = [a - b for a, b in itertools.pairwise(found)]
    assert min(saved) > 20
    assert max(saved) - min(saved) < 10, "the first layer's input needs no gradient"
    recompute.install(causal, 0)
    assert kept_by(model, batch) == found[0], "and it can be undone"


def order_of_calls(model: Any, batch: Batch) -> list[int]:
    calls: list[int] = []
    handles = [
        layer.self_attn.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
        for i, layer in enumerate(layers_of(model))
    ]
    gradients(model, batch)
    for handle in handles:
        handle.remove()
    return calls


def test_the_first_layers_that_learn_are_taken(deep: Path) -> None:
    model, batch = model_of(deep), batch_of()
    once = list(range(LAYERS))
    recompute.install(fast.causal_model(model), 2)
    assert order_of_calls(model, batch) == [*once, 1, 0], "the last layers are not repeated"
    partial = model_of(deep, adapter_layers=3)
    assert recompute.install(fast.causal_model(partial), 2) == 2
    assert order_of_calls(partial, batch) == [*once, 3, 2]
    assert recompute.install(fast.causal_model(partial), LAYERS) == 3
    rows = model_of(deep, rows=[5, 6], adapter_layers=3)
    assert recompute.install(fast.causal_model(rows), LAYERS) == LAYERS


def test_nothing_is_repeated_when_nothing_is_learned(deep: Path) -> None:
    model, batch = model_of(deep), batch_of()
    recompute.install(fast.causal_model(model), LAYERS, offload=True)
    model.eval()
    assert order_of_calls(model, batch) == list(range(LAYERS))
    model.train()
    with torch.no_grad():
        whole = fast.loss_sum(model, batch)
    assert torch.equal(whole, fast.loss_sum(model.eval(), batch).detach())


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("compiled_first", [True, False])
def test_compiled_layers(deep: Path, compiled_first: bool, fresh_compiler: None) -> None:
    """The program of a layer is compiled once and serves the repetition too."""
    model, batch = model_of(deep), batch_of()
    exact = gradients(model, batch)
    programs = []

    def backend(graph: Any, inputs: Any) -> Any:
        programs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def compile_layers() -> None:
        for layer in layers_of(model):
            layer.compile(dynamic=False, backend=backend)

    if compiled_first:
        compile_layers()
    recompute.install(fast.causal_model(model), 3, offload=True)
    if not compiled_first:
        compile_layers()
    fast.causal_model(model).get_input_embeddings().register_forward_hook(
        lambda _, __, out: out.requires_grad_()
    )
    found = gradients(model, batch)
    assert found.keys() == exact.keys()
    for name, one in exact.items():
        torch.testing.assert_close(found[name], one, atol=1e-4, rtol=1e-4)
    assert len(programs) == 1
    for layer in layers_of(model):  # as `CompiledLoss.give_up` does
        layer._compiled_call_impl = None
    assert same(exact, gradients(model, batch))
    assert order_of_calls(model, batch)[LAYERS:] == [2, 1, 0]


def test_the_shelf_holds_nothing_after_the_backward_pass(deep: Path) -> None:
    model = model_of(deep)
    recompute.install(fast.causal_model(model), 3, offload=True)
    loss = fast.loss_sum(model, batch_of())
    shelf = layers_of(model)[0].recomputation.shelf
    kept = []
    waiting = shelf.last
    while waiting is not None:
        kept.append(weakref.ref(waiting))
        waiting = waiting.before
    assert len(kept) == 3, "the inputs of those layers and nothing else"
    loss.backward()  # type: ignore[no-untyped-call]
    assert shelf.last is None
    del loss
    gc.collect()
    assert all(one() is None for one in kept)


def test_two_passes_before_their_backward_passes(deep: Path) -> None:
    model = model_of(deep)
    one, other = batch_of(), batch_of((40,), seed=1)
    exact = [gradients(model, batch) for batch in (one, other)]
    recompute.install(fast.causal_model(model), LAYERS, offload=True)
    model.zero_grad()
    losses = [fast.loss_sum(model, batch) for batch in (one, other)]
    for loss in losses:
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    for name, parameter in adapters.trained_parameters(model).items():
        torch.testing.assert_close(parameter.grad, exact[0][name] + exact[1][name])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_inputs_leave_the_card_and_come_back(deep: Path) -> None:
    model, batch = model_of(deep).to("cuda"), batch_of((3000, 5000)).to("cuda")
    causal = fast.causal_model(model)
    peaks, found = [], []
    for layers, offload in ((0, False), (LAYERS, False), (LAYERS, True)):
        recompute.install(causal, layers, offload)
        gradients(model, batch)
        torch.cuda.reset_peak_memory_stats()
        found.append(gradients(model, batch))
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[0] > peaks[1] > peaks[2]
    assert all(same(found[0], one) for one in found[1:])
