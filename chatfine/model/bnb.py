"""The library bitsandbytes, which not every machine has: asked for when it is needed."""

from __future__ import annotations

import functools
import sys
from typing import Any

from chatfine.errors import ResourceError
from chatfine.i18n import t


@functools.lru_cache(maxsize=4)
def bitsandbytes(part: str = "functional", flag: str = "--quantize nf4") -> Any:
    """A part of bitsandbytes (functional, optim); `flag` is what it is needed for.

    Raises:
        ResourceError: it is not installed, or does not load on this machine.
    """
    # on some processors it fetches code from a hub at import if this package is there
    kernels = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        import bitsandbytes as package
    except Exception as error:  # a library that finds the wrong CUDA raises anything
        raise ResourceError(
            "no-bitsandbytes",
            t("{flag} needs the package bitsandbytes", flag=flag),
            why=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            fix="pip install bitsandbytes",
        ) from error
    finally:
        if kernels is None:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = kernels
    return getattr(package, part)
