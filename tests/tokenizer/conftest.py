"""Fixtures of the tokenizer tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_styles import STYLES, write_style


@pytest.fixture(scope="session")
def styles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Style → tokenizer folder."""
    root = tmp_path_factory.mktemp("styles")
    return {style: write_style(root / style, style) for style in STYLES}
