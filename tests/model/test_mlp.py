"""An MLP on fp8 weights as one operation, against its linears one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from chatfine.model import adapters, chunked, joined, lora, mlp, storages
from chatfine.model.fp8 import E4M3, E4M3_MAX
from chatfine.model.fp8_rows import fp8_columns
from chatfine.model.frozen import FrozenLinear
from chatfine.model.lora_fp8 import Groups
from chatfine.model.mlp_fp8 import mlp_fp8_pieces
from chatfine.model.swiglu_fp8 import ROOM, ROOM_BACK, swiglu_fp8, swiglu_fp8_back

HIDDEN, INSIDE, RANK = 128, 320, 16
KINDS = [("fp8", False), ("fp8", True), ("nf4-fp8", False)]


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply 8-bit floats by the twin of the card's product."""
    for module in (storages, lora):
        monkeypatch.setattr(module, "multiplies_fp8", lambda x, out, size: not (out | size) % 16)


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


class Parent(nn.Module):
    """Something that has an MLP."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        settings = {"hidden_size": HIDDEN, "intermediate_size": INSIDE}
        self.mlp = LlamaMLP(LlamaConfig(**settings, hidden_act=activation))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.mlp(x)
        return y


class Doubled(LlamaMLP):
    """An MLP that says something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 2)
        return y


def adapted(
    storage: str = "fp8", turned: bool = True, b: float = 0.05, activation: str = "silu",
    targets: str = "gate_proj up_proj down_proj",
) -> Any:  # fmt: skip
    """A model with fused adapters, and groups whose columns are written."""
    torch.manual_seed(0)
    parent = Parent(activation)
    for name, layer in list(parent.mlp.named_children()):
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.05)
            base = FrozenLinear.of(layer, storage)
            if turned:
                base.keep_turned()
            setattr(parent.mlp, name, base)
    model = get_peft_model(
        parent, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets.split())
    )
    for name, parameter in adapters.trained_parameters(model).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=b)
    lora.install(model)
    groups = Groups(model, lora.on_fp8(model))
    groups.refresh()
    return model, groups


