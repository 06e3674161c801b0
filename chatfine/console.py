"""What a person sees: prose, tables and bars through rich; one JSON object on stdout with --json.

With `--json` all prose goes to stderr, so stdout stays parseable (contract C8). Only rank 0 speaks.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from chatfine.i18n import t

if TYPE_CHECKING:
    from rich.console import Console

_json_mode = False


def set_json_mode(on: bool) -> None:
    """Send prose to stderr from now on."""
    global _json_mode
    _json_mode = on
    console.cache_clear()


def json_mode() -> bool:
    """Whether stdout is reserved for the one JSON object."""
    return _json_mode


def is_main_process() -> bool:
    """Whether this is rank 0 (torchrun's RANK), the only one that prints."""
    return os.environ.get("RANK", "0") == "0"


def make_streams_safe() -> None:
    """Show `?` for what the terminal can't: no Windows console may break on an emoji."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


@functools.lru_cache(maxsize=1)
def console() -> Console:
    """The one rich console."""
    from rich.console import Console

    make_streams_safe()
    return Console(
        stderr=_json_mode, quiet=not is_main_process(), highlight=False, soft_wrap=True, emoji=False
    )


def say(text: str = "", style: str | None = None) -> None:
    """Print one message; its text is taken literally (no markup)."""
    console().print(text, style=style, markup=False)


def write(text: str) -> None:
    """Print a piece of a line at once, without a line end: an answer as it grows."""
    out = console()
    out.print(text.replace("\x1b", "␛"), end="", markup=False)  # no model steers the terminal
    out.file.flush()


def ask(prompt: str) -> str:
    """A line typed by the user; EOFError at the end of the input, KeyboardInterrupt at Ctrl-C."""
    if not _json_mode:
        return input(prompt)
    write(prompt)  # stdout belongs to the JSON object
    return input()


def warn(text: str) -> None:
    """Print a warning."""
    say(text, style="yellow")


def error(code: str, text: str) -> None:
    """Print an error on stderr: `error[code]:` in red where colours are shown, then the text."""
    from rich.console import Console
    from rich.text import Text

    prefix = Text(t("error[{code}]: ", code=code), style="bold red")
    Console(stderr=True, highlight=False, soft_wrap=True).print(prefix + Text(text))


def heading(text: str) -> None:
    """Print the title of a part."""
    say()
    say(text, style="bold cyan")


def table(columns: list[str], rows: list[list[str]], title: str | None = None) -> None:
    """Print a table; wide characters take two columns."""
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for name in columns:
        grid.add_column(name, overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    console().print(grid, soft_wrap=False)


def emit(result: dict[str, Any]) -> None:
    """With --json: print the command's result as one line on stdout."""
    if _json_mode and is_main_process():
        print(json.dumps(result, ensure_ascii=False), flush=True)


def size(count_bytes: float) -> str:
    """Bytes as a person reads them: 97.2 MB, 1.4 GB (powers of 1000)."""
    for unit in ("B", "KB", "MB", "GB"):
        if count_bytes < 1000 or unit == "GB":
            return (
                f"{count_bytes:.0f} {unit}" if unit in ("B", "KB") else f"{count_bytes:.1f} {unit}"
            )
        count_bytes /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
