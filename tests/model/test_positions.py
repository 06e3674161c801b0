"""Scaled positions are those that transformers computes from a config written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from chatfine.errors import ModelError, UsageError
from chatfine.hub.folder import read_model_folder
from chatfine.model import positions as scaling
from chatfine.model.load import load_model
from chatfine.model.positions import KINDS, Positions, stretch

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
BY_HAND: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 256},
    "llama3": {"factor": 4.0, "original_max_position_embeddings": 256, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0},
}  # fmt: skip
LLAMA = SIZES | {"model_type": "llama", "rope_theta": 10000.0}


def rotary(model: Any) -> Any:
    return next(one for name, one in model.named_modules() if name.endswith("rotary_emb"))


def config_of(kind: str, **more: Any) -> Any:
    head = {"head_dim": 32} if kind in ("Qwen3", "Gemma", "Glm") else {}
    return getattr(transformers, f"{kind}Config")(**(SIZES | head | more))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "model", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Olmo2", "Glm", "StableLm", "SmolLM3"]
)
def test_frequencies_are_transformers_own(model: str, kind: str, tmp_path: Path) -> None:
    own = config_of(model)
    own.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    found = stretch(raw, kind, 1000)
    assert found is not None
    assert (found.factor, found.own, found.length) == (4.0, 256, 1024)
    config = scaling.library_config(tmp_path, found)
    assert config.max_position_embeddings == 1024
    ours = rotary(transformers.AutoModelForCausalLM.from_config(config))
    by_hand = config_of(model)
    by_hand.rope_parameters = {**own.rope_parameters, "rope_type": kind, **BY_HAND[kind]}
    wanted, factor = ROPE_INIT_FUNCTIONS[kind](by_hand, seq_len=1024)
    assert torch.allclose(ours.inv_freq, wanted, rtol=1e-6, atol=0)
    assert ours.attention_scaling == factor
    assert not torch.allclose(ours.inv_freq, rotary(
        transformers.AutoModelForCausalLM.from_config(own)).inv_freq, rtol=1e-2)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_of_a_config_says_the_same(kind: str, tmp_path: Path) -> None:
    """Old files have a base beside the scaling, new ones in it, some none at all."""
    new = SIZES | {"model_type": "llama",
                   "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}  # fmt: skip
    without = SIZES | {"model_type": "llama", "rope_scaling": None}
    changed = []
    for raw in (LLAMA, new, without):
        again = scaling.with_positions(raw, stretch(raw, kind, 512))
        assert scaling.with_positions(again, stretch(raw, kind, 512)) == again
        (tmp_path / "config.json").write_text(json.dumps(again), encoding="utf-8")
        changed.append(transformers.AutoConfig.from_pretrained(tmp_path))
        for lost in ("rope_parameters", "rope_scaling"):  # a reader that knows only one form
            one_form = {name: value for name, value in again.items() if name != lost}
            (tmp_path / "config.json").write_text(json.dumps(one_form), encoding="utf-8")
            if kind != "dynamic" or lost == "rope_scaling":
                read = transformers.AutoConfig.from_pretrained(tmp_path)
                assert read.rope_parameters == changed[-1].rope_parameters
    assert changed[0].rope_parameters == changed[1].rope_parameters == changed[2].rope_parameters
    assert {one.max_position_embeddings for one in changed} == {512}


@pytest.mark.parametrize(
    ("tokens", "factor", "length"),
    [(257, 1.25, 320), (512, 2.0, 512), (513, 2.25, 576), (1000, 4.0, 1024), (4096, 16.0, 4096)],
)
def test_the_factor_is_no_larger_than_needed(tokens: int, factor: float, length: int) -> None:
    for kind in KINDS:
        found = stretch(LLAMA, kind, tokens)
        assert found is not None
        assert (found.factor, found.length) == (factor, length)
    assert stretch(LLAMA, "yarn", 256) is None


def test_a_model_that_scales_already_is_scaled_further_in_its_own_way() -> None:
    linear = LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    found = stretch(linear, "linear", 512)
    assert found is not None
    assert (found.factor, found.length, found.rope["rope_type"]) == (4.0, 512, "linear")
    llama31 = LLAMA | {"max_position_embeddings": 131072, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}}  # fmt: skip
    found = stretch(llama31, "llama3", 262144)
    assert found is not None
    assert (found.factor, found.length) == (16.0, 262144)
    assert found.rope["original_max_position_embeddings"] == 8192
    assert found.rope["low_freq_factor"] == 2.0
    # Qwen's way of writing it: the factor says how far, and max_position_embeddings does not
    qwen = LLAMA | {"max_position_embeddings": 32768, "rope_scaling": {
        "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}  # fmt: skip
    found = stretch(qwen, "yarn", 100_000)
    assert found is not None
    assert (found.factor, found.length) == (4.0, 131072)
    found = stretch(qwen, "yarn", 200_000)
    assert found is not None
    assert (found.factor, found.length) == (6.25, 204_800)


@pytest.mark.parametrize(
    ("changes", "kind", "code", "fix"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "yarn", "positions-scaled",
         "--rope-scaling linear"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic", "positions-scaled",
         "--max-length up to 256"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "yarn", "positions-scaled",
         "--max-length up to 256"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {}}},
         "yarn", "positions-unknown", "--max-length"),
        ({"model_type": "gpt2", "rope_theta": None}, "yarn", "positions-unknown", "Llama"),
        ({"model_type": "falcon", "alibi": True}, "linear", "positions-unknown", "Llama"),
        ({"model_type": "granitemoehybrid", "position_embedding_type": "nope"}, "yarn",
         "positions-unknown", "Llama"),
        ({"model_type": "phi3"}, "yarn", "positions-unknown", "--rope-scaling dynamic"),
    ],
)  # fmt: skip
def test_refusals(changes: dict[str, Any], kind: str, code: str, fix: str) -> None:
    raw = LLAMA | changes
    with pytest.raises(ModelError) as caught:
        stretch(raw, kind, 512)
    assert caught.value.code == code
    assert fix in str(caught.value.fix)
    assert stretch(raw, kind, 200) is None, "nothing to scale"


def test_phi3_takes_a_larger_base(tmp_path: Path) -> None:
    config_of("Phi3", original_max_position_embeddings=256).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    found = stretch(raw, "dynamic", 512)
    config = scaling.library_config(tmp_path, found)
    assert config.rope_parameters["rope_theta"] > 10000 * 2
    assert config.max_position_embeddings == 512


def test_the_part_of_a_larger_model_that_reads_text_is_changed() -> None:
    found = stretch(LLAMA, "yarn", 512)
    whole = scaling.with_positions({"model_type": "llava", "text_config": dict(LLAMA)}, found)
    assert whole.keys() == {"model_type", "text_config"}
    assert whole["text_config"] == scaling.with_positions(LLAMA, found)


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_all_loaders_build_the_same_model(tiny: Path, quantize: str) -> None:
    folder = read_model_folder(tiny)
    ids = torch.arange(3, 300)[None] % 400
    for kind in KINDS:
        found = stretch(folder.config, kind, 2048)
        model = load_model(tiny, torch.float32, quantize=quantize, positions=found)
        assert model.config.max_position_embeddings == 2048
        plain = load_model(tiny, torch.float32, quantize=quantize)
        rotary(plain).inv_freq.copy_(rotary(model).inv_freq)
        rotary(plain).attention_scaling = rotary(model).attention_scaling
        with torch.no_grad():
            assert torch.equal(model(ids).logits, plain(ids).logits)
    assert scaling.with_positions_of(folder, found).max_positions == 2048
    assert read_model_folder(tiny).max_positions == 512, "files stay as they are"


def write_fact(folder: Path, fact: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "chatfine.json").write_text(json.dumps({"positions": fact}), encoding="utf-8")
    return folder


def test_an_adapter_says_what_it_was_trained_with(tmp_path: Path) -> None:
    found = stretch(LLAMA, "yarn", 512)
    assert found is not None
    assert scaling.of_adapter(write_fact(tmp_path / "a", found.facts())) == found
    assert scaling.of_adapter(write_fact(tmp_path / "a", None)) is None
    assert scaling.of_adapter(tmp_path) is None
    assert scaling.of_adapter(None) is None
    wrong: list[Any] = [
        "yarn", [1], {}, found.facts() | {"length": "512"}, found.facts() | {"factor": -1},
        found.facts() | {"more": 1}, found.facts() | {"rope": {"rope_type": "yarn"}},
        found.facts() | {"rope": {"rope_type": "os.system", "rope_theta": 1.0}},
        found.facts() | {"rope": {"rope_type": "yarn", "rope_theta": 1.0, "x": "y"}},
    ]  # fmt: skip
    for fact in wrong:
        with pytest.raises(ModelError, match="can't be understood") as caught:
            scaling.of_adapter(write_fact(tmp_path / "a", fact))
        assert caught.value.code == "adapter-bad-config"


def test_a_run_goes_on_as_its_adapter_began() -> None:
    earlier = stretch(LLAMA, "yarn", 512)

    def of_run(kind: str, tokens: int) -> Positions | None:
        return scaling.of_run(LLAMA, kind, tokens, earlier)

    assert earlier is not None
    assert of_run("auto", 0) == of_run("auto", 9999) == of_run("yarn", 300) == earlier
    assert of_run("yarn", 1024) == stretch(LLAMA, "yarn", 1024), "and may go further"
    for kind in ("none", "linear"):
        with pytest.raises(UsageError) as caught:
            of_run(kind, 300)
        assert caught.value.code == "adapter-other-positions"
        assert "--rope-scaling yarn" in str(caught.value.fix)
    assert scaling.of_run(LLAMA, "auto", 9999) is None
    assert scaling.of_run(LLAMA, "none", 9999) is None
