"""Messages in the reader's language: English in the code, Chinese from a gettext catalogue.

`CHATFINE_LANG` (`zh` or `en`) decides; without it the locale does. Every string a person reads goes
through `t`, so that the completeness test can hold the catalogue against the source.
"""

from __future__ import annotations

import functools
import gettext
import locale
import os
import sys
from pathlib import Path

DOMAIN = "chatfine"
LOCALE_DIR = Path(__file__).with_name("locale")


def language() -> str:
    """The language in force: "zh" or "en"."""
    chosen = os.environ.get("CHATFINE_LANG", "").strip().lower()
    if chosen:
        return "zh" if chosen.startswith("zh") else "en"
    for variable in ("LC_ALL", "LC_MESSAGES", "LANG"):
        value = os.environ.get(variable)
        if value:
            return "zh" if value.lower().startswith("zh") else "en"
    if sys.platform == "win32":  # Windows sets none of these; ask the C library instead
        return "zh" if (locale.getlocale()[0] or "").lower().startswith(("zh", "chinese")) else "en"
    return "en"


@functools.lru_cache(maxsize=4)
def _catalogue(code: str) -> gettext.NullTranslations:
    languages = ["zh_CN"] if code == "zh" else []
    return gettext.translation(DOMAIN, str(LOCALE_DIR), languages=languages, fallback=True)


def t(message: str, /, **values: object) -> str:
    """Translate `message`, then fill its `{named}` fields with `values`.

    The message must be a literal, so that extraction finds it; the fields are `str.format` fields.
    """
    text = _catalogue(language()).gettext(message) if message else ""
    return text.format(**values) if values else text
