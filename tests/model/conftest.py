"""Models this small are faster on one thread, and two test processes don't wait for each other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from chatfine.model import cross_entropy, lora, storages

torch.set_num_threads(1)


@pytest.fixture
def rounds_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply 8-bit floats on a CPU too, by the twin of the card's product."""
    for module in (storages, lora):
        monkeypatch.setattr(module, "multiplies_fp8", lambda x, out, size: not (out | size) % 16)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the compiler."""
    monkeypatch.setattr(nn.Module, "compile", lambda *args, **kwargs: None)
    monkeypatch.setattr(
        cross_entropy, "_compiled_gradient", lambda: cross_entropy._softmax_gradient
    )
