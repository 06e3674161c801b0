"""chatfine: fine-tune a chat model, from nothing to talking with your own.

    import chatfine as cf
    run = cf.train(model="smollm2-135m-instruct", dataset="dialogs", output="my-run")
    cf.merge(run="my-run", output="my-model")
    cf.chat(model="my-model", prompt="Who are you?")

Every function takes the settings of the command of the same name as keyword arguments and returns
what the command prints with `--json`.
"""

import sys

# Before anything newer: Python 3.6 must be able to read this file, so it has no __future__ import.
if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit("chatfine 需要 Python 3.10 或更新的版本 / chatfine needs Python 3.10 or newer")

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chatfine.api import (
        chat,
        check_data,
        convert,
        demo,
        doctor,
        download,
        evaluate,
        expand_vocab,
        merge,
        models,
        plan,
        resume,
        tokens,
        train,
    )
    from chatfine.errors import ChatfineError
    from chatfine.tokenizer.encode import ChatTokenizer
    from chatfine.types import Message

__version__ = "0.1.0"

__all__ = [
    "ChatTokenizer",
    "ChatfineError",
    "Message",
    "chat",
    "check_data",
    "convert",
    "demo",
    "doctor",
    "download",
    "evaluate",
    "expand_vocab",
    "merge",
    "models",
    "plan",
    "resume",
    "tokens",
    "train",
]

_ELSEWHERE = {
    "ChatTokenizer": "chatfine.tokenizer.encode",
    "ChatfineError": "chatfine.errors",
    "Message": "chatfine.types",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used, so that `import chatfine` costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ELSEWHERE.get(name, "chatfine.api")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _CallableRoom(ModuleType):
    """A room that shares its name with a verb (`chatfine.train`): calling it calls the verb."""

    def __call__(self, *args: Any, **settings: Any) -> Any:
        api = importlib.import_module("chatfine.api")
        return getattr(api, self.__name__.rpartition(".")[2])(*args, **settings)


class _Package(ModuleType):
    """This package; without it, importing the room `chatfine.train` would hide the verb `train`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in __all__ and isinstance(value, ModuleType):
            value.__class__ = _CallableRoom
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
