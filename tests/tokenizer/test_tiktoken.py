"""Llama 3's tokenizer.model: its ranks become a tokenizer.json that encodes alike, and back."""

from __future__ import annotations

import base64
import itertools
import json
import random
from pathlib import Path

import pytest
from chat_styles import CORPUS, random_text

from chatfine.errors import TokenizerError
from chatfine.tokenizer.convert import read_model_file
from chatfine.tokenizer.encode import ChatTokenizer
from chatfine.tokenizer.files import read_files, write_tokenizer
from chatfine.tokenizer.template import LLAMA3
from chatfine.tokenizer.tiktoken import control_tokens, is_rank_file, ranks_of
from chatfine.types import Message

regex = pytest.importorskip("regex")  # comes with transformers

# as published: how Llama 3 cuts a text before it merges bytes
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train(rounds: int) -> list[bytes]:
    """A byte vocabulary in the order of its ranks: the most frequent neighbours join each round."""
    words = [[bytes([byte]) for byte in word.encode()]
             for line in CORPUS for word in regex.findall(PATTERN, line)]  # fmt: skip
    pieces = [bytes([byte]) for byte in range(256)]
    for _ in range(rounds):
        counts: dict[bytes, int] = {}
        for word in words:
            for pair in itertools.pairwise(word):
                counts[b"".join(pair)] = counts.get(b"".join(pair), 0) + 1
        counts = {piece: n for piece, n in counts.items() if piece not in pieces}
        if not counts:
            break
        best = max(counts, key=lambda piece: (counts[piece], piece))
        pieces.append(best)
        words = [merge(word, best) for word in words]
    return pieces


def merge(word: list[bytes], piece: bytes) -> list[bytes]:
    out: list[bytes] = []
    for part in word:
        if out and out[-1] + part == piece:
            out[-1] = piece
        else:
            out.append(part)
    return out


def reference(ranks: dict[bytes, int], text: str) -> list[int]:
    """Byte pair encoding by rank, by its definition."""
    ids = []
    for stretch in regex.findall(PATTERN, text):
        parts = [bytes([byte]) for byte in stretch.encode()]
        while len(parts) > 1:
            joined = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
            best = min(joined)
            if best == len(ranks):
                break
            at = joined.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids


@pytest.fixture(scope="module")
def rank_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama3") / "tokenizer.model"
    lines = [base64.b64encode(piece) + b" %d\n" % n for n, piece in enumerate(train(150))]
    path.write_bytes(b"".join(lines))
    return path


def test_it_encodes_as_the_ranks_say(rank_file: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    assert is_rank_file(rank_file)
    spec, config = read_model_file(rank_file)
    write_tokenizer(tmp_path, spec, config, LLAMA3)
    lines = [line.split() for line in rank_file.read_bytes().splitlines()]
    ranks = {base64.b64decode(piece): int(rank) for piece, rank in lines}
    ours, theirs = ChatTokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(4)
    texts = [
        *CORPUS,
        "I'M 12345  a\n\n b'll  ",
        "  \t\r\n x",
        *(random_text(rng) for _ in range(200)),
    ]
    for text in texts:
        wanted = reference(ranks, text)
        assert ours.encode_text(text) == wanted, text
        assert theirs(text)["input_ids"] == [ours.bos_id, *wanted]
        assert theirs.decode(wanted) == text
    assert ours.bos_id == len(ranks)
    assert ours.size == len(theirs) == len(ranks) + 256


def test_the_template_is_metas_dialogue_format(rank_file: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    spec, config = read_model_file(rank_file, modern=False)
    write_tokenizer(tmp_path, spec, config | {"eos_token": "<|eot_id|>"}, LLAMA3)
    ours = ChatTokenizer.load(tmp_path)
    messages = [Message("system", "Be brief."), Message("user", " Hi "), Message("assistant", "Yo")]
    ids = ours.encode_dialogue(messages).ids
    text = AutoTokenizer.from_pretrained(tmp_path).decode(ids)
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYo<|eot_id|>"
    )
    assert ours.turn_end_id == ours.eos_id == ids[-1] == ours.bos_id + 9


def test_control_tokens_have_their_published_ids() -> None:
    old, new = control_tokens(False), control_tokens(True)
    assert len(set(old)) == len(set(new)) == 256
    assert old[9] == new[9] == "<|eot_id|>"
    assert (old[4], new[4]) == ("<|reserved_special_token_2|>", "<|finetune_right_pad_id|>")
    assert (old[255], new[255]) == (
        "<|reserved_special_token_250|>", "<|reserved_special_token_247|>")  # fmt: skip
    assert new[8:11] == ["<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]


def test_there_and_back_again(rank_file: Path, tmp_path: Path) -> None:
    spec, config = read_model_file(rank_file)
    write_tokenizer(tmp_path, spec, config, None)
    assert ranks_of(read_files(tmp_path).spec) == rank_file.read_bytes()
    other = json.loads(json.dumps(spec)) | {"pre_tokenizer": {"type": "ByteLevel"}}
    assert ranks_of(other) is None


def test_damaged_files_are_refused(rank_file: Path, tmp_path: Path) -> None:
    lines = rank_file.read_bytes().splitlines(keepends=True)
    damaged = {
        "swapped": [*lines[:5], lines[6], lines[5], *lines[7:]],
        "lost": lines[:9] + lines[10:],
        "page": [*lines[:9], b"<html>\n"],
        "short": lines[:100],
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(b"".join(content))
        with pytest.raises(TokenizerError) as error:
            read_model_file(tmp_path / name)
        assert error.value.code == "bad-tokenizer-model", name
    (tmp_path / "junk").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    assert not is_rank_file(tmp_path / "junk")
