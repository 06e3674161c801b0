"""Ray Train 启动 chatfine 训练 / `chatfine train` with Ray Train as the launcher

    python -m pip install -e ".[ray]"
    python recipes/ray_train.py --workers 8 --cpus 8 recipes/llama2_7b_fsdp.yaml -o my-run
    python recipes/ray_train.py --workers 2 --gpus 0 -m smollm2-135m-instruct -d dialogs -o my-run

四个参数归 Ray：--workers 进程数，--gpus 和 --cpus 每个进程分到多少（默认各 1），--retries 有进程
死掉后重来几次；其余与 chatfine train 相同。输出目录里已经有训练时就接着跑，所以重来、或者把同一条
命令再打一遍，都从最近的检查点开始。多台机器要有共享的文件夹：模型、数据、输出目录和 CHATFINE_HOME
在每台机器上是同一个路径。用 Ray 2.60 试过。

Four flags are Ray's: --workers is the number of processes, --gpus and --cpus are the share of each
(1 if not given), --retries says how often to begin again after a process has died; all else is as
for chatfine train. Where the output folder holds a run, that run goes on, so a retry, or the same
command typed again, begins at the newest checkpoint. Several machines need a shared folder: model,
data, output and CHATFINE_HOME are the same path on each. Tried with Ray 2.60.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from chatfine.cli import guarded, settings
from chatfine.config import TrainConfig
from chatfine.errors import Stopped

PASSED_ON = ("CHATFINE_HOME", "CHATFINE_LANG", "HF_HUB_OFFLINE")


def work(job: dict[str, Any]) -> None:
    """What each process does; Ray has set RANK, WORLD_SIZE and the process group already."""
    import chatfine as cf
    from chatfine import console

    os.chdir(job["folder"])
    run = Path(job["settings"]["output"])
    try:
        if (run / "config.yaml").is_file():
            cf.resume(run)
        else:
            cf.train(**job["settings"])
    except cf.ChatfineError as error:  # not raised: to begin again would end the same way
        console.error(error.code, str(error))
    except SystemExit:
        pass  # the first process has said why


def launch(own: argparse.Namespace, values: dict[str, Any]) -> None:
    """Start the processes and wait until the run is finished."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    ray.init(runtime_env={"env_vars": passed_on})
    trainer = TorchTrainer(
        work,
        train_loop_config={"folder": os.getcwd(), "settings": values},
        # single numbers are summed on the CPU, gradients on the GPUs
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if own.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=own.workers,
            use_gpu=own.gpus > 0,
            resources_per_worker={"CPU": own.cpus} | ({"GPU": own.gpus} if own.gpus else {}),
        ),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=own.retries)),
    )
    why = None
    try:
        trainer.fit()
    except Exception as error:  # the name of Ray's own error depends on its version
        why = str(error).strip().splitlines()[0]
    if why or not Path(values["output"], "result.json").is_file():
        raise Stopped(
            "ray-failed", "the run did not finish; what its processes said stands above", why=why,
            fix="mend what they say, then type the same command again: it goes on from the newest "
                "checkpoint",
        )  # fmt: skip


def read(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Ray's flags, and the words that are those of `chatfine train`."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--retries", type=int, default=0)
    return parser.parse_known_args(argv)


def main(argv: list[str]) -> int:
    """Check all settings, then let Ray start; returns the exit code."""
    own, words = read(argv)

    def do(_switches: set[str], words: list[str]) -> None:
        values, where = settings("train", words)
        TrainConfig.read(values, where)
        launch(own, {"output": "ray-run"} | values)

    return guarded(words, do)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
