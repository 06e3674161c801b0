"""A long row in pieces: the same numbers and gradients, and never the whole row inside an MLP."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from chatfine.data.batches import collate
from chatfine.model import adapters, chunked, fast, recompute
from chatfine.model.load import load_model
from chatfine.types import Batch, Example


def row(lengths: tuple[int, ...], seed: int = 0) -> Batch:
    """Documents of these lengths end to end, everything learned."""
    numbers = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 400, (n,), generator=numbers).tolist() for n in lengths]
    return collate([Example(one, [True] * len(one)) for one in ids])


def model_of(path: Path, method: str, dtype: torch.dtype, recomputed: bool, **options: Any) -> Any:
    torch.manual_seed(5)
    model = adapters.attach(load_model(path, torch.float32), method, **options).to(dtype)
    for name, parameter in adapters.trained_parameters(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    if recomputed:
        recompute.install(fast.causal_model(model), 99)
    return model.train()


def loss_and_gradients(model: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = fast.loss_sum(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    learned = adapters.trained_parameters(model)
    return loss.detach(), {n: p.grad.clone() for n, p in learned.items() if p.grad is not None}


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
@pytest.mark.parametrize("recomputed", [True, False])
@pytest.mark.parametrize("tokens", [1, 16, 37, 52, 53, 500])
def test_pieces_change_nothing_in_float64(
    tiny: Path, method: str, recomputed: bool, tokens: int
) -> None:
    batch = row((20, 32, 1, 52))  # 105 tokens
    model = model_of(tiny, method, torch.float64, recomputed, **({} if method == "full" else {
        "rank": 3, "alpha": 6}))  # fmt: skip
    loss, gradients = loss_and_gradients(model, batch)
    assert chunked.install(model, tokens) == 2 * 3 + 1, (
        "an MLP and two norms a layer, the last norm"
    )
    again, others = loss_and_gradients(model, batch)
    assert abs(again - loss) < 1e-10
    assert gradients.keys() == others.keys()
    assert all(torch.allclose(others[name], one, atol=1e-10) for name, one in gradients.items())


def test_pieces_change_nothing_in_float32(tiny: Path) -> None:
    batch = row((64, 33))
    model = model_of(tiny, "lora", torch.float32, True, rank=4)
    loss, gradients = loss_and_gradients(model, batch)
    chunked.install(model, 10)
    again, others = loss_and_gradients(model, batch)
    assert abs(again - loss) / loss < 1e-6
    for name, one in gradients.items():
        assert (others[name] - one).norm() <= 1e-5 * one.norm(), name


def test_dropout_of_a_piece_is_the_same_when_it_is_recomputed(tiny: Path) -> None:
    model = model_of(tiny, "lora", torch.float64, True, rank=3, dropout=0.5)
    chunked.install(model, 16)
    batch = row((40, 13))
    inner = fast.causal_model(model).get_decoder().layers[0].mlp.up_proj.lora_A["default"].weight

    def loss() -> torch.Tensor:
        torch.manual_seed(9)
        return fast.loss_sum(model, batch)

    model.zero_grad()
    loss().backward()  # type: ignore[no-untyped-call]
    step = torch.zeros_like(inner)
    step[1, 2] = 1e-3  # norms compute in float32: smaller ones drown in its rounding
    with torch.no_grad():
        inner += step
        above = loss()
        inner -= 2 * step
        below = loss()
    assert inner.grad is not None
    assert float(above - below) / 2e-3 == pytest.approx(float(inner.grad[1, 2]), rel=2e-2)


class Widths:
    """How many tokens of an MLP's inner numbers are alive at once, at most."""

    def __init__(self, mlp: Any) -> None:
        self.alive: list[Any] = []
        self.most = 0
        mlp.act_fn.register_forward_hook(self.see)

    def see(self, module: Any, inputs: Any, output: torch.Tensor) -> None:
        self.alive = [one for one in self.alive if one() is not None]
        self.alive.append(weakref.ref(output))
        self.most = max(self.most, sum(one().shape[-2] for one in self.alive))


def test_only_a_piece_is_ever_alive_inside_an_mlp(tiny: Path) -> None:
    batch = row((100, 100))
    model = model_of(tiny, "lora", torch.float32, True, rank=2)
    widths = Widths(fast.causal_model(model).get_decoder().layers[1].mlp)
    loss_and_gradients(model, batch)
    assert widths.most == 200, "without pieces it is the row"
    chunked.install(model, 20)
    widths.most = 0
    loss_and_gradients(model, batch)
    assert 20 <= widths.most <= 40
    widths.most = 0
    with torch.no_grad():
        fast.loss_sum(model.eval(), batch)
    assert 20 <= widths.most <= 40, "an evaluation too"


def test_what_is_built_otherwise_is_left_alone(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig

    model = load_model(tiny, torch.float32)
    assert chunked.install(model, 0) == 0
    assert chunked.install(model, 8) == 7
    assert chunked.install(model, 8) == 0, "once"
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = AutoModelForCausalLM.from_config(
        MixtralConfig(**sizes, intermediate_size=32, num_local_experts=2, num_key_value_heads=2)
    )
    kinds = {type(layer.mlp) for layer in experts.model.layers}
    assert chunked.install(experts, 8) == 5, "its norms"
    assert {type(layer.mlp) for layer in experts.model.layers} == kinds
    other = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_embd=32, n_layer=2,
                                                        n_head=2))  # fmt: skip
    assert chunked.install(other, 8) == 0


def test_layers_in_pieces_stay_one_program(tiny: Path) -> None:
    """A compiler takes modules of one class and equal settings as the same code."""
    model = load_model(tiny, torch.float32)
    chunked.install(model, 8)
    layers = model.model.layers
    assert type(layers[0].mlp) is type(layers[1].mlp)
    assert type(layers[0].input_layernorm) is type(model.model.norm)


def test_the_loss_holds_neither_all_logits_nor_wide_states(
    monkeypatch: pytest.MonkeyPatch, tiny: Path
) -> None:
    """Of S states in bf16 (S, D), the largest tensor that comes up has S · D numbers in bf16, or a
    block of logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from chatfine.model import cross_entropy

    found: list[torch.Size] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None
                               ) -> Any:  # fmt: skip
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, (tuple, list)) else (out,):
                wide = isinstance(one, torch.Tensor) and one.dtype == torch.float32
                if wide and one.numel() >= 300 * 64:
                    found.append(one.shape)
            return out

    monkeypatch.setitem(cross_entropy.HEAD_CHUNK_BYTES, "cpu", 4 * 448 * 16)
    hidden = torch.randn(300, 64, dtype=torch.bfloat16, requires_grad=True)
    weight, labels = torch.randn(448, 64, dtype=torch.bfloat16), torch.arange(300)
    with Watch():
        cross_entropy.linear_cross_entropy(hidden, weight, labels).backward()
    assert found == []
    assert hidden.grad is not None
