"""Bad model folders: each is refused with its own code and words, and nothing is opened blindly."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_hub import CONFIG, llama_tensors, write_safetensors

from chatfine.errors import ModelError
from chatfine.hub.folder import check_vocabulary, read_model_folder, resolve_source
from chatfine.tokenizer.files import read_files


def edit(file: Path, **changes: Any) -> None:
    value = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    value.update(changes)
    file.write_text(json.dumps(value), encoding="utf-8")


def refusal(folder: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        read_model_folder(folder)
    assert caught.value.exit_code == 2
    assert caught.value.fix, "an error must say what to do"
    return caught.value


def test_a_sound_folder_is_read(folder: Path) -> None:
    model = read_model_folder(folder)
    assert (model.vocab_size, model.hidden_size, model.layers) == (64, 16, 2)
    assert model.max_positions == 128
    assert model.tied
    assert model.dtype == "fp16"
    assert model.weight_bytes == 2 * model.parameters
    data = model.tensors["model.embed_tokens.weight"]
    assert data.end - data.begin == 64 * 16 * 2
    assert max(info.end for info in model.tensors.values()) == data.file.stat().st_size


def test_headers_agree_with_the_safetensors_library(tiny: Path) -> None:
    from safetensors import safe_open

    model = read_model_folder(tiny)
    with safe_open(tiny / "model.safetensors", "pt") as weights:
        assert set(weights.keys()) == set(model.tensors)
        raw = (tiny / "model.safetensors").read_bytes()
        for name, info in model.tensors.items():
            tensor = weights.get_tensor(name)
            assert tuple(tensor.shape) == info.shape
            assert raw[info.begin : info.end] == tensor.numpy().tobytes()
    assert not model.tied
    assert model.dtype == "fp32"


def test_a_tied_head_is_counted_once(folder: Path) -> None:
    before = read_model_folder(folder).parameters
    tensors = llama_tensors() | {"lm_head.weight": (64, 16)}
    write_safetensors(folder / "model.safetensors", tensors)
    assert read_model_folder(folder).parameters == before


def test_digest_sees_weights_and_config(folder: Path) -> None:
    before = read_model_folder(folder).digest()
    assert read_model_folder(folder).digest() == before
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    weights_changed = read_model_folder(folder).digest()
    edit(folder / "config.json", rope_theta=7.0)
    assert len({before, weights_changed, read_model_folder(folder).digest()}) == 3


def pickles_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({}, file)


def no_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


def no_shard(folder: Path) -> None:
    no_index(folder)
    names = list(llama_tensors())
    shards = {name: f"model-0000{1 + (i > 3)}-of-00002.safetensors" for i, name in enumerate(names)}
    edit(folder / "model.safetensors.index.json", weight_map=shards)


def shard_lacks_tensor(folder: Path) -> None:
    names = [*llama_tensors(), "lm_head.weight"]
    edit(
        folder / "model.safetensors.index.json",
        weight_map=dict.fromkeys(names, "model.safetensors"),
    )


def shard_outside(folder: Path) -> None:
    edit(folder / "model.safetensors.index.json", weight_map={"a": "../secret.safetensors"})


def wrong_matrix(folder: Path) -> None:
    tensors = llama_tensors() | {"model.layers.1.mlp.up_proj.weight": (16, 40)}
    write_safetensors(folder / "model.safetensors", tensors)


def no_matrix(folder: Path) -> None:
    tensors = llama_tensors()
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    write_safetensors(folder / "model.safetensors", tensors)


def cut_short(folder: Path) -> None:
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:-100])


def pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 269060552\n"
    (folder / "model.safetensors").write_text(text, encoding="utf-8")


def overlong_tensor(folder: Path) -> None:
    raw = (folder / "model.safetensors").read_bytes().replace(b"[64, 16]", b"[63, 16]", 1)
    (folder / "model.safetensors").write_bytes(raw)


def rewrite(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", **changes)


def tokenizer_code(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})


BAD: list[tuple[Callable[[Path], object], str, str]] = [
    (lambda folder: (folder / "config.json").unlink(), "model-no-config",
     "there is no config.json in"),
    (lambda folder: (folder / "config.json").write_text("{"), "model-bad-config",
     "config.json is not valid JSON"),
    (lambda folder: (folder / "config.json").write_text("[" * 100_000), "model-bad-config",
     "config.json is not valid JSON"),
    (lambda folder: (folder / "config.json").write_text("[]"), "model-bad-config",
     "config.json must hold a JSON object"),
    (rewrite(vocab_size=None), "model-bad-config", "config.json says vocab_size = null"),
    (rewrite(num_attention_heads="4"), "model-bad-config", 'num_attention_heads = "4"'),
    (pickles_only, "model-pickle", "the weights are pickles (pytorch_model.bin)"),
    (rewrite(auto_map={"AutoModelForCausalLM": "evil.Model"}), "model-runs-code",
     "config.json has auto_map"),
    (rewrite(text_config={**CONFIG, "auto_map": {"AutoConfig": "evil.C"}}), "model-runs-code",
     "config.json has auto_map"),
    (rewrite(_attn_implementation_internal="evil/kernels"), "model-runs-code",
     "config.json has _attn_implementation_internal"),
    (tokenizer_code, "model-runs-code", "tokenizer_config.json has auto_map"),
    (lambda folder: (folder / "model.safetensors").unlink(), "model-no-weights",
     "there are no weights (*.safetensors)"),
    (no_index, "model-missing-shard", "model.safetensors.index.json is missing"),
    (no_shard, "model-missing-shard",
     "1 of 2 weight files are missing: model-00002-of-00002.safetensors"),
    (shard_lacks_tensor, "model-missing-tensor", "model.safetensors has no tensor lm_head.weight"),
    (shard_outside, "model-bad-weights", "model.safetensors.index.json is damaged"),
    (wrong_matrix, "model-wrong-shape",
     "model.layers.1.mlp.up_proj.weight has shape [16, 40]; config.json says [40, 16]"),
    (rewrite(vocab_size=65), "model-wrong-shape",
     "model.embed_tokens.weight has shape [64, 16]; vocab_size × hidden_size says [65, 16]"),
    (rewrite(num_hidden_layers=3), "model-wrong-shape",
     "config.json says num_hidden_layers = 3, the weights have 2 layers"),
    (rewrite(tie_word_embeddings=False), "model-missing-tensor",
     "the weights have no tensor lm_head.weight"),
    (no_matrix, "model-missing-tensor",
     "the weights have no tensor model.layers.1.self_attn.k_proj.weight"),
    (cut_short, "model-truncated", "model.safetensors is cut short"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model-truncated",
     "model.safetensors is cut short"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"<!DOCTYPE html>" * 200),
     "model-truncated", "is not a safetensors file"),
    (pointer, "model-lfs-pointer", "model.safetensors is a git-lfs pointer"),
    (overlong_tensor, "model-bad-weights", "model.safetensors is damaged"),
]  # fmt: skip


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer.model",
                                  "model.safetensors", "generation_config.json"])  # fmt: skip
def test_pointers_of_a_clone_without_lfs(folder: Path, name: str) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 17209961\n"
    (folder / name).write_text(text, encoding="utf-8")
    error = refusal(folder)
    assert (error.code, error.what) == (
        "model-lfs-pointer", f"{name} is a git-lfs pointer, not the file itself",
    )  # fmt: skip
    assert error.fix[0] == f"in the folder {folder}: git lfs install && git lfs pull"
    assert "password it wants a token of the hub" in error.fix[1]
    if name.startswith("tokenizer"):  # a folder with only a tokenizer
        (folder / "config.json").unlink()
        with pytest.raises(ModelError, match=f"{name} is a git-lfs pointer"):
            read_files(folder)


@pytest.mark.parametrize(("damage", "code", "words"), BAD)
def test_a_bad_folder_is_refused(
    folder: Path, damage: Callable[[Path], object], code: str, words: str
) -> None:
    damage(folder)
    error = refusal(folder)
    assert error.code == code
    assert words in error.what


def test_no_folder_at_all(tmp_path: Path) -> None:
    error = refusal(tmp_path / "nowhere")
    assert error.code == "no-model"
    assert "there is no model folder" in error.what


def test_safetensors_beside_a_pickle_are_enough(folder: Path) -> None:
    (folder / "training_args.bin").write_bytes(pickle.dumps(1))
    edit(folder / "config.json", _name_or_path="acme/tiny", auto_map={})
    assert read_model_folder(folder).layers == 2


def test_two_shards_are_put_together(folder: Path) -> None:
    tensors = llama_tensors()
    (folder / "model.safetensors").unlink()
    placed: dict[str, str] = {}
    for number, names in enumerate((list(tensors)[:5], list(tensors)[5:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in names})
        placed |= dict.fromkeys(names, file)
    edit(folder / "model.safetensors.index.json", weight_map=placed)
    model = read_model_folder(folder)
    assert set(model.tensors) == set(tensors)
    assert [shard.name for shard in model.shards] == sorted(set(placed.values()))


def test_a_tokenizer_larger_than_the_embedding_names_expand_vocab(folder: Path) -> None:
    model = read_model_folder(folder)
    check_vocabulary(model, 64)
    with pytest.raises(
        ModelError, match="has 65 pieces, the model's embedding only 64 rows"
    ) as caught:
        check_vocabulary(model, 65)
    assert caught.value.code == "model-small-embedding"
    assert f"chatfine expand-vocab -m {folder} " in caught.value.fix[0]


def adapter_at(folder: Path, base: str) -> Path:
    folder.mkdir(parents=True)
    edit(folder / "adapter_config.json", base_model_name_or_path=base, auto_mapping=None)
    return folder


def test_names_become_model_adapter_and_run(folder: Path, tmp_path: Path) -> None:
    assert resolve_source(folder).model == folder
    adapter = adapter_at(tmp_path / "adapter", str(folder))
    found = resolve_source(str(adapter))
    assert (found.model, found.adapter, found.run) == (folder, adapter, None)

    run = tmp_path / "run"
    inner = adapter_at(run / "adapter", "acme/elsewhere")
    (run / "config.yaml").write_text("model: x\n", encoding="utf-8")
    found = resolve_source(run, base=str(folder))
    assert (found.model, found.adapter, found.run) == (folder, inner, run)

    edit(inner / "chatfine.json", base=str(folder))
    assert resolve_source(run).model == folder

    full = tmp_path / "full"
    shutil.copytree(folder, full / "model")
    (full / "config.yaml").write_text("model: x\n", encoding="utf-8")
    found = resolve_source(full)
    assert (found.model, found.adapter, found.run) == (full / "model", None, full)


def test_sources_that_cannot_be_resolved(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHATFINE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))

    def code(name: Path) -> tuple[str, str]:
        with pytest.raises(ModelError) as caught:
            resolve_source(name)
        return caught.value.code, str(caught.value)

    lost = code(adapter_at(tmp_path / "lost", "smollm2-135m-instruct"))
    assert lost[0] == "adapter-no-base"
    assert "chatfine download smollm2-135m-instruct" in lost[1]
    assert code(adapter_at(tmp_path / "nameless", ""))[0] == "adapter-no-base"
    foreign = adapter_at(tmp_path / "foreign", str(folder))
    edit(foreign / "adapter_config.json", auto_mapping={"parent_library": "evil.module"})
    assert code(foreign)[0] == "model-runs-code"
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("model: x\n", encoding="utf-8")
    unfinished = code(run)
    assert unfinished[0] == "run-unfinished"
    assert f"chatfine resume {run}" in unfinished[1]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert code(empty)[0] == "model-no-config"


def test_the_room_imports_neither_torch_nor_transformers() -> None:
    script = (
        "import sys, chatfine.hub.download, chatfine.hub.folder, chatfine.hub.convert;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'tokenizers')))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
