"""What quality.py writes: all numbers as JSON, a table as markdown, a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu_report import markdown, number

BASE = "none"
PLAIN = "-plain"
STORAGES = {BASE: "bf16", "fp8": "fp8", "nf4": "NF4", f"fp8{PLAIN}": "fp8, not calibrated",
            f"nf4{PLAIN}": "NF4, not calibrated"}  # fmt: skip
"""What `--quantize` takes, with `PLAIN` without calibration, and its name for people."""
GOALS = {"fp8": 0.5, "nf4": 1.5}
"""Per cent that the final validation loss may lie above bf16's, in the mean over the seeds."""
COLOURS = {BASE: "#525252", "fp8": "#08519c", "nf4": "#d94801", f"fp8{PLAIN}": "#9ecae1",
           f"nf4{PLAIN}": "#fdbe85"}  # fmt: skip
COLUMNS = ("data", "storage", "products", "seeds", "final validation loss", "to bf16, mean %",
           "worst %", "goal %", "on bf16 weights, mean %", "")  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One run.

    Attributes:
        storage: what was asked for, a key of STORAGES.
        stored: what the run did; "none" in place of "fp8" where the card has no fp8.
        products: the number format in which frozen weights were multiplied.
        points: step, tokens so far and validation loss of each evaluation.
        error: why the run did not come to its end.
        whole_loss: the final loss if the adapter is put on the bf16 weights instead of the rounded
            ones; None where it was not measured, as in files of before it was.
        whole_error: why that could not be measured, which is no failure of the run.
    """

    data: str
    storage: str
    seed: int
    stored: str
    products: str
    compiled: bool
    points: list[list[float]]
    train_seconds: float | None
    tokens_per_second: float | None
    peak_bytes: int | None
    error: str
    card: str
    command: str
    whole_loss: float | None = None
    whole_error: str = ""

    @property
    def key(self) -> tuple[str, str, int]:
        """What makes two runs the same one."""
        return self.data, self.storage, self.seed

    @property
    def losses(self) -> dict[float, float]:
        """Validation loss by step."""
        return {step: loss for step, _, loss in self.points}

    @property
    def final(self) -> float | None:
        """Validation loss after the last step; None if the run did not get there."""
        return self.points[-1][2] if self.points and not self.error else None


def chosen(results: Iterable[Result], data: str, storage: str) -> dict[int, Result]:
    """The runs that came to their end, by seed."""
    return {
        one.seed: one
        for one in results
        if (one.data, one.storage) == (data, storage) and one.final is not None
    }


def differences(
    results: Sequence[Result], data: str, storage: str
) -> dict[int, dict[float, float]]:
    """By seed and step: per cent that a validation loss lies above bf16's of the same seed."""
    base = {seed: one.losses for seed, one in chosen(results, data, BASE).items()}
    return {
        seed: {
            step: 100 * (loss / base[seed][step] - 1)
            for step, loss in one.losses.items()
            if step in base[seed]
        }
        for seed, one in chosen(results, data, storage).items()
        if seed in base
    }


def whole_differences(results: Sequence[Result], data: str, storage: str) -> list[float]:
    """Per cent that losses on bf16 weights lie above the final one of bf16's run of the seed."""
    base = {seed: one.final for seed, one in chosen(results, data, BASE).items()}
    return [
        100 * (one.whole_loss / final - 1)
        for seed, one in chosen(results, data, storage).items()
        if one.whole_loss is not None and (final := base.get(seed))
    ]


def quantized(storage: str) -> str:
    """What `--quantize` takes."""
    return storage.removesuffix(PLAIN)


