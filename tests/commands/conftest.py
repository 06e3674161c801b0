"""A model with an adapter on it, as a run would leave it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose adapter sits on the tiny model and knows a system prompt."""
    from peft import LoraConfig, get_peft_model

    from chatfine.hub.folder import read_model_folder
    from chatfine.model.adapters import save_adapter
    from chatfine.model.load import load_model
    from chatfine.tokenizer.encode import ChatTokenizer

    torch.manual_seed(4)
    model = load_model(tiny, torch.float32)
    tuned = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    tokenizer = ChatTokenizer.load(tiny)
    facts = {
        "base": str(tiny),
        "base_digest": read_model_folder(tiny).digest(),
        "method": "lora",
        "template": "model",
        "canaries": {"Hi 你好": tokenizer.encode_text("Hi 你好")},
        "datasets": ["mine"],
        "system": "Be brief.",
    }
    folder = tmp_path_factory.mktemp("runs") / "run"
    save_adapter(tuned, folder / "adapter", facts)
    (folder / "config.yaml").write_text("seed: 42\nvalidation: ''\n")
    (folder / "result.json").write_text(json.dumps({"train_loss": 1.25, "val_loss": 1.5}))
    return folder
