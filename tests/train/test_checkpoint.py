"""The checkpoint store: whole or not at all, whatever is interrupted or damaged (contract C4)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from chatfine.train import checkpoint
from chatfine.train.checkpoint import CheckpointStore, check


class Crash(BaseException):
    """The process dies here."""


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "weights": {"b": torch.full((4,), float(step)), "a": torch.arange(6).view(2, 3).t()},
        "optimizer": {"a|step": torch.tensor(float(step))},
        "rng": {"torch": torch.get_rng_state()},
    }


def save(store: CheckpointStore, step: int, best: int | None = None) -> None:
    store.save({"step": step, "best_step": best, "note": "é中"}, tensors(step))


def steps(store: CheckpointStore) -> list[int]:
    return [int(p.name.removeprefix("step-")) for p in sorted(store.folder.glob("step-*"))]


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    save(store, 7)
    newest, skipped = store.newest()
    assert skipped == []
    assert newest is not None
    assert newest.step == 7
    assert newest.state["note"] == "é中"
    for stem, named in tensors(7).items():
        found = newest.tensors(stem)
        assert sorted(found) == sorted(named)
        assert all(torch.equal(found[name], value) for name, value in named.items())
    assert [p.name for p in store.folder.iterdir()] == ["step-00000007"]
    assert sorted(p.name for p in newest.path.iterdir()) == [
        "manifest.json", "optimizer.safetensors", "rng.safetensors", "state.json",
        "weights.safetensors",
    ]  # fmt: skip


def test_an_empty_store_has_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "none")
    assert store.newest() == (None, [])
    assert store.at(3) is None
    store.clear_staging()


# -- crashes ---------------------------------------------------------------------------------------


def crash_at(monkeypatch: pytest.MonkeyPatch, kill_at: int) -> Callable[[], int]:
    """Die at the k-th of all calls that touch the disk; returns a counter of the calls."""
    calls = 0

    def wrap(target: Any, name: str) -> None:
        original = getattr(target, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == kill_at:
                raise Crash
            return original(*args, **kwargs)

        monkeypatch.setattr(target, name, counted)

    for target, name in (
        (os, "fsync"), (Path, "rename"), (Path, "mkdir"), (safetensors.torch, "save_file"),
        (checkpoint, "_write"), (os, "unlink"), (os, "rmdir"), (checkpoint, "_sha256"),
    ):  # fmt: skip
        wrap(target, name)
    return lambda: calls


@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step"])
def test_a_crash_at_any_moment_leaves_only_whole_checkpoints(tmp_path: Path, again: bool) -> None:
    """Every call that touches the disk is the last one in turn, pruning included."""
    step, finished, moment = (4 if again else 5), False, 0
    while not finished:
        moment += 1
        folder = tmp_path / str(moment)
        store = CheckpointStore(folder, keep=2)
        for one in (2, 3, 4):
            save(store, one, best=2)
        with pytest.MonkeyPatch.context() as patch:
            calls = crash_at(patch, moment)
            with contextlib.suppress(Crash):
                save(store, step, best=step)  # prunes step 2 and 3
            finished = calls() < moment
        fresh = CheckpointStore(folder, keep=2)
        newest, skipped = fresh.newest()
        assert skipped == [], moment
        assert newest is not None
        assert newest.step >= (3 if again else 4), moment
        fresh.clear_staging()
        assert all(path.name.startswith("step-") for path in folder.iterdir()), moment
        save(fresh, 6, best=newest.step)
        found = fresh.newest()[0]
        assert found is not None
        assert found.step == 6
    assert moment > 20


# -- damage ----------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    content = (path / "weights.safetensors").read_bytes()
    (path / "weights.safetensors").write_bytes(content[:-1])


def alter(path: Path) -> None:
    content = bytearray((path / "optimizer.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "optimizer.safetensors").write_bytes(bytes(content))


def lose(path: Path) -> None:
    (path / "rng.safetensors").unlink()


def lose_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def break_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"state.json": ', encoding="utf-8")


def odd_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"state.json": {"size": 3}}', encoding="utf-8")


def list_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('["state.json"]', encoding="utf-8")


def binary_manifest(path: Path) -> None:
    (path / "manifest.json").write_bytes(b"\xff\x00\xfe")


def alter_state(path: Path) -> None:
    text = (path / "state.json").read_text(encoding="utf-8").replace('"step": 9', '"step": 8')
    (path / "state.json").write_text(text, encoding="utf-8")


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def folder_for_file(path: Path) -> None:
    (path / "rng.safetensors").unlink()
    (path / "rng.safetensors").mkdir()


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (truncate, "weights.safetensors has "),
        (alter, "the content of optimizer.safetensors has changed"),
        (lose, "rng.safetensors is missing"),
        (lose_manifest, "never finished"),
        (break_manifest, "manifest can't be read"),
        (odd_manifest, "manifest can't be read"),
        (list_manifest, "manifest can't be read"),
        (binary_manifest, "manifest can't be read"),
        (alter_state, "the content of state.json has changed"),
        (empty, "never finished"),
        (folder_for_file, "rng.safetensors is missing"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_its_fault(
    tmp_path: Path, damage: Callable[[Path], None], fault: str
) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 8)
    save(store, 9)
    damage(tmp_path / "step-00000009")
    newest, skipped = store.newest()
    assert newest is not None
    assert newest.step == 8
    assert [name for name, _ in skipped] == ["step-00000009"]
    assert fault in skipped[0][1]
    assert store.at(9) is None
    assert store.at(8) is not None


def test_all_damaged_is_none(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        save(store, step)
        truncate(tmp_path / f"step-0000000{step}")
    newest, skipped = store.newest()
    assert newest is None
    assert [name for name, _ in skipped] == ["step-00000002", "step-00000001"]


def test_the_manifest_holds_size_and_hash_of_each_file(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path), 1)
    path = tmp_path / "step-00000001"
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    files = {p.name for p in path.iterdir()} - {"manifest.json"}
    assert manifest.keys() == files
    assert all(facts["bytes"] == (path / name).stat().st_size for name, facts in manifest.items())
    assert check(path) is None


# -- what stays ------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [2, 3])
def test_the_last_ones_and_the_best_stay(tmp_path: Path, keep: int) -> None:
    store = CheckpointStore(tmp_path, keep)
    for step in range(1, 8):
        save(store, step, best=min(step, 2))
    assert steps(store) == [2, *range(8 - keep, 8)]


def test_a_future_that_was_undone_is_removed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (10, 20, 30):
        save(store, step)
    truncate(tmp_path / "step-00000030")
    save(store, 25)
    assert steps(store) == [20, 25]


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "step-notes.txt").write_text("mine", encoding="utf-8")
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 3):
        save(store, step)
    newest, skipped = store.newest()
    assert newest is not None
    assert (newest.step, skipped) == (3, [])
    assert (tmp_path / "step-notes.txt").is_file()


def test_the_staging_of_a_dead_process_is_removed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    (tmp_path / ".staging-00000002").mkdir()
    (tmp_path / ".staging-00000002" / "weights.safetensors").write_bytes(b"half")
    store.clear_staging()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_equal_states_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(CheckpointStore(tmp_path / name), 3)
    for path in (tmp_path / "a" / "step-00000003").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / "step-00000003" / path.name).read_bytes()
