"""The command line: parsing, help, refusals, exit codes, both output forms."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatfine import cli, flags, helptext
from chatfine.config import Config, EvalConfig, TrainConfig
from chatfine.errors import DataError, Stopped, UsageError

Capture = pytest.CaptureFixture[str]
SECRET = "a-secret-that-must-not-leak"
TRAIN = ["train", "-m", "m", "-d", "d"]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Config]]:
    """Put a function in the place of a command's own; returns the list of settings it gets."""

    def install(name: str, do: Callable[[Any], dict[str, Any]] | None = None) -> list[Config]:
        seen: list[Config] = []
        module, _, function = cli.COMMANDS[name].target.partition(":")

        def run(config: Config) -> dict[str, Any]:
            seen.append(config)
            return do(config) if do else {"ok": True}

        stand_in = types.ModuleType(module)
        setattr(stand_in, function, run)
        monkeypatch.setitem(sys.modules, module, stand_in)
        return seen

    return install


def refused(capsys: Capture, *words: str) -> dict[str, Any]:
    """Run a command line that must be refused; returns the error as data."""
    assert cli.main([*words, "--json"]) == 2
    error: dict[str, Any] = json.loads(capsys.readouterr().out)
    return error


# -- parsing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--rank", "16"], {"rank": 16}),
        (["--rank=16"], {"rank": 16}),
        (["--max-length", "9", "--max_length=10"], {"max_length": 10}),
        (["--learning-rate", "1e-3"], {"learning_rate": 1e-3}),
        (["--deterministic", "--no-overwrite"], {"deterministic": True, "overwrite": False}),
        (["--overwrite=false"], {"overwrite": False}),
        (["-d", "e", "--dataset=f", "--mix", "2,1,1"],
         {"dataset": ("d", "e", "f"), "mix": (2.0, 1.0, 1.0)}),
        (["--mix=3"], {"mix": (3.0,)}),
        (["--track", "wandb", "--track", "tensorboard"], {"track": ("wandb", "tensorboard")}),
        (["--system", "- be brief"], {"system": "- be brief"}),
        (["--system=--x"], {"system": "--x"}),
        (["--system="], {"system": ""}),
        (["--validation", "0.2"], {"validation": "0.2"}),
        (["--prompt", "问：{q}\n", "--response={a}"], {"prompt": "问：{q}\n", "response": "{a}"}),
    ],
)  # fmt: skip
def test_flags_are_read(fake: Any, words: list[str], expected: dict[str, Any]) -> None:
    (config,) = [fake("train")][0:1]
    assert cli.main([*TRAIN, *words]) == 0
    assert {name: getattr(config[0], name) for name in expected} == expected


def test_positionals_are_read(fake: Any) -> None:
    chat, tokens, data = fake("chat"), fake("tokens"), fake("data")
    assert cli.main(["chat", "my-model", "--prompt", "hi"]) == 0
    assert (chat[0].model, chat[0].prompt) == ("my-model", "hi")
    assert cli.main(["tokens", "-m", "m", "--", "--not a flag"]) == 0
    assert cli.main(["tokens", "-1 + 2", "-m", "m"]) == 0
    assert [config.text for config in tokens] == ["--not a flag", "-1 + 2"]
    assert cli.main(["data", "check", "a.jsonl", "b.jsonl", "-d", "c.jsonl", "-m", "m"]) == 0
    assert data[0].dataset == ("a.jsonl", "b.jsonl", "c.jsonl")


def test_negative_numbers_are_values_not_flags(fake: Any, capsys: Capture) -> None:
    fake("train")
    assert "--rank is -1; it must be > 0" in refused(capsys, *TRAIN, "--rank", "-1")["what"]


def test_a_recipe_and_flags_on_top(fake: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: m\ndataset: [a, b]\nvalidation: 0.1\npacking: off\nlearning-rate: 1e-3\nrank: 4\n",
        encoding="utf-8",
    )
    seen = fake("train")
    assert cli.main(["train", str(recipe), "--rank", "32", "-o", "run"]) == 0
    config = seen[0]
    assert (config.dataset, config.validation, config.packing) == (("a", "b"), "0.1", "off")
    assert (config.learning_rate, config.rank, config.output) == (1e-3, 32, "run")


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "what", "fix"),
    [
        (["trian"], "unknown-command", "trian", "did you mean train?"),
        ([*TRAIN, "--max-lenght", "5"], "unknown-flag", "--max-lenght", "--max-length?"),
        ([*TRAIN, "--max_lenght=5"], "unknown-flag", "--max_lenght", "--max-length?"),
        ([*TRAIN, "--lr", "1"], "unknown-flag", "--lr", "--learning-rate?"),
        ([*TRAIN, "--learn=1"], "unknown-flag", "--learn", "--learning-rate?"),
        ([*TRAIN, "-z"], "unknown-flag", "-z", "--help"),
        ([*TRAIN, "--rank"], "no-value", "--rank", "--rank=VALUE"),
        ([*TRAIN, "--rank", "--seed", "1"], "no-value", "--rank", "--rank=VALUE"),
        ([*TRAIN, "--no-overwrite=1"], "flag-value", "--no-overwrite", ""),
        ([*TRAIN, "--no-rank"], "unknown-flag", "--no-rank", ""),
        ([*TRAIN, "--method", "lara"], "bad-setting", "lora, dora, rows, full, freeze", "lora?"),
        (["data", "chek", "x"], "bad-setting", "check, show", "did you mean check?"),
        (["tokens", "two", "words", "-m", "m"], "extra-word", "words", "quotes"),
        (["chat", "a", "--model", "b", "c"], "extra-word", "'c'", ""),
        (["chat", "-m", "a", "b"], "given-twice", "MODEL", ""),
        (["train", "no-such.yaml"], "no-recipe", "no-such.yaml", ""),
    ],
)  # fmt: skip
def test_refusals_name_the_word_and_the_way_out(
    capsys: Capture, words: list[str], code: str, what: str, fix: str
) -> None:
    error = refused(capsys, *words)
    assert error["error"] == code
    assert what in error["what"]
    assert fix in " ".join(error["fix"])


