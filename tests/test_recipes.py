"""The launchers in recipes/: what they start, and when they start it again. The Chinese path of
the two medical recipes: its commands, on a tiny model."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_lines import check, in_header, ray_train

from chatfine import cli

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "recipes" / "slurm.sh"
RECIPE = "recipes/llama2_7b_fsdp.yaml"
SRUN = """#!/usr/bin/env bash
shift  # --kill-on-bad-exit=1
printf '%s\\n' "$*" >> started
if [ -f srun-does ]; then . ./srun-does; fi
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1 $2" = "show hostnames" ]; then printf 'node1\\nnode2\\n'; else echo "$*" >> asked; fi
"""

slurm = pytest.mark.skipif(
    sys.platform == "win32" or shutil.which("bash") is None, reason="Slurm and bash are Linux's"
)


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A folder with the recipes, and programs that write down what Slurm's would be asked."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / "bin" / name).write_text(text, encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def submit(cluster: Path, *words: str, srun_does: str = "", restart: str = "0") -> int:
    (cluster / "srun-does").write_text(srun_does, encoding="utf-8")
    environment = os.environ | {
        "PATH": f"{cluster / 'bin'}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8",
        "SLURM_RESTART_COUNT": restart,
    }  # fmt: skip
    return subprocess.run(
        ["bash", str(SCRIPT), *words], cwd=cluster, env=environment, timeout=30, check=False,
        capture_output=True,
    ).returncode  # fmt: skip


def lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


@slurm
def test_a_finished_run_is_not_queued_again(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = "mkdir -p my-run && touch my-run/result.json"
    assert submit(cluster, "my-run", RECIPE, "--epochs", "2", srun_does=done) == 0
    (command,) = lines(cluster / "started")
    assert command.startswith("torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d")
    assert "--rdzv_endpoint node1:24242 " in command
    assert command.endswith(f"-m chatfine train {RECIPE} --output my-run --epochs 2")
    monkeypatch.chdir(cluster)
    check(command)
    assert lines(cluster / "asked") == []


@slurm
def test_a_run_that_was_stopped_queues_again_and_goes_on(
    cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = ("mkdir -p my-run/checkpoints/step-00000012 && touch my-run/config.yaml\n"
               "exit 1")  # fmt: skip
    assert submit(cluster, "my-run", RECIPE, srun_does=stopped) == 1
    assert lines(cluster / "asked") == ["requeue 4242"]
    done = "touch my-run/result.json"
    assert submit(cluster, "my-run", RECIPE, srun_does=done, restart="1") == 0
    first, second = lines(cluster / "started")
    assert second.endswith("-m chatfine resume my-run")
    assert "--rdzv_id 4242-0 " in first
    assert "--rdzv_id 4242-1 " in second
    monkeypatch.chdir(cluster)
    check(second)
    assert lines(cluster / "asked") == ["requeue 4242"]


@slurm
def test_a_run_that_does_not_get_on_is_not_queued_for_ever(cluster: Path) -> None:
    assert submit(cluster, "my-run", RECIPE, srun_does="exit 1") == 1
    (cluster / "my-run" / "checkpoints" / "step-00000012").mkdir(parents=True)
    (cluster / "my-run" / "config.yaml").touch()
    assert submit(cluster, "my-run", RECIPE, srun_does="exit 1") == 1
    assert lines(cluster / "asked") == []


@slurm
def test_slurm_needs_a_run_and_a_recipe(cluster: Path) -> None:
    assert submit(cluster, "my-run") == 2
    assert not (cluster / "started").exists()


def test_ray_takes_its_own_flags_and_leaves_the_others() -> None:
    own, train = ray_train().read(["--workers", "8", "--cpus", "4", RECIPE, "-o", "x"])
    assert (own.workers, own.gpus, own.cpus, own.retries) == (8, 1, 4, 0)
    assert train == [RECIPE, "-o", "x"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-m", "m", "-d", "d", "--epohcs", "3"], "--epohcs"),
        (["-m", "m"], "missing: --dataset (-d)"),
        (["-m", "m", "-d", "d", "--rank", "-1"], "--rank is -1"),
    ],
)
def test_ray_is_not_started_for_settings_that_are_wrong(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ray_train().main(["--workers", "2", *words]) == 2
    assert says in capsys.readouterr().err
    assert "ray" not in sys.modules


SMALL = {
    "plan": ["--device", "cpu"],
    "train": ["--device", "cpu", "--max-steps", "3", "--batch-size", "2"],
    "chat": ["--max-new-tokens", "4"],
}
"""What makes a command of a recipe small."""


@pytest.mark.parametrize("recipe", ["medical_zh.yaml", "medical_corpus_zh.yaml"])
def test_the_chinese_path_goes_from_one_end_to_the_other(
    recipe: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Grow, train, merge, ask: the commands in the header, in their order."""
    monkeypatch.setenv("CHATFINE_HOME", str(tmp_path / "home"))
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    shutil.copytree(tiny, tmp_path / "chat_7b_hf")
    personal = tmp_path / "datasets_processing" / "personal_dataset"
    personal.mkdir(parents=True)
    texts = ["感谢您的咨询，祝您身体健康。", "高血压患者可以用这种药吗？", "请问孩子发烧怎么办？"]
    rows = [{"title": texts[i % 3], "ask": f"{i}？", "answer": texts[(i + 1) % 3]}
            for i in range(120)]  # fmt: skip
    records = [{"question": row["title"], "answer": row["answer"]} for row in rows]
    for path, lines_ in (
        (tmp_path / "medical.jsonl", rows),
        (personal / "format_data.json", records),
    ):
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in lines_)
        path.write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    commands = in_header((ROOT / "recipes" / recipe).read_text(encoding="utf-8"))
    assert [line.split()[1] for line in commands[-4:]] == ["plan", "train", "merge", "chat"]
    assert commands[0].split()[1] == "expand-vocab"
    for line in commands:
        words = shlex.split(line.replace("--size 8000", "--size 20"))[1:]
        assert cli.main([*words, *SMALL.get(words[0], [])]) == 0, line
    printed = capsys.readouterr().out
    assert "new rows" in printed
    assert "proved: logits" in printed
