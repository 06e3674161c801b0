"""report.md of a run: what was trained on what, how the loss went, what to type next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chatfine import console
from chatfine.i18n import t
from chatfine.train.prepare import Prepared


def write(
    path: Path, prepared: Prepared, result: dict[str, Any], metrics: list[dict[str, Any]]
) -> None:
    """Write the report as Markdown in the reader's language."""
    config, data = prepared.config, prepared.data.report.as_dict()
    evaluations = [row for row in metrics if "val_loss" in row]
    lines = [
        "# " + t("Training report: {name}", name=prepared.run.name),
        "",
        "![loss](loss.png)",
        "",
        f"| {t('what')} | |",
        "|---|---|",
        _row(t("model"), config.model),
        _row(t("data"), ", ".join(config.dataset)),
        _row(t("examples"), t("{train} for training, {validation} for validation",
                              train=data["train"], validation=data["validation"])),
        _row(t("method"), _method(prepared)),
        *([_row(t("positions"), str(prepared.positions))] if prepared.positions else []),
        _row(t("steps"), f"{result['steps']} ({result['ended']})"),
        _row(t("tokens"), f"{result['tokens']:,}"),
        _row(t("tokens a second"), f"{result['tokens_per_second']:,.0f}"),
        _row(t("training loss at the end"), _number(result["train_loss"])),
        _row(t("best validation loss"), f"{_number(result['val_loss'])} ({result['best_step']})"),
        _row(t("peak memory"), console.size(result["peak_memory_bytes"])),
        _row(t("training time"), console.duration(result["seconds"])),
        "",
    ]  # fmt: skip
    if evaluations:
        lines += [f"| {t('step')} | {t('validation loss')} |", "|--:|--:|"]
        lines += [f"| {row['step']} | {row['val_loss']:.4f} |" for row in evaluations]
        lines.append("")
    lines += [t("Talk with it:"), "", f"    chatfine chat {prepared.run}", ""]
    path.write_text("\n".join(lines), encoding="utf-8", newline="\n")


def show(result: dict[str, Any], output: Path) -> None:
    """Say what came out and where it lies."""
    console.say()
    console.say(
        t("{steps} steps in {time}: training loss {loss}, validation loss {val}",
          steps=result["steps"], time=console.duration(result["seconds"]),
          loss=_number(result["train_loss"]), val=_number(result["val_loss"]))
    )  # fmt: skip
    console.say(t("written: {path}", path=output))
    console.say(t("talk with it: {command}", command=f"chatfine chat {result['run']}"), "bold")


def _method(prepared: Prepared) -> str:
    config = prepared.config
    if config.method in ("lora", "dora"):
        shape = f"rank {config.rank}, alpha {config.lora_alpha}, {config.targets}"
        return f"{prepared.method}, {shape}"
    return prepared.method


def _row(name: str, value: str) -> str:
    return f"| {name} | {value} |"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
