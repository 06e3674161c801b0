"""Bytes of a data file → lines of text; says which encoding a file has when it is not UTF-8."""

from __future__ import annotations

import codecs
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from chatfine.errors import DataError
from chatfine.hub.lfs import LFS_POINTER, pointer_fixes, pointer_why
from chatfine.i18n import t

HEAD_BYTES = 65536
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
BINARY_STARTS = {b"PK\x03\x04": "zip / xlsx", b"\x1f\x8b": "gzip", b"PAR1": "parquet"}


@dataclass(frozen=True, slots=True)
class Line:
    """One line with its line ending; `error` says why its text can't be trusted."""

    number: int
    text: str
    error: DataError | None = None


def read_head(path: Path) -> bytes:
    """The first 64 KB.

    Raises:
        DataError: the file can't be opened, is UTF-16 or UTF-32, compressed, or a Git LFS pointer.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise DataError(
            "data-unreadable", t("{path} can't be read", path=path), why=error.strerror
        ) from None
    for mark, name in BYTE_ORDER_MARKS:
        if head.startswith(mark):
            raise wrong_encoding(path, name)
    without_mark = _utf16_without_mark(head)
    if without_mark:
        raise wrong_encoding(path, without_mark)
    for start, name in BINARY_STARTS.items():
        if head.startswith(start):
            raise DataError(
                "data-binary",
                t("{path} is a {kind} file, not text", path=path, kind=name),
                fix=t("unpack it, or save the table as CSV (UTF-8)"),
            )
    if head.startswith(LFS_POINTER):
        raise lfs_pointer(path)
    return head


def lfs_pointer(path: Path) -> DataError:
    """The error for a Git LFS pointer in the place of a data file."""
    return DataError(
        "data-lfs-pointer",
        t("{path} is only a Git LFS pointer, the data is not here", path=path),
        where=str(path),
        why=pointer_why(),
        fix=pointer_fixes(path.parent, "chatfine download OWNER/NAME --kind dataset"),
    )


def read_lines(path: Path, shown: str) -> Iterator[Line]:
    """The lines of a UTF-8 file, one at a time; a byte order mark at its start is left out.

    A line with undecodable or NUL bytes comes with its error, so that the caller can go on.

    Raises:
        DataError: the whole file has another encoding.
    """
    known_utf8 = _is_utf8_beyond_ascii(read_head(path))
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                if not known_utf8 and _is_gbk(raw):
                    raise wrong_encoding(path, "GBK") from None
                yield Line(
                    number, raw.decode("utf-8", "replace"), _not_utf8(shown, number, raw, error)
                )
                continue
            yield Line(number, text, _nul(shown, number, text) if "\0" in text else None)


def read_text(path: Path, shown: str) -> str:
    """The whole file as text, line endings kept.

    Raises:
        DataError: it is not UTF-8, or holds NUL bytes.
    """
    lines = []
    for line in read_lines(path, shown):
        if line.error:
            raise line.error
        lines.append(line.text)
    return "".join(lines)


def wrong_encoding(path: Path, name: str) -> DataError:
    """The error for a file in another encoding, with two ways to convert it."""
    target = path.with_suffix(".utf8" + path.suffix)
    codec = {"GBK": "gb18030"}.get(name, name.lower())
    convert = f"p.Path(r'{target}').write_text(p.Path(r'{path}').read_text('{codec}'), 'utf-8')"
    return DataError(
        "data-encoding",
        t("{path} is encoded as {encoding}; it must be UTF-8", path=path, encoding=name),
        where=f"{path}:1:1",
        fix=[
            f"iconv -f {codec} -t utf-8 {shlex.quote(str(path))} > {shlex.quote(str(target))}",
            t("or on Windows: {command}", command=f'python -c "import pathlib as p; {convert}"'),
        ],
    )


def _not_utf8(shown: str, number: int, raw: bytes, error: UnicodeDecodeError) -> DataError:
    column = len(raw[: error.start].decode("utf-8")) + 1
    return DataError(
        "data-not-utf8",
        t("the byte {byte} is not UTF-8", byte=f"0x{raw[error.start]:02X}"),
        where=f"{shown}:{number}:{column}",
        fix=t("save the file as UTF-8, or repair this line"),
    )


def _nul(shown: str, number: int, text: str) -> DataError:
    return DataError(
        "data-nul",
        t("the line holds a NUL byte"),
        where=f"{shown}:{number}:{text.index(chr(0)) + 1}",
        why=t("the file was cut off or damaged while it was written"),
        fix=t("write or download the file again, or delete this line"),
    )


def _is_utf8_beyond_ascii(head: bytes) -> bool:
    try:  # the last character may be cut in two by the end of the head
        text = codecs.getincrementaldecoder("utf-8")().decode(head, final=False)
    except UnicodeDecodeError:
        return False
    return not text.isascii()


def _utf16_without_mark(head: bytes) -> str:
    """UTF-16LE or UTF-16BE when NULs stand on every other byte only, as in Latin text; else ""."""
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if max(even, odd) < max(4, len(head) // 20) or min(even, odd) * 20 > max(even, odd):
        return ""
    return "UTF-16LE" if odd > even else "UTF-16BE"


def _is_gbk(raw: bytes) -> bool:
    """Whether bytes that are not UTF-8 read as GBK: nearly all characters are common Chinese ones.

    GB2312's characters have both bytes above 0xA0, which Latin letters with accents do not give.
    """
    try:
        text = raw.decode("gb18030")
    except UnicodeDecodeError:
        return False
    wide = [character for character in text if ord(character) > 127]
    common = sum(len(character.encode("gb2312", "ignore")) == 2 for character in wide)
    return bool(wide) and common >= 0.8 * len(wide)
