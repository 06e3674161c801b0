"""Every error a user can meet: what happened, where, why, and what to do now.

    ChatfineError            exit  what it stands for
    ├── Refused                 2  bad input; nothing was written
    │   ├── UsageError          2  a flag, a config key or a value
    │   ├── ModelError          2  a model folder, a download, an adapter
    │   ├── TokenizerError      2  a tokenizer or a chat template
    │   ├── DataError           2  a data file, a row, a data set
    │   ├── OutputError         2  the output folder
    │   ├── ResourceError       2  memory, disk, a missing device or package
    │   └── ProofError          2  a merge that did not prove itself
    ├── Stopped                75  ended early on purpose, can be resumed
    ├── Interrupted           130  Ctrl-C or SIGTERM, can be resumed
    └── Bug                    70  ours; a report file is written

`code` is a short stable name such as `data-bad-json`: it is what a user searches for. The texts
arrive already translated (`chatfine.i18n.t`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from chatfine.i18n import t


class ChatfineError(Exception):
    """Base of all errors shown to a user.

    Args:
        code: stable kebab-case name.
        what: one sentence, what happened, with the value at fault.
        where: file:line:column, a flag, a folder.
        why: the reason, when it is not obvious.
        fix: what to do now; one or several lines, a command where there is one.
    """

    exit_code = 70

    def __init__(
        self,
        code: str,
        what: str,
        *,
        where: str | None = None,
        why: str | None = None,
        fix: str | Sequence[str] = (),
    ) -> None:
        super().__init__(what)
        self.code = code
        self.what = what
        self.where = where
        self.why = why
        self.fix = (fix,) if isinstance(fix, str) else tuple(fix)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(t("  where: {where}", where=self.where))
        if self.why:
            lines.append(t("  why:   {why}", why=self.why))
        lines += [t("  do:    {fix}", fix=line) for line in self.fix]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, object]:
        """The same as plain data, for `--json`."""
        return {
            "error": self.code,
            "what": self.what,
            "where": self.where,
            "why": self.why,
            "fix": list(self.fix),
            "exit_code": self.exit_code,
        }


class Refused(ChatfineError):
    """Bad input; nothing was written."""

    exit_code = 2


class UsageError(Refused):
    """A flag, a config key or a value that can't be used."""


class ModelError(Refused):
    """A model folder, a download or an adapter that can't be used."""


class TokenizerError(Refused):
    """A tokenizer or chat template that can't be used."""


class DataError(Refused):
    """A data file, row or data set that can't be used."""


class OutputError(Refused):
    """An output folder that is in use, not empty or not writable."""


class ResourceError(Refused):
    """Not enough memory or disk, or a device or package that is missing."""


class ProofError(Refused):
    """A merged model whose logits do not agree with base + adapter."""


class Stopped(ChatfineError):
    """Ended early on purpose; the run can be resumed."""

    exit_code = 75


class Interrupted(ChatfineError):
    """Ctrl-C or SIGTERM; the run can be resumed."""

    exit_code = 130


class Bug(ChatfineError):
    """An error of ours."""

    exit_code = 70


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """The closest of `known` to `word`, as a translated question; None when nothing is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return t("did you mean {word}?", word=close[0]) if close else None
