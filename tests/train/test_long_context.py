"""A length beyond the model's own: trained, resumed, merged, and read by plain transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chatfine.commands import chat as chat_command
from chatfine.commands.convert import convert
from chatfine.commands.eval import evaluate
from chatfine.commands.merge import merge
from chatfine.commands.opened import open_source
from chatfine.config import (
    ChatConfig,
    ConvertConfig,
    EvalConfig,
    MergeConfig,
    ResumeConfig,
    TrainConfig,
    dump_yaml,
    load_yaml,
)
from chatfine.errors import ModelError, Stopped, UsageError
from chatfine.hub.folder import read_model_folder
from chatfine.model.positions import KINDS
from chatfine.train import plan as planning
from chatfine.train.decisions import Decisions
from chatfine.train.loop import Trainer
from chatfine.train.prepare import prepare
from chatfine.train.run import resume, train

Configure = Callable[..., TrainConfig]
Metrics = Callable[[Path], list[dict[str, Any]]]
IDS = torch.arange(3, 903)[None] % 397 + 3


@pytest.fixture
def long_data(tmp_path: Path) -> Path:
    """Eight rows of about 800 to 1,100 tokens; the tiny model was made for 512."""
    rows = [{"question": f"Say {i}.", "answer": f"I am model {i}. " * (70 + 4 * i)}
            for i in range(8)]  # fmt: skip
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def long_run(configure: Configure, long_data: Path) -> Configure:
    """Settings of a run with rows of up to 2,048 tokens."""

    def make(**changes: Any) -> TrainConfig:
        values = {"dataset": str(long_data), "max_length": 2048, "rope_scaling": "yarn",
                  "batch_size": 1, "max_steps": 2, "validation": str(long_data)}  # fmt: skip
        return configure(**(values | changes))

    return make


@torch.no_grad()
def logits(folder: Path, adapter: Path | None = None, config: Any = None) -> torch.Tensor:
    """What transformers and PEFT compute without us."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    given = {} if config is None else {"config": config}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **given)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    result: torch.Tensor = model.eval()(IDS).logits
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_trained_and_merged_it_is_one_model_for_everybody(
    long_run: Configure, tiny: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoConfig

    result = train(long_run(rope_scaling=kind))
    run = Path(result["run"])
    said = capsys.readouterr()
    assert f"{kind} × 4, 512 → 2,048 tokens" in said.out + said.err
    assert f"{kind} × 4" in (run / "report.md").read_text(encoding="utf-8")
    merge(MergeConfig(run=str(run), output=str(tmp_path / "merged")))
    said = capsys.readouterr()
    assert "positions as in training" in said.out + said.err
    merged = read_model_folder(tmp_path / "merged")
    assert merged.max_positions == 2048
    tokenizer = json.loads((tmp_path / "merged/tokenizer_config.json").read_text(encoding="utf-8"))
    assert tokenizer["model_max_length"] == 2048
    config = AutoConfig.from_pretrained(tmp_path / "merged")
    wanted = logits(tiny, run / "adapter", config)
    assert (logits(tmp_path / "merged") - wanted).abs().max() < 1e-3
    assert (logits(tiny, run / "adapter") - wanted).abs().max() > 1e-2, "positions matter"
    again = open_source(str(tmp_path / "merged")).load(torch.float32, torch.device("cpu"))
    with torch.no_grad():
        assert (again(IDS).logits - wanted).abs().max() < 1e-3


def test_chat_and_eval_read_an_adapter_as_it_was_trained(
    long_run: Configure, long_data: Path, tiny: Path, tmp_path: Path
) -> None:
    result = train(long_run(validation="0.25"))
    opened = open_source(result["run"])
    assert opened.folder.max_positions == 2048
    measured = evaluate(
        EvalConfig(model=result["run"], dataset=(str(long_data),), max_length=2048, dtype="fp32",
                   device="cpu", split="validation")
    )  # fmt: skip
    assert measured["loss"] == pytest.approx(result["val_loss"], abs=1e-4)
    with torch.no_grad():
        ours = opened.load(torch.float32, torch.device("cpu"))(IDS).logits
    merge(MergeConfig(run=result["run"], output=str(tmp_path / "merged")))
    assert (ours - logits(tmp_path / "merged")).abs().max() < 1e-3
    # the base beside its adapter is not the same model with the adapter switched off
    both = [open_source(result["run"]), open_source(str(tiny))]
    config = ChatConfig(model=result["run"], compare=str(tiny), dtype="fp32", device="cpu")
    tuned, base = chat_command._load(both, config, ())
    assert tuned.model.config.max_position_embeddings == 2048
    assert base.model.config.max_position_embeddings == 512


def test_a_killed_run_goes_on_and_another_scaling_is_refused(
    long_run: Configure, metrics: Metrics, tmp_path: Path
) -> None:
    base = {"max_steps": 4, "eval_every": 2, "save_every": 1, "checkpointing": "full"}
    train(long_run(output=str(tmp_path / "whole"), **base))
    original = Trainer._update

    def update(self: Trainer, loss: Any, rate: float) -> float:
        norm = original(self, loss, rate)
        if self.progress.step == 2:
            raise Stopped("stopped", "in the middle of a step")
        return norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_update", update)
        with pytest.raises(Stopped):
            train(long_run(output=str(tmp_path / "killed"), **base))
    killed = tmp_path / "killed"
    kept = load_yaml(killed / "config.yaml")
    assert kept["rope_scaling"] == "yarn"
    for changes in ({"rope_scaling": "linear"}, {"max_length": 1536}):
        dump_yaml(TrainConfig.read(kept | changes), killed / "config.yaml")
        with pytest.raises(UsageError) as caught:
            resume(ResumeConfig(run=str(killed)))
        assert caught.value.code == "config-changed"
    dump_yaml(TrainConfig.read(kept), killed / "config.yaml")
    resume(ResumeConfig(run=str(killed)))
    assert metrics(killed) == metrics(tmp_path / "whole")
    for name in ("adapter_model.safetensors", "chatfine.json"):
        ours, theirs = (one / "adapter" / name for one in (killed, tmp_path / "whole"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_whole_model_carries_its_positions(long_run: Configure, tmp_path: Path) -> None:
    result = train(long_run(method="full", learning_rate=1e-3))
    folder = read_model_folder(Path(result["run"]) / "model")
    assert folder.max_positions == 2048
    for form in ("rope_parameters", "rope_scaling"):
        assert folder.config[form]["rope_type"] == "yarn"
        assert folder.config[form]["factor"] == 4.0
    convert(ConvertConfig(source=result["run"], output=str(tmp_path / "converted")))
    assert (logits(tmp_path / "converted") - logits(folder.path)).abs().max() < 1e-4
    assert read_model_folder(tmp_path / "converted").max_positions == 2048
    # it can be taken further, in the same way only
    again = {"model": str(folder.path), "max_length": 3000, "output": str(tmp_path / "next")}
    positions = prepare(long_run(**again)).positions
    assert positions is not None
    assert (positions.factor, positions.length) == (6.0, 3072)
    with pytest.raises(ModelError, match="scaled already") as caught:
        prepare(long_run(rope_scaling="linear", **again))
    assert "--rope-scaling yarn" in str(caught.value.fix)


def test_an_adapter_goes_on_with_its_positions(long_run: Configure, tmp_path: Path) -> None:
    first = train(long_run())
    on = {"adapter": first["run"], "output": str(tmp_path / "second")}
    second = train(long_run(rope_scaling="auto", max_length=1500, max_steps=1, **on))
    facts = [json.loads((Path(one["run"]) / "adapter/chatfine.json").read_text(encoding="utf-8"))
             for one in (first, second)]  # fmt: skip
    assert facts[0]["positions"] == facts[1]["positions"]
    assert facts[0]["positions"]["kind"] == "yarn"
    with pytest.raises(UsageError) as caught:
        prepare(long_run(rope_scaling="linear", **on))
    assert caught.value.code == "adapter-other-positions"
    with pytest.raises(UsageError) as caught:
        prepare(long_run(rope_scaling="auto", max_length=4096, **on))
    assert caught.value.code == "length-beyond-model"
    assert prepare(long_run(max_length=4096, **on)).model.max_positions == 4096


@pytest.mark.parametrize("kind", ["auto", "none"])
def test_without_the_flag_a_longer_length_is_refused(long_run: Configure, kind: str) -> None:
    with pytest.raises(UsageError) as caught:
        prepare(long_run(rope_scaling=kind))
    assert caught.value.code == "length-beyond-model"
    assert "--max-length is 2048; the model was made for 512 tokens" in caught.value.what
    assert "--rope-scaling yarn" in str(caught.value.fix)
    assert "--max-length 512" in str(caught.value.fix)


def test_a_model_without_rotary_positions_is_refused(
    long_run: Configure, tiny: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "other"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["rope_parameters"]
    text = json.dumps(config | {"model_type": "gpt2"})
    (folder / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError) as caught:
        prepare(long_run(model=str(folder)))
    assert caught.value.code == "positions-unknown"


def test_a_length_that_fits_is_not_scaled(
    configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = prepare(configure(max_length=512))
    asked = prepare(configure(max_length=512, rope_scaling="yarn"))
    assert asked.positions is None
    assert asked.model == plain.model
    decided = Decisions("cpu", "float32", 1, 1, packing=False, recompute_layers=0)
    assert "positions" not in asked.facts(decided)


def test_a_learned_prefix_takes_positions_too(long_run: Configure) -> None:
    settings = {"method": "prefix", "virtual_tokens": 10, "batch_size": 1}
    positions = prepare(long_run(max_length=2040, **settings)).positions
    assert positions is not None
    assert positions.length == 2176  # 4.25 × 512, for 2,050
    with pytest.raises(UsageError, match="--max-length is 505"):
        prepare(long_run(max_length=505, rope_scaling="auto", **settings))


def test_a_long_row_in_pieces_trains_the_same(
    long_run: Configure, metrics: Metrics, tmp_path: Path
) -> None:
    settings = {"checkpointing": "full", "packing": "on", "max_steps": 3}
    train(long_run(output=str(tmp_path / "whole"), **settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "LONG_ROW_TOKENS", 1000)
        patch.setattr(planning, "PIECE_TOKENS", 300)
        train(long_run(output=str(tmp_path / "pieces"), **settings))
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "pieces"), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
