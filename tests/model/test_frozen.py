"""The packed linear: rounding within bounds, products of exactly the rounded weight, rows apart."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from chatfine.data.batches import collate
from chatfine.errors import ModelError, ResourceError
from chatfine.model import adapters, attention, fast, lora, recompute, storages
from chatfine.model.frozen import FrozenLinear, frozen_linears
from chatfine.model.load import load_model, pack_linears, packed_names
from chatfine.model.storages import STORAGES
from chatfine.train import plan as planning
from chatfine.types import Batch, Example

BATCH: Batch = collate([Example(list(range(5, 25)), [True] * 20), Example([7, 8, 9], [True] * 3)])
SHAPES = [(64, 64), (5, 100), (1, 64), (7, 33), (96, 160), (3, 1)]


def linear(shape: tuple[int, int], dtype: torch.dtype = torch.float32, bias: bool = True) -> Any:
    torch.manual_seed(sum(shape))
    return nn.Linear(shape[1], shape[0], bias, dtype=dtype)


# -- the weight ------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rounding_is_bounded_by_the_largest_of_a_row_or_block(
    storage: str, shape: tuple[int, int]
) -> None:
    exact = linear(shape).weight.detach()
    found = FrozenLinear.of(linear(shape), storage).dequantize()
    if storage == "int8":
        limit = exact.abs().amax(1, keepdim=True) / 254
    else:  # half the widest gap between codes, of the largest in the row: 0.152
        limit = exact.abs().amax(1, keepdim=True) * (0.2 if "e4m3" in storage else 0.1525)
    assert found.shape == exact.shape
    assert bool(((found - exact).abs() <= limit * 1.0001).all())
    if "e4m3" in storage:
        return  # largest magnitudes that are rounded make other scales
    again = FrozenLinear.of(linear(shape), storage)
    again.fill(found)
    torch.testing.assert_close(again.dequantize(), found, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("storage", STORAGES)
def test_rows_of_the_stored_form_are_the_stored_form_of_the_rows(storage: str) -> None:
    """What FSDP2 slices by rows must be a packed weight by itself."""
    layer = FrozenLinear.of(linear((10, 100)), storage)
    some = FrozenLinear.of(linear((10, 100)), storage)
    some.fill(linear((10, 100)).weight.detach()[3:7])
    for whole, part in zip(layer.packed, some.packed, strict=True):
        assert torch.equal(whole[3:7], part)
    rows = layer.storage.unpack(
        (layer.weight[3:7], layer.scales[3:7]), layer.in_features, torch.float32
    )
    assert torch.equal(rows, layer.dequantize()[3:7])


@pytest.mark.parametrize("storage", STORAGES)
def test_casting_the_model_leaves_what_is_stored(storage: str) -> None:
    layer = FrozenLinear.of(linear((8, 64)), storage)
    before = layer.dequantize()
    assert torch.equal(nn.Sequential(layer).to(torch.bfloat16)[0].dequantize(), before)
    assert not any(one.dtype.is_floating_point for one in layer.packed)
    assert layer.bias.dtype == torch.bfloat16


def test_int8_is_what_bitsandbytes_makes() -> None:
    functional = storages.bitsandbytes()
    weight = torch.randn(40, 100)
    weight[3] = 0
    codes, scales = STORAGES["int8"].pack(weight)
    wanted, largest, _ = functional.int8_vectorwise_quant(weight.clone())
    assert torch.equal(codes, wanted)
    assert torch.equal(scales.view(torch.float32)[:, 0], largest)
    back = functional.int8_vectorwise_dequant(wanted, largest)
    unpacked = STORAGES["int8"].unpack((codes, scales), 100, torch.float32)
    torch.testing.assert_close(unpacked, back, atol=1e-6, rtol=1e-6)


def test_nf4_of_whole_blocks_is_what_bitsandbytes_makes() -> None:
    functional = storages.bitsandbytes()
    weight = torch.randn(6, 128)
    layer = FrozenLinear.of(linear((6, 128)), "nf4")
    layer.fill(weight)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(layer.weight.reshape(-1), codes.reshape(-1))
    assert torch.equal(layer.dequantize(), functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("storage", STORAGES)
def test_what_is_stored_is_as_small_as_the_plan_says(tiny: Path, storage: str) -> None:
    from chatfine.hub.folder import read_model_folder

    folder = read_model_folder(tiny)
    tensors = {name: info.shape for name, info in folder.tensors.items()}
    shapes = planning.Shapes.of(folder.text_config, tensors, folder.parameters)
    model = load_model(tiny, torch.float32, quantize=storage)
    stored = sum(layer.stored_bytes for layer in frozen_linears(model))
    assert stored == planning.packed_bytes(shapes, storage)
    a_number = 0.76 if storage.startswith("nf4") else 1.1  # rows of 160
    assert stored < shapes.body_parameters * a_number
    assert adapters.count_parameters(model)[1] == folder.parameters


# -- the product -----------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_product_and_gradient_are_those_of_the_rounded_weight(
    storage: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    layer = FrozenLinear.of(linear(shape, dtype), storage)
    x = torch.randn(2, 3, shape[1], dtype=dtype, requires_grad=True)
    direction = torch.randn(2, 3, shape[0], dtype=dtype)
    results = []
    for y in (layer(x), F.linear(x, layer.dequantize(), layer.bias)):
        results.append((y, *torch.autograd.grad((y * direction).sum(), x)))
    for got, wanted in zip(*results, strict=True):
        assert got.dtype == dtype
        tolerance = 1e-12 if dtype == torch.float64 else 2e-2
        torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("storage", STORAGES)
def test_only_the_packed_weight_is_kept_for_the_backward_pass(storage: str) -> None:
    layer = FrozenLinear.of(linear((96, 160)), storage)
    kept: list[torch.Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda one: kept.append(one) or one, lambda x: x
    )
    with hooks:
        layer(torch.randn(4, 160, requires_grad=True))
    assert kept
    assert sum(one.numel() * one.element_size() for one in kept) == layer.stored_bytes


@pytest.mark.parametrize("storage", storages.UNPACKED)
def test_compiled_layers_unpack_again_instead_of_keeping_what_they_unpacked(storage: str) -> None:
    layer = FrozenLinear.of(linear((96, 160), torch.bfloat16, bias=False), storage)
    compiled = torch.compile(lambda x: layer(x.sin()).cos(), backend="aot_eager_decomp_partition")
    x = torch.randn(8, 160, dtype=torch.bfloat16, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = compiled(x)
    packed = {one.data_ptr() for one in layer.packed}
    extra = [one for one in kept if one.data_ptr() not in packed]
    assert sum(one.numel() for one in extra) <= 3 * 8 * 160
    (grad,) = torch.autograd.grad(y.sum(), x)
    (slow,) = torch.autograd.grad(layer(x.sin()).cos().sum(), x)
    torch.testing.assert_close(grad, slow, atol=0.02, rtol=0.02)


def test_under_autocast_it_computes_as_a_linear_does() -> None:
    layer = FrozenLinear.of(linear((8, 64)), "int8")
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(3, 64))
    assert y.dtype == torch.bfloat16


# -- adapters on it --------------------------------------------------------------------------------


def adapted(path: Path, storage: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    base = load_model(path, dtype, quantize=storage)
    model = adapters.attach(base, options.pop("method", "lora"), **options)
    torch.manual_seed(1)
    for parameter in adapters.trained_parameters(model).values():
        nn.init.normal_(parameter, std=0.1)
    return model


def thawed(model: Any) -> Any:
    """The slow twin: every packed linear replaced by a plain one with the rounded weight."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, FrozenLinear):
                plain = nn.Linear(child.in_features, child.out_features, bias=False)
                plain.weight = nn.Parameter(child.dequantize(), requires_grad=False)
                setattr(module, name, plain)
    return model


