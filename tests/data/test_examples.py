"""Splitting, the over-length policy, the cache and the report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatfine.data import cache as cache_files
from chatfine.data.dialogues import DataSettings, held_out, load_dialogues
from chatfine.data.examples import Examples, Splits, encode_dialogues, load_examples
from chatfine.data.report import DataReport
from chatfine.errors import DataError, UsageError
from chatfine.tokenizer.encode import ChatTokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> ChatTokenizer:
    return ChatTokenizer.load(tiny)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def pairs(count: int, words: int = 3, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"question": f"question {i} " + "why " * words, "answer": f"answer {i}"}
        for i in range(start, start + count)
    ]


def same(one: Splits, two: Splits) -> bool:
    both = zip([*one.train, one.validation], [*two.train, two.validation], strict=True)
    return all(
        a is b is None
        or all(np.array_equal(getattr(a, f), getattr(b, f)) for f in ("ids", "mask", "offsets"))
        for a, b in both
    )


def texts(examples: Examples | None, tokenizer: ChatTokenizer) -> set[str]:
    return {tokenizer.decode(one.ids) for one in examples} if examples is not None else set()


def test_every_example_is_what_the_tokenizer_says(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = write(tmp_path / "a.jsonl", pairs(600))
    settings = DataSettings(validation="0")
    (examples,) = load_examples([path], tokenizer, settings).train
    dialogues = load_dialogues(path, settings)
    assert len(examples) == len(dialogues) == 600
    for dialogue, example in zip(dialogues, examples, strict=True):
        expected = tokenizer.encode_dialogue(dialogue.messages)
        assert list(example.ids) == list(expected.ids)
        assert list(map(bool, example.mask)) == list(map(bool, expected.mask))
    assert examples.lengths.sum() == len(examples.ids)
    assert examples.supervised.tolist() == [sum(map(int, one.mask[1:])) for one in examples]


def test_held_out_depends_on_contents_alone(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    rows = pairs(100)
    once = write(tmp_path / "a.jsonl", rows)
    write(tmp_path / "many" / "z.jsonl", rows[:30])
    write(tmp_path / "many" / "b.jsonl", rows[30:][::-1])
    settings = DataSettings(validation="0.2", seed=7)
    one = load_examples([once], tokenizer, settings)
    two = load_examples([str(tmp_path / "many")], tokenizer, settings)
    assert one.validation is not None
    assert len(one.validation) == 20
    assert texts(one.validation, tokenizer) == texts(two.validation, tokenizer)
    assert texts(one.train[0], tokenizer).isdisjoint(texts(one.validation, tokenizer))
    other = load_examples([once], tokenizer, DataSettings(validation="0.2", seed=8))
    assert texts(one.validation, tokenizer) != texts(other.validation, tokenizer)
    validation = load_dialogues(once, settings, "validation")
    train = load_dialogues(once, settings, "train")
    assert len(validation) == 20
    assert len(train) == 80
    assert texts(encode_dialogues(validation, tokenizer, settings), tokenizer) == texts(
        one.validation, tokenizer
    )


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
def test_held_out_always_leaves_something(fraction: float, count: int) -> None:
    prints = np.random.default_rng(count).integers(0, 2**63, count).astype(np.uint64)
    held = held_out(prints, fraction)
    assert not held.all()
    assert held.any() == (fraction > 0 and count > 1)
    twice = held_out(np.concatenate([prints, prints]), fraction)
    assert np.array_equal(twice[:count], twice[count:]), "equal dialogues stay together"
    if count > 50 and 0 < fraction < 1:
        assert abs(held.mean() - fraction) < 0.02


def test_validation_by_file_split_and_own(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    folder = tmp_path / "set"
    write(folder / "train.jsonl", pairs(20))
    write(folder / "validation.jsonl", pairs(5, start=100))
    write(folder / "test.jsonl", pairs(7, start=200))
    extra = write(tmp_path / "extra.jsonl", pairs(3, start=300))
    plain = write(tmp_path / "plain.jsonl", pairs(20, start=400))

    def sizes(names: list[str], validation: str) -> tuple[list[int], int]:
        found = load_examples(names, tokenizer, DataSettings(validation=validation))
        return [len(one) for one in found.train], len(found.validation or [])

    assert sizes([str(folder)], "") == ([20], 5)
    assert sizes([str(folder)], "test") == ([20], 7)
    assert sizes([str(folder)], "0.25") == ([15], 5)
    assert sizes([str(folder)], "0") == ([20], 0)
    assert sizes([str(folder)], extra) == ([20], 3)
    assert sizes([str(folder), plain], "") == ([20, 18], 7)
    assert sizes([str(folder), plain], "test") == ([20, 20], 7)
    with pytest.raises(DataError) as caught:
        sizes([str(folder)], "tset")
    assert caught.value.where == "--validation"
    with pytest.raises(UsageError):
        sizes([str(folder)], "1.5")
    with pytest.raises(UsageError):
        sizes([str(folder)], "train")
    assert len(load_dialogues(str(folder), DataSettings())) == 7
    assert len(load_dialogues(plain, DataSettings())) == 20


def test_too_long_drop_cut_error(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    rows = pairs(10)
    rows[3]["answer"] = "very long " * 60
    rows[6]["question"] = "very long " * 60
    path = write(tmp_path / "a.jsonl", rows)

    def load(too_long: str, **more: Any) -> Splits:
        settings = DataSettings(validation="0", max_length=100, too_long=too_long, **more)
        return load_examples([path], tokenizer, settings)

    dropped = load("drop")
    assert len(dropped.train[0]) == 8
    (part,) = dropped.report.parts
    assert part.dropped["too-long"].count == 2
    assert part.dropped["too-long"].first == f"{path}:4"
    cut = load("cut")
    assert len(cut.train[0]) == 9
    assert int(cut.train[0].lengths.max()) == 100
    assert cut.report.parts[0].cut.count == 1
    assert cut.report.parts[0].dropped["prompt-too-long"].first == f"{path}:7"
    assert (cut.train[0].supervised > 0).all()
    with pytest.raises(DataError) as caught:
        load("error")
    assert (caught.value.code, caught.value.where) == ("data-too-long", f"{path}:4")
    with pytest.raises(DataError) as caught:
        load("drop", max_dropped=0.1)
    assert caught.value.code == "data-too-many-dropped"
    assert "2 of 10" in caught.value.what
    assert "2 × longer than --max-length" in (caught.value.why or "")
    assert f"--max-length {max(part.lengths)}" in caught.value.fix


def test_all_too_long_names_the_lengths(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = write(tmp_path / "a.jsonl", pairs(9))
    lengths = sorted(
        load_examples([path], tokenizer, DataSettings(validation="0")).train[0].lengths
    )
    with pytest.raises(DataError) as caught:
        load_examples([path], tokenizer, DataSettings(max_length=8, max_dropped=1.0))
    assert caught.value.code == "data-all-too-long"
    assert f"median {lengths[4]}, longest {lengths[-1]}" in (caught.value.why or "")
    assert f"--max-length {lengths[-1]}" in caught.value.fix


def test_running_text_is_divided_and_every_token_predicted_once(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    text = "Anna: Can you buy some milk on the way home? " * 40
    path = write(tmp_path / "a.jsonl", [{"text": text}, {"text": "short"}])
    (examples,) = load_examples(
        [path], tokenizer, DataSettings(validation="0", max_length=50)
    ).train
    whole = [list(tokenizer.encode_plain(one).ids) for one in (text, "short")]
    assert int(examples.lengths.max()) <= 50
    predicted = [token for one in examples for token in list(one.ids)[1:]]
    assert predicted == whole[0][1:] + whole[1][1:]


def test_bad_rows_are_skipped_and_counted(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    rows = pairs(20)
    rows[4]["answer"] = ""
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match="the answer is empty"):
        load_examples([path], tokenizer, DataSettings())
    splits = load_examples([path], tokenizer, DataSettings(validation="0", on_bad_row="skip"))
    assert len(splits.train[0]) == 19
    (part,) = splits.report.parts
    assert (part.rows, part.dropped_rows) == (20, 1)
    assert part.skipped["data-empty-answer"].first.startswith(f"{path}:5:")


def test_a_template_that_refuses_a_row_is_a_problem_of_that_row(tmp_path: Path, tiny: Path) -> None:
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}"
        "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        encoding="utf-8",
    )
    tokenizer = ChatTokenizer.load(tiny, str(template))
    roles = ["human", "function_call", "observation", "gpt"]
    rows: list[dict[str, Any]] = [
        {
            "conversations": [
                {"from": role, "value": f"{role} {i}"} for role in roles[: 2 + 2 * (i == 5)]
            ]
        }
        for i in range(10)
    ]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as caught:
        load_examples([path], tokenizer, DataSettings())
    assert (caught.value.where or "").startswith(f"{path}:6")
    splits = load_examples([path], tokenizer, DataSettings(validation="0", on_bad_row="skip"))
    assert len(splits.train[0]) == 9
    assert splits.report.parts[0].dropped_rows == 1


def test_cache_gives_the_same_and_is_remade_when_damaged(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    path = write(tmp_path / "a.jsonl", pairs(50))
    folder = tmp_path / "cache"
    settings = DataSettings()
    fresh = load_examples([path], tokenizer, settings, folder)
    (entry,) = folder.iterdir()
    stamp = entry.stat().st_mtime_ns
    again = load_examples([path], tokenizer, settings, folder)
    assert entry.stat().st_mtime_ns == stamp
    assert isinstance(again.train[0].ids, np.memmap)
    assert same(fresh, again)
    assert again.report.as_dict() == fresh.report.as_dict()
    for damage in ("train0.ids.npy", cache_files.MANIFEST):
        file = entry / damage
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        remade = load_examples([path], tokenizer, settings, folder)
        assert same(fresh, remade)
        assert cache_files.load(entry) is not None
    (entry / "train0.ids.npy").unlink()
    assert same(fresh, load_examples([path], tokenizer, settings, folder))
    assert sorted(one.name for one in folder.iterdir()) == [entry.name]


def test_cache_key_sees_data_settings_and_tokenizer(
    tmp_path: Path, tokenizer: ChatTokenizer, tiny: Path
) -> None:
    path = write(tmp_path / "a.jsonl", pairs(20))
    folder = tmp_path / "cache"

    def entries(tokens: ChatTokenizer = tokenizer, **settings: Any) -> int:
        load_examples([path], tokens, DataSettings(**settings), folder)
        return len(list(folder.iterdir()))

    assert entries() == 1
    assert entries(mix=(1.0,)) == 1
    assert entries(system="S") == 2
    assert entries(ChatTokenizer.load(tiny, "plain")) == 3
    write(tmp_path / "a.jsonl", pairs(20, start=1))
    assert entries() == 4


def test_refusals_leave_nothing_in_the_cache(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [*pairs(5), {"question": "Q", "answer": ""}])
    with pytest.raises(DataError):
        load_examples([path], tokenizer, DataSettings(), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_report_survives_json(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [*pairs(20), *pairs(2)])
    report = load_examples([path], tokenizer, DataSettings(max_length=200)).report
    values = json.loads(json.dumps(report.as_dict()))
    assert DataReport.from_dict(values).as_dict() == report.as_dict()
    assert report.parts[0].duplicates == 2
    assert values["train"] + values["validation"] == values["rows"] == 22
    assert 0 < values["tokens"]["trained_share"] < 1


def test_refusing_data_imports_no_torch(tmp_path: Path, tiny: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "Q", "answer": ""}])
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from chatfine.data.examples import DataSettings, load_examples\n"
        "from chatfine.errors import DataError\n"
        "from chatfine.tokenizer.encode import ChatTokenizer\n"
        f"try: load_examples([{path!r}], ChatTokenizer.load(Path({str(tiny)!r})), DataSettings())\n"
        "except DataError as error: print(error.code, error.exit_code)\n"
        "print({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:2] == ["data-empty-answer 2", "set()"]
