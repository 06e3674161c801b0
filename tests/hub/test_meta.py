"""Meta's layout → Hugging Face and back, against an independent form of Meta's network."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from meta_reference import (
    LLAMA2,
    VOCABULARY,
    Tensors,
    cut,
    logits,
    random_weights,
    write_meta,
)
from safetensors.torch import load_file

from chatfine.errors import ModelError
from chatfine.hub import shards
from chatfine.hub.folder import read_model_folder
from chatfine.hub.meta import find_meta_folder, meta_to_folder, read_meta_folder
from chatfine.hub.meta_layout import Joined, check_params, plan_join, read_shape
from chatfine.hub.to_meta import folder_to_meta

IDS = [1, 5, 9, 33, 60, 2, 7, 7, 41, 12]
LLAMA31 = {"dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "vocab_size": VOCABULARY,
           "multiple_of": 16, "norm_eps": 1e-5, "rope_theta": 500000.0,
           "use_scaled_rope": True}  # fmt: skip


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def converted(source: Path, output: Path, **options: Any) -> Path:
    output.mkdir()
    meta_to_folder(read_meta_folder(source), output, **options)
    return output


@pytest.fixture(scope="module")
def hf_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Llama 2 of the reference, converted from two shards."""
    root = tmp_path_factory.mktemp("meta")
    return converted(write_meta(root / "two", LLAMA2, random_weights(LLAMA2), 2), root / "hf")


def test_two_shards_compute_what_metas_network_computes(hf_of_two: Path) -> None:
    model = load(hf_of_two)
    wanted = logits(LLAMA2, random_weights(LLAMA2), IDS)
    torch.testing.assert_close(model(torch.tensor([IDS])).logits[0], wanted, rtol=0, atol=1e-4)
    assert model.config.num_key_value_heads == 2
    assert read_model_folder(hf_of_two).max_positions == 4096


