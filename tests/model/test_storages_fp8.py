"""Weights as 8-bit floats: their rounding, and products of them against exact ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from chatfine.model import storages
from chatfine.model.fp8 import E4M3, E4M3_MAX, round_rows
from chatfine.model.fp8_rows import fp8_rows
from chatfine.model.frozen import FrozenLinear
from chatfine.model.storages import FP8_ROOM, STORAGES, nf4_values

SHAPES = [(64, 64), (48, 192), (16, 96)]


@pytest.fixture
def rounds_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply 8-bit floats on a CPU too, by the twin of the card's product."""
    monkeypatch.setattr(storages, "multiplies_fp8", lambda x, out, size: not (out | size) % 16)


def packed_linear(shape: tuple[int, int], storage: str) -> Any:
    torch.manual_seed(shape[0])
    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    torch.nn.init.normal_(linear.weight, std=0.02)
    return FrozenLinear.of(linear, storage), linear.weight.detach()


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


# -- the weight ------------------------------------------------------------------------------------


@pytest.mark.parametrize("magnitude", [1e-6, 0.02, 1e4])
def test_three_bits_of_every_number_stay_and_there_is_room_above(magnitude: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 80) * magnitude
    weight[3] = 0
    storage = STORAGES["fp8"]
    codes, scales = storage.pack(weight)
    error = (storage.unpack((codes, scales), 80, torch.float32) - weight).abs()
    smallest = scales.view(torch.float32) * 2**-10  # half a step next to zero
    assert bool((error <= torch.maximum(weight.abs() / 16, smallest) * 1.001).all())
    assert bool((error[3] == 0).all())
    assert codes.view(E4M3).float().abs().max() == E4M3_MAX / FP8_ROOM


def test_room_above_costs_nothing() -> None:
    """A row's numbers, each to its own three bits, whether they end at 448 or at 28."""
    weight = torch.randn(8, 64).abs() + 0.5
    storage = STORAGES["fp8"]
    whole = weight.amax(1, keepdim=True) / E4M3_MAX
    tight = (weight / whole).to(E4M3).float() * whole
    found = storage.unpack(storage.pack(weight), 64, torch.float32)
    torch.testing.assert_close(found, tight, atol=0, rtol=1e-6)


@pytest.mark.parametrize("size", [64, 100, 160])
def test_nf4_in_plain_torch_is_what_bitsandbytes_unpacks(size: int) -> None:
    torch.manual_seed(size)
    storage = STORAGES["nf4"]
    codes, scales = storage.pack(torch.randn(24, size))
    wanted = storage.unpack((codes, scales), size, torch.float32)
    found = nf4_values(codes, scales.view(torch.float32), size)
    torch.testing.assert_close(found, wanted, atol=0, rtol=1e-6)


@pytest.mark.parametrize("size", [64, 100])
def test_nf4_fp8_is_stored_as_nf4_and_differs_by_one_rounding(size: int) -> None:
    torch.manual_seed(size)
    weight = torch.randn(24, size)
    nf4, both = STORAGES["nf4"], STORAGES["nf4-fp8"]
    assert isinstance(both, storages.NF4Fp8)
    packed = both.pack(weight)
    for got, wanted in zip(packed, nf4.pack(weight), strict=True):
        assert torch.equal(got, wanted)
    stored = both.unpack(packed, size, torch.float32)
    assert torch.equal(stored, nf4.unpack(packed, size, torch.float32))
    codes, scales = both.fp8(packed, size)
    assert codes.shape == (24, size)
    multiplied = codes.float() * scales
    limit = torch.maximum(stored.abs() / 16, scales * 2**-10)
    assert bool(((multiplied - stored).abs() <= limit * 1.001).all())
    turned, again = both.fp8_turned(packed, size)
    assert torch.equal(turned.float(), codes.float().t())
    assert torch.equal(again, scales)


