"""`chatfine doctor`: each finding has a state and, where it is not ok, a remedy."""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from chatfine.commands import doctor as room
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


def test_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, bitsandbytes="0.48", **{"bitsandbytes-windows": "0.37"})
    for cuda, words in ((False, "there is no CUDA GPU"), (True, "0.48")):
        monkeypatch.setattr(room, "_has_cuda", lambda cuda=cuda: cuda)
        stale, current = list(room._quantising())
        assert "bitsandbytes-windows hides" in stale.text
        assert stale.fix.endswith("pip uninstall -y bitsandbytes-windows")
        assert words in current.text
        assert current.status == ("ok" if cuda else "warn")
    versions(monkeypatch, bitsandbytes=None, **{"bitsandbytes-windows": None})
    (absent,) = room._quantising()
    assert absent.fix.endswith("pip install bitsandbytes")


def test_proxies_are_shown_without_their_password(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*room._PROXIES, *(name.lower() for name in room._PROXIES)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", "http://me:secret@proxy.example:3128")
    monkeypatch.setenv("ALL_PROXY", "socks5://me:secret@proxy.example:1080")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = {check.name: check for check in room._network()}
    assert found["HTTPS_PROXY"].status == "ok"
    assert found["ALL_PROXY"].status == "warn"
    assert found["HF_HUB_OFFLINE"].status == "warn"
    assert "proxy.example" in found["HTTPS_PROXY"].text
    assert not any("secret" in check.text for check in found.values())


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
    usage = room.shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: usage)
    memory = {check.name: check for check in room._machine()}["memory"]
    (cache,) = room._cache()
    assert (memory.status, cache.status) == ("warn", "warn")
    assert "1.0 GB free" in cache.text
    assert "CHATFINE_HOME" in cache.fix
    assert not (tmp_path / "not").exists()
