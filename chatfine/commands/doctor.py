"""`chatfine doctor`: what this machine can do, what is missing, and the command that adds it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chatfine import console, runtime
from chatfine.commands import reach
from chatfine.commands.finding import Check
from chatfine.config import DoctorConfig
from chatfine.errors import ResourceError
from chatfine.i18n import t

FLOORS = {
    "torch": "2.10", "transformers": "5.3", "peft": "0.19", "tokenizers": "0.22",
    "safetensors": "0.6", "jinja2": "3.1.6", "datasets": "4.4", "pyarrow": "18", "numpy": "1.26",
    "pydantic": "2.10", "pyyaml": "6", "rich": "14", "huggingface-hub": "1.0", "filelock": "3.16",
    "gguf": "0.17", "sentencepiece": "0.2", "protobuf": "5", "rouge-score": "0.1.2",
    "matplotlib": "3.9", "psutil": "5.9",
}  # fmt: skip
"""Oldest versions that work: the dependencies of pyproject.toml (a test compares them)."""
PYTHON_FLOOR = (3, 10)
_MARKS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "missing": ("✗", "red")}
_LEAST_MEMORY_BYTES = 4e9  # the demo on the smallest model
_BITSANDBYTES_FLOOR = "0.50"


def doctor(config: DoctorConfig) -> dict[str, Any]:
    """Say what this machine can do and what to install."""
    checks: list[Check] = []
    parts: tuple[Callable[[], Iterator[Check]], ...] = (
        _python, _torch, _machine, _libraries, _extras, _quantising, reach.network,
        reach.cache,
    )  # fmt: skip
    for part in parts:
        for check in part():
            mark, style = _MARKS[check.status]
            console.say(f"{mark} {check.name:<16} {check.text}", style=style)
            if check.fix:
                console.say("  " + t("do: {fix}", fix=check.fix))
            checks.append(check)
    counts = {status: sum(check.status == status for check in checks) for status in _MARKS}
    console.say()
    if counts["missing"]:
        console.say(t("{n} things are missing; see the lines with ✗", n=counts["missing"]))
    else:
        console.say(t("all that is needed is here; now type: {command}", command="chatfine demo"))
    return {"ok": not counts["missing"], "checks": [asdict(check) for check in checks]}


def _python() -> Iterator[Check]:
    text = f"{platform.python_version()}, {platform.platform(terse=True)}, {platform.machine()}"
    if sys.version_info < PYTHON_FLOOR:
        yield Check("Python", "missing", text, t("install Python 3.10 or newer"))
    elif sys.maxsize < 2**32:
        yield Check("Python", "missing", text, t("install a 64-bit Python; torch has no other"))
    else:
        yield Check("Python", "ok", text)


def _torch() -> Iterator[Check]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library does not load
        yield Check("torch", "missing", t("can't be imported: {why}", why=error), install("torch"))
        return
    device = runtime.pick_device()
    if device.type == "cuda":
        yield from _gpus()
    elif device.type == "mps":
        yield Check("device", "ok", t("Apple GPU (mps)"))
    else:
        yield from _no_gpu(torch.version.cuda)
    if runtime.pick_dtype("auto", device) == torch.bfloat16:
        yield Check("bf16", "ok", t("computed in hardware"))
    else:
        yield Check("bf16", "warn", t("not in hardware here; auto takes another number format"))


def _gpus() -> Iterator[Check]:
    import torch

    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        generation = f"{card.major}.{card.minor}"
        yield Check("device", "ok", t("GPU {index}: {name}, {memory}, compute capability {cc}",
                    index=index, name=card.name, memory=console.size(card.total_memory),
                    cc=generation))  # fmt: skip
    if torch.cuda.device_count() < 2:
        return
    if platform.system() == "Windows":
        yield Check("NCCL", "warn",
                    t("Windows has no NCCL: several GPUs train together over gloo, more slowly"),
                    t("for several GPUs use Linux or WSL 2"))  # fmt: skip
    elif not torch.distributed.is_nccl_available():
        yield Check("NCCL", "warn", t("this torch has no NCCL for training on several GPUs"),
                    install("torch"))  # fmt: skip


def _no_gpu(cuda: str | None) -> Iterator[Check]:
    text = t("CPU with {n} threads; small models train here, large ones need a GPU",
             n=os.cpu_count())  # fmt: skip
    if shutil.which("nvidia-smi") is None:
        yield Check("device", "ok", text)
    elif cuda is None:
        fix = t("install the CUDA build of torch: see {url}", url="https://pytorch.org")
        yield Check("device", "missing", t("an NVIDIA driver is here, but torch is the CPU build"),
                    fix)  # fmt: skip
    else:
        fix = t("run nvidia-smi: the driver may be too old for CUDA {cuda}", cuda=cuda)
        yield Check("device", "missing", t("torch is for CUDA {cuda} but finds no GPU", cuda=cuda),
                    fix)  # fmt: skip


def _machine() -> Iterator[Check]:
    yield Check("cores", "ok", str(usable_cores()))
    if version_of("psutil") is None:
        return  # told with the libraries
    total = memory_bytes()
    if total >= _LEAST_MEMORY_BYTES:
        yield Check("memory", "ok", console.size(total))
    else:
        fix = t("close other programs; the demo needs about 4 GB")
        yield Check("memory", "warn", console.size(total), fix)


def _libraries() -> Iterator[Check]:
    for name, floor in FLOORS.items():
        found = version_of(name)
        if found is None:
            yield Check(name, "missing", t("not installed, {floor} or newer is needed",
                        floor=floor), install(name))  # fmt: skip
        elif _numbers(found) < _numbers(floor):
            yield Check(name, "missing", t("{found} is too old, {floor} or newer is needed",
                        found=found, floor=floor), install(name))  # fmt: skip
        else:
            yield Check(name, "ok", found)


def _extras() -> Iterator[Check]:
    uses = {
        "tensorboard": "--track tensorboard",
        "trackio": "--track trackio",
        "swanlab": "--track swanlab",
        "wandb": "--track wandb",
    }
    for name, use in uses.items():
        found = version_of(name)
        if found:
            yield Check(name, "ok", found)
        else:
            yield Check(name, "warn", t("not installed; only for {use}", use=use),
                        f"{sys.executable} -m pip install {name}")  # fmt: skip


def _quantising() -> Iterator[Check]:
    """8-bit weights (int8) are plain torch and work everywhere; nf4 needs bitsandbytes."""
    if version_of("bitsandbytes-windows"):
        yield Check("bitsandbytes", "warn",
                    t("the old package bitsandbytes-windows hides the current bitsandbytes"),
                    f"{sys.executable} -m pip uninstall -y bitsandbytes-windows")  # fmt: skip
    found = version_of("bitsandbytes")
    renew = f'{sys.executable} -m pip install -U "bitsandbytes>={_BITSANDBYTES_FLOOR}"'
    if found is None:
        text = t("not installed; only for --quantize nf4 (--quantize int8 works without)")
        yield Check("bitsandbytes", "warn", text, renew)
    elif _numbers(found) < _numbers(_BITSANDBYTES_FLOOR):
        yield Check("bitsandbytes", "warn", t("{found} is too old, {floor} or newer is needed",
                    found=found, floor=_BITSANDBYTES_FLOOR), renew)  # fmt: skip
    else:
        yield _loaded_bitsandbytes(found)


def _loaded_bitsandbytes(version: str) -> Check:
    """Whether bitsandbytes works here: its import alone succeeds even without its library."""
    try:
        from chatfine.model.bnb import bitsandbytes

        library = bitsandbytes().lib
    except (ImportError, OSError, ResourceError) as error:
        why = error.why if isinstance(error, ResourceError) else str(error)
        return Check("bitsandbytes", "warn",
                     t("{version} does not load: {why}; --quantize int8 works without",
                       version=version, why=why),
                     f"{sys.executable} -m bitsandbytes")  # fmt: skip
    if not _has_cuda():
        text = t("{version}: nf4 works on the CPU, slowly; there is no CUDA GPU", version=version)
        return Check("bitsandbytes", "ok", text)
    if getattr(library, "compiled_with_cuda", True):
        return Check("bitsandbytes", "ok", version)
    return Check("bitsandbytes", "warn",
                 t("{version} has no library for this CUDA: nf4 fails on the GPU; --quantize int8 "
                   "works without", version=version),
                 f"{sys.executable} -m bitsandbytes")  # fmt: skip


def _has_cuda() -> bool:
    try:
        import torch
    except (ImportError, OSError):
        return False
    return torch.cuda.is_available()


def usable_cores() -> int:
    """Processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """Main memory this process may use, a container's limit included."""
    import psutil

    total = int(psutil.virtual_memory().total)
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        file = Path("/sys/fs/cgroup") / limit
        text = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
        if text.isdigit():
            total = min(total, int(text))
    return total


def version_of(name: str) -> str | None:
    """The installed version of a distribution, None if it is not there; nothing is imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def install(name: str) -> str:
    """The command that installs a library at its floor or newer."""
    return f'{sys.executable} -m pip install "{name}>={FLOORS[name]}"'


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in release[0].split(".")] if release else []
    while numbers and numbers[-1] == 0:  # 6 and 6.0 are one version
        numbers.pop()
    return tuple(numbers)
