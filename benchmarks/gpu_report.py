"""What gpu.py writes: all results as JSON, a table as markdown, a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu_cases import CASES, OURS, SYSTEMS

WEIGHTS = {"nf4": "NF4", "fp32": "float32"}
COLUMNS = ("system", "weights", "rows a step", "recomputed", "tokens/s", "× best peer",
           "peak GiB", "first step s")  # fmt: skip
OUR_COLOUR, PEER_COLOUR = "#08519c", "#bdbdbd"


@dataclass(frozen=True)
class Result:
    """One measurement.

    Attributes:
        system: key of SYSTEMS.
        checkpointing: what is computed twice, as text.
        tokens_per_second: tokens that are not padding; None if no step was measured.
        peak_bytes: the most memory the process had allocated on the card.
        first_step_seconds: from the start of the process to the end of its first step.
        error: why there is no speed, or why the process did not come to its end.
        shape: of a peer's first batch, which tells whether it was padded or laid end to end.
        steps: tokens and seconds of every step, the first ones too.
        warm_up: steps at the front that do not count.
    """

    case: str
    title: str
    system: str
    weights: str
    batch: int
    note: str
    packing: bool
    checkpointing: str
    tokens_per_second: float | None
    peak_bytes: int | None
    first_step_seconds: float | None
    error: str
    shape: list[int] | None
    card: str
    steps: list[tuple[int, float]]
    warm_up: int
    command: str

    @property
    def key(self) -> tuple[object, ...]:
        """What makes two measurements the same one."""
        return (self.case, self.system, self.weights, self.batch, self.note, self.packing,
                self.system != OURS and self.checkpointing)  # fmt: skip

    @property
    def name(self) -> str:
        """The system with what is special about this run."""
        more = [self.layout] if self.layout else []
        more += [self.note] if self.note else []
        return SYSTEMS[self.system] + (f" ({', '.join(more)})" if more else "")

    @property
    def layout(self) -> str:
        """Whether a peer laid its rows end to end, as its first batch shows."""
        end_to_end = self.shape is not None and self.shape[0] == 1 < self.batch
        if self.system == OURS:
            return ""
        if self.packing:
            return "packed" if end_to_end or self.shape is None else "asked to pack, padded"
        return "padding-free" if end_to_end else ""


def read(file: Path) -> list[Result]:
    """The results in a gpu.json."""
    return [Result(**one) for one in json.loads(file.read_text(encoding="utf-8"))["results"]]


def merged(results: Sequence[Result], new: Result) -> list[Result]:
    """All results in the order of the cases' runs, a new one in the place of its older self."""
    kept = [one for one in results if one.key != new.key]
    return sorted([*kept, new], key=place)


def place(result: Result) -> tuple[int, int]:
    """Which case of the list it belongs to, and which of its runs; one that is no longer there
    comes last."""
    number = [case.name for case in CASES].index(result.case)
    own = (result.system, result.weights, result.batch, result.note)
    for at, run in enumerate(runs := CASES[number].runs):
        packed = run.system == OURS or run.packing == result.packing
        if packed and own == (run.system, run.weights, run.batch, run.note):
            return number, at
    return number, len(runs)


def fastest(results: Sequence[Result], ours: bool) -> Result | None:
    """The fastest run of chatfine, or of all others."""
    some = [one for one in results if (one.system == OURS) == ours and one.tokens_per_second]
    return max(some, key=lambda one: one.tokens_per_second or 0, default=None)


def by_case(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results of each case, in order."""
    groups: dict[str, list[Result]] = {}
    for one in results:
        groups.setdefault(one.case, []).append(one)
    return groups


def number(value: float | None, form: str = ",.0f") -> str:
    """A number for a table, or a dash."""
    return "–" if value is None else format(value, form)


def line(result: Result) -> str:
    """One result while the benchmark runs."""
    head = f"{result.case}  {result.name}, {stored(result)}: "
    if result.tokens_per_second is None:
        return head + f"failed, {result.error}"
    gib = None if result.peak_bytes is None else result.peak_bytes / 2**30
    return head + (f"{number(result.tokens_per_second)} tok/s, {number(gib, '.1f')} GiB, first "
                   f"step after {number(result.first_step_seconds, '.1f')} s")  # fmt: skip


def cells(result: Result, best: Result | None) -> list[str]:
    """One row of a case's table."""
    gib = None if result.peak_bytes is None else result.peak_bytes / 2**30
    share = None
    if best and best.tokens_per_second and result.tokens_per_second:
        share = result.tokens_per_second / best.tokens_per_second
    recomputed = {"True": "all", "False": "–"}.get(
        str(result.checkpointing), str(result.checkpointing)
    )
    row = [result.name, stored(result), str(result.batch), recomputed,
           number(result.tokens_per_second), number(share, ".2f"), number(gib, ".1f"),
           number(result.first_step_seconds, ".1f")]  # fmt: skip
    if result.system == OURS:
        row[0], row[4] = f"**{row[0]}**", f"**{row[4]}**"
    if result.error:
        failed = f"failed: {result.error}".replace("|", "/")
        row[4] = failed if result.tokens_per_second is None else f"{row[4]}, then {failed}"
    return row


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int]) -> list[str]:
    """A markdown table; the columns `words` are to the left, the others to the right."""
    marks = ["---" if place in words else "--:" for place in range(len(head))]
    return ["| " + " | ".join(row) + " |" for row in [head, marks, *rows]]


