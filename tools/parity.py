"""Keep docs/zh/tutorial-flags.md and docs/en/tutorial-flags.md in step with the table of flags.

    python tools/parity.py write     write both pages from chatfine/tutorial/fields.py
    python tools/parity.py check     say which page is not what the table says; exit 1 if any is

The texts are translated by the catalogue, so write the pages after `tools/catalogue.py update`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout's table, installed or not
LANGUAGES = ("zh", "en")


def page(language: str) -> Path:
    """Where the page of a language lies."""
    return ROOT / "docs" / language / "tutorial-flags.md"


def text(language: str) -> str:
    """What the page of a language should hold."""
    from chatfine.tutorial.show import document

    before = os.environ.get("CHATFINE_LANG")
    os.environ["CHATFINE_LANG"] = language
    try:
        return document()
    finally:
        if before is None:
            del os.environ["CHATFINE_LANG"]
        else:
            os.environ["CHATFINE_LANG"] = before


def stale() -> list[Path]:
    """The pages that are missing or not what the table says."""
    pages = {page(language): text(language) for language in LANGUAGES}
    return [path for path, wanted in pages.items()
            if not path.is_file() or path.read_text(encoding="utf-8") != wanted]  # fmt: skip


def main(words: list[str]) -> int:
    """Write or check; returns the exit code."""
    if words == ["write"]:
        for language in LANGUAGES:
            page(language).parent.mkdir(parents=True, exist_ok=True)
            page(language).write_text(text(language), encoding="utf-8", newline="\n")
    elif words != ["check"]:
        print(__doc__)
        return 2
    found = stale()
    for path in found:
        print(f"{path.relative_to(ROOT)}: not what the table says; run tools/parity.py write")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
