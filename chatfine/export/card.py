"""README.md of a merged model: what it is, what it was taught, under which licence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chatfine.i18n import t


def write_card(
    folder: Path,
    *,
    base: str,
    licence: str,
    method: str,
    datasets: Sequence[str],
    losses: Mapping[str, float | None],
    proof: Mapping[str, Any],
) -> Path:
    """Write the model card in the reader's language and return its path.

    Args:
        folder: the model folder; its name is the title.
        base: name of the base model.
        licence: of the base, "" = not known.
        method: how it was trained, such as lora.
        datasets: names of the data.
        losses: `train_loss` and `val_loss` of the run, None where not known.
        proof: `gap`, `rounding_gap`, `top1_agreement`, `dtype` and `quantized` of the merge.
    """
    unknown = t("not known")
    rows = {
        t("base model"): base or unknown,
        t("licence"): licence or t("that of the base model"),
        t("method"): t("{method}, merged into the weights", method=method),
        t("data"): ", ".join(datasets) or unknown,
        t("training loss at the end"): _number(losses.get("train_loss"), unknown),
        t("best validation loss"): _number(losses.get("val_loss"), unknown),
        t("number format"): str(proof["dtype"]),
        t("proof of the merge"): t(
            "largest difference of logits to base + adapter: {gap:.1e} before rounding; "
            "rounding to {dtype} adds {rounding:.2g} and keeps {share:.1%} of the likeliest tokens",
            gap=proof["gap"], dtype=proof["dtype"], rounding=proof["rounding_gap"],
            share=proof["top1_agreement"],
        ),
    }  # fmt: skip
    choice = proof.get("quantized")
    if choice:
        added = {"full": t("the exact weights"), "dequantized": t("the rounded weights")}
        rows[t("base in training")] = t("{storage}; the adapter was added to {weights}",
                                        storage=choice["storage"],
                                        weights=added[choice["added_to"]])  # fmt: skip
    lines = _front_matter(base, licence)
    lines += [f"# {folder.name}", "", f"| {t('what')} | |", "|---|---|"]
    lines += [f"| {name} | {value.replace('|', '/')} |" for name, value in rows.items()]
    lines += ["", t("Talk with it:"), "", f"    chatfine chat {folder.name}", ""]
    lines += [t("The licence and the limits of the base model hold for this model too."), ""]
    path = folder / "README.md"
    path.write_text("\n".join(lines), encoding="utf-8", newline="\n")
    return path


def _front_matter(base: str, licence: str) -> list[str]:
    """The block that model hubs read; only what is certain is claimed."""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if licence.lower() in ("apache-2.0", "mit"):
        lines.append(f"license: {licence.lower()}")
    if base.count("/") == 1 and not base.startswith((".", "/")):
        lines.append(f"base_model: {base}")
    return [*lines, "tags: [chatfine]", "---", ""]


def _number(value: float | None, unknown: str) -> str:
    return unknown if value is None else f"{value:.4f}"
