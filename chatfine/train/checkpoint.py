"""The checkpoint store (contract C4): a checkpoint is there whole, or not at all.

    checkpoints/
      step-00000120/
        weights.safetensors     what learns
        optimizer.safetensors   its moments
        rng.safetensors         every random generator
        state.json              step, cursors, best so far
        manifest.json           size and sha256 of each of the above

Where several processes share the weights (FSDP2), each writes the rows it holds into a file of its
own, `weights-00001-of-00004.safetensors`, and reading takes any rows out of any number of such
files; so a run goes on with another number of processes.

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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatfine.i18n import t

if TYPE_CHECKING:
    import torch

    from chatfine.train.distributed import Group

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

    def tensors(
        self,
        stem: str,
        rows: Callable[[str], tuple[int, int] | None] = lambda name: None,
        names: Collection[str] | None = None,
    ) -> dict[str, torch.Tensor]:
        """The tensors of `weights`, `optimizer` or `rng`, on the CPU; empty if there are none.

        Args:
            stem: which.
            rows: name of a tensor → first row that is wanted and the row after the last; None =
                all.
            names: read only these; None = all.
        """
        return _join(self._files(stem), rows, names)

    def names(self, stem: str) -> list[str]:
        """The names of those tensors, sorted."""
        from safetensors import safe_open

        found: set[str] = set()
        for path in self._files(stem):
            with safe_open(str(path), "pt") as file:
                found |= set(file.keys())
        return sorted(found)

    def _files(self, stem: str) -> list[Path]:
        whole = self.path / f"{stem}.safetensors"
        if whole.is_file():
            return [whole]
        return sorted(self.path.glob(f"{stem}-*-of-*.safetensors"))


class CheckpointStore:
    """The folder `checkpoints/` of one run; its owner holds the run's lock."""

    def __init__(self, folder: Path, keep: int = 2, group: Group | None = None) -> None:
        self.folder = folder
        self.keep = keep
        self.group = group

    def save(
        self, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> Checkpoint:
        """Write a checkpoint of `state["step"]` and prune old ones; `state["best_step"]` stays.

        All processes of a run call it together; the first one writes what all have alike.

        Args:
            state: plain data; needs "step", may have "best_step".
            tensors: file stem → name → tensor.
        """
        from chatfine.train.distributed import Group

        group = self.group or Group()
        step = int(state["step"])
        final = self.folder / f"{PREFIX}{step:08d}"
        staging = self.folder / f"{STAGING}{step:08d}"
        if group.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
        group.wait()
        written = [_write_tensors(staging, stem, named, group) for stem, named in tensors.items()]
        manifest = {k: v for part in group.gather(written) for one in part for k, v in one.items()}
        if group.rank == 0:
            self._commit(state, staging, final, manifest)
            self._prune(step, int(state.get("best_step") or -1))
        group.wait()
        return Checkpoint(final, dict(state))

    def _commit(
        self, state: Mapping[str, Any], staging: Path, final: Path, manifest: dict[str, Any]
    ) -> None:
        """Let a checkpoint whose tensors are on the disk appear."""
        _write(staging / "state.json", json.dumps(dict(state), indent=1, ensure_ascii=False))
        manifest["state.json"] = _facts(staging / "state.json")
        _write(staging / "manifest.json", json.dumps(dict(sorted(manifest.items())), indent=1))
        _fsync_folder(staging)
        self._remove(final)  # the same step again, after a resume from before it
        staging.rename(final)
        _fsync_folder(self.folder)
        if sys.platform == "win32":
            _write(final / MARKER, "")

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


def _write_tensors(
    folder: Path, stem: str, named: Mapping[str, torch.Tensor], group: Group
) -> dict[str, Any]:
    """Write this process's part of some tensors; returns what the manifest says of the file."""
    from safetensors.torch import save_file

    from chatfine.train.distributed import is_slice, own, own_rows

    sliced = sorted(name for name in named if is_slice(named[name]))
    rows = {name: [*own_rows(named[name], group), named[name].shape[0]] for name in sliced}
    mine = [name for name in sorted(named) if group.rank == 0 or name in rows]
    if not mine and group.rank:
        return {}
    part = f"-{group.rank + 1:05d}-of-{group.size:05d}" if sliced else ""
    file = folder / f"{stem}{part}.safetensors"
    plain = {name: own(named[name].detach()).cpu().contiguous() for name in mine}
    # one entry, since the format does not fix the order of several
    save_file(plain, str(file), {"rows": json.dumps(rows)} if sliced else None)
    _fsync(file)
    return {file.name: _facts(file)}


def _join(
    files: Sequence[Path],
    rows: Callable[[str], tuple[int, int] | None],
    names: Collection[str] | None,
) -> dict[str, torch.Tensor]:
    """The wanted rows of the wanted tensors out of the files of one or several processes."""
    import torch
    from safetensors import safe_open

    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for path in files:
        with safe_open(str(path), "pt") as file:
            held = json.loads((file.metadata() or {}).get("rows", "{}"))
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if names is not None and name not in names:
                    continue
                if name not in held:
                    pieces[name] = [(0, _cut(file.get_tensor(name), rows(name)))]
                    continue
                begin, end, total = held[name]
                first, last = rows(name) or (0, total)
                low, high = max(begin, first), min(end, last)
                if low < high or first == last:  # a process without rows needs an empty tensor
                    part = file.get_slice(name)[low - begin : max(low, high) - begin]
                    pieces.setdefault(name, []).append((low, part))
    joined = {}
    for name, parts in sorted(pieces.items()):
        ordered = [piece for _, piece in sorted(parts, key=lambda one: one[0])]
        joined[name] = ordered[0] if len(ordered) == 1 else torch.cat(ordered)
    return joined


def _cut(value: torch.Tensor, rows: tuple[int, int] | None) -> torch.Tensor:
    return value if rows is None or not value.ndim else value[slice(*rows)]


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


def _facts(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


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
