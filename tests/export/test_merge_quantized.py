"""Merging an adapter of a quantised base: what it is added to is measured, and proved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_parts import PROMPTS, Make, load, logits
from safetensors.torch import load_file

from chatfine.errors import ProofError
from chatfine.export import merge as merge_module
from chatfine.export import merge_logits, merge_weights
from chatfine.export.merge import MergeResult, merge
from chatfine.model.adapters import load_adapter
from chatfine.model.frozen import frozen_linears
from chatfine.model.load import load_model


@pytest.fixture
def quantised(make_adapter: Make) -> Any:
    """An adapter folder that says its base was stored as `storage`."""

    def make(base: Path, storage: str, **settings: Any) -> Path:
        adapter = make_adapter(base, **settings)
        (adapter / "chatfine.json").write_text(json.dumps({"base": "b", "quantize": storage}))
        return adapter

    return make


def trained(base: Path, adapter: Path, storage: str) -> torch.Tensor:
    """Logits of the model as it was trained."""
    model = load_adapter(load_model(base, torch.float32, quantize=storage), adapter)
    assert any(True for _ in frozen_linears(model))
    return logits(model)


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("storage", ["int8", "nf4"])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"target_modules": ["q_proj"]}])
def test_the_merged_model_computes_what_was_trained(
    storage: str, settings: dict[str, Any], tiny: Path, quantised: Any, tmp_path: Path
) -> None:
    adapter = quantised(tiny, storage, **settings)
    result = merge(tiny, adapter, tmp_path / "out", None, PROMPTS)
    wanted = trained(tiny, adapter, storage)
    assert gap(logits(load(tmp_path / "out")), wanted) < 1e-3
    choice = result.quantized
    assert choice is not None
    assert (choice.storage, choice.added_to) == (storage, "dequantized")
    assert choice.gap_dequantized < 1e-3 < choice.gap_full
    assert result.gap < 1e-3
    # both gaps are what they say
    (adapter / "chatfine.json").unlink()
    merge(tiny, adapter, tmp_path / "exact", None, PROMPTS)
    full = gap(logits(load(tmp_path / "exact")), wanted)
    assert choice.gap_full == pytest.approx(full, rel=1e-3)
    proof = json.loads((tmp_path / "out" / "chatfine.json").read_text())["proof"]
    assert proof["quantized"]["added_to"] == "dequantized"


def test_all_packed_weights_are_written_rounded_and_no_others(
    tiny: Path, quantised: Any, tmp_path: Path
) -> None:
    adapter = quantised(tiny, "nf4", target_modules=["q_proj"])
    merge(tiny, adapter, tmp_path / "out", None, PROMPTS)
    before, after = (load_file(path / "model.safetensors") for path in (tiny, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}
    model = load_model(tiny, torch.float32, quantize="nf4")
    up = "model.layers.1.mlp.up_proj"
    assert torch.equal(after[f"{up}.weight"], model.get_submodule(up).dequantize())


def test_what_comes_closer_is_chosen(
    tiny: Path, quantised: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that was trained on the exact weights after all: the measurement says so."""
    adapter = quantised(tiny, "nf4")
    original = merge_logits.tuned_logits
    monkeypatch.setattr(
        merge_logits, "tuned_logits", lambda job, prompts, storage: original(job, prompts, "none")
    )
    result = merge(tiny, adapter, tmp_path / "out", None, PROMPTS)
    assert result.quantized is not None
    assert result.quantized.added_to == "full"
    assert result.quantized.gap_full < 1e-3 < result.quantized.gap_dequantized
    exact = load_file(tiny / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"], exact
    )


def test_shards_in_bf16(sharded: Path, quantised: Any, tmp_path: Path) -> None:
    adapter = quantised(sharded, "int8")
    result = merge(sharded, adapter, tmp_path / "out", None, PROMPTS)
    assert result.dtype == "bfloat16"
    assert result.gap < 1e-3 < result.rounding_gap
    assert result.quantized is not None
    assert gap(logits(load(tmp_path / "out")), trained(sharded, adapter, "int8")) < 0.5


def test_a_tied_head_stays_exact(tied: Path, quantised: Any, tmp_path: Path) -> None:
    adapter = quantised(tied, "nf4")
    result: MergeResult = merge(tied, adapter, tmp_path / "out", None, PROMPTS)
    assert not result.untied
    assert gap(logits(load(tmp_path / "out")), trained(tied, adapter, "nf4")) < 1e-3


def test_the_proof_holds_the_rounded_sum_too(
    tiny: Path, quantised: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded weights that differ from those of the training by 2 % show in the proof."""
    adapter = quantised(tiny, "nf4")
    choose = merge_module.choose

    def spoil(job: Any, prompts: Any) -> Any:
        choice = choose(job, prompts)
        original = merge_weights.Rounded.of
        monkeypatch.setattr(
            merge_weights.Rounded, "of", lambda self, *one: 1.02 * original(self, *one)
        )
        return choice

    monkeypatch.setattr(merge_module, "choose", spoil)
    with pytest.raises(ProofError) as caught:
        merge(tiny, adapter, tmp_path / "out", None, PROMPTS)
    assert caught.value.code == "proof-gap"
    assert not (tmp_path / "out").exists()
