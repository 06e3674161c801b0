"""Adapters inside the product of their fp8 weight, against exact products of the rounded weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from chatfine.model import adapters, lora, storages
from chatfine.model.fp8 import E4M3, E4M3_MAX
from chatfine.model.frozen import FrozenLinear
from chatfine.model.lora_fp8 import ALIGNMENT, Groups, tail_width

RANK, SCALE, SIZE = 16, 2.0, 256
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
OUTS = (192, 64, 64, 256, 320, 320)
KINDS = [("fp8", False), ("fp8", True), ("nf4-fp8", False)]


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply 8-bit floats by the twin of the card's product."""
    for module in (storages, lora):
        monkeypatch.setattr(module, "multiplies_fp8", lambda x, out, size: not (out | size) % 16)


class Linears(nn.Module):
    """Linears that read the same states."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        for name, out in sizes.items():
            self.add_module(name, nn.Linear(SIZE, out, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in self.children()], -1)


def adapted(storage: str, turned: bool, b: float, names: Sequence[str] = NAMES) -> Any:
    """A model with fused adapters whose B is of the magnitude `b`."""
    torch.manual_seed(0)
    linears = Linears({n: out for n, out in zip(NAMES, OUTS, strict=True) if n in names})
    for name, layer in list(linears.named_children()):
        nn.init.normal_(layer.weight, std=0.02)
        base = FrozenLinear.of(layer, storage)
        if turned:
            base.keep_turned()
        setattr(linears, name, base)
    config = LoraConfig(r=RANK, lora_alpha=int(SCALE * RANK), target_modules=list(names))
    model = get_peft_model(linears, config)
    for name, parameter in adapters.trained_parameters(model).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=b)
    assert lora.install(model) == len(names)
    return model


def grouped(model: Any) -> Groups:
    groups = Groups(model, lora.on_fp8(model))
    groups.refresh()
    return groups


def layers_of(model: Any) -> list[Any]:
    return [one for one in model.modules() if isinstance(one, lora._fused())]


def exact(model: Any, x: torch.Tensor) -> torch.Tensor:
    """x W'ᵀ + s (x Aᵀ) Bᵀ with the rounded weight W'."""
    parts = []
    for layer in layers_of(model):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        parts.append(x @ layer.base_layer.dequantize().t() + SCALE * (x @ a.t()) @ b.t())
    return torch.cat(parts, -1)


def states(tokens: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, tokens, SIZE, requires_grad=True), torch.randn(
        2, tokens, sum(OUTS)
    ) * 1e-4


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(("storage", "turned"), KINDS)
@pytest.mark.parametrize("b", [1e-5, 1e-3, 0.05])
def test_output_and_gradients_are_exact_but_for_the_left_factors_rounding(
    storage: str, turned: bool, b: float
) -> None:
    model = adapted(storage, turned, b)
    grouped(model)
    x, direction = states()
    inputs = (x, *adapters.trained_parameters(model).values())
    assert len(inputs) == 1 + 2 * len(NAMES)
    got, wanted = model(x), exact(model, x)
    assert 1e-4 < distance(got, wanted) < 0.06  # rounded, and by no more than that
    grads = torch.autograd.grad(got, inputs, direction)
    slow = torch.autograd.grad(wanted, inputs, direction)
    assert 1e-4 < distance(grads[0], slow[0]) < 0.06
    for grad, other in zip(grads[1:], slow[1:], strict=True):
        assert grad.dtype == torch.float32
        assert distance(grad, other) < 1e-6


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("b", [1e-5, 1e-3, 0.05])
def test_the_adapters_own_part_is_far_more_exact(turned: bool, b: float) -> None:
    """Where states, weight and upstream gradient are 8-bit floats only the adapter is rounded."""
    model = adapted("fp8", turned, b)
    for base in (layer.base_layer for layer in layers_of(model)):
        codes = torch.randint(-15, 16, base.weight.shape).float()
        base.weight.data = codes.to(E4M3).view(torch.uint8)
        base.scales.data = torch.full((base.out_features, 1), 2**-8).view(torch.uint8)
        if turned:
            base.keep_turned()
    grouped(model)
    x = (torch.randint(-8, 9, (40, SIZE)) * 8).float()
    x[:, 0] = E4M3_MAX  # so that a row's scale is one
    direction = (torch.randint(-8, 9, (40, sum(OUTS))) * 8).float()
    direction[:, [sum(OUTS[:i]) for i in range(len(OUTS))]] = E4M3_MAX
    x.requires_grad_()
    weight = torch.cat([layer.base_layer.dequantize() for layer in layers_of(model)])
    results = [(y, torch.autograd.grad(y, x, direction)[0]) for y in (model(x), exact(model, x))]
    for got, wanted, plain in zip(*results, (x @ weight.t(), direction @ weight), strict=True):
        assert distance(got, wanted) < 0.01
        if b >= 1e-3:  # a smaller B falls below the smallest 8-bit float, and below W's own steps
            assert distance(got - plain, wanted - plain) < 0.01


def test_what_reads_the_same_states_is_one_product() -> None:
    model = adapted("fp8", True, 0.05)
    before = [layer.base_layer.dequantize() for layer in layers_of(model)]
    groups = grouped(model)
    names = {id(layer): name.rpartition(".")[2] for name, layer in model.named_modules()}
    joined = [[names[id(layer)] for layer in group.layers] for group in groups.groups]
    assert joined == [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"], ["o_proj"]]
    for group in groups.groups:
        codes = group.packed[0]
        begin, end = codes.data_ptr(), codes.data_ptr() + codes.numel()
        assert codes.shape[1] == SIZE + tail_width(SIZE, RANK * len(group.layers))
        for layer in group.layers:  # no copy of the weight stays behind
            assert begin <= layer.base_layer.weight.data_ptr() < end
            assert layer.base_layer.turned is None
    for layer, weight in zip(layers_of(model), before, strict=True):
        assert torch.equal(layer.base_layer.dequantize(), weight)


def test_linears_of_which_one_is_missing_or_different_stay_alone() -> None:
    model = adapted("fp8", False, 0.05, names=("q_proj", "v_proj", "gate_proj", "up_proj"))
    layers_of(model)[3].scaling["default"] = 1.0  # of up_proj
    assert [len(group.layers) for group in grouped(model).groups] == [1, 1, 1, 1]


@pytest.mark.parametrize(("size", "rank"), [(256, 1), (64, 16), (80, 8), (4096, 192)])
def test_the_summed_dimension_is_aligned_and_holds_three_columns_a_rank(
    size: int, rank: int
) -> None:
    width = tail_width(size, rank)
    assert (size + width) % ALIGNMENT == 0
    assert 3 * rank <= width < 3 * rank + ALIGNMENT


@pytest.mark.parametrize(("storage", "turned"), KINDS)
def test_a_changed_adapter_counts_once_its_columns_are_written_anew(
    storage: str, turned: bool
) -> None:
    model = adapted(storage, turned, 1e-3)
    groups = grouped(model)
    x, direction = states()
    (before,) = torch.autograd.grad(model(x), x, direction)
    with torch.no_grad():
        for parameter in adapters.trained_parameters(model).values():
            parameter.mul_(-20)
    stale = exact(model, x).detach()
    assert distance(model(x), stale) > 0.1
    groups.refresh()
    assert distance(model(x), stale) < 0.06
    got, wanted = (torch.autograd.grad(y, x, direction)[0] for y in (model(x), exact(model, x)))
    assert distance(got, wanted) < 0.06
    assert distance(before, wanted) > 0.1


def test_numbers_too_large_are_noticed_and_given_back_to_the_plain_path() -> None:
    model = adapted("fp8", True, 0.05)
    groups = grouped(model)
    assert groups.fits()
    weight = layers_of(model)[1].lora_B["default"].weight
    weight.data[3, 2] = 1e4
    assert not groups.fits()
    groups.drop()
    assert groups.fits()  # nothing is left that could overflow
    x, direction = states()
    plain = adapted("fp8", False, 0.05)
    layers_of(plain)[1].lora_B["default"].weight.data[3, 2] = 1e4
    ours, theirs = model(x), plain(x)
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    for got, wanted in zip(
        torch.autograd.grad(ours, x, direction), torch.autograd.grad(theirs, x, direction),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(got, wanted, atol=0, rtol=0)
    assert all(layer.base_layer.weight.is_contiguous() for layer in layers_of(model))


def test_a_layer_that_is_switched_off_is_its_base() -> None:
    model = adapted("fp8", True, 0.05)
    grouped(model)
    x, _ = states(5)
    weight = torch.cat([layer.base_layer.dequantize() for layer in layers_of(model)])
    with model.disable_adapter():
        assert distance(model(x), x @ weight.t()) < 0.06
    assert distance(model(x), exact(model, x)) < 0.06


@pytest.mark.parametrize(("storage", "turned"), KINDS)
def test_what_is_measured_and_answered_is_the_rounded_weight_exactly(
    storage: str, turned: bool
) -> None:
    model = adapted(storage, turned, 0.05)
    grouped(model)
    x, direction = states()
    wanted = exact(model, x)
    assert distance(model(x), wanted) > 1e-3
    model.eval()
    torch.testing.assert_close(model(x), wanted, atol=1e-5, rtol=1e-4)
    got, slow = (torch.autograd.grad(y, x, direction)[0] for y in (model(x), wanted))
    torch.testing.assert_close(got, slow, atol=1e-7, rtol=1e-4)
    with model.disable_adapter():
        weight = torch.cat([layer.base_layer.dequantize() for layer in layers_of(model)])
        torch.testing.assert_close(model(x), x @ weight.t(), atol=1e-5, rtol=1e-4)
    model.train()
    assert distance(model(x), wanted) > 1e-3