def loss_and_gradients(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = fast.loss_sum(model, BATCH)
    loss.backward()
    learned = adapters.trained_parameters(model)
    return loss.item(), {name: one.grad.clone() for name, one in learned.items()}


def compare(got: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    assert got[0] == pytest.approx(wanted[0], rel=tolerance)
    assert got[1].keys() == wanted[1].keys()
    for name, grad in got[1].items():
        assert ((grad - wanted[1][name]).norm() / wanted[1][name].norm()).item() < tolerance, name


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("options", [{}, {"method": "dora"}, {"dropout": 1e-9}])
def test_an_adapter_learns_what_it_would_on_the_rounded_weights(
    tiny: Path, storage: str, options: Any
) -> None:
    model = adapted(tiny, storage, **dict(options)).eval()
    assert sum(1 for _ in frozen_linears(model)) == 14
    found = loss_and_gradients(model)
    compare(found, loss_and_gradients(thawed(model)))


@pytest.mark.parametrize("storage", STORAGES)
def test_the_fused_forward_is_that_of_peft(tiny: Path, storage: str) -> None:
    model = adapted(tiny, storage)
    quick = loss_and_gradients(model)
    lora.uninstall(model)
    compare(quick, loss_and_gradients(model))
    assert lora.install(model) == 14


def test_one_fused_layer_in_float64_agrees_in_output_and_all_gradients() -> None:
    from peft import LoraConfig, get_peft_model

    layer = FrozenLinear.of(linear((20, 100), torch.float64, bias=False), "nf4")
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["0"])
    model = get_peft_model(nn.Sequential(layer), config, autocast_adapter_dtype=False).double()
    learned = adapters.trained_parameters(model)
    for parameter in learned.values():
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, 100, dtype=torch.float64, requires_grad=True)
    results = []
    for install in (False, True):
        if install:
            assert lora.install(model) == 1
        y = model(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, *learned.values()))))
    for slow, quick in zip(*results, strict=True):
        torch.testing.assert_close(quick, slow, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("storage", STORAGES)
def test_recomputed_activations_give_the_same_gradients(tiny: Path, storage: str) -> None:
    model = adapted(tiny, storage).train()
    plain = loss_and_gradients(model)
    recompute.install(fast.causal_model(model), 99)
    again = loss_and_gradients(model)
    assert plain[0] == again[0]
    assert all(torch.equal(grad, again[1][name]) for name, grad in plain[1].items())


def test_adapters_on_a_packed_base_in_16_bits_are_float32(tiny: Path) -> None:
    model = adapted(tiny, "nf4", torch.bfloat16)
    loss, grads = loss_and_gradients(model)
    wanted, _ = loss_and_gradients(adapted(tiny, "nf4"))
    assert loss == pytest.approx(wanted, rel=1e-2)
    assert {grad.dtype for grad in grads.values()} == {torch.float32}


# -- loading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_linears_but_the_head_are_packed_and_the_rest_is_exact(
    tiny: Path, storage: str, dtype: torch.dtype
) -> None:
    exact, model = load_model(tiny, torch.float32), load_model(tiny, dtype, quantize=storage)
    packed = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, FrozenLinear)}
    assert packed == set(packed_names(tiny))
    assert len(packed) == 14
    for name, value in exact.named_parameters():
        if name not in packed:
            assert torch.equal(model.get_parameter(name), value.to(dtype)), name
            continue
        layer = model.get_submodule(name.removesuffix(".weight"))
        # rounded from the file, whatever the model computes in
        codes, scales = STORAGES[storage].pack(value.detach())
        assert torch.equal(layer.weight, codes)
        assert torch.equal(layer.scales, scales)
    for name, buffer in exact.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
    assert not model.training
    assert model.config._attn_implementation == attention.ATTENTION


