"""What this machine has and does: free memory and disk, the peak so far, products a second."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from chatfine.train.plan import Shapes

USABLE = {"cpu": 0.85, "cuda": 0.94, "mps": 0.75}
"""Share of the free memory a run may plan with."""


def measured_flops(device: torch.device, dtype: torch.dtype, shapes: Shapes) -> float:
    """Products a second on this device, from a tenth of a second of one of the model's own
    products."""
    import torch

    rows = 1024 if device.type == "cpu" else 8192
    a = torch.randn(rows, shapes.hidden, device=device, dtype=dtype)
    b = torch.randn(shapes.intermediate, shapes.hidden, device=device, dtype=dtype)
    best, begin = 0.0, time.perf_counter()
    while time.perf_counter() - begin < 0.15:
        start = time.perf_counter()
        torch.nn.functional.linear(a, b)
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        best = max(best, 2.0 * a.numel() * shapes.intermediate / (time.perf_counter() - start))
    return best


EFFICIENCY = {"cpu": 0.72, "cuda": 0.45, "mps": 0.4}
"""Measured share of that rate that a whole training step reaches."""


CONTEXT_BYTES = 500e6
"""What CUDA itself takes of a card before torch allocates anything."""


def cap_memory(device: torch.device, limit_gb: float) -> None:
    """Let torch take no more of a CUDA device than a card of `limit_gb` GB would leave it; 0 lifts
    the limit again."""
    import torch

    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        share = (limit_gb * 1e9 - CONTEXT_BYTES) / total if limit_gb else 1.0
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, share)), device)


def free_memory_bytes(device: torch.device, limit_gb: float = 0) -> float:
    """Memory a run may take on `device`: what is free, or what a device of `limit_gb` GB would have
    free, less a safety margin."""
    import psutil
    import torch

    if limit_gb:
        free = limit_gb * 1e9 - (CONTEXT_BYTES if device.type == "cuda" else 0)
    elif device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
    return float(free) * USABLE[device.type]


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has used so far: the card's, or resident memory on a CPU."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(peak if sys.platform == "darwin" else peak * 1024)
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)  # type: ignore[attr-defined]