def grads_of(model: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output and all gradients for fixed states."""
    torch.manual_seed(1)
    x = torch.randn(2, 24, HIDDEN, requires_grad=True)
    y = model(x)
    inputs = (x, *adapters.trained_parameters(model).values())
    return y, list(torch.autograd.grad(y, inputs, torch.randn(y.shape) * 1e-4))


@pytest.mark.parametrize(("storage", "turned"), KINDS)
@pytest.mark.parametrize("b", [1e-5, 1e-3, 0.05])
def test_it_computes_what_its_linears_compute(storage: str, turned: bool, b: float) -> None:
    model, _ = adapted(storage, turned, b)
    wanted, slow = grads_of(model)
    assert mlp.install(model) == 1
    got, fast = grads_of(model)
    # the same roundings, in other units: a number here and there goes the other way
    assert distance(got, wanted) < 0.03
    for one, other in zip(fast, slow, strict=True):
        assert one.dtype == other.dtype
        assert distance(one, other) < 0.03


@pytest.mark.parametrize(("storage", "turned"), KINDS)
def test_in_pieces_it_computes_the_same_and_keeps_what_it_reads(storage: str, turned: bool) -> None:
    model, _ = adapted(storage, turned)
    mlp.install(model)
    wanted, slow = grads_of(model)
    pieces, _ = adapted(storage, turned)
    inner = pieces.base_model.model.mlp
    inner.__class__, inner.piece_tokens = chunked._in_pieces(type(inner)), 7
    assert mlp.install(pieces) == 1
    assert mlp.install(pieces) == 0
    got, fast = grads_of(pieces)
    # a product of other sizes may be off by a float32's last digit, and round the other way
    assert distance(got, wanted) < 1e-3
    for one, other in zip(fast, slow, strict=True):
        assert one.dtype == other.dtype
        assert distance(one, other) < 1e-3
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: sizes.append(x.numel()) or x, lambda x: x
    ):
        pieces(torch.randn(2, 24, HIDDEN, requires_grad=True))
    assert 48 * INSIDE not in sizes  # neither gate nor up nor what goes into down
    assert 48 * HIDDEN in sizes
    pieces.eval()
    model.eval()
    x = torch.randn(2, 24, HIDDEN)
    torch.testing.assert_close(pieces(x), model(x))
    for one in (pieces, model):
        mlp.uninstall(one)
        assert chunked.own_class(one.base_model.model.mlp) is LlamaMLP
    assert chunked.in_pieces(inner)


def test_against_exact_products_it_is_as_far_as_its_linears_are() -> None:
    model, groups = adapted()
    slow = grads_of(model)
    mlp.install(model)
    fast = grads_of(model)
    groups.drop()
    model.eval()  # which multiplies exactly
    exact = grads_of(model)
    for found in (slow, fast):
        assert 1e-3 < distance(found[0], exact[0]) < 0.08
        for one, other in zip(found[1], exact[1], strict=True):
            assert 1e-3 < distance(one, other) < 0.12
    for near, far, wanted in zip(fast[1], slow[1], exact[1], strict=True):
        assert distance(near, wanted) < 1.1 * distance(far, wanted)


def test_measured_or_switched_off_it_is_its_own_forward() -> None:
    model, groups = adapted()
    mlp.install(model)
    x = torch.randn(3, HIDDEN)
    trained = model(x)
    with model.disable_adapter():
        assert distance(model(x), trained) > 0.1
    assert torch.equal(model(x), trained)
    model.eval()
    measured = model(x)
    groups.drop()
    assert torch.equal(model(x), measured)
    model.train()
    assert model(x).isfinite().all()  # each linear by itself


@pytest.mark.parametrize(
    ("other", "count"),
    [
        ({"activation": "gelu"}, 1),
        ({"targets": "gate_proj up_proj"}, 1),
        ({"targets": "down_proj"}, 0),
    ],
)
def test_what_is_no_swiglu_on_fp8_computes_what_its_linears_compute(
    other: dict[str, str], count: int
) -> None:
    model, _ = adapted(**other)
    wanted, slow = grads_of(model)
    assert mlp.install(model) == count
    got, fast = grads_of(model)
    assert torch.equal(got, wanted)
    assert all(torch.equal(one, two) for one, two in zip(fast, slow, strict=True))


def test_another_forward_is_left_as_it_is() -> None:
    model, _ = adapted()
    model.base_model.model.mlp.__class__ = Doubled
    assert mlp.install(model) == 0


@pytest.mark.parametrize(("kind", "count"), [(LlamaMLP, 1), (Doubled, 0)])
def test_in_pieces_gate_and_up_are_joined_where_nothing_waits_between_them(
    kind: type[nn.Module], count: int
) -> None:
    parent = Parent("silu")
    model = get_peft_model(
        parent, LoraConfig(r=RANK, target_modules=["gate_proj", "up_proj", "down_proj"])
    )
    lora.install(model)
    parent.mlp.__class__ = chunked._in_pieces(kind)
    parent.mlp.piece_tokens = 7
    wanted, slow = grads_of(model)
    assert len(joined.join(model)) == count
    assert mlp.install(model) == count
    assert mlp.install(model) == 0  # once is enough
    assert chunked.in_pieces(parent.mlp)
    assert issubclass(chunked.own_class(parent.mlp), kind)
    got, fast = grads_of(model)
    torch.testing.assert_close(got, wanted)
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other)


def test_swiglu_and_its_gradient_are_torchs_and_their_codes_are_them_rounded() -> None:
    torch.manual_seed(0)
    both = torch.randn(7, 2 * INSIDE, requires_grad=True)
    gate, up = both.split(INSIDE, 1)
    wanted = nn.functional.silu(gate) * up
    h, codes, scales = swiglu_fp8(both.detach(), 64)
    torch.testing.assert_close(h, wanted.detach())
    assert codes.shape == (7, INSIDE + 64)
    found = codes[:, :INSIDE].view(E4M3).float()
    assert bool((found.abs().amax(1) == E4M3_MAX / ROOM).all())
    assert distance(found * scales, h) < 0.04

    grad, factors = torch.randn(7, INSIDE), torch.rand(2 * INSIDE) + 0.5
    (slow,) = torch.autograd.grad(wanted, both, grad)
    fast, codes, scales = swiglu_fp8_back(grad, both.detach(), factors, 64)
    torch.testing.assert_close(fast, slow, atol=1e-6, rtol=1e-5)
    found = codes[:, : 2 * INSIDE].view(E4M3).float()
    assert bool((found.abs().amax(1) == E4M3_MAX / ROOM_BACK).all())
    assert distance(found * scales, fast * factors) < 0.04


def test_columns_behind_codes_hold_eight_bits_and_end_where_the_scale_does() -> None:
    torch.manual_seed(0)
    codes, scales = torch.full((9, 96), 7, dtype=torch.uint8), torch.rand(9, 1) + 0.5
    inner = torch.randn(9, 4) * 20
    inner[2, 1], inner[3, 1] = 1e6, -1e6
    fp8_columns(codes, scales, inner, 2.0, 32)
    assert bool((codes[:, :64] == 7).all())
    found = codes[:, 64:].view(E4M3).float() * scales
    high, low, again, rest = found.split_with_sizes([4, 4, 4, 20], 1)
    assert torch.equal(high, again)
    assert not rest.any()
    most = 2 * E4M3_MAX * scales
    error = (high + low - (2 * inner).clamp(-most, most)).abs()
    limit = torch.maximum(inner.abs() / 128, scales * 2**-10) * 1.01
    assert bool((error <= limit).all())


def test_the_operations_are_as_torch_wants_them() -> None:
    both, grad = torch.randn(5, 64), torch.randn(5, 32)
    torch.library.opcheck(swiglu_fp8, (both, 32))
    torch.library.opcheck(swiglu_fp8_back, (grad, both, torch.rand(64), 32))
    codes = torch.zeros(5, 96, dtype=torch.uint8)
    torch.library.opcheck(fp8_columns, (codes, torch.rand(5, 1) + 1, torch.randn(5, 4), 1.0, 32))


def test_the_operation_in_pieces_is_as_torch_wants_one() -> None:
    model, groups = adapted()
    linears = model.base_model.model.mlp
    pair, down = linears.gate_proj.group, linears.down_proj.group
    assert [len(one.layers) for one in groups.groups] == [2, 1]
    a_gate, a_up, b_gate, b_up = pair.weights()
    a_down, b_down = down.weights()
    torch.library.opcheck(mlp_fp8_pieces, (
        torch.randn(12, HIDDEN, requires_grad=True), 5, (pair.scale, down.scale), "fp8,fp8",
        pair.packed, down.packed, (pair.tail_b, pair.tail_a, down.tail_b, down.tail_a),
        (a_gate, a_up, a_down, b_gate, b_up, b_down),
    ), test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))  # fmt: skip
