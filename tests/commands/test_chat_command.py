"""`chatfine chat` with all its ways to ask, and what it refuses before torch is imported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from chatfine import console
from chatfine.commands import chat as chat_module
from chatfine.commands.chat import chat
from chatfine.commands.opened import open_source
from chatfine.config import ChatConfig
from chatfine.errors import DataError, ModelError, OutputError, TokenizerError, UsageError
from chatfine.model import load as load_module
from chatfine.model.adapters import load_adapter
from chatfine.model.generate import Sampling
from chatfine.model.load import load_model
from chatfine.serve.speaker import Speaker
from chatfine.tokenizer.encode import ChatTokenizer
from chatfine.types import Message


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "write", lambda text: None)
    monkeypatch.setattr(console, "say", lambda text="", style=None: None)


def ask(model: Path, **settings: Any) -> dict[str, Any]:
    values = {"model": str(model), "max_new_tokens": 10, "dtype": "fp32", "device": "cpu"}
    return chat(ChatConfig.read(values | settings))


def test_a_run_answers_with_its_adapter_and_its_system_prompt(
    run: Path, tiny: Path, quiet: None
) -> None:
    tuned = load_adapter(load_model(tiny, torch.float32), run / "adapter")
    voice = Speaker("run", tuned, ChatTokenizer.load(tiny), Sampling(10))
    wanted = voice.reply([Message("system", "Be brief."), Message("user", "Who?")]).text
    assert ask(run, prompt="Who?") == {"question": "Who?", "answer": wanted}
    assert ask(run / "adapter", prompt="Who?")["answer"] == wanted
    assert ask(tiny, prompt="Who?")["answer"] != wanted


def test_comparing_with_the_base_loads_it_once(
    run: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    loads: list[Path] = []
    original = load_module.load_model
    monkeypatch.setattr(
        load_module, "load_model", lambda path, *rest: loads.append(path) or original(path, *rest)
    )
    console.console.cache_clear()
    both = ask(run, prompt="Who?", compare=str(tiny))
    assert loads == [tiny]
    assert both["answer"] == ask(run, prompt="Who?")["answer"]
    assert both["answer_compare"] == ask(tiny, prompt="Who?", system="Be brief.")["answer"]
    assert both["answer"] != both["answer_compare"]
    console.console.cache_clear()


def test_prompt_file(run: Path, tiny: Path, tmp_path: Path, quiet: None) -> None:
    file = tmp_path / "chat.json"
    dialogues = [
        [{"role": "user", "content": "你好"}],
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
    ]
    file.write_text(json.dumps(dialogues), encoding="utf-8")
    found = ask(run, prompt_file=str(file))["answers"]
    assert found[0]["answer"] == ask(run, prompt="你好")["answer"]
    assert len(found) == 2
    file.write_text(json.dumps(dialogues[0]), encoding="utf-8")  # one dialogue instead of a list
    assert ask(run, prompt_file=str(file))["answers"] == found[:1]


def test_input_to_output_keeps_fields_and_order(tiny: Path, tmp_path: Path, quiet: None) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows: list[dict[str, Any]] = [
        {"id": number, "prompt": "word " * count} for number, count in enumerate([9, 1, 5, 3])
    ]
    rows.append({"messages": [{"role": "user", "content": "小明"}], "tag": None})
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = ask(tiny, input=str(source), output=str(target), batch_size=2)
    assert result == {"answered": 5, "resumed": 0, "output": str(target)}
    written = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert [{k: v for k, v in row.items() if k != "answer"} for row in written] == rows
    assert written[1]["answer"] == ask(tiny, prompt="word ")["answer"]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    with pytest.raises(OutputError, match="exists"):
        ask(tiny, input=str(source), output=str(target))


def test_an_interrupted_answers_file_goes_on(
    tiny: Path, tmp_path: Path, quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(f'{{"prompt": "number {n}"}}\n' for n in range(9)))
    settings = {"input": str(source), "batch_size": 1, "temperature": 1.0}
    ask(tiny, **settings, output=str(tmp_path / "whole.jsonl"))

    original = Speaker.answers
    calls: list[int] = []

    def breaks(self: Speaker, *rest: Any) -> list[str]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *rest)

    monkeypatch.setattr(Speaker, "answers", breaks)
    target = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        ask(tiny, **settings, output=str(target))
    assert not target.exists()
    partial = next(tmp_path.glob(".out.jsonl.*.partial"))
    assert partial.read_bytes().count(b"\n") == 4
    with partial.open("ab") as file:  # the machine went down in the middle of a line
        file.write(b'{"prompt": "num')
    assert ask(tiny, **settings, output=str(target))["resumed"] == 4
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("content", "code", "where"),
    [
        (b'{"prompt": "a"}\n{"prompt" "b"}\n', "data-bad-json", "in.jsonl:2"),
        (b'{"prompt": "a"}\n{"question": "b"}\n', "no-question", "in.jsonl:2"),
        (b'{"prompt": "  "}\n', "data-empty-question", "in.jsonl:1"),
        (b'{"prompt": "a", "answer": "b"}\n', "answer-taken", "in.jsonl:1"),
        (b'{"messages": [{"role": "assistant", "content": "b"}]}', "not-a-question", "in.jsonl:1"),
        ("你好，这是一个文件".encode("gbk") * 9, "data-encoding", ""),
        (b"", "no-questions", "in.jsonl"),
    ],
)
def test_bad_input_files(content: bytes, code: str, where: str, tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(content)
    with pytest.raises(DataError) as error:
        ask(tiny, input=str(source), output=str(tmp_path / "out.jsonl"))
    assert error.value.code == code
    assert where in str(error.value)
    assert [item.name for item in tmp_path.iterdir()] == ["in.jsonl"]


def test_refusals(tiny: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--prompt, --input"):
        ask(tiny, prompt="a", input="b", output="c")
    with pytest.raises(UsageError, match="go together"):
        ask(tiny, input="b")
    with pytest.raises(DataError, match="there is no file"):
        ask(tiny, prompt_file=str(tmp_path / "none.json"))
    with pytest.raises(ModelError) as missing:
        ask(tmp_path / "none", prompt="a")
    assert missing.value.code == "no-model"

    plain = tmp_path / "plain"
    shutil.copytree(tiny, plain)
    settings = json.loads((plain / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (plain / "tokenizer_config.json").write_text(json.dumps(settings))
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(TokenizerError, match="no chat template"):
        ask(plain, prompt="a")


def test_a_tokenizer_that_changed_since_training_is_noticed(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    facts = json.loads((copy / "adapter" / "chatfine.json").read_text())
    facts["canaries"] = {"Hi 你好": [1, 2, 3]}
    (copy / "adapter" / "chatfine.json").write_text(json.dumps(facts))
    with pytest.raises(TokenizerError, match=r"in training it was \[1, 2, 3\]") as error:
        ask(copy, prompt="a")
    assert error.value.code == "tokenizer-changed"


def test_an_adapter_on_another_base_is_refused(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    facts = json.loads((copy / "adapter" / "chatfine.json").read_text())
    (copy / "adapter" / "chatfine.json").write_text(json.dumps(facts | {"base_digest": "0" * 64}))
    with pytest.raises(ModelError, match="is not the model that the adapter was trained on"):
        ask(copy, prompt="a")


def test_the_template_of_the_run_is_used(run: Path, tiny: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    facts = json.loads((copy / "adapter" / "chatfine.json").read_text())
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    facts["template"] = template
    (copy / "adapter" / "chatfine.json").write_text(json.dumps(facts))
    assert open_source(str(copy)).tokenizer.template == template
    assert open_source(str(run)).tokenizer.template == ChatTokenizer.load(tiny).template


def test_refusals_come_before_torch(tiny: Path, run: Path, tmp_path: Path) -> None:
    """Each command refuses bad input without having imported torch or transformers."""
    script = f"""
import sys
from chatfine.errors import ChatfineError
from chatfine.config import ChatConfig, EvalConfig, MergeConfig
from chatfine.commands.chat import chat
from chatfine.commands.eval import evaluate
from chatfine.commands.merge import merge
for call, config in (
    (chat, ChatConfig(model={str(tiny)!r}, prompt_file="none.json")),
    (chat, ChatConfig(model="no-such-model")),
    (evaluate, EvalConfig(model={str(tiny)!r}, dataset="none.jsonl")),
    (merge, MergeConfig(run={str(tiny)!r}, output="out")),
    (merge, MergeConfig(run={str(run)!r}, output={str(run)!r})),
):
    try:
        call(config)
    except ChatfineError as error:
        assert error.exit_code == 2, error
        print(error.code)
heavy = {{"torch", "transformers", "peft"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False,
        env={"PYTHONPATH": str(Path(chat_module.__file__).parents[2]), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    wanted = "no-questions-file no-model no-dataset nothing-to-merge output-is-input"
    assert done.stdout.split() == wanted.split()
