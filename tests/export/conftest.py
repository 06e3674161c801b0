"""Bases and adapters for the merge tests, made with transformers and peft themselves."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_parts import Make, load


@pytest.fixture(scope="session")
def tied(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the tiny model, but embedding and head are one weight."""
    from transformers import AutoConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tied") / "model"
    shutil.copytree(tiny, folder)
    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(tiny)
    config.tie_word_embeddings = True
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sharded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model over several safetensors files with an index, in bf16."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("sharded") / "model"
    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


@pytest.fixture
def make_adapter(tmp_path: Path) -> Make:
    """A PEFT adapter folder of random, not small, numbers on the model in `base`."""

    def make(base: Path, name: str = "adapter", **settings: Any) -> Path:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(11)
        values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        model = get_peft_model(load(base), LoraConfig(**(values | settings)))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn(parameter.shape)
        folder = tmp_path / name
        model.save_pretrained(folder)
        return folder

    return make
