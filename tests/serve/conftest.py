"""The tiny model, loaded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def tiny_model(tiny: Path) -> Any:
    from chatfine.model.load import load_model

    return load_model(tiny, torch.float32)
