"""`chatfine doctor`: each finding has a state and, where it is not ok, a remedy."""

from __future__ import annotations

import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from chatfine.commands import doctor as room
from chatfine.commands import reach
from chatfine.config import DoctorConfig

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def checks() -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in room.doctor(DoctorConfig())["checks"]}


def versions(monkeypatch: pytest.MonkeyPatch, **changes: str | None) -> None:
    real = room.version_of
    monkeypatch.setattr(
        room, "version_of", lambda name: changes[name] if name in changes else real(name)
    )


def test_floors_are_those_of_the_project_file() -> None:
    text = PYPROJECT.read_text(encoding="utf-8")
    listed = text[text.index("\ndependencies = [") : text.index("[project.optional-dependencies]")]
    assert dict(re.findall(r'"([\w-]+)>=([\d.]+)"', listed)) == room.FLOORS


def test_this_machine_can_do_it(capsys: pytest.CaptureFixture[str]) -> None:
    report = room.doctor(DoctorConfig())
    assert report["ok"], [check for check in report["checks"] if check["status"] == "missing"]
    found = {check["name"]: check for check in report["checks"]}
    assert platform.python_version() in found["Python"]["text"]
    assert {"device", "bf16", "cores", "torch", "cache"} <= set(found)
    assert int(found["cores"]["text"]) >= 1
    shown = capsys.readouterr().out
    assert all(check["text"] in shown for check in report["checks"])


def test_old_and_missing_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, peft="0.18.9", gguf=None, rich="14.0")
    found = checks()
    assert found["peft"]["text"] == "0.18.9 is too old, 0.19 or newer is needed"
    assert found["gguf"]["text"] == "not installed, 0.17 or newer is needed"
    assert found["gguf"]["fix"] == f'{sys.executable} -m pip install "gguf>=0.17"'
    assert {found[name]["status"] for name in ("peft", "gguf")} == {"missing"}
    assert found["rich"]["status"] == "ok"
    assert not room.doctor(DoctorConfig())["ok"]


@pytest.mark.parametrize(
    ("found", "floor", "older"),
    [("2.13.0+cpu", "2.10", False), ("2.9.1", "2.10", True), ("6", "6.0", False),
     ("3.1.6", "3.1.6", False), ("5.3.0rc1", "5.3", False)],
)  # fmt: skip
def test_versions_are_compared_by_number(found: str, floor: str, older: bool) -> None:
    assert (room._numbers(found) < room._numbers(floor)) is older


def test_trackers_are_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, wandb=None, trackio="0.6")
    found = checks()
    assert found["wandb"]["status"] == "warn"
    assert found["wandb"]["text"] == "not installed; only for --track wandb"
    assert found["wandb"]["fix"].endswith("-m pip install wandb")
    assert found["trackio"]["status"] == "ok"


@pytest.mark.parametrize(
    ("version", "words", "status"),
    [(None, "only for --quantize nf4 (--quantize int8 works without)", "warn"),
     ("0.48.2", "0.48.2 is too old, 0.50 or newer is needed", "warn")],
)  # fmt: skip
def test_bitsandbytes_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, version: str | None, words: str, status: str
) -> None:
    versions(monkeypatch, bitsandbytes=version, **{"bitsandbytes-windows": "0.37"})
    stale, current = list(room._quantising())
    assert "bitsandbytes-windows hides" in stale.text
    assert stale.fix.endswith("pip uninstall -y bitsandbytes-windows")
    assert words in current.text
    assert current.status == status
    assert current.fix.endswith('pip install -U "bitsandbytes>=0.50"')


def test_bitsandbytes_that_is_here() -> None:
    """On a CPU it says what works; with a GPU it must have the library for it."""
    import torch

    pytest.importorskip("bitsandbytes")
    (check,) = room._quantising()
    if not torch.cuda.is_available():
        assert check.status == "ok"
        assert "nf4 works on the CPU" in check.text


def test_bitsandbytes_without_its_cuda_library(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    import torch

    if torch.cuda.is_available():
        pytest.skip("its library for the GPU is here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (check,) = room._quantising()
    assert "has no library for this CUDA" in check.text
    assert check.fix.endswith("-m bitsandbytes")


def test_several_gpus_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    class Card:
        name, total_memory, major, minor = "A Card", 24_000_000_000, 8, 9

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Card)
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    first, second, nccl = list(room._gpus())
    assert first.text == "GPU 0: A Card, 24.0 GB, compute capability 8.9"
    assert second.text.startswith("GPU 1")
    assert "Windows has no NCCL" in nccl.text
    assert "WSL" in nccl.fix


@pytest.mark.parametrize(
    ("cuda", "words"), [(None, "torch is the CPU build"), ("12.8", "finds no GPU")]
)
def test_a_driver_that_torch_does_not_use(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, words: str
) -> None:
    monkeypatch.setattr(room.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    (check,) = room._no_gpu(cuda)
    assert check.status == "missing"
    assert words in check.text
    assert check.fix


def test_little_memory_and_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(room, "memory_bytes", lambda: 2e9)
    monkeypatch.setenv("CHATFINE_HOME", str(tmp_path / "not" / "made"))
    usage = shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    memory = {check.name: check for check in room._machine()}["memory"]
    (cache,) = reach.cache()
    assert (memory.status, cache.status) == ("warn", "warn")
    assert "1.0 GB free" in cache.text
    assert "CHATFINE_HOME" in cache.fix
    assert not (tmp_path / "not").exists()
