"""Git LFS pointers: what `git clone` leaves in the place of large files when git-lfs is missing.

The format of a pointer: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
"""

from __future__ import annotations

from pathlib import Path

from chatfine.hub.refusals import TOKENS_PAGE
from chatfine.i18n import t

LFS_POINTER = b"version https://git-lfs"
LARGEST_POINTER_BYTES = 1024  # the format's own limit


def is_pointer(file: Path) -> bool:
    """Whether the file is only a pointer to the file it should be."""
    if file.stat().st_size > LARGEST_POINTER_BYTES:
        return False
    with file.open("rb") as stream:
        return stream.read(len(LFS_POINTER)) == LFS_POINTER


def pointer_why() -> str:
    """Why there is a pointer in the place of a file."""
    return t("the repository was cloned without git-lfs")


def pointer_fixes(folder: Path, get: str) -> list[str]:
    """What to do about pointers in `folder`; `get` is the command that fetches it without git."""
    return [
        t("in the folder {folder}: {command}", folder=folder,
          command="git lfs install && git lfs pull"),
        t("where git asks for a password it wants a token of the hub: {page}", page=TOKENS_PAGE),
        t("or get it: {command}", command=get),
    ]  # fmt: skip
