"""`chatfine convert`: weights and tokenizer joined, whatever the source, or nothing left behind."""

from __future__ import annotations

import base64
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from chatfine.commands.convert import convert
from chatfine.config import ConvertConfig
from chatfine.errors import ChatfineError, ModelError, UsageError
from chatfine.hub.folder import read_model_folder
from chatfine.tokenizer.encode import ChatTokenizer
from chatfine.types import Message

DIM, INNER = 32, 96
LLAMA3 = {"dim": DIM, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32,
          "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True}  # fmt: skip
DIALOGUE = [Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Bye")]


def run(source: Path, output: Path, **settings: Any) -> dict[str, Any]:
    return convert(ConvertConfig(source=str(source), output=str(output), **settings))


def refusal(source: Path, output: Path, **settings: Any) -> ChatfineError:
    """The error; nothing may be left of the output or of its stage."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(ChatfineError) as error:
        run(source, output, **settings)
    assert sorted(output.parent.iterdir()) == before
    return error.value


def write_weights(folder: Path, params: dict[str, Any], rows: int) -> Path:
    """A one-layer model in Meta's layout, in one file."""
    folder.mkdir(parents=True)
    torch.manual_seed(1)
    shared = DIM // params["n_heads"] * params.get("n_kv_heads", params["n_heads"])
    shapes = {
        "tok_embeddings": (rows, DIM), "norm": (DIM,), "output": (rows, DIM),
        "layers.0.attention_norm": (DIM,), "layers.0.ffn_norm": (DIM,),
        "layers.0.attention.wq": (DIM, DIM), "layers.0.attention.wk": (shared, DIM),
        "layers.0.attention.wv": (shared, DIM), "layers.0.attention.wo": (DIM, DIM),
        "layers.0.feed_forward.w1": (INNER, DIM), "layers.0.feed_forward.w2": (DIM, INNER),
        "layers.0.feed_forward.w3": (INNER, DIM),
    }  # fmt: skip
    weights = {f"{name}.weight": torch.randn(shape).half() for name, shape in shapes.items()}
    torch.save(weights, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(params), encoding="utf-8")
    return folder


def write_ranks(path: Path, extra: int = 20) -> Path:
    pieces = [bytes([byte]) for byte in range(256)]
    pieces += [b"a" * (n + 2) for n in range(extra)]
    lines = [base64.b64encode(piece) + b" %d\n" % n for n, piece in enumerate(pieces)]
    path.write_bytes(b"".join(lines))
    return path


def test_llama2_chat_as_download_sh_leaves_it(shared: Path, tmp_path: Path) -> None:
    """tokenizer.model and licence lie beside the model's folder, which has the name alone."""
    original = shared / "tokenizers/llama2/tokenizer.model"
    if not original.is_file():
        pytest.skip("the real Llama 2 tokenizer is not here")
    params = {"dim": DIM, "n_layers": 1, "n_heads": 4, "multiple_of": 32, "norm_eps": 1e-6,
              "vocab_size": -1}  # fmt: skip
    write_weights(tmp_path / "llama-2-7b-chat", params, 32000)
    shutil.copy(original, tmp_path)
    (tmp_path / "LICENSE").write_text("licence", encoding="utf-8")
    out = tmp_path / "hf"
    result = run(tmp_path / "llama-2-7b-chat", out)
    assert (result["family"], result["context"], result["dtype"]) == ("Llama 2", 4096, "fp16")
    assert (result["vocab_size"], result["layers"]) == (32000, 1)
    json.dumps(result)
    from transformers import AutoConfig, AutoTokenizer

    ours, theirs = ChatTokenizer.load(out), AutoTokenizer.from_pretrained(out)
    reference = AutoTokenizer.from_pretrained(shared / "tokenizers/llama2_hf")
    for text in ("Hello, 你好  world", " a\n b", "12 apples <s>"):
        assert theirs(text)["input_ids"] == reference(text)["input_ids"]
    ids = ours.encode_dialogue(DIALOGUE, prompt=True).ids
    rows = [{"role": message.role, "content": message.content} for message in DIALOGUE]
    assert ids == list(theirs.apply_chat_template(rows, tokenize=True, return_dict=False))
    assert theirs.decode(ids).startswith("<s> [INST] Hi [/INST] Hello </s><s> [INST]")
    assert AutoConfig.from_pretrained(out).max_position_embeddings == 4096
    generation = json.loads((out / "generation_config.json").read_text(encoding="utf-8"))
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)
    assert (out / "LICENSE").read_text(encoding="utf-8") == "licence"
    assert (out / "tokenizer.model").read_bytes() == original.read_bytes()


def test_llama3_instruct_there_and_back_again(tmp_path: Path) -> None:
    place = tmp_path / "Llama-3.1-8B-Instruct" / "original"  # as the hub keeps Meta's files
    write_weights(place, LLAMA3, 256 + 20 + 256)
    ranks = write_ranks(place / "tokenizer.model")
    first = run(tmp_path / "Llama-3.1-8B-Instruct", tmp_path / "hf", dtype="bf16")
    assert (first["family"], first["dtype"]) == ("Llama 3.1", "bf16")
    tokenizer = ChatTokenizer.load(tmp_path / "hf")
    assert "<|start_header_id|>" in tokenizer.template
    begin = 256 + 20
    config = read_model_folder(tmp_path / "hf").config
    assert config["bos_token_id"] == begin
    assert config["eos_token_id"] == [begin + 9, begin + 1, begin + 8], "the end of a turn first"
    assert tokenizer.stop_ids == set(config["eos_token_id"])

    result = run(tmp_path / "hf", tmp_path / "meta", to="meta", shards=2)
    assert result["files"] == ["consolidated.00.pth", "consolidated.01.pth"]
    assert (tmp_path / "meta" / "tokenizer.model").read_bytes() == ranks.read_bytes()
    assert not (tmp_path / "meta" / "config.json").exists(), "nobody may take it for a model folder"
    run(tmp_path / "meta", tmp_path / "again")
    for file in (tmp_path / "hf").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_what_does_not_fit_is_refused_and_nothing_left(tmp_path: Path) -> None:
    source = write_weights(tmp_path / "in" / "llama-3", LLAMA3, 300)
    out = tmp_path / "out"
    missing = refusal(source, out)
    assert missing.code == "no-tokenizer"
    assert "--tokenizer" in missing.fix[0]
    ranks = write_ranks(tmp_path / "my.model")
    small = refusal(source, out, tokenizer=str(ranks))
    assert small.code == "model-small-embedding"
    (source / "consolidated.00.pth").write_bytes(b"<html>")
    assert refusal(source, out, tokenizer=str(ranks)).code == "pth-damaged"
    with pytest.raises(ModelError, match="Meta's layout") as error:
        read_model_folder(source)
    assert f"chatfine convert {source} -o llama-3-hf" in error.value.fix[0]


def test_sources_of_no_known_kind(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    already = refusal(tiny, out)
    assert already.code == "nothing-to-convert"
    assert "--to meta" in already.fix[1]
    assert refusal(tmp_path / "nowhere", out).code == "no-source"
    assert refusal(tmp_path, out).code == "nothing-to-convert"
    with zipfile.ZipFile(tmp_path / "consolidated.00.pth", "w"):
        pass
    one = refusal(tmp_path / "consolidated.00.pth", out)
    assert f"chatfine convert {tmp_path} -o" in one.fix[0]
    assert isinstance(refusal(tiny, out, shards=2), UsageError)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine", encoding="utf-8")
    assert refusal(tiny, taken, to="meta").code == "output-not-empty"
    assert refusal(tiny, tiny, to="meta", overwrite=True).code == "output-is-input"


def test_a_model_without_tokenizer_model_goes_to_meta_with_a_warning(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny, tmp_path / "meta", to="meta")
    assert "no tokenizer.model" in capsys.readouterr().out
    assert ChatTokenizer.load(tmp_path / "meta").digest == ChatTokenizer.load(tiny).digest


def write_gguf(path: Path, model: Path, kind: str) -> Path:
    """A GGUF with the tiny model's weights (rows of q and k unordered) and this kind of pieces."""
    import gguf
    from safetensors.numpy import load_file

    from chatfine.hub.convert import _INNER, _OUTER

    config = read_model_folder(model).config
    names = {theirs: ours for ours, theirs in (_OUTER | _INNER).items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(kind)
    writer.add_token_list(["a", "b"])
    writer.add_token_types([1, 1])
    writer.add_token_merges([])
    for name, value in load_file(model / "model.safetensors").items():
        plain = name.removesuffix(".weight")
        if plain in names:
            writer.add_tensor(f"{names[plain]}.weight", value)
        else:
            _, _, number, inner = plain.split(".", 3)
            writer.add_tensor(f"blk.{number}.{names[inner]}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_with_the_original_tokenizer(tiny: Path, tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "tiny.gguf", tiny, "qwen2")
    unknown = refusal(gguf, tmp_path / "out")
    assert unknown.code == "gguf-tokenizer"
    assert "--tokenizer" in unknown.fix[0]
    assert refusal(gguf, tmp_path / "out", dtype="fp32").where == "--dtype"
    result = run(gguf, tmp_path / "out", tokenizer=str(tiny))
    assert result["dtype"] == "bf16"
    assert result["parameters"] == read_model_folder(tiny).parameters
    assert ChatTokenizer.load(tmp_path / "out").digest == ChatTokenizer.load(tiny).digest
