"""A tiny Llama with the real Llama-2 tokenizer in a folder named chat_7b_hf, beside the doors."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOORS = ("finetuning.py", "chat_completion.py", "merge.py", "expand_token.py")


@pytest.fixture(scope="session")
def llama2_tokenizer() -> Path:
    folder = ROOT.parent / "shared" / "tokenizers" / "llama2_hf"
    if not folder.is_dir():
        pytest.skip("the real Llama-2 tokenizer is not here (../shared/tokenizers)")
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory, llama2_tokenizer: Path) -> Path:
    """2 layers of 32 numbers, 32,000 pieces. Read only: copy it before changing a file."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama") / "chat_7b_hf"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for file in llama2_tokenizer.iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def write_samsum(folder: Path) -> Path:
    """A stand-in for samsum in its own columns: 6 training, 2 validation and 1 test dialogues."""
    folder.mkdir(parents=True)
    for split, count in {"train": 6, "validation": 2, "test": 1}.items():
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "dialogue", "summary"])
            for i in range(count):
                dialogue = f"Anna: Shall we meet at {i + 1}?\r\nBen: Yes, at the {split} station."
                writer.writerow([f"{split}-{i}", dialogue, f"Anna and Ben meet at {i + 1}."])
    return folder


def write_huatuo(folder: Path) -> Path:
    """A stand-in for the medical records: 8 questions in Chinese."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"question": f"感冒第{i}天怎么办？", "answer": f"多喝水，休息{i}天。"} for i in range(8)
    ]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "format_data.json").write_text(text + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """What a reader has: doors, question files, data, and a model in chat_7b_hf."""
    folder = tmp_path_factory.mktemp("repository")
    for name in (*DOORS, "chat.json", "chat1.json"):
        shutil.copyfile(ROOT / name, folder / name)
    shutil.copytree(ROOT / "expand_token", folder / "expand_token")
    shutil.copytree(ROOT / "datasets_processing", folder / "datasets_processing")
    write_huatuo(folder / "datasets_processing" / "personal_dataset")
    write_samsum(folder / "samsum_dataset")
    shutil.copytree(llama, folder / "chat_7b_hf")
    return folder
