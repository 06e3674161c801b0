"""Where and how to compute: device, number format, seed, rank.

torch is imported inside the functions, so that commands which refuse bad input stay fast.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from chatfine.errors import ResourceError
from chatfine.i18n import t

if TYPE_CHECKING:
    import torch


def be_polite_on_cores() -> None:
    """Let waiting threads sleep soon instead of spinning. Works only before torch is imported.

    OpenMP threads that wait for each other spin for milliseconds by default. With one more busy
    program on the machine, the thread they wait for is not running, and every operation costs a
    time slice: a training step of 3.6 s took over 20 s on two cores beside one other process, and
    5 s with this spin. Alone on the machine it costs less than 5 %.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # libgomp: Linux builds of torch
    os.environ.setdefault("KMP_BLOCKTIME", "1")  # libiomp and libomp: Windows and macOS, in ms


def home() -> Path:
    """The one cache folder of models and tokenised data: CHATFINE_HOME, else the user's cache."""
    chosen = os.environ.get("CHATFINE_HOME")
    if chosen:
        return Path(chosen).expanduser()
    if platform.system() == "Windows":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "chatfine"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "chatfine"


def settle_torch() -> None:
    """What torch reads from the environment as it is imported, where the user has not said it.

    What the compiler makes outlasts a restart of the machine; torch would put it into /tmp. On
    Linux a GPU's memory grows in place: a run that fills 21.9 GiB failed with 1.8 of them in pieces
    too small to use.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(home() / "compiled"))
    if platform.system() == "Linux":
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def launched() -> tuple[int, int]:
    """Rank and number of the processes that a launcher (torchrun, Ray Train) started; (0, 1) if it
    did not."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def pick_device(wanted: str = "auto") -> torch.device:
    """The torch device for `wanted` (auto, cpu, cuda or mps).

    Raises:
        ResourceError: the device asked for is not there.
    """
    import torch

    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wanted == "auto":
        wanted = next(name for name in ("cuda", "mps", "cpu") if there[name])
    if not there[wanted]:
        raise ResourceError(
            "no-device",
            t("this machine has no {device} device that torch can use", device=wanted),
            where="--device",
            fix=t("use --device auto, or see chatfine doctor"),
        )
    if wanted == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(wanted)


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware (AMX or AVX512-BF16, or ARM's BF16).

    Without it torch falls back to a scalar path: 19 against 160 GFLOP/s in float32 were measured
    on two AVX2 cores.
    """
    import torch

    if platform.machine().lower() in ("arm64", "aarch64"):
        return (
            bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
            if platform.system() == "Linux"
            else False
        )
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The torch dtype to compute in for `wanted` (auto, bf16, fp16 or fp32)."""
    import torch

    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if wanted != "auto":
        return named[wanted]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "mps":
        return torch.bfloat16
    return torch.bfloat16 if cpu_has_bf16() else torch.float32


def set_seed(seed: int, deterministic: bool = False) -> None:
    """Seed every random number; with `deterministic` also make GPU kernels repeatable."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def fp8_works(device: torch.device) -> bool:
    """Whether `device` multiplies 8-bit floats: an NVIDIA card of compute capability 8.9 (Ada,
    Hopper) or later."""
    import torch

    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def has_bitsandbytes() -> bool:
    """Whether the package is installed; it is not loaded yet."""
    return importlib.util.find_spec("bitsandbytes") is not None


def has_compiler() -> bool:
    """Whether torch can compile for a GPU here: it needs Triton."""
    return importlib.util.find_spec("triton") is not None


def require_storage(quantize: str) -> None:
    """Refuse a storage of frozen weights whose package is not installed; it is not loaded yet.

    Raises:
        ResourceError: with the command that installs it.
    """
    if quantize == "nf4":
        _require_bitsandbytes("--quantize nf4", "--quantize int8")


def require_optimizer(optimizer: str) -> None:
    """The same for an optimizer.

    Raises:
        ResourceError: with the command that installs it.
    """
    if optimizer.endswith("8bit"):
        _require_bitsandbytes(f"--optimizer {optimizer}", "--optimizer anyprecision")


def _require_bitsandbytes(flag: str, instead: str) -> None:
    if not has_bitsandbytes():
        raise ResourceError(
            "no-bitsandbytes",
            t("{flag} needs the package bitsandbytes", flag=flag),
            fix=(f"{sys.executable} -m pip install bitsandbytes", instead),
        )
