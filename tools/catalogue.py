"""Keep the Chinese catalogue in step with the source.

    python tools/catalogue.py update     extract, merge into the .po, write the .mo
    python tools/catalogue.py missing    list what has no translation yet, as JSON: {"English": ""}
    python tools/catalogue.py add FILE   take translations from such a JSON file, then update
    python tools/catalogue.py check      say what is missing, stale or wrong; exit 1 if anything is

Texts are the literals given to `t("…")`, and the help of the settings: field descriptions and the
first docstring line of the config classes. Entries are sorted and carry no dates or line numbers,
so the files change only when a text does.
"""

from __future__ import annotations

import ast
import io
import json
import string
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from babel.messages.catalog import Catalog
from babel.messages.pofile import read_po, write_po

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout's settings, installed or not
PACKAGE = ROOT / "chatfine"
PO = PACKAGE / "locale" / "zh_CN" / "LC_MESSAGES" / "chatfine.po"
MO = PO.with_suffix(".mo")

NOT_LITERAL = {
    ("helptext.py", "flag.help"),
    ("helptext.py", "(cls.__doc__ or '').strip().partition('\\n')[0]"),
}
"""The only calls of `t` whose text is no literal: both show texts of the settings."""


def calls(path: Path) -> Iterator[ast.Call]:
    """Every call of `t(…)` or `i18n.t(…)` in a file (not a tensor's method `.t()`)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("t", "i18n.t"):
            yield node


def source_texts() -> tuple[dict[str, set[str]], list[str]]:
    """Text → files that use it; and the calls whose text is neither a literal nor listed."""
    found: dict[str, set[str]] = {}
    refused = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        for call in calls(path):
            text = call.args[0] if call.args else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                found.setdefault(text.value, set()).add(name)
            elif text is None or (name, ast.unparse(text)) not in NOT_LITERAL:
                refused.append(f"{name}:{call.lineno}")
    for text in setting_texts():
        found.setdefault(text, set()).add("config.py")
    return found, refused


def setting_texts() -> Iterator[str]:
    """The help texts that the command line reads off the settings."""
    from chatfine import config
    from chatfine.flags import flags_of

    for cls in vars(config).values():
        if isinstance(cls, type) and issubclass(cls, config.Config) and cls is not config.Config:
            yield (cls.__doc__ or "").strip().partition("\n")[0]
            yield from (flag.help for flag in flags_of(cls).values())


def fields(text: str) -> set[str]:
    """The {named} fields of a text; braces that are no field make none."""
    try:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except ValueError:
        return set()


def load() -> Catalog:
    """The catalogue as it is on disk; an empty one when there is none."""
    if not PO.exists():
        return Catalog(locale="zh_CN", project="chatfine", fuzzy=False)
    with PO.open("rb") as file:
        return read_po(file, locale="zh_CN")


def translations(catalog: Catalog) -> dict[str, str]:
    """English → Chinese, without the header."""
    return {str(entry.id): str(entry.string) for entry in catalog if entry.id}


def build(texts: dict[str, set[str]], known: dict[str, str]) -> Catalog:
    """A fresh catalogue of exactly these texts."""
    catalog = Catalog(locale="zh_CN", project="chatfine", fuzzy=False)
    for text in sorted(texts):
        catalog.add(
            text, known.get(text, ""), locations=[(name, None) for name in sorted(texts[text])]
        )
    return catalog


def po_bytes(catalog: Catalog) -> bytes:
    """The .po file, without the header fields that hold a date or a tool's version."""
    buffer = io.BytesIO()
    write_po(buffer, catalog, width=100, omit_header=True)
    header = (
        'msgid ""\nmsgstr ""\n"Language: zh_CN\\n"\n"MIME-Version: 1.0\\n"\n'
        '"Content-Type: text/plain; charset=utf-8\\n"\n"Content-Transfer-Encoding: 8bit\\n"\n\n'
    )
    return header.encode() + buffer.getvalue()


def mo_bytes(known: dict[str, str]) -> bytes:
    """The compiled catalogue (GNU .mo, little endian), without a date: same texts, same bytes."""
    header = "Content-Type: text/plain; charset=utf-8\nLanguage: zh_CN\n"
    pairs = sorted((source, text) for source, text in ({"": header} | known).items() if text)
    count, tables, texts = len(pairs), b"", b""
    start = 28 + 16 * count  # the seven numbers of the head, then two tables of (length, offset)
    for column in (0, 1):
        for pair in pairs:
            text = pair[column].encode("utf-8")
            tables += struct.pack("<2I", len(text), start + len(texts))
            texts += text + b"\0"
    return struct.pack("<7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, start) + tables + texts


def problems() -> list[str]:
    """All that is wrong between the source, the .po and the .mo; empty when nothing is."""
    texts, refused = source_texts()
    known = translations(load())
    found = [f"{place}: t() needs a literal text" for place in refused]
    found += [f"no translation: {text!r} ({', '.join(sorted(texts[text]))})"
              for text in sorted(texts) if not known.get(text)]  # fmt: skip
    found += [f"no longer used: {text!r}" for text in sorted(set(known) - set(texts))]
    for text in sorted(texts):
        if known.get(text) and fields(text) != fields(known[text]):
            found.append(f"other fields: {text!r} → {known[text]!r}")
    if not MO.exists() or MO.read_bytes() != mo_bytes(known):
        found.append("the .mo is not the compiled .po")
    return found


def update(extra: dict[str, str] | None = None) -> None:
    """Rewrite both files from the source and the translations known."""
    texts, _ = source_texts()
    known = translations(load()) | (extra or {})
    data = po_bytes(build(texts, known))
    PO.parent.mkdir(parents=True, exist_ok=True)
    PO.write_bytes(data)
    MO.write_bytes(mo_bytes(translations(load())))


def main(words: list[str]) -> int:
    """Run one of the four actions."""
    action = words[0] if words else "check"
    if action == "missing":
        texts, known = source_texts()[0], translations(load())
        lacking = {text: "" for text in sorted(texts) if not known.get(text)}
        print(json.dumps(lacking, ensure_ascii=False, indent=1))
        return 0
    if action == "add":
        update(json.loads(Path(words[1]).read_text(encoding="utf-8")))
    elif action == "update":
        update()
    elif action != "check":
        print(__doc__)
        return 2
    found = problems()
    print("\n".join(found) or f"catalogue complete: {len(source_texts()[0])} texts")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