def test_all_missing_flags_are_listed_at_once(capsys: Capture) -> None:
    error = refused(capsys, "train", "--rank", "4")
    assert error["what"] == "missing: --dataset (-d), --model (-m)"
    assert "chatfine train -m " in error["fix"][0]
    assert refused(capsys, "merge")["what"] == "missing: RUN, --output (-o)"
    assert refused(capsys, "data", "check", "-m", "m")["what"] == "missing: DATASET"


def test_all_bad_values_are_listed_at_once(capsys: Capture) -> None:
    what = refused(capsys, *TRAIN, "--rank", "x", "--keep", "1", "--dropout", "1.5")["what"]
    assert "--rank: 'x' is not usable here" in what
    assert "--keep is 1; it must be ≥ 2" in what
    assert "--dropout is 1.5; it must be < 1" in what


def test_a_wrong_key_in_a_recipe_names_the_file(capsys: Capture, tmp_path: Path) -> None:
    recipe = tmp_path / "my.yaml"
    recipe.write_text("modle: m\n", encoding="utf-8")
    error = refused(capsys, "train", str(recipe), "-d", "d")
    assert (error["error"], error["where"]) == ("unknown-setting", str(recipe))
    assert error["fix"] == ["did you mean model?"]


@pytest.mark.parametrize("text", ["a: [1", "- a\n- b", "just words", ""])
def test_a_broken_recipe_is_refused(capsys: Capture, tmp_path: Path, text: str) -> None:
    recipe = tmp_path / "my.yaml"
    recipe.write_text(text, encoding="utf-8")
    error = refused(capsys, "train", str(recipe))
    assert error["error"] == "bad-yaml"
    assert str(recipe) in error["what"]


# -- exit codes and the two output forms -----------------------------------------------------------


def test_json_is_one_object_on_stdout_and_prose_is_on_stderr(fake: Any, capsys: Capture) -> None:
    from chatfine import console

    def work(_: Config) -> dict[str, Any]:
        console.say("some prose")
        return {"name": "小凡", "loss": 1.5}

    fake("doctor", work)
    assert cli.main(["doctor", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"name": "小凡", "loss": 1.5}
    assert "some prose" in shown.err
    assert cli.main(["--json", "doctor"]) == 0  # before the command too
    assert json.loads(capsys.readouterr().out)["loss"] == 1.5
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out.strip() == "some prose"


def test_errors_keep_their_exit_code_and_say_where_why_and_what_to_do(
    fake: Any, capsys: Capture
) -> None:
    def stop(_: Config) -> dict[str, Any]:
        raise Stopped("stopped", "step 5", where="run", why="asked", fix=["chatfine resume run"])

    fake("resume", stop)
    assert cli.main(["resume", "run"]) == 75
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "error[stopped]: step 5", "  where: run", "  why:   asked", "  do:    chatfine resume run",
    ]  # fmt: skip
    assert cli.main(["resume", "run", "--json"]) == 75
    assert json.loads(capsys.readouterr().out)["exit_code"] == 75


def test_markup_in_an_error_is_shown_as_it_is(fake: Any, capsys: Capture) -> None:
    def refuse(_: Config) -> dict[str, Any]:
        raise DataError("bad", "the text [bold]x[/bold] [/INST]")

    fake("doctor", refuse)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err.strip() == "error[bad]: the text [bold]x[/bold] [/INST]"


def test_ctrl_c_is_a_sentence(fake: Any, capsys: Capture) -> None:
    def interrupt(_: Config) -> dict[str, Any]:
        raise KeyboardInterrupt

    fake("doctor", interrupt)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err.strip() == "error[interrupted]: stopped by Ctrl-C"


