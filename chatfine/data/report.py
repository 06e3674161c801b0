"""What was read, cut and dropped, and why: the page a person sees before training."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from chatfine import console
from chatfine.data.problems import Tally
from chatfine.i18n import t


@dataclass(slots=True)
class PartReport:
    """One split of one data set. `read` counts usable dialogues, `skipped` all other rows."""

    dataset: str
    split: str
    read: int = 0
    train: int = 0
    validation: int = 0
    duplicates: int = 0
    cut: Tally = field(default_factory=Tally)
    divided: Tally = field(default_factory=Tally)
    dropped: dict[str, Tally] = field(default_factory=dict)
    skipped: dict[str, Tally] = field(default_factory=dict)
    lengths: array[int] = field(default_factory=lambda: array("q"))  # before cutting, in tokens

    @property
    def rows(self) -> int:
        """All rows, usable or not."""
        return max(self.read, len(self.lengths)) + sum(one.count for one in self.skipped.values())

    @property
    def dropped_rows(self) -> int:
        """Rows from which nothing is learned."""
        tallies = [*self.dropped.values(), *self.skipped.values()]
        return sum(one.count for one in tallies)

    def drop(self, cause: str, where: str) -> None:
        """Note one dropped example."""
        self.dropped.setdefault(cause, Tally()).add(where)

    def causes(self) -> list[str]:
        """One line for each cause, with the first place it was seen."""
        names = {
            "too-long": t("longer than --max-length"),
            "prompt-too-long": t("the prompt alone fills --max-length"),
            "nothing-to-learn": t("no trained token"),
        }
        lines = []
        for cause, tally in [*self.dropped.items(), *self.skipped.items()]:
            name = names.get(cause) or t("bad row ({code})", code=cause)
            lines.append(
                t(
                    "{count} × {cause}, first {where}",
                    count=tally.count,
                    cause=name,
                    where=tally.first,
                )
            )
        return lines

    def notes(self) -> list[str]:
        """What was changed or is worth knowing, one line each."""
        lines = []
        if self.cut.count:
            lines.append(
                t("{count} cut to --max-length, first {where}", count=self.cut.count,
                  where=self.cut.first)
            )  # fmt: skip
        if self.divided.count:
            lines.append(
                t("{count} long texts divided, first {where}", count=self.divided.count,
                  where=self.divided.first)
            )  # fmt: skip
        if self.duplicates:
            lines.append(t("{count} rows appear more than once", count=self.duplicates))
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Plain data, without the single lengths."""
        values = {
            name: getattr(self, name)
            for name in ("dataset", "split", "read", "train", "validation", "duplicates")
        }
        values |= {"cut": asdict(self.cut), "divided": asdict(self.divided)}
        for name in ("dropped", "skipped"):
            values[name] = {code: asdict(one) for code, one in getattr(self, name).items()}
        return values | {"longest": max(self.lengths, default=0)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PartReport:
        """The inverse of `as_dict`, but for the single lengths."""
        known = dict(values)
        longest = known.pop("longest")
        for name in ("cut", "divided"):
            known[name] = Tally(**known[name])
        for name in ("dropped", "skipped"):
            known[name] = {code: Tally(**one) for code, one in known[name].items()}
        return cls(**known, lengths=array("q", [longest]))


@dataclass(slots=True)
class DataReport:
    """All data sets of one run. `fingerprint` is a hash of the ids and masks of all examples."""

    parts: list[PartReport]
    fingerprint: str
    tokens: dict[str, float]
    max_length: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, for --json and the cache."""
        return {
            "rows": sum(part.rows for part in self.parts),
            "train": sum(part.train for part in self.parts),
            "validation": sum(part.validation for part in self.parts),
            "cut": sum(part.cut.count for part in self.parts),
            "dropped": sum(part.dropped_rows for part in self.parts),
            "max_length": self.max_length,
            "tokens": self.tokens,
            "fingerprint": self.fingerprint,
            "parts": [part.as_dict() for part in self.parts],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataReport:
        """The inverse of `as_dict`."""
        parts = [PartReport.from_dict(part) for part in values["parts"]]
        return cls(parts, values["fingerprint"], dict(values["tokens"]), values["max_length"])

    def show(self) -> None:
        """Print the report."""
        rows = []
        for part in self.parts:
            counts = (part.rows, part.train, part.validation, part.cut.count, part.dropped_rows)
            rows.append([Path(part.dataset).name, part.split, *map(str, counts)])
        columns = [t("data set"), t("split"), t("rows"), t("train"), t("validation"), t("cut"),
                   t("dropped")]  # fmt: skip
        console.table(columns, rows)
        for part in self.parts:
            for line in part.causes():
                console.warn(t("  dropped: {line}", line=line))
            for line in part.notes():
                console.say(t("  note: {line}", line=line))
        longest = max(max(part.lengths, default=0) for part in self.parts)
        if any("too-long" in part.dropped for part in self.parts):
            console.say(t("  --max-length {longest} would keep them all", longest=longest))
        numbers = self.tokens
        console.say(
            t("Tokens of a training example: shortest {min:.0f}, median {median:.0f}, 95 % below "
              "{p95:.0f}, longest {max:.0f}", **_pick(numbers, "min", "median", "p95", "max"))
        )  # fmt: skip
        console.say(
            t("Tokens in all: {total:,.0f}, of which {share:.1%} are trained on",
              total=numbers["total"], share=numbers["trained_share"])
        )  # fmt: skip


def _pick(numbers: Mapping[str, float], *names: str) -> dict[str, object]:
    return {name: numbers[name] for name in names}


def token_statistics(
    lengths: Sequence[npt.NDArray[np.int64]], supervised: Sequence[npt.NDArray[np.int64]]
) -> dict[str, float]:
    """Shortest, median, 95th percentile, longest and total tokens; the share with a label."""
    found = np.concatenate([np.zeros(0, np.int64), *lengths])
    if not len(found):
        found = np.zeros(1, np.int64)
    total = int(found.sum())
    labels = int(sum(int(one.sum()) for one in supervised))
    return {
        "min": int(found.min()),
        "median": float(np.median(found)),
        "p95": float(np.percentile(found, 95)),
        "max": int(found.max()),
        "total": total,
        "supervised": labels,
        "trained_share": labels / total if total else 0.0,
    }
