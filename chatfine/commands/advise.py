"""The corpus of `chatfine expand-vocab`: read, measured, and what to make of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chatfine import console
from chatfine.config import ExpandConfig
from chatfine.data.problems import Problems
from chatfine.data.rows import Row
from chatfine.data.sources import read_rows
from chatfine.errors import DataError, TokenizerError
from chatfine.hub.folder import ModelFolder, check_config
from chatfine.i18n import t
from chatfine.tokenizer.advice import (
    MEASURED_TEXT,
    MIN_GAIN,
    MIN_SHOWN,
    MIN_TEXT,
    SIZES,
    Measure,
    Verdict,
    added_weights,
    judge,
    literature,
    measure,
    measure_sizes,
    split,
)
from chatfine.tokenizer.grow_files import grown
from chatfine.tokenizer.growable import Growable, Growth
from chatfine.tokenizer.hanzi import hanzi
from chatfine.tokenizer.learn import Learned

MOST_CHARACTERS = 40_000_000  # more than MIN_TEXT, or the advice would always be against
_BYTES = {"fp32": 4, "float32": 4}


@dataclass(frozen=True)
class Corpus:
    """The user's texts: those to learn from, and those kept apart to measure on."""

    texts: list[str]
    apart: list[str]
    characters: int
    """of all"""

    @property
    def measured(self) -> list[str]:
        """What measures are made on."""
        return self.apart or self.texts

    def report(self, base: Growable, growth: Growth) -> dict[str, Any]:
        """Say what `growth` does to kept-apart text; returns it."""
        now = measure(base, base, self.measured, self.characters)
        after = measure(base, grown(base, growth), self.measured, self.characters)
        console.say(
            t("characters a token on {text}: {now:.2f} → {after:.2f}",
              text=t("text kept apart") if self.apart else t("the corpus itself"), now=now.ratio,
              after=after.ratio)
        )  # fmt: skip
        verdict = judge(now, [after], self.characters)
        if not verdict.size:
            why = _why(verdict, [now, after], self.characters)
            console.warn(t("the advice is against it: {why}", why=why))
        return {"before": asdict(now), "after": asdict(after)}


@dataclass(frozen=True, slots=True)
class Costs:
    """What a row of the model costs; zeros where no config.json says so."""

    hidden: int
    tied: bool
    bytes_each: int

    @classmethod
    def of(cls, model: ModelFolder | None, folder: Path) -> Costs:
        """Read it off the weights, else off config.json."""
        if model is not None:
            return cls(model.hidden_size, model.tied, _BYTES.get(model.dtype, 2))
        if not (folder / "config.json").is_file():
            return cls(0, False, 0)
        config = check_config(folder)
        text = config.get("text_config") or config
        named = str(text.get("dtype") or text.get("torch_dtype"))
        return cls(int(text["hidden_size"]), bool(text.get("tie_word_embeddings")),
                   _BYTES.get(named, 2))  # fmt: skip


def read_corpus(names: Sequence[str], base: Growable, skip: bool = False) -> Corpus:
    """All texts of the rows of some data sets or files.

    A text that spells a control token is no running text: it was made for another program, and its
    tokens would be counted as words. Other rows that can't be used are treated the same.

    Args:
        skip: leave such rows out and count them.

    Raises:
        DataError: corpus-control-token, a file or row that can't be read, or no text at all.
    """
    texts: list[str] = []
    characters = 0
    problems = Problems(skip)
    for row, text in _texts(names, problems):
        control = base.spelled_control(text)
        if control:
            problems.add(_spells_control(row, control))
            continue
        if characters + len(text) > MOST_CHARACTERS:
            console.warn(t("only the first {n} characters of the corpus are used",
                           n=f"{characters:,}"))  # fmt: skip
            break
        texts.append(text)
        characters += len(text)
    problems.raise_if_any()
    if problems.total:
        console.warn(t("{count} rows of the corpus are left out", count=problems.total))
    if not texts:
        raise DataError(
            "corpus-empty",
            t("there is no text in {names}", names=", ".join(names)),
            where="--corpus",
            fix=t("name text, JSON, CSV or parquet files in the language that is to be added"),
        )
    rest, apart = split(texts)
    return Corpus(rest, apart, characters)


def _spells_control(row: Row, token: str) -> DataError:
    return DataError(
        "corpus-control-token",
        t("the text spells the control token {token}", token=token),
        where=row.where,
        fix=t("take the control tokens out of the corpus: new pieces are learned from plain text"),
    )


def _texts(names: Sequence[str], problems: Problems) -> Iterator[tuple[Row, str]]:
    for name in names:
        for row in read_rows(name, on_bad=problems.add):
            text = "\n".join(_strings(row.values))
            if text.strip():
                yield row, text.encode("utf-8", "replace").decode()  # a lone half of a pair


