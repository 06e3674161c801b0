"""The model card says what is known and nothing else."""

from __future__ import annotations

from pathlib import Path

from chatfine.export.card import write_card


def test_the_card_claims_only_what_is_known(tmp_path: Path) -> None:
    proof = {"gap": 1e-5, "rounding_gap": 0.5, "top1_agreement": 0.925, "dtype": "bfloat16"}
    text = write_card(
        tmp_path, base="Org/Name", licence="Apache-2.0", method="dora", datasets=["a", "b"],
        losses={"train_loss": None}, proof=proof,
    ).read_text(encoding="utf-8")  # fmt: skip
    assert "license: apache-2.0\nbase_model: Org/Name\n" in text
    assert "| data | a, b |" in text
    assert "| best validation loss | not known |" in text
    assert "92.5%" in text
    text = write_card(
        tmp_path, base="", licence="", method="lora", datasets=[], losses={}, proof=proof
    ).read_text(encoding="utf-8")
    assert "license:" not in text
    assert "base_model:" not in text
