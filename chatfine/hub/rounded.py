"""Where a run keeps the weights that its adapter was trained on, if they were rounded to texts.

`model.rounded` writes and reads the file.
"""

from __future__ import annotations

from pathlib import Path

CALIBRATED = "calibrated"
"""What an adapter's chatfine.json calls it that the base was rounded to texts."""
FILE = "rounded.safetensors"
"""Its name in a run folder. Names inside are those of the model's state dict."""


def beside(adapter: Path | None) -> Path | None:
    """The file of the run that an adapter folder belongs to, if it is there."""
    file = adapter.parent / FILE if adapter else None
    return file if file and file.is_file() else None
