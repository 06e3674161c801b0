"""A .pth is a pickle: nothing in it runs, and its reader sees no secret."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from meta_reference import LLAMA2, random_weights, write_meta

from chatfine.errors import ModelError
from chatfine.hub.meta import meta_to_folder, read_meta_folder
from chatfine.hub.pth import halves_to_pairs, pairs_to_halves
from chatfine.hub.pth_process import PthProcess, check_pth, child_environment

SECRETS = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "HTTPS_PROXY", "MY_PASSWORD")


class Trap:
    """Unpickled without care, it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_that_runs_a_program_runs_none(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    source = write_meta(tmp_path / "meta", LLAMA2, random_weights(LLAMA2))
    file = source / "consolidated.00.pth"
    torch.save(random_weights(LLAMA2) | {"rope.freqs": Trap(mark)}, file)
    torch.load(file, weights_only=False)
    assert mark.is_dir(), "the trap works where it is not guarded against"
    mark.rmdir()
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ModelError) as error:
        meta_to_folder(read_meta_folder(source), out)
    assert error.value.code == "pth-unsafe"
    assert "mkdir" in error.value.what
    assert "weights_only" not in str(error.value), "torch's advice would be to open it unsafely"
    assert not mark.exists()
    assert list(out.iterdir()) == []


def test_the_child_sees_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, "topsecret")
    monkeypatch.chdir(tmp_path)
    environment = child_environment()
    assert not {*SECRETS, "HOME", "USER"} & set(environment)
    assert "topsecret" not in "".join(environment.values())
    probe = Path(f"/proc/{os.getpid()}/environ")
    if not probe.exists():
        pytest.skip("this system does not show a process's environment")
    with PthProcess() as child:
        seen, end = b"", time.monotonic() + 20
        while not seen and time.monotonic() < end:  # empty until the program has started
            seen = Path(f"/proc/{child.process.pid}/environ").read_bytes()
        folder = Path(f"/proc/{child.process.pid}/cwd").resolve()
    assert b"topsecret" not in seen
    assert b"PATH=" in seen
    assert folder != tmp_path, "it does not look for modules in the user's folder"
    assert child.process.returncode == 0


def test_a_child_that_dies_is_told() -> None:
    with PthProcess() as child:
        child.process.kill()
        with pytest.raises(Exception, match="memory"):
            child.ask({"op": "open", "files": []})
    with PthProcess() as child, pytest.raises(ModelError, match="ended with code 1") as error:
        child.ask({"op": "nonsense"})
    assert "Error" in (error.value.why or ""), "the last lines of what it said"


def archive(path: Path, names: list[str], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as stream:
        for name in names:
            stream.writestr(name, b"x" * 100)
    return path


def test_what_is_no_checkpoint_is_refused_unopened(tmp_path: Path) -> None:
    sound = tmp_path / "sound.pth"
    torch.save({"a": torch.ones(1000)}, sound)
    check_pth(sound)
    raw = sound.read_bytes()
    (tmp_path / "cut.pth").write_bytes(raw[: len(raw) // 2])
    (tmp_path / "page.pth").write_bytes(b"<!DOCTYPE html>" * 20)
    torch.save({"a": torch.ones(9)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "lfs.pth").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    )
    archive(tmp_path / "wheel.pth", ["package/__init__.py", "package/data.txt"])
    archive(tmp_path / "two.pth", ["a/data.pkl", "b/data.pkl"])
    archive(tmp_path / "script.pth", ["a/data.pkl", "a/constants.pkl"])
    archive(tmp_path / "packed.pth", ["a/data.pkl", "a/data/0"], zipfile.ZIP_DEFLATED)
    reasons = {
        "cut": "cut short", "page": "not a zip", "old": "not a zip", "wheel": "no data.pkl",
        "two": "no data.pkl", "script": "TorchScript", "packed": "compressed",
    }  # fmt: skip
    for name, reason in reasons.items():
        with pytest.raises(ModelError) as error:
            check_pth(tmp_path / f"{name}.pth")
        assert error.value.code == "pth-damaged", name
        assert reason in (error.value.why or ""), name
    with pytest.raises(ModelError) as error:
        check_pth(tmp_path / "lfs.pth")
    assert error.value.code == "model-lfs-pointer"


def test_tensors_larger_than_their_file_and_not_finite_ones(tmp_path: Path) -> None:
    """A stride of 0 would make a terabyte out of one number; a NaN is no weight."""
    bomb = tmp_path / "bomb.pth"
    torch.save({"a": torch.ones(1).expand(10**6, 10**6)}, bomb)
    nan = tmp_path / "nan.pth"
    torch.save({"a": torch.tensor([1.0, torch.nan])}, nan)
    large = tmp_path / "large.pth"
    torch.save({"a": torch.tensor([1.0, 70000.0])}, large)
    item = {"name": "b", "source": "a", "dtype": "F32", "shape": [2], "axis": None, "heads": 0}
    with PthProcess() as child:
        with pytest.raises(ModelError, match=r"bomb\.pth can't be read"):
            child.ask({"op": "open", "files": [str(bomb)]})
        for file, dtype in ((nan, "F32"), (large, "F16")):
            child.ask({"op": "open", "files": [str(file)]})
            request = {"op": "join", "folder": str(tmp_path), "tensors": [item | {"dtype": dtype}]}
            with pytest.raises(ModelError, match="not finite") as error:
                child.ask(request)
            assert error.value.code == "model-not-finite"
            assert "--dtype bf16" in error.value.fix[0]


def test_the_two_rotary_orders_undo_each_other() -> None:
    rows = torch.arange(24.0).reshape(12, 2)
    for heads in (1, 2, 3):
        assert torch.equal(halves_to_pairs(pairs_to_halves(rows, heads), heads), rows)
    # one head of four rows: the pairs (0, 1) and (2, 3) come half a head apart
    assert pairs_to_halves(torch.arange(4.0)[:, None], 1).flatten().tolist() == [0, 2, 1, 3]


def test_the_parent_never_loads_torch(tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", LLAMA2, random_weights(LLAMA2))
    code = f"""
import sys
from pathlib import Path
from chatfine.hub.meta import read_meta_folder
read_meta_folder(Path({str(tmp_path / "meta")!r}))
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
