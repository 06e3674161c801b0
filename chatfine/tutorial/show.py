"""The table of fields, as `--help` of a door shows it and as docs/*/tutorial-flags.md has it."""

from __future__ import annotations

import itertools

from chatfine.helptext import columns, screen_width, wrap
from chatfine.i18n import t
from chatfine.tutorial.fields import CHATTING, EXPANDING, MERGING, TRAINING, Field
from chatfine.tutorial.generation import OPTIONS

DOORS = {
    "finetuning.py": TRAINING,
    "chat_completion.py": CHATTING + OPTIONS,
    "merge.py": MERGING,
    "expand_token.py": EXPANDING,
}


def help_text(script: str, command: str, table: tuple[Field, ...], example: str) -> str:
    """The help of one door: every flag with its default and what it becomes."""
    width = screen_width()
    lines = [t("usage: python {script} [flags]", script=script), ""]
    lines += wrap(
        t("Flags are written --flag value, --flag=value, --flag or --noflag; --group.flag sets one "
          "group's, --flag every group's of that name. The flags of chatfine {command} may stand "
          "beside them.", command=command),
        width,
    )  # fmt: skip
    for group, fields in itertools.groupby(table, key=lambda one: one.group):
        rows = [(_spelling(one), f"{becomes(one)}: {one.note()}") for one in fields]
        lines += ["", group, *columns(rows, width)]
    return "\n".join([*lines, "", t("For example"), f"  {example}"])


def _spelling(one: Field) -> str:
    default = shown(one)
    return f"--{one.name} [{default}]" if default else f"--{one.name}"


def shown(one: Field) -> str:
    """A default as a person types it."""
    return ",".join(one.default) if isinstance(one.default, tuple) else str(one.default)


def becomes(one: Field) -> str:
    """The flags of chatfine that a field decides."""
    if not one.effective:
        return t("without effect")
    return " ".join("--" + name.replace("_", "-") for name in one.settings)


def document() -> str:
    """docs/*/tutorial-flags.md in the language in force."""
    lines = [
        t("# The tutorial's flags"), "",
        t("Every flag of the tutorial's four scripts, its default there, and what it becomes here. "
          "`python tools/parity.py write` writes this page from `chatfine/tutorial/fields.py`."),
    ]  # fmt: skip
    for script, table in DOORS.items():
        lines += ["", f"## {script}"]
        for group, fields in itertools.groupby(table, key=lambda one: one.group):
            lines += ["", f"### {group}", ""]
            lines += [_row(t("flag"), t("default"), "chatfine", t("how, or why not"))]
            lines += [_row("---", "---", "---", "---")]
            for one in fields:
                default = f"`{shown(one)}`" if shown(one) else ""
                target = f"`{becomes(one)}`" if one.effective else becomes(one)
                lines.append(_row(f"`--{one.name}`", default, target, one.note()))
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"