def stored(result: Result) -> str:
    """How the weights were kept, for people."""
    return WEIGHTS.get(result.weights, result.weights)


def summary(groups: dict[str, list[Result]]) -> list[str]:
    """One line a case: ours against the best peer."""
    rows = []
    for results in groups.values():
        ours, peer = fastest(results, ours=True), fastest(results, ours=False)
        if ours is None or peer is None:
            continue
        assert ours.tokens_per_second
        assert peer.tokens_per_second
        ratio = ours.tokens_per_second / peer.tokens_per_second
        rows.append([results[0].title, number(ours.tokens_per_second), stored(ours),
                     number(peer.tokens_per_second), f"{peer.name}, {stored(peer)}",
                     f"**{ratio:.2f}**"])  # fmt: skip
    head = ("work", "chatfine tokens/s", "weights", "best peer tokens/s", "which", "ratio")
    return [*markdown(head, rows, (0, 2, 4)), ""] if rows else []


def table(results: Sequence[Result], facts: dict[str, Any]) -> str:
    """The whole page."""
    cards = " and ".join(dict.fromkeys(one.card for one in results))
    libraries = ", ".join(f"{name} {number}" for name, number in facts["libraries"].items())
    groups = by_case(results)
    lines = [f"# Speed on {cards or 'nothing yet'}", "",
             f"{libraries}. Dialogues: {facts['dialogues']}. Tokens that are not padding, random "
             "weights, one process and card.", ""]  # fmt: skip
    if " and " in cards:
        lines += ["**Several cards: compare only within one measurement.**", ""]
    lines += summary(groups)
    for case in groups.values():
        best = fastest(case, ours=False)
        lines += [f"## {case[0].title}", "",
                  *markdown(COLUMNS, [cells(one, best) for one in case], (0, 1)), ""]  # fmt: skip
    return "\n".join(lines)


def draw(results: Sequence[Result], file: Path) -> None:
    """A panel of bars for each case that has a speed."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    measured = [one for one in results if one.tokens_per_second]
    groups = by_case(measured)
    if not groups:
        return
    heights = [len(group) + 1.2 for group in groups.values()]
    figure = Figure(figsize=(8, 0.32 * sum(heights) + 0.6), dpi=120, layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)
    for axes, group in zip(panels[:, 0], groups.values(), strict=True):
        names = [f"{one.name}, {stored(one)}" for one in group]
        rates = [one.tokens_per_second or 0.0 for one in group]
        colours = [OUR_COLOUR if one.system == OURS else PEER_COLOUR for one in group]
        places = range(len(group))
        bars = axes.barh(places, rates, color=colours, height=0.7)
        axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3, fontsize=8)
        axes.set_yticks(places, names, fontsize=8)
        axes.invert_yaxis()
        axes.set_title(group[0].title, fontsize=9, loc="left")
        axes.set_xlim(0, 1.15 * max(rates))
        axes.xaxis.set_visible(False)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    cards = ", ".join(dict.fromkeys(one.card for one in measured))
    figure.suptitle(f"tokens a second that are not padding, {cards}", fontsize=10)
    figure.savefig(file, metadata={"Software": None})


def write(folder: Path, results: Sequence[Result], facts: dict[str, Any]) -> None:
    """Write gpu.json, gpu.md and gpu.png."""
    folder.mkdir(parents=True, exist_ok=True)
    values = facts | {"results": [asdict(one) for one in results]}
    (folder / "gpu.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    (folder / "gpu.md").write_text(table(results, facts), encoding="utf-8")
    draw(results, folder / "gpu.png")