def _strings(value: Any) -> Iterator[str]:
    """Every text inside the values of a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)


def advise_size(base: Growable, corpus: Corpus, costs: Costs, config: ExpandConfig) -> int:
    """The size that the advice names.

    Raises:
        TokenizerError: expanding-does-not-pay.
    """
    found = advise(base, corpus, costs, config)
    size = int(found["advice"])
    if not size:
        fixes = [t("use the model as it is")]
        if len(found["measures"]) > 1:
            fixes.append(t("do it all the same by naming a size: --size {size}",
                           size=found["fits"] or SIZES[0]))  # fmt: skip
        raise TokenizerError(
            "expanding-does-not-pay",
            t("the advice is not to grow the vocabulary for this corpus"),
            why=str(found["why"]),
            fix=fixes,
        )
    return size


def advise(base: Growable, corpus: Corpus, costs: Costs, config: ExpandConfig) -> dict[str, Any]:
    """Measure several sizes, show them with their costs, and judge.

    Returns:
        `measures`, `advice` (how many pieces, 0 = don't), `fits` (how many would suit the text,
        were there more of it; 0 = none) and `why`.
    """
    sizes = sorted({*SIZES, config.size} - {0})
    console.say(t("measuring {characters} characters …", characters=f"{corpus.characters:,}"))
    learned = Learned(base, corpus.texts, max(sizes))
    found = measure_sizes(base, learned, corpus.measured, corpus.characters, sizes)
    preset = hanzi(base)
    rows = [_line(t("now"), found[0], found[0], costs)]
    rows += [_line(f"{one.added:,}", one, found[0], costs) for one in found[1:]]
    if preset.pieces:
        after = measure(base, grown(base, preset), corpus.measured, corpus.characters)
        rows.append(_line(f"hanzi ({after.added:,})", after, found[0], costs))
    console.table(
        [t("pieces added"), t("characters a token"), t("tokens saved"), t("parts of characters"),
         t("each shown"), t("weights more")],
        rows,
    )  # fmt: skip
    verdict = judge(found[0], found[1:], corpus.characters)
    why = _why(verdict, found, corpus.characters)
    _explain(corpus, verdict, why, found)
    return {"measures": [asdict(one) for one in found], "advice": verdict.size,
            "fits": verdict.fits, "why": why}  # fmt: skip


def _line(name: str, one: Measure, now: Measure, costs: Costs) -> list[str]:
    weights = added_weights(one.added, costs.hidden, costs.tied)
    return [
        name,
        f"{one.ratio:.2f}",
        f"{1 - now.ratio / one.ratio:.0%}" if one.added and one.ratio else "",
        f"{one.broken:.0%}",
        t("{n:.0f} times", n=one.shown) if one.added else "",
        f"{weights / 1e6:.1f} M, {console.size(weights * costs.bytes_each)}" if weights else "",
    ]


def _explain(corpus: Corpus, verdict: Verdict, why: str, found: Sequence[Measure]) -> None:
    """The verdict in words, with what others needed."""
    console.say(
        t("measured on {n} texts kept apart", n=len(corpus.apart))
        if corpus.apart
        else t("too few texts to keep some apart: the figures are those of the corpus itself, and "
               "too good")
    )  # fmt: skip
    console.heading(t("what others needed"))
    for line in literature():
        console.say(f"- {line}")
    console.heading(t("advice"))
    if verdict.size:
        console.say(t("add {size} pieces: {why}", size=f"{verdict.size:,}", why=why), "bold")
    else:
        console.say(t("don't: {why}", why=why), "bold")
    if verdict.cause == "too-little-text":
        now, fits = found[0], _of_size(found, verdict.fits)
        console.say(
            t("what growing still gives: with {size} pieces a text takes {saved} fewer tokens, so "
              "answers are faster and the context holds {gain:.1f} times as much. If that counts "
              "more than quality, or you will train on much more text than this: --size {number}",
              size=f"{fits.added:,}", saved=f"{1 - now.ratio / fits.ratio:.0%}",
              gain=fits.ratio / now.ratio, number=fits.added)
        )  # fmt: skip
    console.say(
        t("the limits of this rule are set by hand: beyond {measured} million characters of "
          "training text nothing was measured here", measured=_millions(MEASURED_TEXT))
    )  # fmt: skip


def _of_size(found: Sequence[Measure], size: int) -> Measure:
    return next(one for one in found if one.added == size)


def _millions(characters: int) -> str:
    return f"{characters / 1e6:.3g}"


def _why(verdict: Verdict, found: Sequence[Measure], characters: int) -> str:
    """The cause in words; `characters` are those of the corpus."""
    now, best = found[0], found[-1]
    if verdict.cause == "too-little-text":
        return t("the corpus has {n} million characters, and new rows need more text than that. "
                 "With {measured} million, trained for the same time, grown vocabularies ended at "
                 "5 to 7 % more bits a character than the old one; the limit is set at {limit} "
                 "million", n=_millions(characters), measured=_millions(MEASURED_TEXT),
                 limit=_millions(MIN_TEXT))  # fmt: skip
    if verdict.cause == "gains-little":
        gain = best.ratio / now.ratio if now.ratio else 0.0
        return t("a token would hold only {gain:.2f} times as much text as now (the limit is "
                 "{limit})", gain=gain, limit=MIN_GAIN)  # fmt: skip
    if verdict.cause == "shown-too-rarely":
        first = found[1]
        return t("already with {size} pieces the corpus shows each only {n:.0f} times (the limit "
                 "is {limit:.0f}), too seldom to learn it", size=f"{first.added:,}", n=first.shown,
                 limit=MIN_SHOWN)  # fmt: skip
    chosen = _of_size(found, verdict.size)
    return t("a token holds {gain:.2f} times as much text, and the corpus shows each new piece "
             "{n:.0f} times", gain=chosen.ratio / now.ratio, n=chosen.shown)  # fmt: skip
