"""An old Python is told so in one sentence, wherever it meets the project first."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SENTENCE = "chatfine 需要 Python 3.10 或更新的版本 / chatfine needs Python 3.10 or newer"
FILES = ["chatfine/__init__.py", *sorted(path.name for path in ROOT.glob("*.py"))]  # the doors
AS_OLD = "import runpy, sys; sys.path.insert(0, '.'); sys.version_info = (3, 8, 18); "


def run(python: str, *words: str) -> str:
    done = subprocess.run(
        [python, *words], cwd=ROOT, capture_output=True, check=False,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 1
    return done.stderr.decode("utf-8").strip()


@pytest.mark.parametrize("name", FILES)
def test_an_old_python_can_read_the_file_and_is_stopped_first(name: str) -> None:
    source = (ROOT / name).read_text(encoding="utf-8")
    body = ast.parse(source, feature_version=(3, 6)).body
    modules = [node.module for node in ast.walk(ast.parse(source)) if hasattr(node, "module")]
    assert "__future__" not in modules, "Python 3.6 does not know annotations there"
    check = next(node for node in body if isinstance(node, ast.If))
    assert ast.unparse(check.test) == "sys.version_info < (3, 10)"
    before = [ast.unparse(node) for node in body[1 : body.index(check)]]
    assert set(before) <= {"import sys", "from setuptools import setup"}


def test_the_floor_is_that_of_the_project_file() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^requires-python = ">=3\.10"$', text, re.MULTILINE)


@pytest.mark.parametrize(
    "words",
    ["import chatfine", "runpy.run_module('chatfine', run_name='__main__')",
     "runpy.run_path('setup.py')", "runpy.run_path('finetuning.py', run_name='__main__')"],
)  # fmt: skip
def test_the_sentence(words: str) -> None:
    assert run(sys.executable, "-c", AS_OLD + words) == SENTENCE


@pytest.mark.parametrize("version", ["3.6", "3.7", "3.8", "3.9"])
def test_a_real_old_python(version: str) -> None:
    python = shutil.which(f"python{version}")
    works = python and subprocess.run([python, "-V"], capture_output=True).returncode == 0
    if not works:
        pytest.skip(f"there is no Python {version} on this machine")
    assert run(str(python), "-m", "chatfine", "--version") == SENTENCE
