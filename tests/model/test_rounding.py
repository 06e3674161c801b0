"""Weights rounded to texts: the grids are the storages' own, and what a layer answers is nearer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from chatfine.data.batches import collate
from chatfine.errors import ModelError
from chatfine.model import rounding
from chatfine.model.fast import loss_sum
from chatfine.model.frozen import choose_products, frozen_linears
from chatfine.model.load import load_model
from chatfine.model.rounded import read_rounded, write_rounded
from chatfine.model.rounding import CALIBRATED, GRIDS, round_block, round_together
from chatfine.model.storages import EXACT, STORAGES, NF4Fp8
from chatfine.runtime import fp8_works
from chatfine.types import Batch, Example


def inputs(rows: int, columns: int) -> torch.Tensor:
    """Rows whose columns go together and are of very different sizes, as a model's are."""
    source = torch.Generator().manual_seed(0)
    mixed = torch.randn(rows, 24, generator=source) @ torch.randn(24, columns, generator=source)
    noise = 0.3 * torch.randn(rows, columns, generator=source)
    return (mixed + noise) * torch.logspace(-1, 1, columns)


def weights(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(1)
    return [0.02 * torch.randn(size, generator=source) for size in sizes]


def far(exact: torch.Tensor, rounded: torch.Tensor, x: torch.Tensor) -> float:
    """By how much the answers differ, in parts of the answers."""
    return float((x @ (rounded - exact).t()).norm() / (x @ exact.t()).norm())


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("columns", [64, 100, 200])
def test_answers_are_much_nearer_than_those_of_the_nearest_codes(name: str, columns: int) -> None:
    both = weights((48, columns), (5, columns))
    x, held = inputs(900, columns).split([600, 300])
    packed = round_together(both, x.t() @ x, name)
    storage = STORAGES[name]
    for weight, one in zip(both, packed, strict=True):
        plain = storage.unpack(storage.pack(weight), columns, torch.float32)
        found = storage.unpack(one, columns, torch.float32)
        codes, kind, scales = storage.shapes(*weight.shape)
        assert (one[0].shape, one[0].dtype, one[1].shape) == (codes, kind, scales)
        assert far(weight, found, held) < 0.7 * far(weight, plain, held)


@pytest.mark.parametrize("name", CALIBRATED)
def test_inputs_that_say_nothing_leave_the_nearest_codes(name: str) -> None:
    """Columns that don't go together can't make up for each other."""
    (weight,) = weights((16, 64))
    (packed,) = round_together([weight], torch.eye(64), name)
    storage = STORAGES[name]
    found = storage.unpack(packed, 64, torch.float32)
    plain = storage.unpack(storage.pack(weight), 64, torch.float32)
    if name == "fp8":
        assert torch.equal(found, plain)
    else:  # its scales are better than the largest magnitudes
        assert (found - weight).square().sum() < (plain - weight).square().sum()


@pytest.mark.parametrize("name", CALIBRATED)
def test_an_input_that_never_was_and_moments_that_can_not_be_inverted(name: str) -> None:
    (weight,) = weights((16, 64))
    x = inputs(3, 64)  # three rows for sixty-four columns
    x[:, 7] = 0
    (packed,) = round_together([weight], x.t() @ x, name)
    found = STORAGES[name].unpack(packed, 64, torch.float32)
    assert torch.isfinite(found).all()
    assert far(weight, found, x) < 0.1
    (nothing,) = round_together([weight], torch.zeros(64, 64), name)
    assert torch.isfinite(STORAGES[name].unpack(nothing, 64, torch.float32)).all()


def texts() -> Batch:
    source = torch.Generator().manual_seed(3)
    rows = [torch.randint(5, 60, (40,), generator=source).tolist() for _ in range(20)]
    return collate([Example(row, [True] * 40) for row in rows])


@pytest.mark.parametrize("name", CALIBRATED)
def test_a_model_rounded_to_texts_says_of_them_what_it_said(tiny: Path, name: str) -> None:
    batch = texts()
    exact = load_model(tiny, torch.float32)
    plain = load_model(tiny, torch.float32, quantize=name)
    model = load_model(tiny, torch.float32, quantize=name, texts=batch)
    assert not any("forward" in vars(module) for module in model.modules())
    with torch.no_grad():
        logits = [
            one.get_decoder()(batch.ids[None], use_cache=False).last_hidden_state
            for one in (exact, plain, model)
        ]
        # all layers in a row, on the whole text as one document, which was not calibrated on
        gaps = [float((one - logits[0]).norm()) for one in logits[1:]]
        assert torch.isfinite(loss_sum(model, batch))
    assert gaps[1] < 0.8 * gaps[0]


@pytest.mark.parametrize("columns", [64, 100])
def test_the_numbers_of_8_bit_products_are_the_weight_itself(columns: int) -> None:
    (weight,) = weights((48, columns))
    x = inputs(600, columns)
    (packed,) = round_together([weight], x.t() @ x, "nf4-e4m3")
    storage = STORAGES["nf4-e4m3"]
    assert isinstance(storage, NF4Fp8)
    codes, scales = storage.fp8(packed, columns)
    found = storage.unpack(packed, columns, torch.float32)
    assert torch.equal(found, codes.float() * scales)
    exact = STORAGES[EXACT["nf4-e4m3"]]
    torch.testing.assert_close(exact.product(x, packed, columns), x @ found.t())
    torch.testing.assert_close(exact.product_back(x[:, :48], packed, columns), x[:, :48] @ found)
    # rounded without this in mind the same products have two errors
    (plain,) = round_together([weight], x.t() @ x, "nf4")
    assert far(weight, found, x) < far(weight, storage.unpack(plain, columns, torch.float32), x)
    compiled = torch.compile(lambda: storage.unpack(packed, columns, torch.float32))
    assert torch.equal(compiled(), found)


def test_kept_weights_say_how_they_are_stored(tiny: Path, tmp_path: Path) -> None:
    """A base for 8-bit products is opened by --quantize nf4, wherever it is opened."""
    model = load_model(tiny, torch.float32, quantize="nf4-e4m3", texts=texts())
    file = tmp_path / "rounded.safetensors"
    write_rounded(model, file)
    again = load_model(tiny, torch.float32, quantize="nf4", rounded=file)
    for one, other in zip(frozen_linears(model), frozen_linears(again), strict=True):
        assert other.storage.name == "nf4-e4m3"
        assert torch.equal(one.dequantize(), other.dequantize())
        assert other.eval().multiplied == "nf4-e4m3-exact"
    choose_products(again, fp8=True)
    assert next(frozen_linears(again)).train().multiplied == "nf4-e4m3"
    choose_products(again, fp8=False)
    assert next(frozen_linears(again)).train().multiplied == "nf4-e4m3-exact"
    plain = load_model(tiny, torch.float32, quantize="nf4")
    choose_products(plain, fp8=True)
    assert next(frozen_linears(plain)).train().multiplied == "nf4-fp8"


@pytest.mark.parametrize("name", CALIBRATED)
def test_what_was_rounded_is_kept_and_read_again(tiny: Path, tmp_path: Path, name: str) -> None:
    model = load_model(tiny, torch.float32, quantize=name, texts=texts())
    file = tmp_path / "rounded.safetensors"
    write_rounded(model, file)
    assert [one.name for one in tmp_path.iterdir()] == [file.name]
    again = load_model(tiny, torch.float32, quantize=name, rounded=file)
    for one, other in zip(frozen_linears(model), frozen_linears(again), strict=True):
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.scales, other.scales)
    found = next(frozen_linears(model))
    first = next(key for key, module in model.named_modules() if module is found)
    read = read_rounded(file, f"{first}.weight", found.in_features)
    assert torch.equal(read, found.dequantize(torch.float32))
    other = {"fp8": "nf4", "nf4": "fp8"}[name]
    with pytest.raises(ModelError) as caught:
        load_model(tiny, torch.float32, quantize=other, rounded=file)
    assert caught.value.code == "rounded-unfit"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError) as caught:
        load_model(tiny, torch.float32, quantize=name, rounded=file)
    assert caught.value.code == "rounded-unfit"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(("rows", "width"), [(37, 100), (48, 100), (4, 24), (16, 128), (3, 7)])
def test_the_program_for_a_block_is_its_twin(name: str, rows: int, width: int) -> None:
    if name != "nf4" and not fp8_works(torch.device("cuda")):
        pytest.skip("needs a card with fp8 products")
    (weight,) = weights((rows, 200))
    x = inputs(600, 200)
    moments = (x.t() @ x).cuda()
    grid = GRIDS[name](weight.cuda(), moments.diagonal())
    order = moments.diagonal().argsort(descending=True)
    inside = rounding._factor(moments[order][:, order])[:width, :width].contiguous()
    places = order[:width]
    block = weight.cuda()[:, places]
    wanted = rounding._plain_block(block.clone(), inside, places, grid)
    codes, errors = round_block(block, inside, places, grid)
    # where a number lies between two levels the rest of its row may differ
    alike = (codes == wanted[0]).all(1)
    assert alike.float().mean() > 0.6
    torch.testing.assert_close(errors[alike], wanted[1][alike], rtol=1e-3, atol=1e-6)
    assert float(errors.square().sum() / wanted[1].square().sum()) == pytest.approx(1, abs=0.05)
