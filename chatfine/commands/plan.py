"""`chatfine plan`: memory, disk and time of a run, without starting it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from chatfine.config import PlanConfig
from chatfine.train.prepare import prepare


def plan(config: PlanConfig) -> dict[str, Any]:
    """Predict a run; returns the prediction with sizes in bytes and time in seconds.

    Raises:
        Refused: bad input, or a run that does not fit (with what to change).
    """
    with tempfile.TemporaryDirectory() as scratch:
        prepared = prepare(config.model_copy(update={"output": str(Path(scratch) / "run")}))
        prepared.run.mkdir()
        prepared.data.report.show()
        from chatfine.train.distributed import Group
        from chatfine.train.session import Session

        return Session(prepared, Group()).show_plan()
