"""Grown vocabularies on text kept apart: characters per token, idle pieces, changes to English.

What is kept apart, what is compared, and what the columns mean: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from chatfine import console
from chatfine.tokenizer.expand import fill, unreachable, unused
from chatfine.tokenizer.grow_files import MODEL, grown
from chatfine.tokenizer.growable import FIRST_RICH, Growable, Growth
from chatfine.tokenizer.hanzi import hanzi
from chatfine.tokenizer.learn import Learned

SHARED = Path(__file__).parents[2] / "shared"
SETS = {
    "rust book": "zh_rust_book/docs.jsonl",
    "TiDB docs": "zh_tidb_docs/docs.jsonl",
    "medical": "toyhom_med_zh/train.jsonl",
}
ENGLISH = "en_rust_book/docs.jsonl"
SIZES = (7620, 23296)
Encode = Callable[[Sequence[str]], list[list[int]]]


def texts_of(path: Path) -> tuple[list[str], list[str]]:
    """The texts to learn from, and those kept apart."""
    rest, apart = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        text = (
            row["text"] if "text" in row else "\n".join([row["title"], row["ask"], row["answer"]])
        )
        first = hashlib.sha256(row.get("path", text).encode()).digest()[0]
        (rest if first % 10 else apart).append(text)
    return rest, apart


def ids(tokenizer: Growable) -> Encode:
    return lambda texts: [encoding.ids for encoding in tokenizer.encode(texts)]


def naive(base: Growable, texts: Sequence[str], size: int) -> tuple[Encode, int, int, int]:
    """The usual merge of two SentencePiece models: how it encodes, its size, its unused and its
    unreachable pieces."""
    import sentencepiece as spm
    from sentencepiece import sentencepiece_model_pb2 as protocol

    trained, model = protocol.ModelProto(), protocol.ModelProto()
    written = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.splitlines() if line),
        model_writer=written, model_type="bpe", vocab_size=size + size // 3,
        character_coverage=0.9999, byte_fallback=True, split_digits=True,
        hard_vocab_limit=False, num_threads=1, max_sentence_length=100_000, minloglevel=2,
    )  # fmt: skip
    trained.ParseFromString(written.getvalue())
    model.ParseFromString((base.files.folder / MODEL).read_bytes())
    known = {piece.piece for piece in model.pieces}
    fresh = [piece.piece for piece in trained.pieces if piece.piece not in known][:size]
    for piece in fresh:
        model.pieces.add(piece=piece, score=0.0)
    processor = spm.SentencePieceProcessor(model_proto=model.SerializeToString())
    encode: Encode = lambda texts: processor.encode(list(texts), num_threads=1)  # noqa: E731
    used = {number for one in encode(texts) for number in one}
    idle = sum(base.first_new + n not in used for n in range(len(fresh)))
    model.normalizer_spec.add_dummy_prefix = False  # each piece alone, as it is spelled
    alone = spm.SentencePieceProcessor(model_proto=model.SerializeToString())
    pieces = alone.encode([piece.replace("▁", " ") for piece in fresh], num_threads=1)
    lost = sum(ids != [base.first_new + n] for n, ids in enumerate(pieces))
    return encode, len(fresh), idle, lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=SHARED / "tokenizers/llama2_hf")
    parser.add_argument("--naive", action="store_true", help="also the usual way (Llama-2's kind)")
    options = parser.parse_args()
    base = Growable.load(options.model)
    sets = {name: texts_of(SHARED / "data" / path) for name, path in SETS.items()}
    learn_from = [text for rest, _ in sets.values() for text in rest]
    pages = (text for part in texts_of(SHARED / "data" / ENGLISH) for text in part)
    english = [text for text in pages if max(text) < chr(FIRST_RICH)]
    english_before = ids(base)(english)
    rows = []

    def add(name: str, encode: Encode, seconds: float, idle: str) -> None:
        ratios = [sum(map(len, apart)) / sum(map(len, encode(apart))) for _, apart in sets.values()]
        changed = sum(a != b for a, b in zip(english_before, encode(english), strict=True))
        rows.append([name, *(f"{ratio:.3f}" for ratio in ratios), idle,
                     f"{changed} of {len(english)}", f"{seconds:.0f}"])  # fmt: skip

    def add_growth(name: str, growth: Growth, seconds: float) -> None:
        idle = len(unused(base, growth, learn_from))
        lost = len(unreachable(base, growth))
        add(f"{name} +{len(growth.pieces):,}", ids(grown(base, growth)), seconds, f"{idle}, {lost}")

    add("as it is", ids(base), 0, "")
    begin = time.perf_counter()
    add_growth("hanzi", hanzi(base), time.perf_counter() - begin)
    for size in SIZES:
        begin = time.perf_counter()
        growth = fill(base, Learned(base, learn_from, size), size)
        add_growth("corpus", growth, time.perf_counter() - begin)
        if options.naive:
            begin = time.perf_counter()
            encode, count, idle, lost = naive(base, learn_from, size)
            add(f"naive +{count:,}", encode, time.perf_counter() - begin, f"{idle}, {lost}")
    console.table(["vocabulary", *SETS, "unused, unreachable", "English pages changed", "s"], rows)


if __name__ == "__main__":
    main()
