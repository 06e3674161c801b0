"""Checked dialogues → ids and masks that fit `max_length`.

Over-length policy. A dialogue longer than `max_length` is dropped (`drop`), ends the run (`error`),
or keeps its beginning (`cut`): a model always reads a dialogue from its start, so only the end can
go; a cut answer then has no end token, which teaches no early stop. A cut that leaves nothing to
learn counts as dropped. Running text is never dropped: it is divided into stretches of `max_length`
that overlap by one token, so that every token is predicted once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from chatfine.data.dialogues import DataSettings
from chatfine.data.problems import Problems
from chatfine.data.report import PartReport
from chatfine.errors import DataError, TokenizerError
from chatfine.i18n import t
from chatfine.types import Dialogue, Example

if TYPE_CHECKING:
    from chatfine.tokenizer.encode import ChatTokenizer

CHUNK = 256
"""How many dialogues are tokenised at once."""

Encoded = tuple[int, Sequence[int], Sequence[bool]]
"""Number of the dialogue, its ids and mask."""


def encode(
    dialogues: Iterable[Dialogue],
    tokenizer: ChatTokenizer,
    settings: DataSettings,
    report: PartReport,
    problems: Problems,
) -> Iterator[Encoded]:
    """The usable examples, fitted to `max_length`; everything else is noted in `report`."""
    limit = settings.max_length
    stream = iter(dialogues)
    number = 0
    while chunk := list(itertools.islice(stream, CHUNK)):
        for dialogue, example in zip(
            chunk, _encode_chunk(chunk, tokenizer, settings, problems), strict=True
        ):
            if example is not None:
                report.lengths.append(len(example.ids))
                for ids, mask in _fitted(example, dialogue, limit, settings.too_long, report):
                    yield number, ids, mask
            number += 1


def encode_one(dialogue: Dialogue, tokenizer: ChatTokenizer, train_on: str) -> Example:
    """Ids and mask of one dialogue, of running text, or of a row that came as tokens.

    Raises:
        TokenizerError: the chat template refuses it, or there is none.
    """
    if dialogue.example is not None:
        return dialogue.example
    if dialogue.plain:
        return tokenizer.encode_plain(dialogue.messages[0].content)
    return tokenizer.encode_dialogue(dialogue.messages, cast(Any, train_on))


def _encode_chunk(
    chunk: Sequence[Dialogue],
    tokenizer: ChatTokenizer,
    settings: DataSettings,
    problems: Problems,
) -> list[Example | None]:
    """Examples of a chunk; None where the chat template refuses the dialogue."""
    train_on = cast(Any, settings.train_on)
    if not any(one.plain or one.example for one in chunk):
        try:
            return list(tokenizer.encode_many([one.messages for one in chunk], train_on))
        except TokenizerError:
            pass  # find out which one below
    examples: list[Example | None] = []
    for one in chunk:
        try:
            examples.append(encode_one(one, tokenizer, settings.train_on))
        except TokenizerError as error:
            if error.code == "no-template":
                raise
            refusal = DataError(
                error.code, error.what, where=one.where, why=error.why, fix=error.fix
            )
            problems.add(refusal)
            examples.append(None)
    return examples


def _fitted(
    example: Example, dialogue: Dialogue, limit: int, too_long: str, report: PartReport
) -> Iterator[tuple[Sequence[int], Sequence[bool]]]:
    """The example, cut or divided to `limit` tokens; nothing where nothing could be learned."""
    ids, mask = example.ids, example.mask
    if limit and len(ids) > limit:
        if dialogue.plain and limit > 1:
            report.divided.add(dialogue.where)
            for start in range(0, len(ids) - 1, limit - 1):
                yield ids[start : start + limit], mask[start : start + limit]
            return
        if too_long == "error":
            raise _too_long(len(ids), limit, dialogue.where)
        if too_long == "drop":
            report.drop("too-long", dialogue.where)
            return
        ids, mask = ids[:limit], mask[:limit]
        if not any(mask[1:]):
            report.drop("prompt-too-long", dialogue.where)
            return
        report.cut.add(dialogue.where)
    if any(mask[1:]):
        yield ids, mask
    else:
        report.drop("nothing-to-learn", dialogue.where)


def _too_long(length: int, limit: int, where: str) -> DataError:
    return DataError(
        "data-too-long",
        t("an example has {length} tokens, --max-length is {limit}", length=length, limit=limit),
        where=where,
        fix=[f"--max-length {length}", "--too-long drop", "--too-long cut"],
    )


def check_dropped(report: PartReport, settings: DataSettings) -> None:
    """Refuse a data set of which nothing or too little is left."""
    lengths = sorted(report.lengths)
    if not lengths or not report.rows:
        return
    longest, median = lengths[-1], lengths[len(lengths) // 2]
    too_long = sum(length > settings.max_length for length in lengths) if settings.max_length else 0
    hint = [f"--max-length {longest}", "--too-long cut"] if too_long else []
    if report.dropped_rows == report.rows and too_long == len(lengths):
        raise DataError(
            "data-all-too-long",
            t("all {count} examples are longer than --max-length {limit}", count=len(lengths),
              limit=settings.max_length),
            where=report.dataset or None,
            why=t("tokens: shortest {shortest}, median {median}, longest {longest}",
                  shortest=lengths[0], median=median, longest=longest),
            fix=hint,
        )  # fmt: skip
    share = report.dropped_rows / report.rows
    if share > settings.max_dropped or report.dropped_rows == report.rows:
        raise DataError(
            "data-too-many-dropped",
            t("{dropped} of {rows} examples would be dropped ({share:.0%}); --max-dropped allows "
              "{allowed:.0%}", dropped=report.dropped_rows, rows=report.rows, share=share,
              allowed=settings.max_dropped),
            where=report.dataset or None,
            why="; ".join(report.causes()),
            fix=[*hint, f"--max-dropped {share + 0.005:.2f}"],
        )  # fmt: skip
