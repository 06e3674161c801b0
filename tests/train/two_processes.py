"""What each of two processes does in test_distributed.py: several runs, one after the other."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from chatfine.config import ResumeConfig, TrainConfig
from chatfine.train import run


def hang_at(step: int) -> None:
    """Let this process's main thread sleep before an optimizer step."""
    from chatfine.data.batches import Batches

    original = Batches.step

    def sleeps(self: Batches, index: int) -> Any:
        if index == step:
            time.sleep(600)
        return original(self, index)

    Batches.step = sleeps  # type: ignore[method-assign]


def main(plan: Path) -> None:
    for job in json.loads(plan.read_text()):
        os.environ["MASTER_PORT"] = str(job["port"])
        if job.get("hang") == int(os.environ["RANK"]):
            hang_at(6)
        if "resume" in job:
            run.resume(ResumeConfig(run=job["resume"]))
        else:
            run.train(TrainConfig.read(job["settings"]))


if __name__ == "__main__":
    from chatfine.cli import guarded

    sys.exit(guarded(sys.argv[1:], lambda switches, words: main(Path(words[0]))))