def test_one_shard_gives_the_same_weights_as_two(hf_of_two: Path, tmp_path: Path) -> None:
    source = write_meta(tmp_path / "one", LLAMA2, random_weights(LLAMA2), 1)
    seen: list[tuple[int, int]] = []
    out = converted(source, tmp_path / "out", progress=lambda *counts: seen.append(counts))
    one, two = load_file(out / "model.safetensors"), load_file(hf_of_two / "model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert "rope.freqs" not in one
    assert seen[-1][0] == seen[-1][1] == read_model_folder(out).weight_bytes


def test_llama3_cuts_the_embedding_along_the_vocabulary(tmp_path: Path) -> None:
    weights = random_weights(LLAMA31)
    source = write_meta(tmp_path / "three", LLAMA31, weights, 2, axis=0)
    out = converted(source, tmp_path / "out", dtype="BF16", ids={"bos_token_id": 3})
    folder = read_model_folder(out)
    assert (folder.dtype, folder.max_positions) == ("bf16", 131072)
    assert folder.config["bos_token_id"] == 3
    assert not folder.tied
    assert folder.config["rope_parameters"] == {
        "rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    exact = {name: value.bfloat16().float() for name, value in weights.items()}
    found = load(out)(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(found, logits(LLAMA31, exact, IDS), rtol=0, atol=1e-4)


def test_there_and_back_again_is_bit_identical(tiny: Path, tmp_path: Path) -> None:
    model = read_model_folder(tiny)
    meta = tmp_path / "meta"
    meta.mkdir()
    folder_to_meta(model, meta, shards=2)
    assert sorted(file.name for file in meta.iterdir()) == [
        "chatfine.json", "consolidated.00.pth", "consolidated.01.pth", "params.json"]  # fmt: skip
    again = read_model_folder(converted(meta, tmp_path / "again"))
    before, after = (load_file(f / "model.safetensors") for f in (tiny, again.path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(before[name].dtype == after[name].dtype for name in before)
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "vocab_size", "max_position_embeddings", "rms_norm_eps",
            "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
    assert {key: again.config[key] for key in same} == {key: model.config[key] for key in same}
    # what was written is Meta's layout for others too: the reference computes the same from it
    params = json.loads((meta / "params.json").read_text(encoding="utf-8"))
    parts = [torch.load(meta / f"consolidated.0{n}.pth", weights_only=True) for n in (0, 1)]
    whole = {name: _joined(name, [part[name] for part in parts]) for name in parts[0]}
    found = load(tiny)(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(logits(params, whole, IDS), found, rtol=0, atol=1e-3)


def _joined(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    if "norm" in name:
        return parts[0]
    return torch.cat(parts, 1 if any(kind in name for kind in ("wo", "w2", "tok_")) else 0)


def test_real_weights_tell_their_story(shared: Path, tmp_path: Path) -> None:
    """Karpathy's 260K model, which was trained in Meta's order of rows, with shared key heads."""
    file = shared / "models/stories260K/stories260K.bin"
    if not file.is_file():
        pytest.skip("stories260K is not here")
    raw = file.read_bytes()
    dim, inner, layers, heads, kv_heads, vocabulary, _ = struct.unpack("7i", raw[:28])
    numbers = torch.frombuffer(bytearray(raw[28:]), dtype=torch.float32)
    at = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        size = torch.Size(shape).numel()
        at += size
        return numbers[at - size : at].reshape(shape).clone()

    weights = {"tok_embeddings.weight": take(vocabulary, dim)}
    kv = dim // heads * kv_heads
    for name, shape in {
        "attention_norm": (dim,), "attention.wq": (dim, dim), "attention.wk": (kv, dim),
        "attention.wv": (kv, dim), "attention.wo": (dim, dim), "ffn_norm": (dim,),
        "feed_forward.w1": (inner, dim), "feed_forward.w2": (dim, inner),
        "feed_forward.w3": (inner, dim),
    }.items():  # fmt: skip
        for number, value in enumerate(take(layers, *shape)):
            weights[f"layers.{number}.{name}.weight"] = value
    weights["norm.weight"] = take(dim)
    weights["output.weight"] = weights["tok_embeddings.weight"]
    params = {"dim": dim, "n_layers": layers, "n_heads": heads, "n_kv_heads": kv_heads,
              "vocab_size": vocabulary, "multiple_of": 4, "norm_eps": 1e-5}  # fmt: skip
    out = converted(write_meta(tmp_path / "stories", params, weights), tmp_path / "out")
    ids = load(out).generate(torch.tensor([[1]]), max_new_tokens=30, do_sample=False)[0].tolist()
    table, pieces, at = (shared / "models/stories260K/tok512.bin").read_bytes(), [], 4
    while at < len(table):
        length = struct.unpack("i", table[at + 4 : at + 8])[0]
        pieces.append(table[at + 8 : at + 8 + length])
        at += 8 + length
    text = b"".join(pieces[number] for number in ids[1:]).decode()
    assert text.strip().startswith("Once upon a time, there was a little girl named Lily.")


# -- refusals --------------------------------------------------------------------------------------


def test_what_lacks_a_file_is_refused_at_once(tmp_path: Path) -> None:
    source = write_meta(tmp_path / "two", LLAMA2, random_weights(LLAMA2), 2)
    (source / "consolidated.00.pth").rename(tmp_path / "aside")
    with pytest.raises(ModelError, match=r"consolidated\.00\.pth") as error:
        read_meta_folder(source)
    assert error.value.code == "meta-missing-shard"
    (tmp_path / "aside").rename(source / "consolidated.00.pth")
    (source / "params.json").rename(tmp_path / "aside")
    with pytest.raises(ModelError, match=r"params\.json"):
        read_meta_folder(source)


def test_the_folder_around_one_model_is_enough(tmp_path: Path) -> None:
    weights = random_weights(LLAMA2)
    one = write_meta(tmp_path / "models" / "llama-2-7b", LLAMA2, weights)
    assert find_meta_folder(tmp_path / "models") == find_meta_folder(one) == one
    assert find_meta_folder(tmp_path) is None
    write_meta(tmp_path / "models" / "llama-2-7b-chat", LLAMA2, weights)
    with pytest.raises(ModelError, match="several") as error:
        find_meta_folder(tmp_path / "models")
    assert "llama-2-7b-chat" in error.value.fix[0]


def test_files_of_different_models_are_refused(tmp_path: Path) -> None:
    weights = random_weights(LLAMA2)

    def plan(parts: list[Tensors], **change: Any) -> list[Joined]:
        params = check_params(tmp_path, LLAMA2 | change)
        listings = [{n: ("F32", tuple(v.shape)) for n, v in part.items()} for part in parts]
        shape = read_shape(tmp_path, params, listings, 128, tied=False)
        return plan_join(tmp_path, shape, listings, "")

    def refusal(parts: list[Tensors], **change: Any) -> ModelError:
        with pytest.raises(ModelError) as error:
            plan(parts, **change)
        return error.value

    assert len(plan([weights])) == len(plan(cut(weights, 2))) == len(weights)
    without = {
        name: value for name, value in weights.items() if "layers.1.attention.wk" not in name
    }
    assert refusal([without]).code == "meta-missing-tensor"
    assert "layers.1.attention.wk.weight" in str(refusal([without]))
    wrong = refusal([weights], n_kv_heads=4)
    assert wrong.code == "meta-wrong-shape"
    assert "[16, 32]" in wrong.what
    assert "[32, 32]" in wrong.what
    uneven = cut(weights, 2)
    uneven[1]["layers.0.attention.wo.weight"] = uneven[1]["layers.0.attention.wo.weight"][:, :8]
    assert refusal(uneven).code == "meta-wrong-shape"
    more = refusal([weights | {"layers.0.experts.weight": weights["norm.weight"]}])
    assert more.code == "meta-unsupported"
    assert "layers.0.experts.weight" in (more.why or "")
    assert "vocab_size = 65" in (refusal([weights], vocab_size=65).why or "")
    assert "feed-forward" in (refusal([weights], ffn_dim_multiplier=2).why or "")


def test_what_meta_can_not_say_is_refused(tiny: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    model = read_model_folder(tiny)
    for change, word in (({"model_type": "qwen2"}, "qwen2"), ({"attention_bias": True}, "biases"),
                         ({"head_dim": 32}, "wide"), ({"hidden_act": "gelu"}, "gelu")):  # fmt: skip
        with pytest.raises(ModelError) as error:
            folder_to_meta(replace(model, config=model.config | change), tmp_path)
        assert error.value.code == "meta-inexpressible"
        assert word in (error.value.why or "")
    with pytest.raises(ModelError, match="4 files") as bad:
        folder_to_meta(model, tmp_path, shards=4)
    assert bad.value.where == "--shards"
    assert not list(tmp_path.iterdir())


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="there is no getrusage")
def test_memory_stays_below_twice_the_largest_shard(tmp_path: Path) -> None:
    params = {"dim": 512, "n_layers": 8, "n_heads": 8, "vocab_size": 1024, "multiple_of": 256,
              "norm_eps": 1e-5}  # fmt: skip
    tied = random_weights(LLAMA2)
    tied["output.weight"] = tied["tok_embeddings.weight"]
    write_meta(tmp_path / "small", LLAMA2, tied)
    large = write_meta(tmp_path / "large", params, random_weights(params, 1024), 4)
    shard = max(file.stat().st_size for file in large.iterdir())
    assert shard > 25e6
    code = f"""
        import resource
        from pathlib import Path
        from chatfine.hub.folder import read_model_folder
        from chatfine.hub.meta import meta_to_folder, read_meta_folder
        from chatfine.hub.to_meta import folder_to_meta

        root = Path({str(tmp_path)!r})
        for name in ("small", "large"):
            (root / f"{{name}}-hf").mkdir()
            meta_to_folder(read_meta_folder(root / name), root / f"{{name}}-hf", context=99)
            print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
        (root / "back").mkdir()
        folder_to_meta(read_model_folder(root / "large-hf"), root / "back", shards=4)
        print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True,
                          text=True, check=True)  # fmt: skip
    unit = 1 if sys.platform == "darwin" else 1024
    small, there, back = (int(line) * unit for line in done.stdout.split())
    print(shard / 1e6, small / 1e6, there / 1e6, back / 1e6)
    assert there - small < 2 * shard, "streaming: the whole model is four shards"
    assert back - small < 2 * shard
    # by the way: a head that equals the embedding is known as tied, and the context can be chosen
    folder = read_model_folder(tmp_path / "small-hf")
    assert folder.tied
    assert "lm_head.weight" not in folder.tensors
    assert folder.max_positions == 99
    assert not read_model_folder(tmp_path / "large-hf").tied


def test_shards_of_safetensors_hold_every_tensor_once(
    hf_of_two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = load_file(hf_of_two / "model.safetensors")
    planned = [shards.Planned(name, "F32", tuple(value.shape)) for name, value in tensors.items()]
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    total = shards.write_shards(tmp_path, planned, lambda name: tensors[name].numpy().data)
    found: dict[str, torch.Tensor] = {}
    for file in tmp_path.glob("*.safetensors"):
        assert file.stat().st_size < 22_000
        found |= load_file(file)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in found)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == total == sum(v.nbytes for v in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
