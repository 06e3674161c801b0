"""Runs whose weights learn and are multiplied as 8-bit floats; the card's product by its twin."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from chatfine import cli
from chatfine.config import ResumeConfig, TrainConfig
from chatfine.errors import UsageError
from chatfine.model import learned_fp8
from chatfine.train import decisions as deciding
from chatfine.train import forecast
from chatfine.train.decisions import Decisions
from chatfine.train.loop import Trainer
from chatfine.train.prepare import prepare, shapes_of
from chatfine.train.run import resume, train

Configure = Callable[..., TrainConfig]
Metrics = Callable[[Path], list[dict[str, Any]]]
FULL = {"method": "full", "save_every": 1, "eval_every": 2, "learning_rate": 1e-3, "dtype": "bf16"}


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that multiplies 8-bit floats, by the twin of the card's product."""
    monkeypatch.setattr(deciding, "fp8_works", lambda device: True)
    monkeypatch.setattr(
        learned_fp8, "multiplies_fp8", lambda x, out, size: not (out % 16 or size % 16)
    )


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


def test_a_device_without_them_says_what_it_does_instead(
    tiny: Path, data: Path, tmp_path: Path, metrics: Metrics, capsys: pytest.CaptureFixture[str]
) -> None:
    for choice in ("on", "off"):
        words = ["train", "-m", str(tiny), "-d", str(data), "-o", str(tmp_path / choice),
                 "--method", "full", "--device", "cpu", "--dtype", "fp32", "--max-steps", "2",
                 "--batch-size", "4", "--fp8-products", choice]  # fmt: skip
        assert cli.main(words) == 0
        said = " ".join("".join(capsys.readouterr()).split())
        assert (
            "--fp8-products on needs an NVIDIA card of compute capability 8.9 or later, and bf16; "
            "this run multiplies in float32 instead" in said
        ) == (choice == "on")
        assert "fp8, rounded from the weights" not in said
    assert metrics(tmp_path / "on") == metrics(tmp_path / "off")


def test_a_model_that_is_shared_out_says_why_not(
    configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = prepare(configure(method="full", fp8_products="on"))
    prepared.run.mkdir()
    shapes = shapes_of(prepared.model)
    for ours, said in ((False, True), (True, False)):
        decided = Decisions("cpu", "bfloat16", 1, 1, True, 0, processes=2, sharding="full",
                            learned_fp8=ours)  # fmt: skip
        forecast.show(prepared, decided, shapes, torch.device("cpu"), 4)
        found = " ".join("".join(capsys.readouterr()).split())
        assert ("--fp8-products on is ignored: each process holds only its share" in found) == said


@pytest.mark.usefixtures("card")
def test_weights_that_learn_are_saved_whole_and_the_plan_says_so(
    configure: Configure, metrics: Metrics, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for choice in ("on", "off"):
        train(configure(output=str(tmp_path / choice), fp8_products=choice, **FULL))
        said = " ".join("".join(capsys.readouterr()).split())
        assert ("fp8, rounded from the weights" in said) == (choice == "on")
        found[choice] = metrics(tmp_path / choice)
    assert found["on"] != found["off"]
    assert losses(found["on"]) == pytest.approx(losses(found["off"]), rel=0.02)
    ours, exact = (load_file(tmp_path / one / "model/model.safetensors") for one in ("on", "off"))
    assert ours.keys() == exact.keys()
    assert {name: one.dtype for name, one in ours.items()} == {
        name: one.dtype for name, one in exact.items()
    }


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("options", [{}, {"method": "freeze", "freeze_layers": 1},
                                     {"pure_bf16": True}, {"checkpointing": "full"}])  # fmt: skip
def test_killed_and_resumed_is_the_same_run(
    configure: Configure, metrics: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:  # fmt: skip
    base = FULL | {"fp8_products": "on", "accumulate": 2, "batch_size": 2} | options
    train(configure(output=str(tmp_path / "whole"), **base))
    original = Trainer._update

    def update(self: Trainer, loss: Any, rate: float) -> float:
        if self.progress.step == 2:
            raise Killed
        return original(self, loss, rate)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", update)
        with pytest.raises(Killed):
            train(configure(output=str(tmp_path / "killed"), **base))
    resume(ResumeConfig(run=str(tmp_path / "killed")))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert metrics(whole) == metrics(killed)
    name = "model/model.safetensors"
    assert (whole / name).read_bytes() == (killed / name).read_bytes()


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(("begun", "then"), [("on", "off"), ("off", "on")])
def test_a_run_does_not_change_its_products_on_the_way(
    configure: Configure, tmp_path: Path, begun: str, then: str
) -> None:
    run = tmp_path / "run"
    train(configure(fp8_products=begun, **FULL | {"max_steps": 2}))
    file = run / "config.yaml"
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert settings["fp8_products"] == begun
    settings |= {"fp8_products": then, "max_steps": 2}
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    (run / "result.json").unlink()
    with pytest.raises(UsageError, match=f"fp8_products: {begun} → {then}"):
        resume(ResumeConfig(run=str(run)))


@pytest.mark.usefixtures("card")
def test_nor_does_it_go_on_where_there_are_none(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(configure(fp8_products="on", **FULL | {"max_steps": 2}))
    (tmp_path / "run/result.json").unlink()
    monkeypatch.setattr(deciding, "fp8_works", lambda device: False)
    with pytest.raises(UsageError, match="fp8_products: on → off"):
        resume(ResumeConfig(run=str(tmp_path / "run")))


@pytest.mark.usefixtures("card")
def test_a_run_that_began_before_there_was_this_setting_goes_on(configure: Configure) -> None:
    config = configure(**FULL | {"max_steps": 2})
    train(config)
    run = Path(config.output)
    file = run / "config.yaml"
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    del settings["fp8_products"]
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    decided = json.loads((run / "decisions.json").read_text(encoding="utf-8"))
    del decided["asked"]["fp8_products"], decided["decided"]["learned_fp8"]
    (run / "decisions.json").write_text(json.dumps(decided), encoding="utf-8")
    (run / "result.json").unlink()
    assert resume(ResumeConfig(run=str(run)))["steps"] == 2
