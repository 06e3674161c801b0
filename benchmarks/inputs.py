"""Random models and data for benchmarks: shapes of real models, texts, rows of tokens, dialogues.

As a script it writes a model: `python benchmarks/inputs.py FOLDER SHAPE TOKENIZER`, for a benchmark
that must not hold the card itself.
"""

from __future__ import annotations

import csv
import json
import math
import random
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 32},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
           "num_attention_heads": 32, "num_key_value_heads": 4},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
             "tie_word_embeddings": True},
    "tiny": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2},
}  # fmt: skip
"""Llama-2-7B, TinyLlama-1.1B, SmolLM2-135M, and one for trying a script."""
PROMPT = "Summarize the dialogue as a clinical note:\n{dialogue}"
RESPONSE = "{section_text}"
DIALOGUES = "MTS-Dialog-TrainingSet.csv"
LOG_MEAN, LOG_SPREAD, TRAINED = 5.2, 0.82, 0.25
"""Lengths of MTS-Dialog in Llama-2's tokens: mean and deviation of their logarithm; the share of
tokens that are answers."""


def write_model(folder: Path, shape: str, tokenizer: Path) -> None:
    """Random bf16 weights of a shape, with a real tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    size = len(AutoTokenizer.from_pretrained(str(tokenizer)))
    usual = {"vocab_size": -(-size // 64) * 64, "max_position_embeddings": 4096}
    config = LlamaConfig(**(usual | SHAPES[shape]))
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(str(folder))
    for file in tokenizer.iterdir():
        if file.is_file():
            shutil.copyfile(file, folder / file.name)


def write_texts(file: Path, rows: int, words: int) -> None:
    """Texts of random English words, all different."""
    source = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["".join(source.choices(letters, k=source.randint(2, 9))) for _ in range(4000)]
    with file.open("w", encoding="utf-8") as stream:
        for _ in range(rows):
            text = " ".join(source.choices(vocabulary, k=words))
            stream.write(json.dumps({"text": text}) + "\n")


READER = """import json
from pathlib import Path


def rows(dataset_config, tokenizer, split):
    with Path(__file__).with_suffix(".jsonl").open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]
"""
"""chatfine takes tokens from a function only."""


def write_token_rows(file: Path, rows: Iterable[tuple[list[int], list[bool]]]) -> list[int]:
    """Write ids and labels that all train on alike, and a .py for chatfine beside them.

    Returns the lengths.
    """
    file.with_suffix(".py").write_text(READER, encoding="utf-8")
    lengths = []
    with file.open("w", encoding="utf-8") as stream:
        for ids, mask in rows:
            labels = [one if on else -100 for one, on in zip(ids, mask, strict=True)]
            stream.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")
            lengths.append(len(ids))
    return lengths


def full_rows(count: int, length: int, size: int) -> Iterable[tuple[list[int], list[bool]]]:
    """Rows of `length` random tokens of a vocabulary of `size`, all trained on."""
    source = random.Random(0)
    for _ in range(count):
        yield source.choices(range(5, size), k=length), [True] * length


def random_dialogues(count: int, longest: int, size: int) -> Iterable[tuple[list[int], list[bool]]]:
    """Random tokens in the lengths of real dialogues, the last quarter of each trained on."""
    source = random.Random(0)
    for _ in range(count):
        length = min(longest, max(16, round(source.lognormvariate(LOG_MEAN, LOG_SPREAD))))
        learned = math.ceil(TRAINED * length)
        mask = [False] * (length - learned) + [True] * learned
        yield source.choices(range(5, size), k=length), mask


def real_dialogues(
    folder: Path, model: Path, longest: int
) -> Iterable[tuple[list[int], list[bool]]]:
    """The dialogues of MTS-Dialog that are short enough, under the model's chat template."""
    from chatfine.tokenizer.encode import ChatTokenizer
    from chatfine.types import Message

    tokenizer = ChatTokenizer.load(model)
    with (folder / DIALOGUES).open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            question, answer = PROMPT.format_map(row), RESPONSE.format_map(row)
            example = tokenizer.encode_dialogue(
                [Message("user", question), Message("assistant", answer)]
            )
            if len(example.ids) <= longest:
                yield list(example.ids), [bool(one) for one in example.mask]


if __name__ == "__main__":
    write_model(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