def summary(results: Sequence[Result]) -> list[dict[str, Any]]:
    """What the seeds of each data set and storage come to."""
    rows = []
    for data in dict.fromkeys(one.data for one in results):
        for storage in STORAGES:
            if not (runs := [one for one in results if one.key[:2] == (data, storage)]):
                continue
            finals = [one.final for one in runs if one.final is not None]
            curves = differences(results, data, storage).values()
            apart = [over[max(over)] for over in curves if over]
            instead = {one.stored for one in runs if one.final is not None} - {quantized(storage)}
            whole = whole_differences(results, data, storage)
            goal, outcome = GOALS.get(quantized(storage)), ""
            if instead:
                outcome, apart = f"not measured: stored as {', '.join(sorted(instead))}", []
                whole = []
            elif goal is not None and apart:
                outcome = "met" if statistics.fmean(apart) <= goal else "missed"
            rows.append({
                "data": data, "storage": storage, "seeds": len(finals),
                "products": ", ".join(sorted({one.products for one in runs if one.products})),
                "loss": statistics.fmean(finals) if finals else None,
                "spread": statistics.stdev(finals) if len(finals) > 1 else None,
                "difference": statistics.fmean(apart) if apart else None,
                "worst": max(apart, default=None), "goal": goal, "outcome": outcome,
                "whole": statistics.fmean(whole) if whole else None, "whole_seeds": len(whole),
            })  # fmt: skip
    return rows


def line(result: Result) -> str:
    """One result while the benchmark runs."""
    head = f"{result.data}  {STORAGES[result.storage]}, seed {result.seed}: "
    if result.final is None:
        return head + f"failed, {result.error}"
    tail = ""
    if result.whole_loss is not None:
        tail = f"; {result.whole_loss:.4f} on bf16 weights"
    elif result.whole_error:
        tail = f"; not measured on bf16 weights, {result.whole_error}"
    return head + (f"validation loss {result.final:.4f} after {result.points[-1][0]:,} steps, "
                   f"{number(result.train_seconds, '.1f')} s{tail}")  # fmt: skip


def cells(row: dict[str, Any], results: Iterable[Result]) -> list[list[str]]:
    """A row of the table, and one more for each of its runs that failed."""
    shown = number(row["loss"], ".4f")
    if row["spread"] is not None:
        shown += f" ± {row['spread']:.4f}"
    own = row["storage"] != BASE
    whole = number(row["whole"], "+.2f")
    if 0 < row["whole_seeds"] < row["seeds"]:  # a mean over other seeds than its neighbour
        whole += f" ({row['whole_seeds']} of {row['seeds']})"
    lines = [[row["data"], STORAGES[row["storage"]], row["products"], str(row["seeds"]), shown,
              number(row["difference"] if own else None, "+.2f"),
              number(row["worst"] if own else None, "+.2f"), number(row["goal"], "g"),
              whole, row["outcome"]]]  # fmt: skip
    for one in results:
        if one.error and one.key[:2] == (row["data"], row["storage"]):
            failed = f"failed: {one.error}".replace("|", "/")
            name = f"{STORAGES[one.storage]}, seed {one.seed}"
            lines.append([one.data, name, *"–––––––", failed])
    return lines


def table(results: Sequence[Result], facts: dict[str, Any]) -> str:
    """The whole page."""
    cards = " and ".join(dict.fromkeys(one.card for one in results))
    made = facts["settings"]
    compiled = {one.compiled for one in results if one.final is not None}
    layers = "partly compiled" if len(compiled) > 1 else "compiled"
    layers = "not compiled" if compiled == {False} else layers
    lines = [f"# Learning on an fp8 or NF4 base, {cards or 'nothing yet'}", "",
             ", ".join(f"{name} {value}" for name, value in facts["libraries"].items()) + ".", "",
             f"{made['model']}, LoRA of rank {made['rank']} on all linears, {made['steps']:,} "
             f"steps of {made['batch_size']} packed rows of {made['max_length']:,} tokens, peak "
             f"learning rate {made['learning_rate']:g}, layers {layers}. The loss is that of "
             "held-out answers in nats a token after the last step, mean ± standard deviation over "
             "the seeds. A difference is that to bf16 with the same seed; its mean over the seeds "
             "is held against the goal. fp8 and NF4 weights are calibrated on the training data "
             "unless it says not. *On bf16 weights* is the same difference if the adapter is "
             "used on weights that are not rounded.", ""]  # fmt: skip
    for name, size in facts["data"].items():
        ends = [one.points[-1][1] for one in results if one.data == name and one.final is not None]
        epochs = f", {max(ends) / size['tokens']:.1f} epochs" if ends else ""
        lines += [f"- {name}: {size['train']:,} examples of {size['tokens']:,} tokens{epochs}; "
                  f"{size['validation']:,} held out"]  # fmt: skip
    if " and " in cards:
        lines += ["", "**Several cards: a difference may be theirs.**"]
    rows = [line for row in summary(results) for line in cells(row, results)]
    return "\n".join([*lines, "", *markdown(COLUMNS, rows, (0, 1, 2, 9)), ""])


