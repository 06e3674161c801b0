"""Folders are written whole, and other libraries read them alike."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from chat_styles import CHATML, CORPUS, STYLES, random_text

from chatfine.errors import TokenizerError
from chatfine.tokenizer.encode import ChatTokenizer
from chatfine.tokenizer.files import (
    agree_on_end,
    copy_tokenizer,
    read_files,
    write_from_gguf,
    write_tokenizer,
)
from chatfine.types import Message

DIALOGUE = [Message("user", "a  1 你好"), Message("assistant", "12 apples")]
NEEDED = {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
}


def make_gguf(path: Path, kind: str = "smollm"):
    """Write a GGUF with metadata as SmolLM2's; returns the tokenizer it stands for."""
    import gguf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=control,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS, "a  12  apples"] * 3, trainer)
    pieces = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    merges = [" ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(8192)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(kind)
    writer.add_token_list(pieces)
    writer.add_token_types([3 if piece in control else 1 for piece in pieces])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return tokenizer


def check_alike(folder: Path, seed: int = 1) -> None:
    """transformers loads the folder and encodes, decodes and applies the template as we do."""
    from transformers import AutoTokenizer

    ours, theirs = ChatTokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    rng = random.Random(seed)
    for text in ["a  1", "2024-05-06", *(random_text(rng) for _ in range(40))]:
        assert ours.encode_text(text) == theirs.encode(text, add_special_tokens=False), text
    messages = [message.as_dict() for message in DIALOGUE]
    expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert list(ours.encode_dialogue(DIALOGUE).ids) == expected
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (
        theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id,
    )  # fmt: skip
    assert theirs.model_max_length == 8192


def test_folder_from_gguf(tmp_path: Path) -> None:
    original = make_gguf(tmp_path / "small.gguf")
    write_from_gguf(tmp_path / "small.gguf", tmp_path / "folder")
    assert {path.name for path in (tmp_path / "folder").iterdir()} == NEEDED
    check_alike(tmp_path / "folder")
    ours = ChatTokenizer.load(tmp_path / "folder")
    rng = random.Random(9)
    for text in ["a  1", "a  12", *(random_text(rng) for _ in range(40))]:
        assert ours.encode_text(text) == original.encode(text).ids
    assert [ours.piece(i) for i in ours.encode_text("a  1")][-2:] == ["ĠĠ", "1"]  # not "Ġ", "Ġ1"
    names = [ours.piece(i) for i in (ours.bos_id, ours.eos_id, ours.pad_id)]
    assert names == ["<|im_start|>", "<|im_end|>", "<|im_end|>"]


@pytest.mark.model
def test_folder_of_the_real_model(smollm2: Path) -> None:
    check_alike(smollm2)
    ours = ChatTokenizer.load(smollm2)
    assert ours.size == 49152
    assert [ours.piece(i) for i in ours.encode_text("a  1")] == ["a", "ĠĠ", "1"]
    shown = ours.decode(ours.encode_dialogue(DIALOGUE[:1], prompt=True).ids, keep_control=True)
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert shown.startswith(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n")
    assert shown.endswith("<|im_end|>\n<|im_start|>assistant\n")
    own = ours.encode_dialogue([Message("system", "Be brief."), *DIALOGUE])
    assert system not in ours.decode(own.ids)


def test_gguf_of_another_kind_is_refused(tmp_path: Path) -> None:
    make_gguf(tmp_path / "other.gguf", "qwen2")
    with pytest.raises(TokenizerError, match="gpt2 / qwen2"):
        write_from_gguf(tmp_path / "other.gguf", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_sentencepiece_model(tmp_path: Path, shared: Path) -> None:
    import sentencepiece

    original = shared / "tokenizers/llama2/tokenizer.model"
    if not original.is_file():
        pytest.skip("the real Llama 2 tokenizer is not here")
    shutil.copy(original, tmp_path)
    ours = ChatTokenizer.load(tmp_path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(original))
    rng = random.Random(3)
    for _ in range(100):
        text = random_text(rng)
        assert ours.encode_text(text) == model.encode(text)
    assert (ours.bos_id, ours.eos_id, ours.size) == (1, 2, 32000)
    assert "[INST]" in ours.template
    merges = json.loads((shared / "tokenizers/llama2_hf/tokenizer.json").read_text())["model"][
        "merges"
    ]
    assert [" ".join(merge) for merge in read_files(tmp_path).spec["model"]["merges"]] == merges


def test_small_sentencepiece_models(tmp_path: Path) -> None:
    import sentencepiece

    (tmp_path / "text").write_text("\n".join(" ".join(line.split()) for line in CORPUS * 5))
    for kind in ("bpe", "unigram"):
        folder = tmp_path / kind
        folder.mkdir()
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "text"), model_prefix=str(folder / "tokenizer"), model_type=kind,
            vocab_size=420, byte_fallback=True, normalization_rule_name="identity",
            remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "bpe/tokenizer.model"))
    ours = ChatTokenizer.load(tmp_path / "bpe")
    rng = random.Random(3)
    for _ in range(60):
        text = random_text(rng)
        assert ours.encode_text(text) == model.encode(text)
    with pytest.raises(TokenizerError, match=r"can't convert tokenizer\.model") as refused:
        ChatTokenizer.load(tmp_path / "unigram")
    assert "tokenizer.json" in str(refused.value)


