"""An MLP on plain weights as one operation, against its linears one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from chatfine.model import adapters, chunked, joined, lora, mlp, swiglu_lora
from chatfine.model.frozen import FrozenLinear
from chatfine.model.mlp_lora import MlpLora

HIDDEN, INSIDE = 96, 100
RANKS = [(4, 8, 16), (16, 4, 8), (8, 16, 33)]
"""Of the adapters of gate, up and down."""


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got.double() - wanted).norm() / wanted.double().norm()).item()


class Parent(nn.Module):
    """Something that has an MLP."""

    def __init__(self, bias: bool = False, activation: str = "silu") -> None:
        super().__init__()
        self.mlp = LlamaMLP(
            LlamaConfig(
                hidden_size=HIDDEN, intermediate_size=INSIDE, mlp_bias=bias, hidden_act=activation
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.mlp(x)
        return y


def adapted(
    dtype: torch.dtype = torch.float32, ranks: tuple[int, int, int] = (4, 8, 16),
    targets: str = "gate_proj up_proj down_proj", dora: bool = False, **settings: Any,
) -> Any:  # fmt: skip
    """A model with fused adapters in float32, as training has them, whose gate and up are joined;
    each adapter has the same scale."""
    torch.manual_seed(0)
    names = ("gate_proj", "up_proj", "down_proj")
    given = {name: rank for name, rank in zip(names, ranks, strict=True) if name in targets.split()}
    model: Any = get_peft_model(
        Parent(**settings).to(dtype),
        LoraConfig(
            r=8, lora_alpha=16, target_modules=targets.split(), use_dora=dora,
            rank_pattern=given, alpha_pattern={name: 2 * rank for name, rank in given.items()},
        ),
        autocast_adapter_dtype=False,
    )  # fmt: skip
    wide = torch.promote_types(dtype, torch.float32)
    for name, parameter in adapters.trained_parameters(model).items():
        parameter.data = parameter.data.to(wide)
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    lora.install(model)
    joined.join(model)
    return model.train()


def grads_of(model: Any, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """The output and all gradients for fixed states."""
    torch.manual_seed(1)
    x = torch.randn(2, 19, HIDDEN).to(dtype).requires_grad_()
    y = model(x)
    inputs = (x, *adapters.trained_parameters(model).values())
    return [y, *torch.autograd.grad(y, inputs, torch.randn(y.shape).to(dtype))]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of what `MlpLora` was given."""
    found: list[torch.Size] = []
    apply = MlpLora.apply

    def counted(x: torch.Tensor, *rest: Any) -> Any:
        found.append(x.shape)
        return apply(x, *rest)

    monkeypatch.setattr(MlpLora, "apply", counted)
    return found


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)]
)
def test_it_computes_what_its_linears_compute(
    dtype: torch.dtype, most: float, ranks: tuple[int, int, int], compiled: bool,
    calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = adapted(dtype, ranks)
    wanted = grads_of(model, dtype)
    assert mlp.install(model) == 1
    # the path for a compiler is the same arithmetic in other operations
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    got = grads_of(model, dtype)
    assert calls == [(38, HIDDEN)]
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert distance(one, other) < most


def test_in_bfloat16_it_is_nearer_to_the_truth_than_its_linears() -> None:
    model = adapted(torch.bfloat16)
    slow = grads_of(model, torch.bfloat16)
    mlp.install(model)
    fast = grads_of(model, torch.bfloat16)
    model.base_model.model.mlp.gate_proj.group.drop()
    exact = grads_of(model.double(), torch.float64)
    for one, other, truth in zip(fast, slow, exact, strict=True):
        assert distance(one, truth) < 0.01
        assert distance(one, truth) < 1.1 * distance(other, truth)


def test_its_gradients_are_those_of_differences() -> None:
    torch.manual_seed(0)
    shapes = [(5, 6), (14, 6), (6, 7), (2, 6), (3, 6), (4, 7), (7, 2), (7, 3), (6, 4)]
    x, first, second, *weights = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    assert torch.autograd.gradcheck(
        lambda x, *weights: MlpLora.apply(x, (0.5, 2.0), first, second, *weights),
        (x.requires_grad_(), *(one.requires_grad_() for one in weights)),
    )


def test_states_without_a_gradient_get_none() -> None:
    model = adapted()
    mlp.install(model)
    model(torch.randn(3, HIDDEN)).sum().backward()
    assert all(one.grad is not None for one in adapters.trained_parameters(model).values())


def test_in_pieces_it_computes_the_same(calls: list[torch.Size]) -> None:
    model = adapted()
    mlp.install(model)
    wanted = grads_of(model)
    inner = model.base_model.model.mlp
    inner.__class__, inner.piece_tokens = chunked._in_pieces(type(inner)), 7
    del calls[:]
    for one, other in zip(grads_of(model), wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert [rows for rows, _ in calls[:3]] == [14, 14, 10]
    assert len(calls) == 6  # each again for its backward pass


def test_really_compiled_it_is_one_program_that_computes_the_same() -> None:
    model = adapted()
    wanted = grads_of(model)
    mlp.install(model)
    model.base_model.model.mlp.compile(fullgraph=True, dynamic=False)
    for one, other in zip(grads_of(model), wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_measured_or_switched_off_it_is_its_own_forward(calls: list[torch.Size]) -> None:
    model = adapted()
    mlp.install(model)
    x = torch.randn(3, HIDDEN)
    trained = model(x)
    assert len(calls) == 1
    with model.disable_adapter():
        assert distance(model(x), trained) > 0.1
    model.eval()
    torch.testing.assert_close(model(x), trained)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("other", "count"),
    [
        ({"activation": "relu"}, 1),
        ({"bias": True}, 0),
        ({"dora": True}, 0),
        ({"targets": "gate_proj up_proj"}, 1),
        ({"targets": "down_proj"}, 0),
    ],
)
def test_what_is_no_plain_swiglu_computes_what_its_linears_compute(
    other: dict[str, Any], count: int, calls: list[torch.Size]
) -> None:
    model = adapted(**other)
    wanted = grads_of(model)
    assert mlp.install(model) == count
    assert all(torch.equal(a, b) for a, b in zip(grads_of(model), wanted, strict=True))
    assert calls == []


@pytest.mark.parametrize("kind", ["packed", "bias", "dtype"])
def test_another_kind_of_down_or_of_states_keeps_the_linears(
    kind: str, calls: list[torch.Size]
) -> None:
    model = adapted()
    down = model.base_model.model.mlp.down_proj
    if kind == "packed":
        down.base_layer = FrozenLinear.of(down.base_layer, "int8")
    elif kind == "bias":
        down.base_layer.bias = nn.Parameter(torch.ones(HIDDEN), requires_grad=False)
    dtype = torch.float64 if kind == "dtype" else torch.float32
    wanted = grads_of(model, dtype)
    assert mlp.install(model) == 1
    for one, other in zip(grads_of(model, dtype), wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert calls == []


# -- what lies between the products ----------------------------------------------------------------


def drawn(
    rows: int, size: int, ranks: tuple[int, int, int], dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """grad, back, a_down, both, inner, b_gate and b_up."""
    torch.manual_seed(rows + size)
    gate, up, down = ranks
    shapes = [(rows, size), (rows, down), (down, size), (rows, 2 * size), (rows, gate + up)]
    shapes += [(size, gate), (size, up)]
    return [(torch.randn(shape) / 2).to(dtype) for shape in shapes]


def exact(
    grad: torch.Tensor, back: torch.Tensor, a_down: torch.Tensor, both: torch.Tensor,
    inner: torch.Tensor, b_gate: torch.Tensor, b_up: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """h and the gradient of `both`, by torch."""
    both = both.detach().requires_grad_()
    gate, up = (both + inner @ torch.block_diag(b_gate, b_up).t()).chunk(2, 1)
    h = F.silu(gate) * up
    (found,) = torch.autograd.grad(h, both, grad + back @ a_down)
    return h.detach(), found


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 3e-3)]
)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("rows", "size"), [(1, 96), (5, 100), (37, 320)])
def test_swiglu_and_its_gradient_are_torchs(
    rows: int, size: int, ranks: tuple[int, int, int], dtype: torch.dtype, most: float
) -> None:
    inputs = drawn(rows, size, ranks, dtype)
    wanted = exact(*(one.double() for one in inputs))
    h, grad = swiglu_lora.swiglu_lora(*inputs[3:]), swiglu_lora.swiglu_lora_back(*inputs)
    assert h.dtype == grad.dtype == dtype
    for got, truth in zip((h, grad), wanted, strict=True):
        assert got.shape == truth.shape
        assert distance(got, truth) < most


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(
    ("dtype", "most"),
    [(torch.float32, 1e-6), (torch.float16, 4e-4), (torch.bfloat16, 3e-3)],
)
@pytest.mark.parametrize("ranks", [*RANKS, (8, 8, 8), (1, 3, 1), (128, 64, 128), (8, 8, 200)])
@pytest.mark.parametrize(("rows", "size"), [(1, 96), (5, 100), (37, 320), (300, 1000)])
def test_the_programs_are_their_twins(
    rows: int, size: int, ranks: tuple[int, int, int], dtype: torch.dtype, most: float
) -> None:
    inputs = drawn(rows, size, ranks, dtype)
    wanted = exact(*(one.double() for one in inputs))
    slow = swiglu_lora.swiglu_lora(*inputs[3:]), swiglu_lora.swiglu_lora_back(*inputs)
    inputs = [one.cuda() for one in inputs]
    fast = swiglu_lora.swiglu_lora(*inputs[3:]), swiglu_lora.swiglu_lora_back(*inputs)
    for got, twin, truth in zip(fast, slow, wanted, strict=True):
        assert got.dtype == twin.dtype
        assert distance(got.cpu(), truth) < most
        # sums in another order: a number here and there is rounded the other way
        torch.testing.assert_close(got.cpu(), twin, rtol=2e-2 if most > 1e-6 else 1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_card_it_computes_what_its_linears_compute() -> None:
    model = adapted(torch.bfloat16)
    model.base_model.model.mlp.gate_proj.group.drop()
    joined.join(model.cuda())
    torch.manual_seed(1)
    x = torch.randn(300, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    inputs = (x, *adapters.trained_parameters(model).values())
    slow = model(x)
    wanted = torch.autograd.grad(slow, inputs, torch.ones_like(slow))
    mlp.install(model)
    fast = model(x)
    assert distance(fast, slow) < 0.02
    got = torch.autograd.grad(fast, inputs, torch.ones_like(fast))
    for one, other in zip(got, wanted, strict=True):
        assert distance(one, other) < 0.02


def test_the_operations_are_as_torch_wants_them() -> None:
    inputs = drawn(5, 32, (4, 8, 3))
    torch.library.opcheck(swiglu_lora.swiglu_lora, tuple(inputs[3:]))
    torch.library.opcheck(swiglu_lora.swiglu_lora_back, tuple(inputs))