def draw(results: Sequence[Result], file: Path) -> None:
    """A column for each data set: the validation losses, below them their distance from bf16's.

    Left out are runs that failed and those stored in another way than asked for.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    results = [
        one for one in results if one.final is not None and one.stored == quantized(one.storage)
    ]
    names = list(dict.fromkeys(one.data for one in results))
    if not names:
        return
    figure = Figure(figsize=(1 + 5.5 * len(names), 6.5), dpi=120, layout="constrained")
    panels = figure.subplots(2, len(names), squeeze=False, sharex="col", height_ratios=(3, 2))
    for (above, below), name in zip(panels.T, names, strict=True):
        for storage in STORAGES:
            runs = chosen(results, name, storage)
            curves(above, [one.losses for one in runs.values()], storage)
            if storage != BASE:
                curves(below, list(differences(results, name, storage).values()), storage)
            if storage in GOALS:
                below.axhline(GOALS[storage], color=COLOURS[storage], linestyle=":", linewidth=1)
                below.annotate(f"goal {GOALS[storage]:g} %", (0.01, GOALS[storage]), fontsize=8,
                               xycoords=("axes fraction", "data"), xytext=(0, 2),
                               textcoords="offset points", color=COLOURS[storage])  # fmt: skip
        below.axhline(0, color=COLOURS[BASE], linewidth=1)
        above.set_title(name, fontsize=10, loc="left")
        below.set_xlabel("optimizer step")
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in (above, below):
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        above.legend(frameon=False)
    panels[0, 0].set_ylabel("validation loss (nats a token)")
    panels[1, 0].set_ylabel("difference to bf16 (%)")
    cards = ", ".join(dict.fromkeys(one.card for one in results))
    figure.suptitle(f"thick: mean over the seeds, thin: each seed; {cards}", fontsize=10)
    figure.savefig(file, metadata={"Software": None})


def curves(axes: Any, found: Sequence[dict[float, float]], storage: str) -> None:
    """Each seed's values by step as a thin line, their mean as a thick one."""
    if not found:
        return
    colour = COLOURS[storage]
    for one in found:
        axes.plot(one.keys(), one.values(), color=colour, linewidth=0.7, alpha=0.5)
    steps = [step for step in found[0] if all(step in one for one in found)]
    mean = [statistics.fmean(one[step] for one in found) for step in steps]
    axes.plot(steps, mean, "o-", color=colour, linewidth=2, markersize=4, label=STORAGES[storage])


def read(file: Path) -> tuple[list[Result], dict[str, Any]]:
    """The results in a quality.json, and the settings they were made with."""
    values = json.loads(file.read_text(encoding="utf-8"))
    return [Result(**one) for one in values["results"]], values["settings"]


def write(folder: Path, results: Sequence[Result], facts: dict[str, Any]) -> None:
    """Write quality.json, quality.md and quality.png."""
    folder.mkdir(parents=True, exist_ok=True)
    values = facts | {"summary": summary(results), "results": [asdict(one) for one in results]}
    (folder / "quality.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    (folder / "quality.md").write_text(table(results, facts), encoding="utf-8")
    draw(results, folder / "quality.png")
