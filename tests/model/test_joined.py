"""Linears that read the same states as one product, against each by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from chatfine.model import adapters, lora
from chatfine.model.frozen import FrozenLinear
from chatfine.model.joined import join

SIZE = 28
OUTS = {"q_proj": 24, "k_proj": 7, "v_proj": 7, "o_proj": 20, "gate_proj": 33, "up_proj": 33}


class Linears(nn.Module):
    """Linears that read the same states; some have a bias."""

    def __init__(self) -> None:
        super().__init__()
        for name, out in OUTS.items():
            self.add_module(name, nn.Linear(SIZE, out, bias=name == "k_proj"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in self.children()], -1)


def adapted(dtype: torch.dtype = torch.float64, packed: tuple[str, ...] = ()) -> Any:
    torch.manual_seed(0)
    linears = Linears().to(dtype)
    for name in packed:
        setattr(linears, name, FrozenLinear.of(linears.get_submodule(name), "int8"))
    model: Any = get_peft_model(linears, LoraConfig(r=5, lora_alpha=9, target_modules=list(OUTS)))
    for parameter in adapters.trained_parameters(model).values():
        parameter.data = torch.randn_like(parameter, dtype=dtype) / 4
    assert lora.install(model) == len(OUTS)
    return model


def layers_of(model: Any) -> dict[str, Any]:
    named = model.named_modules()
    return {name.rpartition(".")[2]: one for name, one in named if hasattr(one, "fused_adapter")}


@pytest.mark.parametrize("compiled", [False, True])
def test_outputs_and_gradients_are_those_of_the_single_layers(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the path for a compiler is the same arithmetic in other operations
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    single, both = adapted(), adapted()
    assert [len(one.layers) for one in join(both)] == [3, 2]
    x = torch.randn(2, 11, SIZE, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(2, 11, sum(OUTS.values()), dtype=torch.float64)
    results = []
    for model in (single, both):
        y = model(x)
        inputs = (x, *adapters.trained_parameters(model).values())
        results.append((y, *torch.autograd.grad(y, inputs, direction)))
    assert len(results[0]) == 2 + 2 * len(OUTS)
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


def test_weights_become_views_and_names_stay() -> None:
    single, both = adapted(), adapted()
    (first, second) = join(both)
    for group in (first, second):
        (whole,) = group.packed
        begin, end = whole.data_ptr(), whole.data_ptr() + whole.nbytes
        for layer in group.layers:
            assert begin <= layer.base_layer.weight.data_ptr() < end
            assert layer.base_layer.weight.is_contiguous()
    states = single.state_dict(), both.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_layer_that_is_switched_off_and_one_that_is_let_go() -> None:
    single, both = adapted(), adapted()
    groups = join(both)
    x = torch.randn(3, SIZE, dtype=torch.float64)
    with single.disable_adapter(), both.disable_adapter():
        torch.testing.assert_close(both(x), single(x))
    for group in groups:
        group.drop()
    assert all(layer.group is None for layer in layers_of(both).values())
    torch.testing.assert_close(both(x), single(x))


def test_what_is_packed_or_scaled_otherwise_stays_alone() -> None:
    assert [len(one.layers) for one in join(adapted(torch.float32, ("k_proj",)))] == [2]
    model = adapted()
    layers_of(model)["up_proj"].scaling["default"] = 0.5
    assert [len(one.layers) for one in join(model)] == [3]


def test_states_of_a_wider_format_are_taken_in_the_weights_own() -> None:
    model = adapted(torch.bfloat16)
    join(model)
    assert model(torch.randn(3, SIZE)).dtype == torch.bfloat16
