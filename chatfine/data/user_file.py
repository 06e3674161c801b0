"""The user's Python file: may it be run, which function is in it, and errors with their line."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatfine.errors import ChatfineError, DataError, did_you_mean
from chatfine.hub.catalog import RECORD
from chatfine.i18n import t
from chatfine.runtime import home

MODEL_FILES = ("tokenizer.json", "tokenizer.model", "model.safetensors", "pytorch_model.bin",
               "model.safetensors.index.json")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Function:
    """A function in a file; `path` is absolute."""

    path: Path
    name: str

    def __str__(self) -> str:
        return f"{self.path}:{self.name}"


def check_file(function: Function) -> None:
    """Refuse a file that is not there or was downloaded.

    Raises:
        DataError: with its path.
    """
    if not function.path.is_file():
        raise DataError(
            "data-no-function-file",
            t("there is no file {path}", path=function.path),
            where=str(function),
            fix=t("data from a function is named FILE.py or FILE.py:FUNCTION"),
        )
    _refuse_downloaded(function.path.resolve())


def source_of(function: Function) -> str:
    """The text of the file, if it may be run.

    Raises:
        DataError: no such file, one that was downloaded, not UTF-8 or not Python.
    """
    check_file(function)
    path = function.path
    try:
        source = path.read_text(encoding="utf-8-sig")
        compile(source, str(path), "exec", dont_inherit=True)
    except UnicodeDecodeError:
        raise DataError(
            "data-function-syntax",
            t("{path} is not UTF-8", path=path),
            fix=t("save the file as UTF-8"),
        ) from None
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise DataError(
            "data-function-syntax",
            t("{path} is not valid Python: {reason}", path=path, reason=error),
            where=f"{path}:{line}",
            fix=t("repair that line"),
        ) from None
    return source


def _refuse_downloaded(path: Path) -> None:
    marked = next(
        (
            folder
            for folder in path.parents
            if (folder / RECORD).is_file()
            or (
                (folder / "config.json").is_file()
                and any((folder / name).is_file() for name in MODEL_FILES)
            )
        ),
        None,
    )
    inside = marked or next((one for one in _caches() if path.is_relative_to(one)), None)
    if inside is not None:
        raise DataError(
            "data-function-downloaded",
            t("{path} is not run: it lies in a folder of downloads", path=path),
            where=str(inside),
            why=t("code that came with a model or a data set may do anything to this machine"),
            fix=t("read it, and copy it elsewhere if you trust it"),
        )


def _caches() -> list[Path]:
    """Where this program and the hubs' libraries put what they download."""
    named = ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "MODELSCOPE_CACHE")
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    caches = [
        home(),
        Path.home() / ".cache" / "modelscope",
        *(hub / name for name in ("hub", "datasets", "modules")),
        *(Path(os.environ[name]) for name in named if os.environ.get(name)),
    ]
    return [cache.expanduser().resolve() for cache in caches]


def run_file(function: Function, source: str) -> types.ModuleType:
    """The file as a module, run from its source, so that it is what was hashed.

    Raises:
        DataError: an error in the file, with its line.
    """
    name = f"chatfine_custom_{hashlib.sha256(str(function.path).encode()).hexdigest()[:12]}"
    module = types.ModuleType(name)
    module.__file__ = str(function.path)
    sys.modules[name] = module  # dataclasses and pickles look a class's module up
    if str(function.path.parent) not in sys.path:
        sys.path.append(str(function.path.parent))  # it may import what lies beside it
    with users_code(function):
        code = compile(source, str(function.path), "exec", dont_inherit=True)
        exec(code, module.__dict__)
    return module


def function_in(module: types.ModuleType, function: Function) -> Callable[..., Any]:
    """The function of that name, which takes three arguments.

    Raises:
        DataError: there is none, or it takes others.
    """
    found: Callable[..., Any] | None = getattr(module, function.name, None)
    if not callable(found):
        names = [
            name
            for name, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
        ]
        near = did_you_mean(function.name, names)
        example = f"{function.path.name}:{names[0] if names else 'FUNCTION'}"
        raise DataError(
            "data-no-function",
            t("{path} has no function {name}", path=function.path, name=function.name),
            why=t("it has: {names}", names=", ".join(names)) if names else None,
            fix=near or t("name it: {example}", example=example),
        )
    try:
        inspect.signature(found).bind(None, None, "")
    except TypeError as error:
        raise DataError(
            "data-function-arguments",
            t("the function {name} can't be called with three arguments", name=function.name),
            where=str(function),
            why=str(error),
            fix=t("define it as {example}",
                  example=f"def {function.name}(dataset_config, tokenizer, split)"),
        ) from None  # fmt: skip
    except ValueError:  # no signature is known
        pass
    return found


@contextlib.contextmanager
def users_code(function: Function, split: str = "") -> Iterator[None]:
    """Errors in it become ours, with their line; what it prints goes to stderr.

    `split` is what the function was called with, "" while its file is being run.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except ChatfineError:
        raise
    except (Exception, SystemExit) as error:  # data must not end the program either
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename == str(function.path)]
        how = f"{function.name}(dataset_config, tokenizer, {split!r})"
        raise DataError(
            "data-function-failed",
            t("{kind} in {file}: {message}", kind=type(error).__name__, file=function.path.name,
              message=error),
            where=f"{function.path}:{own[-1].lineno}" if own else str(function),
            why=t("it was called as {call}", call=how) if split else None,
            fix=t("see that line; --debug shows all that led to it"),
        ) from error  # fmt: skip
