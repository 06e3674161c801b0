"""The files beside the package that the tutorial's reader meets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from chatfine.data.dialogues import DataSettings, load_dialogues
from chatfine.data.examples import load_examples
from chatfine.data.tokenise import encode_one
from chatfine.errors import DataError
from chatfine.serve.questions import read_questions
from chatfine.tokenizer.encode import ChatTokenizer

ROOT = Path(__file__).resolve().parents[2]
RECORDS = [{"question": f" 第{i}个问题？", "answer": f"回答{i}。"} for i in range(250)]

Encoded = set[tuple[tuple[int, ...], tuple[bool, ...]]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the shipped function and its data as `write` puts it."""
    monkeypatch.setenv("CHATFINE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "here" / "datasets_processing"
    (folder / "personal_dataset").mkdir(parents=True)
    shutil.copy(ROOT / "datasets_processing" / "qa_huatuo.py", folder)
    monkeypatch.chdir(folder.parent)
    return folder / "personal_dataset" / "format_data.json"


@pytest.fixture(params=["tiny", "llama2_hf"])
def folder(request: pytest.FixtureRequest, tiny: Path) -> Path:
    if request.param == "tiny":
        return tiny
    shared: Path = request.getfixturevalue("shared")
    found = shared / "tokenizers" / request.param
    if not found.is_dir():
        pytest.skip("the Llama 2 tokenizer is not here")
    return found


def examples(dataset: str, tokenizer: ChatTokenizer, train_on: str) -> Encoded:
    """All of both splits; without white space at the end, and white space counted as not learned.

    Which of a prompt's last spaces is learned differs: nothing is read or said by it.
    """
    found: Encoded = set()
    for split in ("train", "validation"):
        settings = DataSettings(train_on=train_on)
        for dialogue in load_dialogues(dataset, settings, split, tokenizer):
            one = encode_one(dialogue, tokenizer, train_on)
            ids = list(map(int, one.ids))
            blank = [not tokenizer.decode([token], keep_control=True).strip() for token in ids]
            while blank[-1]:
                blank.pop()
            mask = [bool(on) and not empty for on, empty in zip(one.mask, blank, strict=False)]
            found.add((tuple(ids[: len(blank)]), tuple(mask)))
    return found


@pytest.mark.parametrize("train_on", ["answers", "all"])
@pytest.mark.parametrize("template", ["model", "plain"])
def test_the_shipped_function_gives_what_chatfine_itself_would(
    here: Path, folder: Path, template: str, train_on: str
) -> None:
    stripped = [{key: text.strip() for key, text in one.items()} for one in RECORDS]
    here.write_text(json.dumps(stripped, ensure_ascii=False), encoding="utf-8")
    tokenizer = ChatTokenizer.load(folder, template)
    own = examples("custom_dataset", tokenizer, train_on)
    assert own == examples("huatuo", tokenizer, train_on)
    assert len(own) == 250


def test_it_learns_the_answer_and_its_end(here: Path, tiny: Path) -> None:
    here.write_text(json.dumps(RECORDS[:2], ensure_ascii=False), encoding="utf-8")
    tokenizer = ChatTokenizer.load(tiny)
    (found,) = load_examples(["custom_dataset"], tokenizer, DataSettings(validation="0")).train
    ids, mask = map(list, (found[0].ids, found[0].mask))
    learned = [int(token) for token, on in zip(ids, mask, strict=True) if on]
    assert tokenizer.decode(learned, keep_control=True) in (
        "回答0。<|im_end|>",
        "回答1。<|im_end|>",
    )


def test_one_hundredth_validates_and_always_the_same(here: Path, tiny: Path) -> None:
    tokenizer = ChatTokenizer.load(tiny)
    lines = "\n".join(json.dumps(one, ensure_ascii=False) for one in RECORDS)
    here.write_text(lines, encoding="utf-8-sig")  # JSON lines, with Windows' mark
    counts, held = [], []
    for seed in (1, 2):
        found = load_examples(["custom_dataset"], ChatTokenizer.load(tiny), DataSettings(seed=seed))
        assert found.validation is not None
        counts.append((len(found.train[0]), len(found.validation)))
        held.append([tokenizer.decode(one.ids) for one in found.validation])
    assert counts == [(248, 2)] * 2
    assert held[0] == held[1]


def test_it_reads_toyhom_as_it_is(here: Path, shared: Path, tiny: Path) -> None:
    source = shared / "data" / "toyhom_med_zh" / "train.jsonl"
    lines = source.read_text(encoding="utf-8").splitlines()[:40]
    here.write_text("\n".join(lines), encoding="utf-8")
    tokenizer = ChatTokenizer.load(tiny)
    assert examples("custom_dataset", tokenizer, "answers") == examples(
        "huatuo", tokenizer, "answers"
    )


def test_without_data_it_says_what_is_wanted(here: Path, tiny: Path) -> None:
    with pytest.raises(DataError, match="FileNotFoundError") as caught:
        load_examples(["custom_dataset"], ChatTokenizer.load(tiny), DataSettings())
    said = str(caught.value)
    assert str(here) in said
    assert '{"question": "' in said
    assert "YOUR_FILE.jsonl" in said
    assert "qa_huatuo.py:" in str(caught.value.where)


def test_prompt_files(tiny: Path) -> None:
    (mayonnaise,) = read_questions(ROOT / "chat.json")
    assert "mayonnaise" in mayonnaise.messages[0].content
    (summary,) = read_questions(ROOT / "chat1.json")
    rows = (ROOT / "chatfine" / "data" / "dialogs" / "train.jsonl").read_text(encoding="utf-8")
    dialogues = [json.loads(line)["dialogue"] for line in rows.splitlines()]
    request, dialogue = summary.messages[0].content.split("\n\n")
    assert dialogue in dialogues
    assert request == "Summarize the dialogue."  # as samsum asks
    for name in ("chat.json", "chat1.json"):
        found = json.loads((ROOT / name).read_text(encoding="utf-8"))
        assert [[set(turn) for turn in one] for one in found] == [[{"role", "content"}]]


def test_personal_data_is_not_committed() -> None:
    folder = ROOT / "datasets_processing" / "personal_dataset"
    assert (folder / ".gitignore").read_text(encoding="utf-8").split() == ["*", "!.gitignore"]
    assert (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n") == ["-e .", ""]
