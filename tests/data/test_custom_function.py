"""Data from a function of the user: what it may return, what is refused, what is run at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from chatfine.data import sources
from chatfine.data.dialogues import DataSettings, load_dialogues
from chatfine.data.examples import Examples, load_examples
from chatfine.errors import DataError
from chatfine.tokenizer.encode import ChatTokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["Hello world", "The quick brown fox jumps", "你好，世界。", "a b c d e f g h"]
START = f"TEXTS = {TEXTS!r}\ndef get_custom_dataset(dataset_config, tokenizer, split):\n"


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATFINE_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> ChatTokenizer:
    return ChatTokenizer.load(tiny)


def script(folder: Path, body: str, start: str = START) -> str:
    path = folder / "mine.py"
    path.write_text(start + body, encoding="utf-8")
    return str(path)


def trained(examples: Examples | None) -> list[tuple[list[int], list[bool]]]:
    assert examples is not None
    return [(list(map(int, one.ids)), list(map(bool, one.mask))) for one in examples]


def refused(dataset: str, tokenizer: ChatTokenizer, validation: str = "0") -> DataError:
    with pytest.raises(DataError) as caught:
        load_examples([dataset], tokenizer, DataSettings(validation=validation))
    return caught.value


RETURNS = {
    "a list of lists": """
    found = [tokenizer(text)["input_ids"] for text in TEXTS]
    return [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in found]
""",
    "padded tensors": """
    found = tokenizer(TEXTS, padding=True, return_tensors="pt")
    rows = []
    for ids, seen in zip(found["input_ids"], found["attention_mask"]):
        labels = ids.masked_fill(seen == 0, -100)
        labels[0 if tokenizer.padding_side == "right" else int((seen == 0).sum())] = -100
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": seen})
    return rows
""",
    "encodings of one row": """
    rows = []
    for text in TEXTS:
        row = tokenizer(text, return_tensors="pt")
        row["labels"] = row["input_ids"].clone()
        row["labels"][0, 0] = -100
        rows.append(row)
    return rows
""",
    "a datasets.Dataset": """
    import datasets
    found = datasets.Dataset.from_dict({"text": TEXTS})
    def encode(row):
        ids = tokenizer(row["text"])["input_ids"]
        return {"input_ids": ids, "labels": [-100, *ids[1:]]}
    return datasets.DatasetDict({split: found.map(encode, remove_columns=["text"])})
""",
    "a torch Dataset": """
    import torch
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(TEXTS)
        def __getitem__(self, index):
            ids = tokenizer(TEXTS[index])["input_ids"]
            return {"input_ids": ids, "labels": [-100, *ids[1:]], "attention_mask": [1] * len(ids)}
    return Rows()
""",
}


@pytest.mark.parametrize("body", RETURNS.values(), ids=RETURNS)
def test_token_rows_are_taken_as_they_are(
    tmp_path: Path, tokenizer: ChatTokenizer, body: str
) -> None:
    found = load_examples([script(tmp_path, body)], tokenizer, DataSettings())
    expected = []
    for text in TEXTS:
        ids = tokenizer.encode_text(text)
        expected.append((ids, [False] + [True] * (len(ids) - 1)))
    assert trained(found.train[0]) == trained(found.validation) == expected
    assert [part.split for part in found.report.parts] == ["train", "validation"]


def test_other_rows_go_the_way_of_a_files_rows(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    pairs = [{"question": f"Q {text}?", "answer": text} for text in TEXTS]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    turns = '[{"role": "user", "content": f"Q {x}?"}, {"role": "assistant", "content": x}]'
    messages = f'    return [{{"messages": {turns}}} for x in TEXTS]\n'
    columns = '    return [{"question": f"Q {x}?", "answer": x, "n": 1} for x in TEXTS]\n'
    settings = DataSettings(system="Be brief.", validation="0")
    expected = trained(load_examples([str(file)], tokenizer, settings).train[0])
    for body in (messages, columns):
        found = load_examples([script(tmp_path, body)], tokenizer, settings)
        assert trained(found.train[0]) == expected
    bad = script(tmp_path, '    return [{"question": "Q?", "answer": ""}]\n')
    assert refused(bad, tokenizer).where == f"{bad}:get_custom_dataset[train]:1:answer"


def test_what_the_function_is_told(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    log = tmp_path / "log.jsonl"
    body = f"""    import json
    print("not for stdout")
    told = [split, dataset_config.train_split, dataset_config.test_split,
            dataset_config.input_length, dataset_config.get("nothing", 5), dataset_config.file,
            tokenizer.chat_template, tokenizer.pad_token_id, len(tokenizer)]
    with open({str(log)!r}, "a") as file:
        file.write(json.dumps(told) + "\\n")
    return [{{"prompt": f"{{split}} {{i}}", "answer": "yes"}} for i in range(4)]