def test_the_turned_codes_are_the_codes_turned() -> None:
    layer, _ = packed_linear((48, 192), "fp8")
    on_the_spot = layer.storage.fp8_turned(layer.packed, 192)
    before = layer.stored_bytes
    layer.keep_turned()
    kept = layer.storage.fp8_turned(layer.packed, 192)
    for got, wanted in zip(kept, on_the_spot, strict=True):
        assert torch.equal(got.float(), wanted.float())
    assert layer.stored_bytes == before + 48 * 192


# -- the product -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("rounds_both")
@pytest.mark.parametrize("storage", ["fp8", "nf4-fp8"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("turned", [False, True])
def test_product_and_gradient_are_exact_but_for_the_left_factors_rounding(
    storage: str, shape: tuple[int, int], turned: bool
) -> None:
    layer, _ = packed_linear(shape, storage)
    if turned and storage == "fp8":
        layer.keep_turned()
    x = torch.randn(2, 20, shape[1], requires_grad=True)
    direction = torch.randn(2, 20, shape[0]) * 1e-4
    y = layer(x)
    (grad,) = torch.autograd.grad(y, x, direction)
    weight = layer.dequantize()
    for got, wanted in ((y, x @ weight.t()), (grad, direction @ weight)):
        assert 1e-4 < distance(got, wanted) < 0.06  # it was rounded, and by no more than that


@pytest.mark.usefixtures("rounds_both")
def test_the_product_of_exact_8_bit_floats_is_exact() -> None:
    layer, _ = packed_linear((48, 96), "fp8")
    x = torch.randint(-8, 9, (10, 96)).float()
    x[:, 0] = E4M3_MAX  # the scale becomes 1
    torch.testing.assert_close(layer(x), x @ layer.dequantize().t(), atol=1e-4, rtol=1e-5)


def test_sizes_the_card_does_not_take_are_unpacked(rounds_both: None) -> None:
    layer, _ = packed_linear((40, 96), "fp8")
    x = torch.randn(5, 96)
    torch.testing.assert_close(layer(x), x @ layer.dequantize().t(), atol=1e-6, rtol=1e-5)


# -- the left factor -------------------------------------------------------------------------------


@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e-3, 1e15])
def test_rows_are_scaled_to_their_largest_and_never_overflow(magnitude: float) -> None:
    x = torch.randn(6, 40) * magnitude
    codes, scales = round_rows(x)
    assert bool(codes.float().isfinite().all())
    if magnitude > 1e-12:
        assert bool((codes.float().abs().amax(1) == E4M3_MAX).all())
        assert distance(codes.float() * scales, x) < 0.04


@pytest.mark.parametrize("with_factors", [False, True])
@pytest.mark.parametrize("small", [1e-3, 1.0, 50.0])
def test_an_adapters_columns_follow_the_rows_to_eight_bits(
    with_factors: bool, small: float
) -> None:
    torch.manual_seed(0)
    x, inner = torch.randn(9, 64), torch.randn(9, 4) * small
    factors = torch.rand(64) + 0.5 if with_factors else None
    codes, scales = fp8_rows(x, inner, factors, 2.0, 64)
    assert codes.shape == (9, 128)
    found = codes.view(E4M3).float() * scales
    wide = x if factors is None else x * factors
    step = scales * 2**-10
    assert bool(((found[:, :64] - wide).abs() <= torch.maximum(wide.abs() / 16, step) * 1.01).all())
    high, low, again, rest = found[:, 64:].split_with_sizes([4, 4, 4, 52], 1)
    assert torch.equal(high, again)
    assert not rest.any()
    error = (high + low - 2 * inner).abs()
    assert bool((error <= torch.maximum(inner.abs() / 128, step) * 1.01).all())
    largest = torch.maximum(wide.abs().amax(1), 2 * inner.abs().amax(1))
    torch.testing.assert_close(scales[:, 0], largest / E4M3_MAX)


def test_the_left_factors_operation_is_as_torch_wants_one() -> None:
    x, inner = torch.randn(5, 32), torch.randn(5, 3)
    torch.library.opcheck(fp8_rows, (x, inner, torch.rand(32), math.pi, 32))