def test_a_model_without_linears_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=64,
                        bos_token_id=1, eos_token_id=2)  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="GPT2LMHeadModel has no linear layers") as caught:
        load_model(tmp_path, torch.float32, quantize="int8")
    assert caught.value.code == "nothing-to-quantize"


def test_without_bitsandbytes_the_command_that_installs_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storages.bitsandbytes.cache_clear()
    for name in [one for one in sys.modules if one.startswith("bitsandbytes.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    try:
        with pytest.raises(ResourceError, match="pip install bitsandbytes") as caught:
            FrozenLinear.of(linear((4, 64)), "nf4")
        assert caught.value.code == "no-bitsandbytes"
        FrozenLinear.of(linear((4, 64)), "int8")  # needs none
    finally:
        storages.bitsandbytes.cache_clear()


# -- the tutorial's model --------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["none", *STORAGES])
def test_lora_with_the_tutorials_settings_trains_4194304_numbers_of_llama_2_7b(
    storage: str,
) -> None:
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32,
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    if storage != "none":
        pack_linears(model, storage, Path("llama-2-7b"))
    model = adapters.attach(model, "lora", rank=8, alpha=32, targets="q_proj,v_proj")
    assert adapters.count_parameters(model) == (4_194_304, 6_738_415_616 + 4_194_304)