def other(c, t, s):
    return get_custom_dataset(c, t, s)
"""
    path = script(tmp_path, body)
    settings = DataSettings(max_length=77, validation=f"{path}[held]")
    load_examples([f"{path}:other[learn]"], tokenizer, settings)
    told = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    rest = [77, 5, path, tokenizer.template, tokenizer.pad_id, tokenizer.size]
    assert told == [["learn", "learn", "validation", *rest], ["held", "train", "held", *rest]]
    log.unlink()
    assert len(load_dialogues(path, settings, "", tokenizer)) == 4  # evaluation: validation
    assert len(load_dialogues(path, DataSettings(validation="0.25"), "train", tokenizer)) == 3
    assert [json.loads(line)[0] for line in log.read_text(encoding="utf-8").splitlines()] == [
        "validation", "train",
    ]  # fmt: skip


def test_what_it_prints_stays_off_stdout(
    tmp_path: Path, tokenizer: ChatTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    path = script(tmp_path, '    print("hello")\n    return [{"prompt": "a", "answer": "b"}]\n')
    load_examples([path], tokenizer, DataSettings(validation="0"))
    printed = capsys.readouterr()
    assert "hello" in printed.err
    assert "hello" not in printed.out


BAD_ROWS = {
    "shifted": ("[{'input_ids': ids, 'labels': ids[1:] + [-100]}]", "shifted by one"),
    "other labels": ("[{'input_ids': ids, 'labels': [0] * len(ids)}]", "labels[0] is 0"),
    "lengths": ("[{'input_ids': ids, 'labels': ids[1:]}]", "labels has"),
    "mask length": (
        "[{'input_ids': ids, 'labels': ids, 'attention_mask': [1]}]", "attention_mask has 1"),
    "beyond": ("[{'input_ids': [*ids, 99999], 'labels': [*ids, 99999]}]", "99999"),
    "negative": ("[{'input_ids': [-1, *ids], 'labels': [-1, *ids]}]", "is -1"),
    "no labels": ("[{'input_ids': ids}]", "the field labels is missing"),
    "text": ("[{'input_ids': 'abc', 'labels': ids}]", "input_ids must be a list"),
    "floats": ("[{'input_ids': ids, 'labels': [1.5] * len(ids)}]", "labels must be a list"),
    "no dict": ("[ids]", "the row is list"),
    "nothing": ("None", "NoneType, not rows"),
    "one dict": ("{'input_ids': ids, 'labels': ids}", "dict, not rows"),
    "no rows": ("[]", "no rows for the split train"),
}  # fmt: skip


@pytest.mark.parametrize(("returned", "said"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_wrong_rows_are_refused(
    tmp_path: Path, tokenizer: ChatTokenizer, returned: str, said: str
) -> None:
    body = f"    ids = tokenizer(TEXTS[1])['input_ids']\n    return {returned}\n"
    path = script(tmp_path, body)
    error = refused(path, tokenizer)
    assert said in str(error)
    assert str(error.where).startswith(f"{path}:get_custom_dataset")
    assert error.fix


def test_nothing_to_learn_and_too_long_follow_the_usual_rules(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    body = """    ids = [tokenizer(text * 3)["input_ids"] for text in TEXTS]
    rows = [{"input_ids": one, "labels": one} for one in ids]
    return [*rows, {"input_ids": ids[0], "labels": [ids[0][0]] + [-100] * (len(ids[0]) - 1)}]
