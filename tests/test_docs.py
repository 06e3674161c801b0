"""The documents' own commands: each parses as it stands, and both languages show the same ones."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from chatfine import cli
from chatfine.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
READMES = (ROOT / "README.md", ROOT / "README.en.md")
FIRST = "python -m pip install -e . && chatfine demo"
SECOND = 'python -m pip install -e ".[test]" && pytest'


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path) -> list[str]:
    """The commands in fenced bash blocks."""
    found = re.findall(r"```bash\n(.*?)```", read(path), re.DOTALL)
    return [line for block in found for line in block.strip().splitlines()]


def commands(path: Path) -> list[list[str]]:
    """Every chatfine command line, in blocks or in `…`, as words after `chatfine`."""
    text = read(path)
    fenced = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    inline = re.findall(r"`(chatfine [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = [line for block in fenced for line in block.strip().splitlines()] + inline
    pieces = [part.strip() for line in lines for part in line.split("&&")]
    pieces = [part.partition(" -m ")[2] if part.startswith("torchrun") else part for part in pieces]
    return [
        shlex.split(part)[1:] for part in pieces if part.startswith("chatfine ") and "…" not in part
    ]


def pages() -> list[Path]:
    log = ROOT / "docs" / "LOG.md"  # a diary: its commands are history
    return [*READMES, *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page != log)]


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_parse(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = "model: smollm2-135m-instruct\ndataset: dialogs\noutput: my-run\n"
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    for words in commands(path):
        if len(words) == 1 and words[0] in cli.COMMANDS:
            continue  # a command named in a sentence
        try:
            values, where = cli.settings(words[0], words[1:])
            cli.COMMANDS[words[0]].config_class().read(values, where)
        except (UsageError, KeyError) as error:
            pytest.fail(f"chatfine {' '.join(words)}: {error}")


def test_the_examples_in_the_help_parse() -> None:
    for name, command in cli.COMMANDS.items():
        words = shlex.split(command.example)
        assert words[:2] == ["chatfine", name]
        command.config_class().read(*cli.settings(name, words[2:]))


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_the_first_screen_has_exactly_the_two_commands(path: Path) -> None:
    first_screen = read(path).partition("\n## ")[0]
    assert re.findall(r"```bash\n(.*?)\n```", first_screen, re.DOTALL) == [FIRST, SECOND]
    assert len(first_screen.splitlines()) <= 24


def test_ci_runs_the_readmes_test_command() -> None:
    lines = [line.strip() for line in read(ROOT / ".ci" / "run").splitlines()]
    install, test = SECOND.split(" && ")
    assert any(
        line.startswith("python -m pip install") and line.endswith('-e ".[test]"') for line in lines
    )
    assert install.endswith('-e ".[test]"')
    assert lines[-1] == test


def test_both_readmes_show_the_same() -> None:
    chinese, english = ([" ".join(words[:2]) for words in commands(path)] for path in READMES)
    assert chinese == english
    for mark in ("\n## ", "\n| ", "\n**", "```"):
        assert read(READMES[0]).count(mark) == read(READMES[1]).count(mark), mark


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_recipes_hold_settings_that_exist(recipe: Path) -> None:
    from chatfine.config import TrainConfig, load_yaml

    assert TrainConfig.read(load_yaml(recipe), str(recipe)).model
    assert recipe.read_text(encoding="utf-8").startswith("#")


def test_the_demos_recipe_is_the_demos_run() -> None:
    from chatfine.commands.demo import demo_config
    from chatfine.config import DemoConfig, TrainConfig, load_yaml

    recipe = TrainConfig.read(load_yaml(ROOT / "recipes" / "dialogs.yaml"))
    demo = demo_config(DemoConfig())
    assert recipe == demo.model_copy(update={"output": recipe.output})
