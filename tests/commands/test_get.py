"""`chatfine models` and `chatfine download` as commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chatfine.commands.get import download, models
from chatfine.config import DownloadConfig, ModelsConfig
from chatfine.hub.catalog import CATALOG, RECORD


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATFINE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))


def test_models_lists_the_catalog_and_the_cache(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("smollm2-135m-instruct", "acme--mine"):
        (tmp_path / "home" / "models").mkdir(parents=True, exist_ok=True)
        (tmp_path / "home" / "models" / name).symlink_to(tiny)
    listed = {entry["name"]: entry for entry in models(ModelsConfig())["models"]}
    assert set(listed) == set(CATALOG) | {"acme/mine"}
    here = {name for name, entry in listed.items() if entry["here"]}
    assert here == {"smollm2-135m-instruct", "acme/mine"}
    assert listed["llama-2-7b-chat"]["gated"]
    shown = capsys.readouterr().out
    assert "smollm2-135m-instruct" in shown
    assert "Apache-2.0" in shown


def test_catalog_names_are_their_own_keys() -> None:
    assert all(name == entry.name == name.lower() for name, entry in CATALOG.items())
    assert CATALOG["smollm2-135m-instruct"].package is not None


def test_download_copies_a_folder(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    result = download(DownloadConfig(name=str(tiny), output=str(out)))
    assert result["path"] == str(out)
    assert result["dtype"] == "fp32"
    assert result["parameters"] * 4 == result["weight_bytes"]
    assert (out / RECORD).is_file()
    assert (out / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()


def test_an_unknown_name_is_refused_within_two_seconds(tmp_path: Path) -> None:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "chatfine", "download", "smolm2-135m-instruct",
         "--json"],
        capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert time.perf_counter() - start < 2
    assert done.returncode == 2
    error = json.loads(done.stdout.splitlines()[-1])
    assert error["error"] == "no-model"
    assert error["fix"][0] == "did you mean smollm2-135m-instruct?"
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not {"torch", "transformers"} & imported
    assert not (tmp_path / "home").exists(), "nothing is left behind"
