"""The tiny tokenizer with some Chinese characters more, made by hand in its tokenizer.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

CHARACTERS = "".join(map(chr, range(0x4E60, 0x4E60 + 200)))
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def grow_tokenizer(source: Path, target: Path, characters: int = 60, stated: bool = True) -> int:
    """Copy the tokenizer of `source` with pieces for so many characters; returns its new size.

    Every character gets the pieces and merges of its bytes; with `stated` also vocabulary.json.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if source != target:
            shutil.copyfile(source / name, target / name)
    old = Tokenizer.from_file(str(source / "tokenizer.json"))
    spec = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    size = first = old.get_vocab_size()
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rows = []
    # the first pieces are those of 习 and its neighbours, each of three bytes that don't merge yet
    for character in [c for c in CHARACTERS if len(old.encode(c).ids) == 3][:characters]:
        spelled = alphabet.pre_tokenize_str(character)[0][0]
        for end in (2, 3):
            piece = spelled[:end]
            if piece not in vocab:
                vocab[piece] = size
                merges.append([spelled[: end - 1], spelled[end - 1]])
                rows.append([size, piece, [vocab[byte] for byte in piece]])
                size += 1
    text = json.dumps(spec, ensure_ascii=False)
    (target / "tokenizer.json").write_text(text, encoding="utf-8")
    if stated:
        facts = {"old_size": first, "new_size": size, "pieces": rows}
        (target / "vocabulary.json").write_text(json.dumps(facts), encoding="utf-8")
    return size


def resave(tiny: Path, folder: Path, dtype: Any, tied: bool, **options: Any) -> Path:
    """A random model as the tiny one in another number format, tied or not."""
    import torch
    import transformers

    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").unlink()
    config = transformers.AutoConfig.from_pretrained(tiny)
    config.tie_word_embeddings = tied
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder, **options)
    return folder
