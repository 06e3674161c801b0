"""The parent of hub/pth.py: start it without secrets, ask it, explain its refusals."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

import chatfine
from chatfine.errors import ChatfineError, ModelError, ResourceError
from chatfine.hub.headers import lfs_pointer
from chatfine.hub.lfs import is_pointer
from chatfine.hub.refusals import disk_full
from chatfine.i18n import t

KEPT = (
    "PATH", "SYSTEMROOT", "WINDIR", "TEMP", "TMP", "TMPDIR", "LANG", "LC_ALL", "LC_CTYPE",
    "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME",
)  # fmt: skip
"""All of this process's environment that the child gets to see."""


def child_environment() -> dict[str, str]:
    """The child's environment: what a program needs to start, and where its modules lie."""
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    modules = [str(Path(place).absolute()) for place in sys.path if place]
    return kept | {"PYTHONPATH": os.pathsep.join(modules)}


def check_pth(file: Path) -> None:
    """Refuse what is not a .pth as torch.save writes it, by the archive's list of contents alone.

    Raises:
        ModelError: model-lfs-pointer, or pth-damaged.
    """
    if is_pointer(file):
        raise lfs_pointer(file)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        cut = isinstance(error, zipfile.BadZipFile) and _begins_as_zip(file)
        why = t("it is cut short") if cut else t("it is not a zip archive, as torch.save writes it")
        raise damaged(file.name, why, file) from None
    names = [entry.filename for entry in entries]
    roots = {name.partition("/")[0] for name in names}
    if len(roots) != 1 or f"{next(iter(roots))}/data.pkl" not in names:
        raise damaged(file.name, t("this zip archive is no checkpoint: it has no data.pkl"), file)
    if any(name.endswith("/constants.pkl") for name in names):
        raise damaged(file.name, t("it holds a TorchScript program, not weights"), file)
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise damaged(file.name, t("its contents are compressed; torch.save never does that"), file)


def _begins_as_zip(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


class PthProcess:
    """A running child; use it as a context manager, so that it ends with the block."""

    def __init__(self) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self.process = subprocess.Popen(
            [sys.executable, "-m", "chatfine.hub.pth"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr,
            env=child_environment(), encoding="utf-8",
            # `-m` looks for modules where it runs, so not in the user's folder
            cwd=Path(chatfine.__file__).absolute().parents[1],
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if kind is not None:
            self.process.kill()
        with contextlib.suppress(OSError):  # it is gone already
            self.process.stdin.close()  # ends the child's loop
        self.process.wait()
        self.process.stdout.close()
        self._stderr.close()

    def ask(
        self, request: dict[str, Any], on_bytes: Callable[[int], None] = lambda count: None
    ) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Args:
            on_bytes: called with the bytes of each tensor that is done.

        Raises:
            ModelError, ResourceError: what the child refused, or how it died.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise self._died() from None
        for line in self.process.stdout:
            said = json.loads(line)
            if "answer" not in said:
                on_bytes(int(said["bytes"]))
                continue
            answer: dict[str, Any] = said["answer"]
            if "error" in answer:
                raise _refused(answer, request)
            return answer
        raise self._died()

    def _died(self) -> ChatfineError:
        code = self.process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
        if code == -9 or any("MemoryError" in line for line in lines[-1:]):
            return _no_memory()
        return ModelError(
            "pth-failed",
            t("the program that reads the weights ended with code {code}", code=code),
            why="\n".join(lines[-3:]) or None,
            fix=t("try again; if it stays so, report it"),
        )  # fmt: skip


def _refused(answer: dict[str, Any], request: dict[str, Any]) -> ChatfineError:
    """The error for what the child answered."""
    name, _, about = str(answer["about"]).partition("\n")
    if answer["error"] == "unsafe":
        return ModelError(
            "pth-unsafe", t("{file} holds more than weights: it names {what}", file=name,
                            what=about),
            why=t("such a file can run any program while it is read; nothing of it was run"),
            fix=t("do not use this file; get the model from Meta, or as *.safetensors from a hub"),
        )  # fmt: skip
    if answer["error"] == "not-finite":
        return ModelError(
            "model-not-finite", t("{name} holds numbers that are not finite", name=name),
            fix=[t("with --dtype fp16, which ends at 65504, choose --dtype bf16"),
                 t("else download the model again")],
        )  # fmt: skip
    if answer["error"] == "memory":
        return _no_memory()
    if answer["error"] == "disk":
        place = Path(request.get("folder") or request.get("file") or request["files"][0])
        if answer["errno"] in (errno.ENOSPC, errno.EDQUOT):
            return disk_full(place if place.is_dir() else place.parent, 0)
        return ModelError(
            "pth-failed", t("the weights can't be read or written"), where=str(place), why=name,
            fix=t("check the disk and the rights of the folder"),
        )  # fmt: skip
    return damaged(name, about)


def _no_memory() -> ResourceError:
    return ResourceError(
        "no-memory", t("the memory is not enough to convert these weights"),
        fix=[t("close other programs, then run the same command again"),
             t("with --to meta: more --shards need less memory")],
    )  # fmt: skip


def damaged(name: str, why: str, file: Path | None = None) -> ModelError:
    """The error for a .pth that can't be read."""
    return ModelError(
        "pth-damaged", t("{file} can't be read as weights", file=name),
        where=str(file) if file else None, why=why, fix=t("download it again"),
    )  # fmt: skip