"""
    path = script(tmp_path, body)
    lengths = sorted(len(tokenizer.encode_text(text * 3)) for text in TEXTS)
    limit = lengths[-2]
    settings = DataSettings(validation="0", max_length=limit, max_dropped=0.9)
    found = load_examples([path], tokenizer, settings)
    dropped = found.report.parts[0].dropped
    assert {code: tally.count for code, tally in dropped.items()} == {
        "too-long": 1, "nothing-to-learn": 1,
    }  # fmt: skip
    assert sorted(found.train[0].lengths) == lengths[:-1]


def test_an_error_in_the_file_names_its_line(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    cases = {
        "    return [{'a': 1}['b']]\n": ("KeyError in mine.py: 'b'", 3),
        "    x = 1\n    import sys; sys.exit('bye')\n": ("SystemExit in mine.py: bye", 4),
        "    pass\nimport no_such_package\n": ("ModuleNotFoundError in mine.py", 4),
        "    return (1 / 0 for _ in range(3))\n": ("ZeroDivisionError in mine.py", 3),
        "    return json.loads('{')\nimport json\n": ("JSONDecodeError in mine.py", 3),
        "    return [\n": ("not valid Python", 3),
    }
    for body, (said, line) in cases.items():
        path = script(tmp_path, body)
        error = refused(path, tokenizer)
        assert said in error.what
        assert error.where == f"{path}:{line}"
    assert "called as get_custom_dataset(dataset_config, tokenizer, 'train')" in str(
        refused(script(tmp_path, "    return 1 / 0\n"), tokenizer)
    )


def test_a_missing_file_or_function(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = script(tmp_path, "    return []\ndef less(config):\n    return []\n")
    assert "there is no file" in refused(str(tmp_path / "none.py"), tokenizer).what
    error = refused(f"{path}:get_costum_dataset", tokenizer)
    assert error.why == "it has: get_custom_dataset, less"
    assert error.fix == ("did you mean get_custom_dataset?",)
    error = refused(f"{path}:less", tokenizer)
    assert error.code == "data-function-arguments"
    assert "def less(dataset_config, tokenizer, split)" in error.fix[0]
    assert refused(f"{path}:TEXTS", tokenizer).code == "data-no-function"


@pytest.mark.parametrize("kind", ["model", "cache", "hub", "record", "link"])
def test_nothing_downloaded_is_run(
    tmp_path: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folders = {"model": "models/it/code", "cache": "home/any", "hub": "hf/hub/x", "record": "set"}
    folder = tmp_path / folders.get(kind, "home/any")
    folder.mkdir(parents=True)
    if kind == "model":
        (folder.parent / "config.json").write_text("{}", encoding="utf-8")
        (folder.parent / "model.safetensors").write_bytes(b"")
    if kind == "record":
        (folder / "chatfine-source.json").write_text("{}", encoding="utf-8")
    path = script(folder, f"    pass\nopen({str(tmp_path / 'was-run')!r}, 'w')\n")
    if kind == "link":
        link = tmp_path / "link.py"
        try:
            link.symlink_to(path)
        except OSError:
            pytest.skip("no links here")
        path = str(link)
    error = refused(path, tokenizer)
    assert error.code == "data-function-downloaded"
    assert not (tmp_path / "was-run").exists()


def test_the_cache_sees_the_file_and_what_it_reads(
    tmp_path: Path, tokenizer: ChatTokenizer, tiny: Path
) -> None:
    data = tmp_path / "data.json"
    data.write_text('["one"]', encoding="utf-8")
    body = f"""    import json
    rows = json.load(open({str(data)!r}))
    return [{{"prompt": "Say it", "answer": text}} for text in rows]
"""
    path = script(tmp_path, body)
    cache = tmp_path / "cache"

    def learned(dataset: str = path) -> tuple[str, int]:
        own = ChatTokenizer.load(tiny)  # as another process would
        (examples,) = load_examples([dataset], own, DataSettings(validation="0"), cache).train
        return own.decode(examples[0].ids).split("\n")[3], len(list(cache.iterdir()))

    assert learned() == learned() == ("one", 1)
    data.write_text('["two"]', encoding="utf-8")
    assert learned() == ("two", 2)
    script(tmp_path, body.replace("text} for", "'three'} for"))
    assert learned() == ("three", 3)
    assert learned(f"{path}:get_custom_dataset")[0] == "three"


def test_names_of_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets_processing").mkdir()
    (tmp_path / "datasets_processing" / "qa_huatuo.py").touch()
    script(tmp_path, "    return []\n")
    default = f"{tmp_path / 'datasets_processing' / 'qa_huatuo.py'}:get_custom_dataset"
    mine = f"{tmp_path / 'mine.py'}:f"
    for name, whole in {
        "custom_dataset": default,
        "mine.py:f": mine,
        "./mine.py:f[train]": f"{mine}[train]",
        "custom_dataset:mine.py:f": mine,
        str(tmp_path / "mine.py"): f"{tmp_path / 'mine.py'}:get_custom_dataset",
    }.items():
        assert sources.absolute(name) == whole
        assert sources.absolute(whole) == whole
        assert sources.splits_of(name) == (("train",) if "[" in name else ("train", "validation"))


def test_a_bad_file_is_refused_before_torch(tmp_path: Path, tiny: Path) -> None:
    path = script(tmp_path, "    return [\n")
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from chatfine.data.examples import DataSettings, load_examples\n"
        "from chatfine.errors import DataError\n"
        "from chatfine.tokenizer.encode import ChatTokenizer\n"
        f"try: load_examples([{path!r}], ChatTokenizer.load(Path({str(tiny)!r})), DataSettings())\n"
        "except DataError as error: print(error.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.split() == ["data-function-syntax", "False"]
