"""One line of doctor's report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Check:
    """What was found. `missing` means that something will not work."""

    name: str
    status: Literal["ok", "warn", "missing"]
    text: str
    fix: str = ""
