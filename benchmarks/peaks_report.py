"""What peaks.py writes: all results as JSON, and a table that shows which part of a plan is off."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from gpu_report import markdown, number

from chatfine.train.plan import Plan, Shapes, Work, make_plan

MOST_ABOVE, MOST_BELOW = 0.10, 0.05
"""The goal: the plan is no more than so much above the measured peak, and so much below it."""


@dataclass(frozen=True)
class Result:
    """What came of one configuration.

    Attributes:
        error: why nothing was measured.
        planned_bytes: the plan's peak; None if there is no plan, since the words were refused.
        parts: what it is made of, in bytes.
        measured_bytes: the most PyTorch had allocated on the card; on a processor the process's
            resident memory. None if the run did not come to its end.
        warnings: what the run said it did otherwise than asked for.
        decided: the settings the run had, as its `decisions.json` says.
        work, shapes: what the plan was made from, so that it can be made again.
    """

    name: str
    error: str
    card: str
    planned_bytes: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    measured_bytes: int | None = None
    warnings: list[str] = field(default_factory=list)
    decided: dict[str, Any] = field(default_factory=dict)
    work: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    seconds: float = 0.0

    @property
    def difference(self) -> float | None:
        """How far the plan is above what was measured, as a share of that."""
        if not self.planned_bytes or not self.measured_bytes:
            return None
        return self.planned_bytes / self.measured_bytes - 1

    @property
    def good(self) -> bool:
        """Whether the plan is as near as it should be."""
        return self.difference is not None and -MOST_BELOW <= self.difference <= MOST_ABOVE


def parts_of(plan: Plan) -> dict[str, float]:
    """What a plan's peak is made of."""
    names = [one.name for one in fields(plan) if one.name.endswith("_bytes")]
    return {name.removesuffix("_bytes"): getattr(plan, name) for name in names
            if name not in ("disk_bytes", "host_bytes")}  # fmt: skip


def planned_again(result: Result) -> Result:
    """The same measurement beside what the plan says today."""
    if not result.work:
        return result
    linears = {name: tuple(one) for name, one in result.shapes["linears"].items()}
    shapes = Shapes(**result.shapes | {"linears": linears})
    known = {one.name for one in fields(Work)}
    # a setting that the plan did not look at then
    values = {name: value for name, value in result.decided.items() if name in known}
    values |= {name: value for name, value in result.work.items() if name in known}
    work = Work(**values | {"targets": tuple(values["targets"])})
    plan = make_plan(shapes, work)
    return replace(result, planned_bytes=plan.memory_bytes, parts=parts_of(plan))


def read(file: Path) -> list[Result]:
    """The results in a peaks.json."""
    return [Result(**one) for one in json.loads(file.read_text(encoding="utf-8"))["results"]]


def merged(results: Sequence[Result], new: Result, order: Sequence[str]) -> list[Result]:
    """All results in the order of the names, a new one in the place of its older self; those of
    configurations that are no longer there come last."""
    places = {name: place for place, name in enumerate(order)}
    kept = [one for one in results if one.name != new.name]
    return sorted([*kept, new], key=lambda one: places.get(one.name, len(places)))


def summary(results: Sequence[Result]) -> str:
    """How good the plan is, in one line."""
    known = {one.name: one.difference for one in results if one.difference is not None}
    failed = len(results) - len(known)
    text = f"; {failed} failed" if failed else ""
    if not known:
        return f"Nothing measured{text}."
    within = sum(abs(value) <= MOST_ABOVE for value in known.values())
    good = sum(one.good for one in results)
    low, high = (pick(known, key=lambda name: known[name] or 0.0) for pick in (min, max))
    return (f"{within} of {len(known)} plans within {MOST_ABOVE:.0%} of the measured peak, {good} "
            f"of them no more than {MOST_BELOW:.0%} below it{text}. Lowest: {known[low]:+.1%} "
            f"({low}); highest: {known[high]:+.1%} ({high}).")  # fmt: skip


def line(result: Result) -> str:
    """One result while the benchmark runs."""
    if result.difference is None:
        return f"{result.name}: failed, {result.error}"
    return (f"{result.name}: planned {gib(result.planned_bytes)} GiB, measured "
            f"{gib(result.measured_bytes)} GiB, {result.difference:+.1%}, "
            f"{result.seconds:,.0f} s")  # fmt: skip


def gib(value: float | None) -> str:
    """Bytes for a table, in GiB."""
    return number(None if value is None else value / 2**30, ".2f")


def cells(result: Result, parts: Sequence[str]) -> list[str]:
    """One row of the table."""
    measured = gib(result.measured_bytes)
    if result.error:
        measured = f"failed: {result.error}".replace("|", "/")
    difference = number(result.difference, "+.1%")
    if result.difference is not None and not result.good:
        difference = f"**{difference}**"
    return [result.name, gib(result.planned_bytes), measured, difference,
            *(gib(result.parts.get(part)) for part in parts)]  # fmt: skip


def table(results: Sequence[Result], libraries: Mapping[str, str]) -> str:
    """The whole page."""
    cards = " and ".join(dict.fromkeys(one.card for one in results))
    parts = list(dict.fromkeys(part for one in results for part in one.parts))
    head = ["configuration", "planned", "measured", "difference", *parts]
    lines = [f"# Planned and measured memory on {cards or 'nothing yet'}", "", summary(results), ""]
    if any(one.decided.get("device") == "cpu" for one in results):
        lines += ["**Runs without a GPU: measured is the resident memory of the whole process, "
                  "which says little about a plan.**", ""]  # fmt: skip
    lines += ["GiB; the columns after the difference are what the plan is made of. Bold: more than "
              f"{MOST_ABOVE:.0%} above or {MOST_BELOW:.0%} below. "
              + ", ".join(f"{name} {version}" for name, version in libraries.items()) + ".", "",
              *markdown(head, [cells(one, parts) for one in results], (0,)), ""]  # fmt: skip
    said = [f"- {one.name}: {text}" for one in results for text in one.warnings]
    lines += ["Warnings of the runs:", "", *said, ""] if said else []
    return "\n".join(lines)


def write(folder: Path, results: Sequence[Result], libraries: Mapping[str, str]) -> None:
    """Write peaks.json and peaks.md."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"libraries": libraries, "results": [asdict(one) for one in results]}
    (folder / "peaks.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    (folder / "peaks.md").write_text(table(results, libraries), encoding="utf-8")