def test_tokens_that_only_the_other_files_name(styles: dict[str, Path], tmp_path: Path) -> None:
    """They get the ids transformers gives them."""
    from transformers import AutoTokenizer

    folder = tmp_path / "more"
    shutil.copytree(styles["chatml"], folder)
    size = ChatTokenizer.load(folder).size
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["pad_token"] = "<pad>"
    token = {"content": "<tool>", "lstrip": False, "rstrip": False, "normalized": False}
    config["added_tokens_decoder"] = {str(size): {**token, "single_word": False, "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = ChatTokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.pad_id == theirs.pad_token_id == size + 1
    assert ours.size == len(theirs) == size + 2
    assert not {size, size + 1} & set(ours.encode_text("<tool><pad>"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json can't be used"),
        ("tokenizer.json", "[]", "tokenizer.json can't be used"),
        ("tokenizer.json", '{"model": {}}', "tokenizer.json can't be used"),
        ("tokenizer.json", '{"model": {"type": "no", "vocab": {}}}', "can't load this tokenizer"),
        ("tokenizer_config.json", "\x00", "tokenizer_config.json can't be used"),
    ],
)
def test_bad_files(
    styles: dict[str, Path], tmp_path: Path, name: str, text: str, message: str
) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(styles["chatml"], folder)
    (folder / name).write_text(text)
    with pytest.raises(TokenizerError, match=message) as refused:
        ChatTokenizer.load(folder)
    assert refused.value.fix


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        ChatTokenizer.load(tmp_path)


@pytest.mark.parametrize("style", STYLES)
def test_copy_encodes_alike(styles: dict[str, Path], tmp_path: Path, style: str) -> None:
    names = copy_tokenizer(styles[style], tmp_path / "copy")
    assert names == ["tokenizer.json", "tokenizer_config.json"]
    before, after = ChatTokenizer.load(styles[style]), ChatTokenizer.load(tmp_path / "copy")
    assert before.digest == after.digest
    assert before.encode_dialogue(DIALOGUE) == after.encode_dialogue(DIALOGUE)


def test_copy_with_another_template(styles: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    template = CHATML.replace("'\n'}}", "''}}")
    copy_tokenizer(styles["chatml"], tmp_path / "copy", template)
    assert ChatTokenizer.load(tmp_path / "copy").template == template
    assert AutoTokenizer.from_pretrained(tmp_path / "copy").chat_template == template


def test_write_then_read(styles: dict[str, Path], tmp_path: Path) -> None:
    files = read_files(styles["chatml"])
    write_tokenizer(tmp_path / "new", files.spec, files.config, files.template)
    assert {path.name for path in (tmp_path / "new").iterdir()} == NEEDED
    assert (
        ChatTokenizer.load(tmp_path / "new").digest == ChatTokenizer.load(styles["chatml"]).digest
    )


def test_end_tokens_are_made_to_agree(styles: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    copy_tokenizer(styles["llama3"], folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 1, "top_p": 0.9}')
    tokenizer = ChatTokenizer.load(folder)
    end, old = tokenizer.turn_end_id, tokenizer.eos_id
    changed = agree_on_end(folder, tokenizer)
    assert len(changed) == 2
    assert "<|eot_id|>" in changed[0]
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [end, old], "top_p": 0.9}
    again = ChatTokenizer.load(folder)
    assert again.eos_id == end
    assert again.stop_ids == {end, old}
    assert agree_on_end(folder, again) == []


def test_gguf_of_a_sentencepiece_model(tmp_path: Path, shared: Path) -> None:
    """The GGUF of a Llama 2 holds pieces, scores and types: the same tokenizer comes out."""
    import gguf
    from sentencepiece import sentencepiece_model_pb2

    original = shared / "tokenizers/llama2/tokenizer.model"
    if not original.is_file():
        pytest.skip("the real Llama 2 tokenizer is not here")
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(original.read_bytes())
    del model.pieces[3000:]
    writer = gguf.GGUFWriter(tmp_path / "llama.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.piece for piece in model.pieces])
    writer.add_token_scores([piece.score for piece in model.pieces])
    writer.add_token_types([piece.type for piece in model.pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    write_from_gguf(tmp_path / "llama.gguf", tmp_path / "from-gguf")
    (tmp_path / "original").mkdir()
    (tmp_path / "original/tokenizer.model").write_bytes(model.SerializeToString())
    found, wanted = read_files(tmp_path / "from-gguf"), read_files(tmp_path / "original")
    assert found.spec == wanted.spec
    assert found.special_tokens == wanted.special_tokens
    assert "[INST]" in ChatTokenizer.load(tmp_path / "from-gguf").template
