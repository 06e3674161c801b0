"""A model on the meta device and its weights one by one: the same as transformers' own loading."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from chatfine.errors import ModelError
from chatfine.model import stream
from chatfine.model.load import load_model
from chatfine.model.stream import StoredWeight

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
MODELS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama-tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-scaled-rope": transformers.LlamaConfig(**SIZES, rope_scaling=LLAMA3),
    "qwen2-bias": transformers.Qwen2Config(**SIZES),
    "gemma2-tied": transformers.Gemma2Config(**SIZES, head_dim=8),
    "phi3-fused": transformers.Phi3Config(**SIZES),
    "gpt2-prefix": transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1,
        eos_token_id=2,
    ),
}  # fmt: skip


def write(folder: Path, config: Any, **options: Any) -> Path:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, **options)
    return folder


def streamed(path: Path, dtype: torch.dtype) -> Any:
    model = stream.empty_model(path, dtype)

    def place(name: str, stored: StoredWeight) -> None:
        stream.put(model, name, stored.read().to(dtype))

    stream.stream_weights(model, path, place)
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_model_that_from_pretrained_makes(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    write(tmp_path, MODELS[name], max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    ours = streamed(tmp_path, dtype)
    for kind in ("state_dict", "named_buffers"):
        wanted, found = (dict(getattr(model, kind)()) for model in (theirs, ours))
        assert wanted.keys() == found.keys()
        for key, value in wanted.items():
            assert found[key].dtype == value.dtype, key
            assert torch.equal(found[key], value), key
    ends = [(m.get_input_embeddings().weight, m.get_output_embeddings().weight)
            for m in (theirs, ours)]  # fmt: skip
    assert (ends[0][0] is ends[0][1]) == (ends[1][0] is ends[1][1])
    assert ours.generation_config.eos_token_id == theirs.generation_config.eos_token_id
    ids = torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(ours.eval()(ids).logits, theirs.eval()(ids).logits)


def test_nothing_has_memory_before_it_is_placed(tiny: Path) -> None:
    model = stream.empty_model(tiny, torch.float32)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_a_process_can_read_its_rows_only(tiny: Path) -> None:
    whole = load_file(tiny / "model.safetensors")
    seen: set[str] = set()

    def place(name: str, stored: StoredWeight) -> None:
        seen.add(name)
        half = stored.shape[0] // 2
        rows = stored.read((half, stored.shape[0]))
        assert torch.equal(rows, whole[stored.name][half:])
        stream.put(model, name, whole[stored.name])

    model = stream.empty_model(tiny, torch.float32)
    stream.stream_weights(model, tiny, place)
    assert seen == set(model.state_dict())


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_no_stored_tensor_outlives_its_placing(
    storage: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the peak is the packed model and one tensor."""
    read, alive = StoredWeight.read, weakref.WeakSet()
    most = 0

    def watched(self: StoredWeight, rows: Any = None) -> torch.Tensor:
        nonlocal most
        tensor = read(self, rows)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(StoredWeight, "read", watched)
    load_model(tiny, torch.float32, quantize=storage)
    assert (most, len(alive)) == (1, 0)


def change(tiny: Path, folder: Path, edit: Any) -> Path:
    path = Path(shutil.copytree(tiny, folder / "model"))
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_a_weight_that_is_missing_is_not_made_up(tiny: Path, tmp_path: Path) -> None:
    lost = "model.layers.1.mlp.up_proj.weight"
    path = change(tiny, tmp_path, lambda tensors: tensors.pop(lost))
    with pytest.raises(ModelError) as caught:
        load_model(path, torch.float32, quantize="int8")
    assert (caught.value.code, caught.value.where) == ("weights-missing", lost)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"])
def test_a_weight_of_another_shape_is_refused(name: str, tiny: Path, tmp_path: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][:-1].contiguous()

    with pytest.raises(ModelError, match=f"{name} has shape") as caught:
        load_model(change(tiny, tmp_path, cut), torch.float32, quantize="int8")
    assert caught.value.code == "model-wrong-shape"


def test_weights_that_need_more_than_reading_are_refused(tmp_path: Path) -> None:
    write(tmp_path, transformers.MixtralConfig(**SIZES, num_local_experts=2))
    with pytest.raises(ModelError, match="loaded whole") as caught:
        load_model(tmp_path, torch.float32, quantize="int8")
    assert caught.value.code == "weights-stored-otherwise"
    assert caught.value.fix == ("--quantize none",)


def test_an_unknown_architecture_is_refused(tiny: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny, tmp_path / "model"))
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "llamba", "architectures": ["LlambaForCausalLM"]}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match="llamba"):
        load_model(path, torch.float32, quantize="int8")


def test_a_tied_head_with_numbers_of_its_own_stays_apart(tmp_path: Path) -> None:
    """As in transformers: the files, not the config, say what the weights are."""
    write(tmp_path, MODELS["llama"])
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    wanted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    found = streamed(tmp_path, torch.float32)
    assert torch.equal(found.lm_head.weight, wanted.lm_head.weight)
    assert not torch.equal(found.lm_head.weight, found.model.embed_tokens.weight)
