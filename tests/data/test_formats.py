"""Shapes of rows, and everything a dialogue must not be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chatfine.data import builtin
from chatfine.data.dialogues import DataSettings, load_dialogues
from chatfine.data.formats import Templates, detect, to_dialogue
from chatfine.data.rows import Row
from chatfine.errors import DataError, UsageError
from chatfine.types import Dialogue


def dialogue(values: dict[str, Any], system: str = "") -> Dialogue:
    return to_dialogue(Row("f", 1, values), detect(values), system)


def flat(values: dict[str, Any], system: str = "") -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in dialogue(values, system).messages]


ROLE = '"role"'
SYSTEM = {"role": "system", "content": "s"}
TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
PAIR = [("user", "Q"), ("assistant", "A")]


@pytest.mark.parametrize(
    "values",
    [
        {"messages": TURNS, "id": 3},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"conversations": TURNS},
        {"instruction": "Q", "input": "", "output": "A", "history": []},
        {"instruction": "", "input": "Q", "output": "A", "system": None},
        {"prompt": "Q", "completion": "A"},
        {"prompt": "Q", "response": "A"},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"question": "Q", "answer": "A", "user": "17"},
        {"query": "Q", "response": "A"},
        {"department": "x", "title": "y", "ask": "Q", "answer": "A"},
        {"问题": "Q", "回答": "A"},
        {"Question": "Q", "Answer": "A"},
        {"messages": [*TURNS, {"role": "user", "content": "never answered"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, TURNS[1]]},
    ],
)
def test_shapes_that_mean_one_question_and_answer(values: dict[str, Any]) -> None:
    assert flat(values) == PAIR


def test_history_input_and_system_keep_their_order() -> None:
    row = {"instruction": "Q2", "input": "more", "output": "A2", "history": [["Q", "A"]]}
    assert flat(row) == [*PAIR, ("user", "Q2\nmore"), ("assistant", "A2")]
    assert flat(row | {"system": "S"}, system="other")[0] == ("system", "S")
    assert flat({"messages": TURNS}, system="S") == [("system", "S"), *PAIR]


def test_tool_turns_are_known() -> None:
    names = ["human", "function_call", "observation", "gpt"]
    row = {"conversations": [{"from": name, "value": name} for name in names]}
    assert [role for role, _ in flat(row)] == ["user", "assistant", "tool", "assistant"]


def test_summary_is_asked_in_the_language_of_the_dialogue() -> None:
    english, chinese = (
        flat({"dialogue": "A: hi", "summary": "s"}),
        flat({"对话": "甲：你好", "摘要": "s"}),
    )
    assert english[0] == ("user", "Summarize the dialogue.\n\nA: hi")
    assert chinese[0] == ("user", "总结这段对话。\n\n甲：你好")


def test_text_is_plain() -> None:
    found = dialogue({"path": "x", "text": "words"}, system="not for running text")
    assert found.plain
    assert [turn.content for turn in found.messages] == ["words"]


def test_templates_take_data_literally() -> None:
    values = {"d": "{r} {d} \\n {{x}} \\1", "r": "}{", "n": 3}
    found = to_dialogue(Row("f", 1, values), Templates("{{S}} {n}:\\n{d}", "{r}"))
    assert found.messages[0].content == "{S} 3:\n{r} {d} \\n {{x}} \\1"
    assert found.messages[1].content == "}{"


def test_templates_need_each_other_and_their_columns(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--response is missing"):
        Templates("{a}", "")
    path = tmp_path / "a.csv"
    path.write_text("dialogue,section_text\n" + "a,b\n" * 50, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_dialogues(str(path), DataSettings(prompt="{dialog}", response="{section_text}"))
    assert caught.value.code == "data-missing-field"
    assert "did you mean dialogue?" in caught.value.fix
    assert "problems" not in caught.value.what, "one sentence, not fifty"


@pytest.mark.parametrize(
    ("values", "code", "key"),
    [
        ({"messages": [TURNS[0], TURNS[0], TURNS[1]]}, "data-two-turns", '"role": "user"'),
        ({"messages": [*TURNS, TURNS[1]]}, "data-two-turns", None),
        ({"messages": [{"role": "usr", "content": "Q"}, TURNS[1]]}, "data-unknown-role", ROLE),
        ({"messages": [TURNS[0], {"role": "assistant", "content": " \n"}]}, "data-empty-answer",
         '"role": "assistant"'),
        ({"messages": TURNS[:1]}, "data-no-answer", ROLE),
        ({"messages": TURNS[1:]}, "data-turn-order", ROLE),
        ({"messages": [TURNS[0], SYSTEM, TURNS[1]]}, "data-turn-order", None),
        ({"messages": [TURNS[0], {"role": "assistant"}]}, "data-missing-field", None),
        ({"messages": [TURNS[0], {"role": "assistant", "content": 3}]}, "data-wrong-type", None),
        ({"messages": "Q"}, "data-wrong-type", '"messages"'),
        ({"messages": []}, "data-wrong-type", '"messages"'),
        ({"question": "Q", "answer": ""}, "data-empty-answer", '"answer"'),
        ({"question": "Q", "answer": None}, "data-wrong-type", '"answer"'),
        ({"question": " ", "answer": "A"}, "data-empty-question", '"question"'),
        ({"question": "Q", "answer": "\ud83d"}, "data-half-character", '"answer"'),
        ({"instruction": "Q", "output": "A", "history": [["one"]]}, "data-wrong-type", '"history"'),
        ({"instruction": "", "input": "", "output": "A"}, "data-empty-question", None),
        ({"text": "  "}, "data-empty-text", '"text"'),
        ({"chosen": "x", "rejected": "y", "prompt": "z"}, "data-preferences", None),
        ({"foo": "x", "bar": "y"}, "data-unknown-shape", None),
        ({"query": "x", "ask": "y", "reply": "z"}, "data-ambiguous", None),
    ],
)  # fmt: skip
def test_bad_rows_have_a_code_a_column_and_a_remedy(
    tmp_path: Path, values: dict[str, Any], code: str, key: str | None
) -> None:
    line = json.dumps(values)
    path = tmp_path / "a.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_dialogues(str(path), DataSettings())
    error = caught.value
    assert error.code == code
    assert error.fix
    place = (error.where or "").removeprefix(f"{path}:").split(":")
    assert place[0] == "1"
    if key is not None:
        column = line.rindex(key) + 1 if code == "data-two-turns" else line.index(key) + 1
        assert place == ["1", str(column)]
    else:
        assert int(place[1]) >= 1


def test_one_odd_row_does_not_decide_the_shape(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"questoin": "Q", "answer": "A"}] + [{"question": "Q", "answer": "A"}] * 5
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_dialogues(str(path), DataSettings())
    assert caught.value.code == "data-missing-field"
    assert (caught.value.where or "").endswith(":1:1")
    assert caught.value.fix[0] == "did you mean questoin?"


def test_builtin_sets() -> None:
    settings = DataSettings(name="{author}", author="B\\1")
    for split, count in (("train", 250), ("validation", 20), ("test", 30)):
        found = load_dialogues("dialogs", settings, split)
        assert len(found) == count
        chinese = sum(builtin.REQUESTS["zh"] in one.messages[0].content for one in found)
        assert chinese == count // 2
    answers = [one.messages[-1].content for one in load_dialogues("identity", settings, "test")]
    assert len(answers) == 20
    assert any("{author}" in text for text in answers), "a name is put in literally"
    assert not any("{name}" in text for text in answers)
    seen: set[str] = set()
    for split in ("train", "validation", "test"):
        rows = {one.messages[0].content for one in load_dialogues("dialogs", settings, split)}
        assert not rows & seen, "no dialogue stands in two splits"
        seen |= rows


@pytest.mark.parametrize(
    ("path", "settings", "count"),
    [
        ("mts_dialog", {"prompt": "Summarize:\\n{dialogue}", "response": "{section_text}"}, 1201),
        ("oasst_sft_zh", {}, 689),
        ("toyhom_med_zh", {}, 6886),
        ("glaive_toolcall_zh", {}, 300),
        ("zh_rust_book", {}, 103),
    ],
)
def test_real_data(shared: Path, path: str, settings: dict[str, str], count: int) -> None:
    found = load_dialogues(
        str(shared / "data" / path), DataSettings(validation="0", **settings), "train"
    )
    assert len(found) == count
