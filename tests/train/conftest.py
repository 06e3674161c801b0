"""A small data file, and settings for runs that take a second."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chatfine.config import TrainConfig

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, for equal bits

Configure = Callable[..., TrainConfig]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenised data goes into the test's folder."""
    monkeypatch.setenv("CHATFINE_HOME", str(tmp_path / "home"))


def write_rows(path: Path, count: int, word: str = "number") -> Path:
    """Questions and answers of different lengths."""
    rows = [
        {"question": f"Who are you, {word} {i}?", "answer": f"I am model {i}. " * (1 + i % 4)}
        for i in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """24 rows."""
    return write_rows(tmp_path / "rows.jsonl", 24)


@pytest.fixture
def configure(tiny: Path, data: Path, tmp_path: Path) -> Configure:
    """Settings of a short run; keyword arguments change them."""

    def make(**changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "model": str(tiny), "dataset": str(data), "output": str(tmp_path / "run"),
            "batch_size": 4, "max_steps": 4, "dtype": "fp32", "device": "cpu", "rank": 2,
            "learning_rate": 1e-2,
        }  # fmt: skip
        return TrainConfig.read(values | changes)

    return make


@pytest.fixture
def metrics() -> Callable[[Path], list[dict[str, Any]]]:
    """The lines of a run's metrics.jsonl without what depends on the clock."""

    def read(run: Path) -> list[dict[str, Any]]:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        clock = ("seconds", "tokens_per_second")
        return [{k: v for k, v in json.loads(x).items() if k not in clock} for x in lines]

    return read


@pytest.fixture
def more_rows() -> Callable[..., Path]:
    """`write_rows`, for tests that need another file."""
    return write_rows
