"""The data sets known by name: where they are looked for, how their rows are asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from chatfine.data import builtin, sources
from chatfine.data.dialogues import DataSettings, load_dialogues
from chatfine.data.examples import Examples, load_examples
from chatfine.errors import DataError
from chatfine.tokenizer.encode import ChatTokenizer
from chatfine.types import Dialogue

SAMSUM = [
    {"id": str(i), "dialogue": f"A: {i}?\r\nB: yes", "summary": f"B says {i}."} for i in range(9)
]
GRAMMAR = [{"input": f"he go {i}", "target": f"He goes {i}."} for i in range(9)]
ALPACA = [
    {"instruction": f"Add {i}.", "input": f"{i}" * (i % 2), "output": f"{2 * i}"} for i in range(9)
]
HUATUO = [{"question": f"感冒{i}天了怎么办？", "answer": f"多喝水，休息{i}天。"} for i in range(9)]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CHATFINE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> ChatTokenizer:
    return ChatTokenizer.load(tiny)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """As the file's ending says: a JSON list, JSON lines or a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        cells = [
            [json.dumps(str(one), ensure_ascii=False)[1:-1] for one in row.values()] for row in rows
        ]
        lines = [",".join(rows[0]), *(",".join(f'"{one}"' for one in row) for row in cells)]
        path.write_text("\n".join(lines), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def asked(one: Dialogue) -> tuple[str, str]:
    user, assistant = one.messages
    return user.content, assistant.content


def first(dataset: str, split: str = "train") -> tuple[str, str]:
    return asked(load_dialogues(dataset, DataSettings(validation="0"), split)[0])


def sizes(dataset: str, tokenizer: ChatTokenizer, **settings: Any) -> tuple[int, int]:
    found = load_examples([dataset], tokenizer, DataSettings(**settings))
    return len(found.train[0]), len(found.validation or [])


@pytest.mark.parametrize("name", ["samsum", "samsum_dataset"])
def test_samsum_of_the_original_archive(here: Path, tokenizer: ChatTokenizer, name: str) -> None:
    for file, count in (("train", 6), ("val", 2), ("test", 1)):
        write(here / "samsum" / f"{file}.json", SAMSUM[:count])
    (here / "samsum" / "licence.txt").write_text("for research", encoding="utf-8")
    assert sources.splits_of(name) == ("train", "validation", "test")
    assert sizes(name, tokenizer) == (6, 2)
    assert first(name) == ("Summarize the dialogue.\n\nA: 0?\nB: yes", "B says 0.")
    assert first(name) == first("samsum:samsum") == first(f"{name}:samsum/train.json")


def test_samsum_still_packed(here: Path) -> None:
    (here / "samsum_dataset").mkdir()
    (here / "samsum_dataset" / "corpus.7z").write_bytes(b"7z")
    with pytest.raises(DataError, match="still packed") as caught:
        sources.locate("samsum")
    assert "samsum_dataset" in caught.value.fix[0]


@pytest.mark.parametrize("folder", ["datasets_grammar", "."])
def test_grammar_of_the_tutorial(here: Path, tokenizer: ChatTokenizer, folder: str) -> None:
    write(here / folder / "gtrain_10k.csv", GRAMMAR[:6])
    write(here / folder / "grammar_validation.csv", GRAMMAR[6:])
    write(here / folder / "other.csv", SAMSUM)  # in the same folder, but none of it
    assert sizes("grammar_dataset", tokenizer) == (6, 3)
    assert first("grammar") == (f"{builtin.CORRECT}\n\nhe go 0", "He goes 0.")
    alone = f"grammar:{folder}/gtrain_10k.csv"
    assert sizes(alone, tokenizer, validation=f"grammar:{folder}/grammar_validation.csv") == (6, 3)


def test_jfleg_gives_a_row_for_each_correction(here: Path) -> None:
    rows = [
        {
            "sentence": "So I think we ca n't go , he 's ill . ",
            "corrections": [
                "So we ca n't go ; he 's ill . ",
                "",
                "He 's ill , we ( both ) stay . ",
            ],
        }
    ]
    write(here / "jfleg" / "validation.json", rows)
    write(here / "jfleg" / "test.json", rows)
    assert sources.splits_of("grammar:jfleg") == ("train", "validation")
    found = load_dialogues("grammar:jfleg", DataSettings(), "train")
    question = f"{builtin.CORRECT}\n\nSo I think we can't go, he's ill."
    assert [asked(one) for one in found] == [
        (question, "So we can't go; he's ill."),
        (question, "He's ill, we (both) stay."),
    ]


def test_alpaca_joins_instruction_and_input(here: Path, tokenizer: ChatTokenizer) -> None:
    write(here / "alpaca_data.json", ALPACA)
    assert [asked(one) for one in load_dialogues("alpaca", DataSettings())][:2] == [
        ("Add 0.", "0"), ("Add 1.\n1", "2"),
    ]  # fmt: skip
    assert sizes("alpaca", tokenizer) == (8, 1)
    assert sizes("alpaca_dataset:alpaca_data.json", tokenizer) == (8, 1)


def test_flaws_of_a_published_set_are_counted_and_left_out(
    here: Path, tokenizer: ChatTokenizer
) -> None:
    flawed = [*ALPACA, {"instruction": "Sing.", "input": "", "output": ""},
              {"instruction": "Hum.", "input": "", "output": None}]  # fmt: skip
    write(here / "alpaca_data.json", flawed)
    report = load_examples(["alpaca"], tokenizer, DataSettings()).report
    assert report.parts[0].rows == 11
    assert report.parts[0].skipped["data-empty-answer"].count == 2
    assert report.parts[0].skipped["data-empty-answer"].first.startswith("alpaca_data.json:1:")
    with pytest.raises(DataError, match="2 problems"):  # the same file as a file is not forgiven
        load_examples(["alpaca_data.json"], tokenizer, DataSettings())


def test_huatuo_holds_out_the_same_hundredth_whatever_the_seed(
    here: Path, tokenizer: ChatTokenizer
) -> None:
    rows = [{"question": f"问题{i}", "answer": f"回答{i}"} for i in range(200)]
    write(here / "datasets_processing" / "personal_dataset" / "format_data.json", rows)

    def held(seed: int) -> Examples:
        found = load_examples(["huatuo"], tokenizer, DataSettings(seed=seed)).validation
        assert found is not None
        return found

    one, two = held(1), held(2)
    assert len(one) == 2
    assert [list(a.ids) for a in one] == [list(b.ids) for b in two]


def test_only_one_split(here: Path, tokenizer: ChatTokenizer) -> None:
    write(here / "samsum" / "train.json", SAMSUM[:6])
    write(here / "samsum" / "test.json", SAMSUM[6:])
    assert sources.splits_of("samsum[test]") == ("test",)
    assert sizes("samsum[test]", tokenizer, validation="samsum[train]") == (3, 6)
    assert sizes("samsum[train]", tokenizer, validation="0") == (6, 0)
    assert first("samsum[test]", "") == first("samsum", "test")
    with pytest.raises(DataError, match="no split called tset") as caught:
        sources.locate("samsum[tset]")
    assert "test" in caught.value.fix[0]
    odd = write(here / "odd[train].json", GRAMMAR)  # a file of that name is that file
    assert sources.locate(odd.name).splits == {"train": (Path(odd.name),)}


def test_a_missing_set_says_where_it_was_looked_for(here: Path) -> None:
    for name, words in {
        "samsum": [
            "samsum_dataset",
            str(here),
            "chatfine download knkarthick/samsum --kind dataset",
        ],
        "grammar": ["datasets_grammar/gtrain_10k.csv", "chatfine download jhu-clsp/jfleg"],
        "alpaca": ["alpaca_data.json", "chatfine download tatsu-lab/alpaca"],
        "huatuo": ["datasets_processing/personal_dataset/format_data.json", '"question"'],
    }.items():
        with pytest.raises(DataError, match=f"{name} is not here") as caught:
            sources.locate(name)
        assert f"-d {name}:FILE" in str(caught.value)
        for word in words:
            assert word in str(caught.value)
    with pytest.raises(DataError, match="no file or folder"):
        sources.locate("alpaca:nowhere.json")
    with pytest.raises(DataError, match=r"did you mean samsum\?|there is no data set samsun"):
        sources.locate("samsun")


@pytest.mark.parametrize(
    ("dataset", "found"),
    [
        ("alpaca", ("alpaca", "")),
        ("alpaca_dataset", ("alpaca", "")),
        ("alpaca:C:\\data\\a.json", ("alpaca", "C:\\data\\a.json")),
        ("samsum:a/b", ("samsum", "a/b")),
        ("C:\\alpaca", None),
        ("C:/alpaca:x", None),
        ("owner/alpaca:subset", None),
        ("owner/samsum", None),
        ("dialogs:x", None),
    ],
)
def test_names_are_told_from_drives_and_hub_names(
    dataset: str, found: tuple[str, str] | None
) -> None:
    known = builtin.find(dataset)
    assert (known and (known[0].name, known[1])) == found


def test_absolute_names_mean_the_same_from_everywhere(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(here / "gtrain_10k.csv", GRAMMAR)
    write(here / "samsum" / "train.json", SAMSUM)
    names = ["grammar", "samsum_dataset", "samsum[train]", "grammar:gtrain_10k.csv", "dialogs",
             "dialogs[test]", "samsum/train.json"]  # fmt: skip
    before = {name: sources.digest(name) for name in names}
    absolute = {name: sources.absolute(name) for name in names}
    assert absolute["dialogs"] == "dialogs"
    assert absolute["samsum[train]"] == f"samsum:{here / 'samsum'}[train]"
    monkeypatch.chdir(tmp_path)
    assert {name: sources.digest(absolute[name]) for name in names} == before
    assert sources.absolute("owner/name:subset") == "owner/name:subset"


@pytest.mark.parametrize("name", ["samsum", "grammar", "alpaca", "huatuo", "dialogs"])
@pytest.mark.parametrize("kind", ["tiny", "llama2"])
def test_the_tutorials_own_text(here: Path, tiny: Path, shared: Path, name: str, kind: str) -> None:
    """--template plain --train-on all: question, answer and end as one text, all of it learned."""
    from transformers import AutoTokenizer

    folder = tiny if kind == "tiny" else shared / "tokenizers" / "llama2_hf"
    if not folder.is_dir():
        pytest.skip("the Llama 2 tokenizer is not here")
    write(here / "samsum" / "train.json", SAMSUM)
    write(here / "gtrain_10k.csv", GRAMMAR)
    write(here / "alpaca_data.json", ALPACA)
    write(here / "personal_dataset" / "format_data.json", HUATUO)
    plain = ChatTokenizer.load(folder, "plain")
    settings = DataSettings(train_on="all", validation="0")
    (examples,) = load_examples([name], plain, settings).train
    dialogues = load_dialogues(name, settings, "train")
    assert len(examples) == len(dialogues) > 5
    theirs = AutoTokenizer.from_pretrained(folder)
    begin = "<s>" if kind == "llama2" else ""
    for dialogue, example in zip(dialogues, examples, strict=True):
        question, answer = (text.strip() for text in asked(dialogue))
        text = f"{begin}{question}\n{answer}{theirs.eos_token}"
        assert list(example.ids) == theirs(text, add_special_tokens=False)["input_ids"]
        assert all(example.mask)


def test_toyhom_stands_in_for_huatuo(here: Path, shared: Path) -> None:
    source = shared / "data" / "toyhom_med_zh" / "train.jsonl"
    target = here / "personal_dataset" / "format_data.json"
    target.parent.mkdir()
    shutil.copyfile(source, target)
    record = json.loads(source.read_text(encoding="utf-8").splitlines()[0])
    for name in ("huatuo", str(source), f"huatuo:{source}"):
        found = load_dialogues(name, DataSettings())
        assert len(found) == 6886
        assert asked(found[0]) == (record["ask"], record["answer"])
