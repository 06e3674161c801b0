"""Tokenised data on disk: appears whole or not at all, is memory-mapped, is remade if damaged."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import chatfine

MANIFEST = "manifest.json"
NPY_HEADER_BYTES = 128


@functools.lru_cache(maxsize=1)
def code_digest() -> str:
    """A hash of the code that turns files into tokens, so that a changed program makes new data."""
    package = Path(chatfine.__file__).parent
    total = hashlib.sha256(version("tokenizers").encode())
    for room in ("data", "tokenizer"):
        for path in sorted((package / room).glob("*.py")):
            total.update(path.read_bytes())
    return total.hexdigest()


def save(folder: Path, arrays: Mapping[str, npt.NDArray[Any]], report: Mapping[str, Any]) -> None:
    """Write arrays and report as `folder`; a full or read-only disk only means no cache."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=".staged-", dir=folder.parent))
    except OSError:
        return
    try:
        hashes = {}
        for name, values in arrays.items():
            path = staged / f"{name}.npy"
            np.save(path, values)
            hashes[path.name] = _hash(path)
        manifest = {"files": hashes, "report": dict(report)}
        with (staged / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(manifest, file, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        staged.rename(folder)
    except OSError:  # no space, or another process was first
        pass
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def load(folder: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]] | None:
    """Arrays (read-only memory maps) and report of `folder`; None if absent or damaged.

    A damaged folder is removed.
    """
    if not folder.is_dir():
        return None
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        arrays = {}
        for name, expected in manifest["files"].items():
            path = folder / name
            if _hash(path) != expected:
                raise ValueError(name)
            bare = path.stat().st_size <= NPY_HEADER_BYTES  # nothing can't be mapped
            arrays[name.removesuffix(".npy")] = np.load(path, mmap_mode=None if bare else "r")
        return arrays, manifest["report"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _hash(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()
