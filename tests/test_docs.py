"""The documents' own commands: each parses as it stands, and both languages show the same ones."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from command_lines import check, in_blocks, in_header, in_prose

from chatfine import cli
from chatfine.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
READMES = (ROOT / "README.md", ROOT / "README.en.md")
FIRST = "python -m pip install -e . && chatfine demo"
SECOND = 'python -m pip install -e ".[test]" && pytest'
RECIPES = sorted((ROOT / "recipes").iterdir())
HEADERS = [*RECIPES, ROOT / "datasets_processing" / "README.md"]


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def pages() -> list[Path]:
    log = ROOT / "docs" / "LOG.md"  # a diary: its commands are history
    return [*READMES, *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page != log)]


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of somebody who types the commands."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    recipe = "model: smollm2-135m-instruct\ndataset: dialogs\noutput: my-run\n"
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    (tmp_path / "chat_7b_hf").mkdir()
    config = {"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096,
              "intermediate_size": 11008, "num_attention_heads": 32,
              "vocab_size": 32000}  # fmt: skip
    (tmp_path / "chat_7b_hf" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def understood(lines: list[str]) -> None:
    wrong = []
    for line in lines:
        try:
            check(line)
        except (UsageError, KeyError, AssertionError, SystemExit) as error:
            wrong.append(f"{line}: {error}")
    assert wrong == []


@pytest.mark.parametrize("path", pages(), ids=short)
def test_commands_parse(path: Path, reader: Path) -> None:
    understood(in_blocks(read(path)) + in_prose(read(path)))


@pytest.mark.parametrize("path", HEADERS, ids=short)
def test_the_commands_in_a_header_parse(path: Path, reader: Path) -> None:
    lines = in_header(read(path))
    assert lines
    understood(lines)


@pytest.mark.parametrize(
    "line",
    [
        "chatfine train -m m -d d --epohcs 3",
        "chatfine no-such-command x",
        "chatfine train recipes/no-such.yaml",
        "python -m finetuning --use_perf --model_name m",
        "python -m finetuning --use_peft",
        "python merge.py --output_dri x",
        "python no_such.py",
        "python recipes/ray_train.py -m m -d d",
        "python recipes/ray_train.py --workers 2 -m m -d d --epohcs 3",
        "torchrun --nproc 2x finetuning.py --model_name m",
        "torchrun --nproc_per_node 2 -m chatfine train -m m -d d --shardign full",
        "sbatch recipes/slurm.sh my-run recipes/llama2_7b_fsdp.yaml --no-such-flag 1",
        "frobnicate --now",
    ],
)
def test_a_stale_command_would_be_seen(line: str, reader: Path) -> None:
    with pytest.raises(AssertionError):
        understood([line])


@pytest.mark.parametrize("path", [*pages(), *HEADERS], ids=short)
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", read(path))
    gone = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert gone == []


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


def likeness(line: str) -> list[str]:
    """A command without what is translated in it."""
    words = shlex.split(line)
    return words[:2] + [word for word in words if word.startswith("-")]


CHINESE = [READMES[0], *sorted((ROOT / "docs" / "zh").glob("*.md"))]


@pytest.mark.parametrize("path", CHINESE, ids=short)
def test_both_languages_show_the_same_commands(path: Path) -> None:
    english = READMES[1] if path == READMES[0] else ROOT / "docs" / "en" / path.name
    mine, other = ([likeness(line) for line in in_blocks(read(one))] for one in (path, english))
    assert mine == other
    mine, other = ({str(likeness(line)) for line in in_prose(read(one)) if " -" in line}
                   for one in (path, english))  # fmt: skip
    assert mine == other
    for mark in ("\n#", "\n| ", "\n- ", "```"):
        assert read(path).count(mark) == read(english).count(mark), mark


def test_both_readmes_show_the_same() -> None:
    for mark in ("\n## ", "\n| ", "\n**", "```"):
        assert read(READMES[0]).count(mark) == read(READMES[1]).count(mark), mark


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=short)
def test_recipes_hold_settings_that_exist(recipe: Path) -> None:
    from chatfine.config import TrainConfig, load_yaml

    assert TrainConfig.read(load_yaml(recipe), str(recipe)).model
    header = [line for line in read(recipe).splitlines() if line.startswith("#")]
    chinese = [line for line in header if re.search(r"[\u4e00-\u9fff]{4}", line)]
    assert chinese, "in both languages"
    assert len(header) > len(chinese) + 2


def test_the_demos_recipe_is_the_demos_run() -> None:
    from chatfine.commands.demo import demo_config
    from chatfine.config import DemoConfig, TrainConfig, load_yaml

    recipe = TrainConfig.read(load_yaml(ROOT / "recipes" / "dialogs.yaml"))
    demo = demo_config(DemoConfig())
    assert recipe == demo.model_copy(update={"output": recipe.output})
