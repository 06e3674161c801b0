"""A run whose frozen weights are rounded to its own texts, and what goes on with it later."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatfine.commands.opened import open_source
from chatfine.config import ResumeConfig, TrainConfig
from chatfine.errors import ResourceError
from chatfine.export.merge import merge
from chatfine.hub.rounded import FILE
from chatfine.model.frozen import FrozenLinear, frozen_linears
from chatfine.model.load import load_model
from chatfine.model.rounded import made_of
from chatfine.train import calibration
from chatfine.train.calibration import calibration_texts, load_base
from chatfine.train.decisions import Decisions
from chatfine.train.plan import Shapes
from chatfine.train.prepare import prepare
from chatfine.train.run import resume, train

Configure = Callable[..., TrainConfig]


@pytest.fixture
def calibrated(configure: Configure) -> Path:
    train(configure(quantize="nf4", calibrate="on", save_every=2))
    return Path(configure().output)


def same_base(model: Any, run: Path) -> bool:
    """Whether the packed linears of a model are those kept in the run folder."""
    kept = load_file(run / FILE)
    linears = {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): one
        for name, one in model.named_modules()
        if isinstance(one, FrozenLinear)
    }
    assert len(linears) * 2 == len(kept)
    return all(
        torch.equal(one.weight, kept[f"{name}.weight"])
        and torch.equal(one.scales, kept[f"{name}.scales"])
        for name, one in linears.items()
    )


def test_the_base_is_kept_and_everything_later_goes_on_with_it(
    calibrated: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = json.loads((calibrated / "adapter/chatfine.json").read_text(encoding="utf-8"))
    assert (facts["quantize"], facts["calibrated"]) == ("nf4", True)
    decided = json.loads((calibrated / "decisions.json").read_text(encoding="utf-8"))["decided"]
    assert decided["calibrate"] is True
    opened = open_source(str(calibrated))
    storage = opened.storage("auto")
    assert storage == "nf4"
    model = opened.load(torch.float32, torch.device("cpu"), storage)
    assert same_base(model, calibrated)
    plain = opened.load(torch.float32, torch.device("cpu"), "none")
    assert not list(frozen_linears(plain))
    # merged, it computes what was trained: the kept weights and the adapter
    prompts = [[3, 4, 5, 6, 7, 8], [9, 10, 11]]
    result = merge(tiny, calibrated / "adapter", tmp_path / "merged", None, prompts)
    assert result.quantized is not None
    assert result.quantized.added_to == "dequantized"
    assert result.gap < 1e-3
    # without the file the exact weights are the best there is, and it is said
    (calibrated / FILE).unlink()
    capsys.readouterr()
    assert open_source(str(calibrated)).storage("auto") == "none"
    assert FILE in capsys.readouterr().out
    assert merge(tiny, calibrated / "adapter", tmp_path / "again", None, prompts).quantized is None


def test_another_base_takes_no_weights_of_the_trained_one(
    calibrated: Path, tiny: Path, tmp_path: Path
) -> None:
    """Shapes fit, weights do not."""
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    weights = {k: v * 1.5 for k, v in load_file(tiny / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    opened = open_source(str(calibrated), str(other))
    assert opened.rounded("nf4") is None
    assert opened.storage("auto") == "none"
    prompts = [[3, 4, 5, 6]]
    found = merge(other, calibrated / "adapter", tmp_path / "merged", None, prompts)
    assert found.quantized is None


def test_other_texts_are_rounded_to_anew(configure: Configure, calibrated: Path) -> None:
    prepared = prepare(configure(output=str(calibrated.with_name("new")), dataset="dialogs"))
    prepared = replace(prepared, run=calibrated)
    decided = Decisions("cpu", "float32", 1, 1, False, 0, quantize="nf4", calibrate=True)
    before = made_of(calibrated / FILE)
    load_base(prepared, decided, torch.device("cpu"))
    assert made_of(calibrated / FILE) != before


def test_going_on_reads_the_base_again_and_learns_the_same(
    configure: Configure, calibrated: Path, metrics: Callable[[Path], Any], tmp_path: Path
) -> None:
    first = tmp_path / "first"
    shutil.copytree(calibrated, first)
    changed = (calibrated / FILE).stat().st_mtime_ns
    newest = max((calibrated / "checkpoints").iterdir())
    shutil.rmtree(newest)
    shutil.rmtree(calibrated / "adapter")
    (calibrated / "result.json").unlink(missing_ok=True)
    resume(ResumeConfig(run=str(calibrated)))
    assert (calibrated / FILE).stat().st_mtime_ns == changed
    assert metrics(calibrated)[-1] == metrics(first)[-1]


def test_texts_are_the_same_whatever_the_seed(configure: Configure) -> None:
    one, other = (
        calibration_texts(prepare(configure(seed=seed, validation="0")), 300) for seed in (1, 2)
    )
    assert one.index == other.index
    assert one.ids.tolist() == other.ids.tolist()
    assert (
        len(one.ids) <= 300 < len(calibration_texts(prepare(configure(validation="0")), 10**6).ids)
    )
    assert len(calibration_texts(prepare(configure()), 1).bounds) == 2, "one example in any case"


def test_fewer_tokens_where_memory_is_short_and_a_word_where_that_is_too_much(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []

    def load(*args: Any, texts: Any = None, **kwargs: Any) -> Any:
        taken.extend([len(texts.ids)] if texts is not None else [])
        if len(taken) == 1:
            raise torch.OutOfMemoryError("as on a card")
        return load_model(*args, texts=texts, **kwargs)

    monkeypatch.setattr(calibration, "load_model", load)
    monkeypatch.setattr(calibration, "CPU_TOKENS", 400)
    train(configure(quantize="int8", max_steps=1))  # has nothing to do with it
    assert not taken
    settings = {"quantize": "nf4", "calibrate": "on", "max_steps": 1, "overwrite": True}
    train(configure(**settings))
    assert 400 >= taken[0] > 100 >= taken[1] > 0
    assert (Path(configure().output) / FILE).is_file()

    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("as on a smaller card")

    monkeypatch.setattr(calibration, "load_model", full)
    with pytest.raises(ResourceError) as caught:
        train(configure(**settings))
    assert caught.value.code == "calibration-memory"


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"quantize": "int8", "calibrate": "on"}, "--calibrate on"), ({"quantize": "nf4"}, "")],
)
def test_where_nothing_is_calibrated(
    configure: Configure, settings: dict[str, str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """int8 has nothing to gain; auto leaves it to long runs on a card."""
    train(configure(max_steps=1, **settings))
    run = Path(configure().output)
    assert not (run / FILE).exists()
    assert "calibrated" not in (run / "adapter/chatfine.json").read_text(encoding="utf-8")
    assert ("--calibrate" in capsys.readouterr().out) == bool(words)


@pytest.mark.parametrize(
    ("hidden", "intermediate", "tokens"), [(576, 1536, 131_072), (4096, 11008, 34_568)]
)
def test_a_large_model_reads_fewer_tokens(hidden: int, intermediate: int, tokens: int) -> None:
    shapes = Shapes(1, hidden, intermediate, hidden, hidden, 1, 1, 1, {})
    assert calibration.tokens_of(shapes) == tokens
    kept = 2 * 2 * tokens * (3 * hidden + intermediate)  # two passes in bf16
    assert kept <= calibration.INPUT_BYTES


def test_auto_is_for_long_runs_on_a_gpu(configure: Configure) -> None:
    prepared = prepare(configure(quantize="nf4"))
    decided = Decisions("cuda", "bfloat16", 1, 1, False, 0, quantize="nf4")

    def auto(tokens: int, **other: Any) -> bool:
        return calibration.calibrates(prepared, replace(decided, **other), tokens)

    assert auto(8_000_000)
    assert not auto(7_999_999)
    assert not auto(8_000_000, device="cpu")
    assert not auto(8_000_000, processes=2)
    assert not auto(8_000_000, quantize="int8")


@pytest.mark.parametrize(
    ("quantize", "in_fp8", "exact"), [("fp8", "fp8", "fp8-exact"), ("nf4", "nf4-fp8", "nf4")]
)
def test_a_run_goes_on_on_a_card_that_does_not_multiply_8_bit_floats(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    quantize: str, in_fp8: str, exact: str,
) -> None:  # fmt: skip
    prepared = prepare(configure(quantize=quantize))
    decided = Decisions(
        "cuda", "float32", 1, 1, False, 0, quantize=quantize, second_copy=quantize == "fp8",
        fp8_products=quantize == "nf4",
    )  # fmt: skip

    def load(path: Path, dtype: torch.dtype, device: torch.device, *args: Any) -> Any:
        return load_model(path, dtype, "cpu", *args)  # there is no such card here

    monkeypatch.setattr(calibration, "load_model", load)
    for works, storage in ((True, in_fp8), (False, exact)):
        monkeypatch.setattr(calibration, "fp8_works", lambda device, works=works: works)
        model = load_base(prepared, decided, torch.device("cuda"))
        linear = next(frozen_linears(model)).train()
        assert linear.multiplied == storage
        assert (linear.turned is not None) == (works and quantize == "fp8")
        said = "8-bit floats" in capsys.readouterr().out
        assert said == (quantize == "fp8" and not works)
    x = torch.randn(3, linear.in_features)
    torch.testing.assert_close(linear(x), x @ linear.dequantize().t())
