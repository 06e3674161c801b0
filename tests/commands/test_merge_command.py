"""`chatfine merge` on a run folder: result, card, and chatting with what comes out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from chatfine.commands.chat import chat
from chatfine.commands.merge import merge
from chatfine.config import ChatConfig, MergeConfig
from chatfine.errors import ModelError, OutputError


def test_a_run_becomes_a_model_that_answers_alike(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "my-model"
    result = merge(MergeConfig(run=str(run), output=str(out)))
    assert result["output"] == str(out)
    assert result["gap"] < 1e-3
    assert (result["dtype"], result["rounding_gap"]) == ("float32", 0)
    assert result["positions"] > 250, "the proof reads whole dialogues"
    json.dumps(result)

    def ask(model: Path) -> dict[str, Any]:
        values = {"model": str(model), "prompt": "你好", "max_new_tokens": 12, "dtype": "fp32"}
        return chat(ChatConfig.read(values))

    assert ask(out) == ask(run), "the system prompt of the training goes with the model too"
    card = (out / "README.md").read_text(encoding="utf-8")
    for part in ("# my-model", "lora", "mine", "1.2500", "1.5000", "chatfine chat my-model"):
        assert part in card
    assert str(tmp_path) not in card


def test_what_is_whole_already(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="whole model already") as error:
        merge(MergeConfig(run=str(tiny), output=str(tmp_path / "out")))
    assert error.value.code == "nothing-to-merge"


def test_a_changed_base_is_taken_only_if_named(run: Path, tiny: Path, tmp_path: Path) -> None:
    copy, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(run, copy)
    shutil.copytree(tiny, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    facts = json.loads((copy / "adapter" / "chatfine.json").read_text())
    (copy / "adapter" / "chatfine.json").write_text(json.dumps(facts | {"base": str(other)}))
    with pytest.raises(ModelError, match="--model"):
        merge(MergeConfig(run=str(copy), output=str(tmp_path / "out")))
    merge(MergeConfig(run=str(copy), output=str(tmp_path / "out"), model=str(other)))
    assert (tmp_path / "out" / "config.json").is_file()


def test_the_output_may_not_hold_the_input(run: Path, tiny: Path) -> None:
    for place in (run, run / "adapter", tiny):
        with pytest.raises(OutputError) as error:
            merge(MergeConfig(run=str(run), output=str(place), overwrite=True))
        assert error.value.code == "output-is-input"
    assert (run / "adapter" / "adapter_config.json").is_file()
