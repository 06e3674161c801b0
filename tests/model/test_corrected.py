"""Weights fitted to inputs that rounding has moved, and what of it is fitted to the texts alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from chatfine.data.batches import collate
from chatfine.model import calibrate, corrected
from chatfine.model.calibrate import _halves, _missing, _Pass
from chatfine.model.frozen import FrozenLinear, frozen_linears
from chatfine.model.load import load_model
from chatfine.types import Batch, Example


def texts(documents: int = 24, seed: int = 3) -> Batch:
    source = torch.Generator().manual_seed(seed)
    rows = [torch.randint(5, 60, (40,), generator=source).tolist() for _ in range(documents)]
    return collate([Example(row, [True] * 40) for row in rows])


def sums(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.stack([a.t() @ b for a, b in zip(left.chunk(2), right.chunk(2), strict=True)])


def test_the_answers_come_nearer_to_those_of_the_exact_inputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(corrected, "RIDGE", 0.01)
    source = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 30, generator=source)
    exact = torch.randn(4000, 30, generator=source)
    moved = exact @ (torch.eye(30) + 0.1 * torch.randn(30, 30, generator=source))
    wanted = weight @ sums(exact - moved, moved)
    found = corrected.corrected(weight, sums(moved, moved), wanted)
    before, after = ((moved @ one.t() - exact @ weight.t()).norm() for one in (weight, found))
    assert after < 0.1 * before
    # something more is wanted of the answers, and can be read off the inputs
    more = moved @ torch.randn(30, 12, generator=source)
    found = corrected.corrected(weight, sums(moved, moved), wanted + sums(more, moved))
    aim = exact @ weight.t() + more
    assert (moved @ found.t() - aim).norm() < 0.1 * (moved @ weight.t() - aim).norm()


def test_what_does_not_hold_for_the_other_half_is_left_out() -> None:
    source = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 30, generator=source)
    inputs = torch.randn(200, 30, generator=source)
    noise = torch.randn(200, 12, generator=source)
    noise[100:] = -inputs[100:] @ torch.linalg.lstsq(inputs[:100], noise[:100]).solution
    found = corrected.corrected(weight, sums(inputs, inputs), sums(noise, inputs))
    assert torch.equal(found, weight)
    nothing = torch.zeros(2, 30, 30)
    assert torch.equal(corrected.corrected(weight, nothing, torch.zeros(2, 12, 30)), weight)


@pytest.mark.parametrize("documents", [1, 2, 5, 6])
def test_both_halves_are_whole_documents_and_all_tokens(documents: int) -> None:
    batch = texts(documents)
    first, second = _halves(batch)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(40 * documents))
    assert len(second) == (20 if documents == 1 else 40 * (documents // 2))


class Layer(nn.Module):
    """Two linears whose answers are added to the states, and one between them."""

    def __init__(self, normalised: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("first", "between", "last"):
            setattr(self, name, FrozenLinear.of(nn.Linear(16, 16, bias=False), "nf4"))
        self.normalised = normalised

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        middle = x + 0.5 * self.first(torch.tanh(x))
        found = self.last(torch.tanh(self.between(middle)))
        return middle + (nn.functional.rms_norm(found, [16]) if self.normalised else found)


def test_linears_whose_answers_are_added_are_found_and_told_what_is_missing() -> None:
    layer = Layer()
    source = torch.Generator().manual_seed(1)
    before = torch.randn(1, 900, 16, generator=source)
    states = before + 0.1 * torch.randn(1, 900, 16, generator=source)
    weights = {one: one.dequantize(torch.float32) for one in frozen_linears(layer)}
    exact, moved = _Pass(weights), _Pass(weights)
    after = exact.run(layer.forward, before)
    reached = moved.run(layer.forward, states)
    assert not any("forward" in vars(one) for one in weights)
    assert len(moved.groups()) == 3
    found = _missing(exact, moved, before, states, after)
    assert found.keys() == {layer.first, layer.last}
    torch.testing.assert_close(found[layer.first], ((before - states) * 2)[0], rtol=0, atol=1e-4)
    # with what is missing in the last answer the layer's states are the exact ones
    last = moved.answers[layer.last] - exact.answers[layer.last]
    torch.testing.assert_close(
        (reached - last)[0] + found[layer.last], after[0], rtol=0, atol=1e-4
    )  # fmt: skip


def test_where_answers_are_normalised_before_they_are_added_nothing_is_missing() -> None:
    layer = Layer(normalised=True)
    layer.first.scales.data.zero_()  # what is added comes from the last one
    states = torch.randn(1, 900, 16) * torch.logspace(-2, 1, 900)[None, :, None]
    weights = {one: one.dequantize(torch.float32) for one in frozen_linears(layer)}
    exact, moved = _Pass(weights), _Pass(weights)
    after = exact.run(layer.forward, states)
    moved.run(layer.forward, states * 1.1)
    assert _missing(exact, moved, states, states * 1.1, after) == {}


def test_a_corrected_model_is_nearer_on_texts_it_was_not_made_from(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = load_model(tiny, torch.float32)
    held = texts(6, seed=8)

    def far() -> float:
        model = load_model(tiny, torch.float32, quantize="nf4", texts=texts(200))
        with torch.no_grad():
            these, those = (
                one.get_decoder()(held.ids.view(6, 40), use_cache=False).last_hidden_state
                for one in (exact, model)
            )
        return float((these - those).norm())

    with_it = far()
    monkeypatch.setattr(calibrate, "CORRECTED", ())
    assert with_it < 0.99 * far()
