"""A folder becomes a model, or one clear error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from chatfine.errors import ModelError
from chatfine.model import attention
from chatfine.model.load import load_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_those_of_the_files_in_the_wanted_format(
    tiny: Path, dtype: torch.dtype
) -> None:
    model = load_model(tiny, dtype)
    stored = load_file(tiny / "model.safetensors")
    for name, value in stored.items():
        assert torch.equal(model.state_dict()[name], value.to(dtype)), name
    assert not model.training
    assert model.config._attn_implementation == attention.ATTENTION


def test_logits_are_those_of_transformers(tiny: Path) -> None:
    ids = torch.tensor([[4, 5, 6, 7, 300]])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(tiny, torch.float32)(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5
        )


def test_a_model_that_has_no_sdpa_loads_too(tmp_path: Path) -> None:
    config = transformers.Gemma2Config(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    assert load_model(tmp_path, torch.float32).config._attn_implementation == attention.ATTENTION


def test_a_weight_that_is_missing_is_not_made_up(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    stored = load_file(folder / "model.safetensors")
    del stored["model.layers.1.mlp.up_proj.weight"]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        load_model(folder, torch.float32)
    assert caught.value.code == "weights-missing"
    assert caught.value.where == "model.layers.1.mlp.up_proj.weight"


def test_an_unknown_architecture_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "llamba", "architectures": ["LlambaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError) as caught:
        load_model(folder, torch.float32)
    assert caught.value.code == "model-unloadable"
    assert "llamba" in str(caught.value.why)
