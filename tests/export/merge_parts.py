"""What the merge tests share: prompts, loading, logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PROMPTS = [[1, *range(30, 60)], [1, 250, 90, 77, 12], [1, *range(300, 320), 5]]


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return torch.cat([model(torch.tensor([ids])).logits[0] for ids in PROMPTS])


Make = Callable[..., Path]
