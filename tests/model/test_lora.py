"""The fused LoRA forward against PEFT's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from chatfine.data.batches import collate
from chatfine.model import adapters, fast, lora
from chatfine.model.frozen import FrozenLinear
from chatfine.model.load import load_model
from chatfine.types import Batch, Example

BATCH: Batch = collate([Example(list(range(5, 25)), [True] * 20), Example([7, 8, 9], [True] * 3)])


def adapted(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model with an adapter that is not the identity."""
    model = adapters.attach(load_model(path, dtype), options.pop("method", "lora"), **options)
    torch.manual_seed(1)
    for parameter in adapters.trained_parameters(model).values():
        nn.init.normal_(parameter, std=0.1)
    return model


def fused(model: nn.Module) -> int:
    return sum(isinstance(m, lora._fused()) for m in model.modules())


def loss_and_gradients(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = fast.loss_sum(model, BATCH)
    loss.backward()
    found = {
        name: parameter.grad.clone()
        for name, parameter in adapters.trained_parameters(model).items()
        if parameter.grad is not None
    }
    return loss.item(), found


def test_every_plain_linear_is_fused(tiny: Path) -> None:
    assert fused(adapted(tiny)) == 14
    assert fused(adapted(tiny, targets="q_proj,v_proj")) == 4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)])
def test_loss_and_gradients_are_those_of_peft(
    tiny: Path, dtype: torch.dtype, tolerance: float
) -> None:
    model = adapted(tiny, dtype, rank=4)
    got, grads = loss_and_gradients(model)
    lora.uninstall(model)
    assert fused(model) == 0
    if dtype is torch.bfloat16:  # PEFT computes a float32 adapter in float32
        for parameter in adapters.trained_parameters(model).values():
            parameter.data = parameter.data.bfloat16()
    wanted, slow = loss_and_gradients(model)
    assert got == pytest.approx(wanted, rel=tolerance / 10)
    assert len(grads) == 28
    assert grads.keys() == slow.keys()
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert ((grad - slow[name].float()).norm() / slow[name].norm()).item() < tolerance, name


def test_one_layer_in_float64_agrees_in_output_and_all_gradients() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 20, bias=False)).double()
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=3, lora_alpha=5, target_modules=["0"])
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    for parameter in adapters.trained_parameters(model).values():
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, 7, 12, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(2, 3, 7, 20, dtype=torch.float64)
    inputs = (x, *adapters.trained_parameters(model).values())
    results = []
    for install in (False, True):
        if install:
            assert lora.install(model) == 1
        y = model(x)
        results.append((y, *torch.autograd.grad((y * direction).sum(), inputs)))
    for slow, quick in zip(*results, strict=True):
        torch.testing.assert_close(quick, slow, atol=1e-12, rtol=1e-12)


def test_switched_off_it_is_the_base_model(tiny: Path) -> None:
    base = fast.loss_sum(load_model(tiny, torch.float32), BATCH).item()
    model = adapted(tiny)
    on = fast.loss_sum(model, BATCH).item()
    with model.disable_adapter():
        off = fast.loss_sum(model, BATCH).item()
    assert off == base
    assert abs(on - base) > 0.1
    assert fast.loss_sum(model, BATCH).item() == on


def test_merging_and_another_active_adapter_are_noticed(tiny: Path) -> None:
    from peft import LoraConfig

    model = adapted(tiny)
    on = fast.loss_sum(model, BATCH).item()
    model.merge_adapter()
    assert fast.loss_sum(model, BATCH).item() == pytest.approx(on, rel=1e-5)
    model.unmerge_adapter()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("second")  # untrained: changes nothing
    base = fast.loss_sum(load_model(tiny, torch.float32), BATCH).item()
    assert fast.loss_sum(model, BATCH).item() == pytest.approx(base, rel=1e-5)


@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"method": "dora"}])
def test_what_is_not_plain_keeps_the_forward_of_peft(tiny: Path, options: Any) -> None:
    model = adapted(tiny, **options)
    assert fused(model) == 0
    loss, grads = loss_and_gradients(model)
    assert loss > 0
    assert all(grad.abs().max() > 0 for grad in grads.values())


@pytest.mark.parametrize("storage", [None, "int8"])
def test_a_linear_with_a_bias_is_fused_and_agrees_with_peft(storage: str | None) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    linears = [nn.Linear(12, 20), nn.Linear(20, 4, bias=False)]
    if storage:
        linears = [FrozenLinear.of(one, storage) for one in linears]
    config = LoraConfig(r=2, target_modules=["0", "1"])
    model = get_peft_model(nn.Sequential(*linears), config)
    for parameter in adapters.trained_parameters(model).values():
        nn.init.normal_(parameter)
    x = torch.randn(5, 12, requires_grad=True)
    inputs = (x, *adapters.trained_parameters(model).values())
    results = []
    for install in (False, True):
        if install:
            assert lora.install(model) == 2
        y = model(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    for slow, quick in zip(*results, strict=True):
        torch.testing.assert_close(quick, slow, atol=1e-4, rtol=1e-4)


def test_dropout_acts_in_training_only(tiny: Path) -> None:
    model = adapted(tiny, dropout=0.5)
    model.eval()
    assert fast.loss_sum(model, BATCH).item() == fast.loss_sum(model, BATCH).item()
    model.train()
    assert fast.loss_sum(model, BATCH).item() != fast.loss_sum(model, BATCH).item()
