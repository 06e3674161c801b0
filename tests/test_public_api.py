"""`import chatfine as cf`: few names, typed, lazy, and the same verbs as the command line."""

from __future__ import annotations

import inspect
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import chatfine as cf
from chatfine import api, cli
from chatfine.errors import UsageError


def run(code: str) -> str:
    """What a fresh Python prints for `code`."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, check=True, cwd=Path(cf.__file__).parents[1],
    )  # fmt: skip
    return done.stdout.strip()


def test_importing_loads_nothing_heavy() -> None:
    code = """
        import sys, chatfine as cf
        heavy = {"torch", "transformers", "pydantic", "rich", "yaml", "numpy", "tokenizers"}
        print(sorted(heavy & set(sys.modules)))
    """
    assert run(code) == "[]"


def test_every_name_is_there_and_no_other() -> None:
    for name in cf.__all__:
        assert callable(getattr(cf, name)), name
    assert set(cf.__all__) <= set(dir(cf))
    with pytest.raises(AttributeError, match="trane"):
        cf.trane  # type: ignore[attr-defined]  # noqa: B018


def test_every_function_is_documented_and_annotated() -> None:
    for name in cf.__all__:
        function = getattr(api, name, None)
        if inspect.isfunction(function):
            assert function.__doc__, name
            assert "return" in function.__annotations__, name


def test_every_command_has_a_function() -> None:
    other = {"eval": "evaluate", "data": "check_data", "expand-vocab": "expand_vocab"}
    assert {other.get(name, name) for name in cli.COMMANDS} <= set(cf.__all__)


def test_a_room_with_a_verbs_name_can_still_be_called() -> None:
    """Importing chatfine.train (the room) puts a module where the verb was; both must work."""
    code = """
        import chatfine as cf
        from chatfine.errors import UsageError
        before = cf.train
        import chatfine.train, chatfine.evaluate
        from chatfine import train
        for call in (before, cf.train, train, chatfine.train):
            try:
                call(model="m", dataset="d", lr=1)
            except UsageError as error:
                print(error.code, chatfine.train.__path__ is not None)
    """
    assert run(code).splitlines() == ["unknown-setting True"] * 4


def test_settings_reach_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def fake(name: str, values: dict[str, Any]) -> dict[str, Any]:
        seen.update(values, command=name)
        return {"run": "r"}

    monkeypatch.setattr(api, "call", fake)
    result = api.train(model=tmp_path, dataset=[tmp_path / "a", "b"], max_length=128, output=None)
    assert result == {"run": "r"}
    assert seen == {
        "command": "train", "model": str(tmp_path), "dataset": [str(tmp_path / "a"), "b"],
        "max_length": 128,
    }  # fmt: skip
    api.download("some-name")
    assert seen["name"] == "some-name"


def test_wrong_settings_are_refused_as_on_the_command_line() -> None:
    with pytest.raises(UsageError) as caught:
        cf.train(model="m", dataset="d", lr=1e-3)
    assert caught.value.fix == ("did you mean learning_rate?",)
    with pytest.raises(UsageError, match=r"--rank is 0; it must be > 0"):
        cf.train(model="m", dataset="d", rank=0)
