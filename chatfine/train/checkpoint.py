"""The checkpoint store (contract C4): a checkpoint is there whole, or not at all.

    checkpoints/
      step-00000120/
        weights.safetensors     what learns
        optimizer.safetensors   its moments
        rng.safetensors         every random generator
        state.json              step, cursors, best so far
        manifest.json           size and sha256 of each of the above

A checkpoint is written into a staging folder, every file and then the folder is fsynced, and one
rename makes it appear. Reading believes nothing: sizes and hashes must agree with the manifest.
There is no pickle. Where a folder can't be fsynced (Windows) a marker file written after the
rename takes its place.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatfine.i18n import t

if TYPE_CHECKING:
    import torch

PREFIX = "step-"
STAGING = ".staging-"
MARKER = "committed"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One valid checkpoint."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.state["step"])

    def tensors(self, stem: str) -> dict[str, torch.Tensor]:
        """The tensors of `weights`, `optimizer` or `rng`, on the CPU."""
        from safetensors.torch import load_file

        return load_file(str(self.path / f"{stem}.safetensors"))


class CheckpointStore:
    """The folder `checkpoints/` of one run; its owner holds the run's lock."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def save(
        self, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> Checkpoint:
        """Write a checkpoint of `state["step"]` and prune old ones; `state["best_step"]` stays.

        Args:
            state: plain data; needs "step", may have "best_step".
            tensors: file stem → name → tensor.
        """
        from safetensors.torch import save_file

        step = int(state["step"])
        final = self.folder / f"{PREFIX}{step:08d}"
        staging = self.folder / f"{STAGING}{step:08d}"
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        for stem, named in tensors.items():
            plain = {name: named[name].detach().cpu().contiguous() for name in sorted(named)}
            save_file(plain, str(staging / f"{stem}.safetensors"))
        _write(staging / "state.json", json.dumps(dict(state), indent=1, ensure_ascii=False))
        files = sorted(staging.iterdir())
        manifest = {
            file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files
        }
        _write(staging / "manifest.json", json.dumps(manifest, indent=1))
        for file in files:
            _fsync(file)
        _fsync_folder(staging)
        self._remove(final)  # the same step again, after a resume from before it
        staging.rename(final)
        _fsync_folder(self.folder)
        if sys.platform == "win32":
            _write(final / MARKER, "")
        self._prune(step, int(state.get("best_step") or -1))
        return Checkpoint(final, dict(state))

    def newest(self) -> tuple[Checkpoint | None, list[tuple[str, str]]]:
        """The newest valid checkpoint (None if there is none), and name and fault of those
        skipped."""
        skipped: list[tuple[str, str]] = []
        for path in self._present():
            fault = check(path)
            if fault is None:
                return self.read(path), skipped
            skipped.append((path.name, fault))
        return None, skipped

    def at(self, step: int) -> Checkpoint | None:
        """The checkpoint of `step` if it is there and valid."""
        path = self.folder / f"{PREFIX}{step:08d}"
        return self.read(path) if path.is_dir() and check(path) is None else None

    @staticmethod
    def read(path: Path) -> Checkpoint:
        """A checkpoint whose files are known to be good."""
        return Checkpoint(path, json.loads((path / "state.json").read_text(encoding="utf-8")))

    def clear_staging(self) -> None:
        """Remove what a killed process left half written."""
        for path in self.folder.glob(f"{STAGING}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _prune(self, newest: int, best: int) -> None:
        kept = 0
        for path in self._present():
            step = int(path.name.removeprefix(PREFIX))
            if step > newest:  # of a future that a resume from an older checkpoint undid
                self._remove(path)
            elif kept < self.keep:
                kept += 1
            elif step != best:
                self._remove(path)

    def _present(self) -> list[Path]:
        """The folders of checkpoints, newest first; nothing that someone else put beside them."""
        found = self.folder.glob(f"{PREFIX}*")
        return sorted(
            (path for path in found if path.name.removeprefix(PREFIX).isdigit()), reverse=True
        )

    def _remove(self, path: Path) -> None:
        """Delete a checkpoint without ever leaving half of it under its name."""
        if path.exists():
            aside = path.with_name(f"{STAGING}old-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)


def check(path: Path) -> str | None:
    """What is wrong with the checkpoint in `path`, as a sentence; None if nothing is."""
    try:
        text = (path / "manifest.json").read_text(encoding="utf-8")
        facts = {name: (one["bytes"], one["sha256"]) for name, one in json.loads(text).items()}
    except FileNotFoundError:
        return t("it has no manifest, so it was never finished")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return t("its manifest can't be read")
    if "state.json" not in facts:
        return t("its manifest can't be read")
    try:
        return _compare(path, facts)
    except OSError as error:
        return str(error)


def _compare(path: Path, manifest: Mapping[str, tuple[int, str]]) -> str | None:
    for name, (size, digest) in manifest.items():
        file = path / name
        if not file.is_file():
            return t("{name} is missing", name=name)
        if file.stat().st_size != size:
            return t(
                "{name} has {n} bytes instead of {expected}",
                name=name, n=file.stat().st_size, expected=size,
            )  # fmt: skip
        if _sha256(file) != digest:
            return t("the content of {name} has changed", name=name)
    if sys.platform == "win32" and not (path / MARKER).exists():
        return t("it has no manifest, so it was never finished")
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def _fsync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _fsync_folder(path: Path) -> None:
    if sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