def test_a_bug_writes_a_report_without_secrets(
    fake: Any, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(_: Config) -> dict[str, Any]:
        return {"x": 1 / 0}

    fake("doctor", fail)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cli.main(["doctor"]) == 70
    shown = capsys.readouterr().err
    (report,) = tmp_path.iterdir()
    assert str(report) in shown
    assert "ZeroDivisionError: division by zero" in shown
    assert "Traceback" not in shown
    text = report.read_text(encoding="utf-8")
    assert "Traceback" in text
    assert "'doctor'" in text
    assert "transformers" in text
    assert SECRET not in text
    assert cli.main(["doctor", "--debug"]) == 70
    assert "Traceback" in capsys.readouterr().err


def test_a_full_disk_is_no_bug(fake: Any, capsys: Capture) -> None:
    def fill(_: Config) -> dict[str, Any]:
        raise OSError(28, "No space left on device", "/some/file")

    fake("doctor", fill)
    assert refused(capsys, "doctor")["where"] == "/some/file"


# -- help ------------------------------------------------------------------------------------------


def test_the_front_page_tells_the_story_in_order(capsys: Capture) -> None:
    assert cli.main([]) == 0
    page = capsys.readouterr().out
    places = [page.index(f"\n  {verb}") for verb in cli.COMMANDS]
    assert places == sorted(places)
    for words in (["--help"], ["-h"], ["help"]):
        assert cli.main(words) == 0
        assert capsys.readouterr().out == page
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("chatfine 0.")


@pytest.mark.parametrize("name", cli.COMMANDS)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_help_shows_every_setting(
    name: str, language: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHATFINE_LANG", language)
    monkeypatch.setenv("COLUMNS", "90")
    assert cli.main([name, "--help", "--unknown"]) == 0
    page = capsys.readouterr().out
    command = cli.COMMANDS[name]
    for flag in flags.flags_of(command.config_class()).values():
        shown = (
            flag.name.upper() if flag.name in command.positional else flag.long.removeprefix("--")
        )
        assert shown in page or all(choice in page for choice in flag.choices or ["?"]), shown
        assert flag.help, f"{flag.name} has no help"
    assert command.example in page
    assert max(map(helptext.width_of, page.splitlines())) <= 90


def test_help_shows_choices_and_defaults() -> None:
    page = " ".join(helptext.command_help(
        "train", cli.COMMANDS["train"], flags.flags_of(TrainConfig)).split())  # fmt: skip
    assert "--method lora|dora|rows|full|freeze|prefix|llama-adapter" in page
    assert "rank of the adapter [8]" in page
    assert "--[no-]overwrite replace the output folder [no]" in page
    assert "-o, --output OUTPUT" in page


def test_every_setting_of_every_command_makes_a_round_trip() -> None:
    """Each default, written as a flag, is read back as the same value."""
    command, known = cli.COMMANDS["eval"], flags.flags_of(EvalConfig)
    words = []
    for flag in known.values():
        if flag.kind == "value":
            words += [f"{flag.long}={'x' if flag.required else flag.default}"]
    values, _ = flags.parse(command, known, [*words, "-d", "x"])
    config = EvalConfig.read(values)
    for flag in known.values():
        if not flag.required:
            assert getattr(config, flag.name) == flag.default, flag.name


def test_wide_characters_are_wrapped_by_their_width() -> None:
    lines = helptext.wrap("数据集的名字，文件，或者函数 file.py:function 都可以。", 12)
    assert "".join(lines).replace(" ", "") == "数据集的名字，文件，或者函数file.py:function都可以。"
    assert all(helptext.width_of(line) <= 14 for line in lines if "file" not in line)
    assert not any(line.startswith(("，", "。")) for line in lines)


def test_flag_spellings() -> None:
    known = flags.flags_of(TrainConfig)
    assert flags.find("--max_length", known) == (known["max_length"], False)
    assert flags.find("--no-overwrite", known) == (known["overwrite"], True)
    assert flags.find("-d", known)[0].name == "dataset"
    with pytest.raises(UsageError):
        flags.find("--max", known | {})  # no abbreviations


# -- the console script ----------------------------------------------------------------------------


def script(*words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "chatfine", *words],
        capture_output=True, encoding="utf-8", timeout=60, env={**os.environ, **settings},
        cwd=Path(cli.__file__).parents[1],
    )  # fmt: skip


def test_the_front_page_loads_nothing_heavy() -> None:
    code = (
        "import sys; from chatfine.cli import main; main(['--help']);"
        "heavy = {'torch', 'transformers', 'pydantic', 'rich', 'yaml', 'numpy'} & set(sys.modules);"
        "print(sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8",
        cwd=Path(cli.__file__).parents[1],
    )  # fmt: skip
    assert done.stderr.strip() == "[]"


def test_a_refusal_is_fast_and_needs_no_torch() -> None:
    start = time.perf_counter()
    done = script("train", "-m", "m")
    assert done.returncode == 2
    assert done.stderr.startswith("error[missing-setting]:")
    assert time.perf_counter() - start < 2


def test_a_console_that_knows_no_chinese_shows_marks_not_a_crash() -> None:
    done = script("--help", CHATFINE_LANG="zh", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert "chatfine train" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGPIPE convention")
def test_a_closed_pipe_is_quiet() -> None:
    line = f"{sys.executable} -m chatfine train --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line],
        capture_output=True, encoding="utf-8", cwd=Path(cli.__file__).parents[1],
    )  # fmt: skip
    assert done.returncode in (0, 141)
    assert done.stderr == ""
