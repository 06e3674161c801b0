"""Schedule, optimizer state, random generators."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from chatfine.train.optim import (
    Schedule,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    warmup_steps,
)
from chatfine.train.rng import rng_tensors, set_rng_tensors

CPU = torch.device("cpu")


def test_cosine_rises_falls_and_ends_at_zero() -> None:
    schedule = Schedule("cosine", 2.0, warmup=4, total=14)
    assert [schedule.at(step) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert schedule.at(4) == 2.0
    assert schedule.at(9) == pytest.approx(1.0)
    assert 0 < schedule.at(13) < schedule.at(12)
    assert schedule.at(14) == pytest.approx(0)
    assert schedule.at(20) == pytest.approx(0)


def test_linear_and_constant() -> None:
    linear = Schedule("linear", 1.0, warmup=0, total=4)
    assert [linear.at(step) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    constant = Schedule("constant", 3.0, warmup=2, total=4)
    assert [constant.at(step) for step in range(5)] == [1.5, 3.0, 3.0, 3.0, 3.0]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_a_warm_up_of_the_whole_run_is_possible(kind: str) -> None:
    assert Schedule(kind, 1.0, warmup=3, total=3).at(2) == 1.0


@pytest.mark.parametrize(
    ("warmup", "total", "steps"),
    [(0, 100, 0), (0.03, 100, 3), (0.03, 12, 1), (0.5, 3, 2), (1, 100, 1), (7, 100, 7), (50, 9, 9)],
)
def test_warm_up_is_a_share_or_a_number(warmup: float, total: int, steps: int) -> None:
    assert warmup_steps(warmup, total) == steps


def step(model: nn.Module, optimizer: torch.optim.Optimizer, rate: float = 0.1) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    model(torch.linspace(-1, 1, 12).view(4, 3)).square().sum().backward()
    optimizer.step()


def test_only_matrices_decay() -> None:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    optimizer = make_optimizer(dict(model.named_parameters()), 0.5, CPU)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(model.weight, torch.full((2, 3), 0.95))
    assert torch.equal(model.bias, torch.ones(2))


def test_a_restored_optimizer_goes_on_bit_by_bit() -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, make_optimizer(dict(model.named_parameters()), 0.1, CPU)

    whole, optimizer = make()
    step(whole, optimizer)
    step(whole, optimizer)
    weights = {name: value.clone() for name, value in whole.state_dict().items()}
    tensors = optimizer_tensors(optimizer, dict(whole.named_parameters()))
    assert sorted(tensors) == [
        "bias|exp_avg", "bias|exp_avg_sq", "bias|step",
        "weight|exp_avg", "weight|exp_avg_sq", "weight|step",
    ]  # fmt: skip
    tensors = {name: value.clone() for name, value in tensors.items()}
    step(whole, optimizer)

    again, other = make()
    again.load_state_dict(weights)
    load_optimizer_tensors(other, dict(again.named_parameters()), tensors)
    step(again, other)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def draw() -> list[float]:
    return [
        random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn()),
        float(torch.rand(())), float(torch.randn(())),
    ]  # fmt: skip


def test_every_generator_goes_on_where_it_was() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    draw()  # leaves half a pair of normal numbers in Python's and numpy's
    states = {name: value.clone() for name, value in rng_tensors(CPU).items()}
    first = [draw() for _ in range(3)]
    draw()
    set_rng_tensors(states, CPU)
    assert [draw() for _ in range(3)] == first


# -- bf16 states -----------------------------------------------------------------------------------


def fit(kind: str, dtype: torch.dtype, kahan: bool = False, steps: int = 300) -> float:
    """Distance to the target after some steps of a least-squares problem."""
    torch.manual_seed(0)
    target = torch.randn(64, 64)
    weight = torch.nn.Parameter(torch.zeros(64, 64, dtype=dtype))
    optimizer = make_optimizer({"w": weight}, 0.0, torch.device("cpu"), kind, kahan)
    for step in range(steps):
        optimizer.zero_grad()
        ((weight.float() - target) ** 2).mean().backward()
        for group in optimizer.param_groups:
            group["lr"] = 2e-2 * (1 - step / steps)
        optimizer.step()
    return float((weight.detach().float() - target).norm() / target.norm())


def test_bf16_moments_learn_what_float32_moments_learn() -> None:
    exact = fit("adamw", torch.float32)
    assert fit("anyprecision", torch.float32) < exact + 0.01


@pytest.mark.parametrize("kahan", [False, True])
def test_bf16_weights_learn_what_float32_weights_learn(kahan: bool) -> None:
    exact = fit("adamw", torch.float32)
    assert fit("adamw", torch.bfloat16) > exact + 0.03, "what rounding to nearest loses"
    assert fit("anyprecision", torch.bfloat16, kahan) < exact + 0.01


def test_small_updates_of_bf16_weights_are_not_lost() -> None:
    """1 + 1e-4 is 1 in bf16; a hundred such updates together are not."""
    for kahan in (False, True):
        torch.manual_seed(1)
        weight = torch.nn.Parameter(torch.ones(4096, 1, dtype=torch.bfloat16))
        optimizer = make_optimizer({"w": weight}, 0.0, torch.device("cpu"), "anyprecision", kahan)
        optimizer.param_groups[0]["lr"] = 1e-4
        for _ in range(100):
            weight.grad = torch.full_like(weight, -1.0)
            optimizer.step()
        assert weight.float().mean().item() == pytest.approx(1.01, abs=4e-3)  # half a bf16 step


def test_rounding_is_right_on_average() -> None:
    from chatfine.train.optim import store

    torch.manual_seed(0)
    value = torch.full((200_000,), 1.0 + 0.3 * 2**-7)  # 3/10 of the way to the next bf16
    target = torch.empty_like(value, dtype=torch.bfloat16)
    store(target, value)
    assert set(target.float().tolist()) == {1.0, 1.0 + 2**-7}
    assert target.float().mean().item() == pytest.approx(value[0].item(), abs=1e-4)


def test_bf16_states_go_on_after_a_restart() -> None:
    weight = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    optimizer = make_optimizer({"w": weight}, 0.0, torch.device("cpu"), "anyprecision", True)
    optimizer.param_groups[0]["lr"] = 1e-2
    weight.grad = torch.randn(8, 8).to(torch.bfloat16)
    optimizer.step()
    saved = {name: value.clone() for name, value in
             optimizer_tensors(optimizer, {"w": weight}).items()}  # fmt: skip
    assert {name.partition("|")[2] for name in saved} == {"step", "exp_avg", "exp_avg_sq", "lost"}
    again = torch.nn.Parameter(weight.detach().clone())
    other = make_optimizer({"w": again}, 0.0, torch.device("cpu"), "anyprecision", True)
    other.param_groups[0]["lr"] = 1e-2
    load_optimizer_tensors(other, {"w": again}, saved)
    for one, optim in ((weight, optimizer), (again, other)):
        torch.manual_seed(5)
        one.grad = torch.full((8, 8), 0.5, dtype=torch.bfloat16)
        optim.step()
    assert torch.equal(weight, again)


# -- 8-bit states ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adamw8bit", "paged-adamw8bit"])
@pytest.mark.parametrize(("dtype", "more"), [(torch.float32, 0.01), (torch.bfloat16, 0.03)])
def test_8_bit_moments_learn_what_float32_moments_learn(
    kind: str, dtype: torch.dtype, more: float
) -> None:
    pytest.importorskip("bitsandbytes")
    assert fit(kind, dtype) < fit("adamw", dtype) + more


def test_8_bit_states_go_on_after_a_restart(device: torch.device) -> None:
    """Matrices of 8-bit moments, and a small one of float32 moments; plain and paged."""
    pytest.importorskip("bitsandbytes")
    for kind in ("adamw8bit", "paged-adamw8bit"):
        torch.manual_seed(0)
        weights = {"large": nn.Parameter(torch.randn(400, 300, device=device)),
                   "small": nn.Parameter(torch.randn(5, 7, device=device))}  # fmt: skip
        gradients = [{n: torch.randn_like(p) for n, p in weights.items()} for _ in range(4)]

        def steps(
            values: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer,
            some: list[dict[str, torch.Tensor]],
        ) -> None:  # fmt: skip
            for gradient in some:
                for name, parameter in values.items():
                    parameter.grad = gradient[name].clone()
                for group in optimizer.param_groups:
                    group["lr"] = 1e-2
                optimizer.step()

        optimizer = make_optimizer(weights, 0.1, device, kind)
        steps(weights, optimizer, gradients[:2])
        tensors = optimizer_tensors(optimizer, weights)
        assert tensors["large|state1"].dtype == torch.uint8
        assert tensors["small|state1"].dtype == torch.float32
        assert tensors["large|step"].item() == 2
        saved = {name: value.detach().cpu().clone() for name, value in tensors.items()}
        again = {name: nn.Parameter(value.detach().clone()) for name, value in weights.items()}
        other = make_optimizer(again, 0.1, device, kind)
        load_optimizer_tensors(other, again, saved)
        steps(weights, optimizer, gradients[2:])
        steps(again, other, gradients[2:])
        assert all(torch.equal(weights[name], again[name]) for name in weights)
        fresh = {name: nn.Parameter(p.detach().clone()) for name, p in again.items()}
        steps(fresh, make_optimizer(fresh, 0.1, device, kind), gradients[:1])
        steps(again, other, gradients[:1])
        assert not torch.equal(fresh["large"], again["large"]), "its state matters"


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    return torch.device(request.param)
