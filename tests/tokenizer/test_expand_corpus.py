"""Pieces from a corpus: the tokenizer's own BPE continued, and what it must not do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from growing import check_folder, new_pieces

from chatfine.errors import TokenizerError
from chatfine.tokenizer import advice
from chatfine.tokenizer.advice import Measure, Verdict, judge
from chatfine.tokenizer.expand import fill, unreachable, unused
from chatfine.tokenizer.grow_files import grown, write_grown
from chatfine.tokenizer.growable import Growable
from chatfine.tokenizer.learn import Learned
from chatfine.tokenizer.runs import find_runs

SIZE = 300


@pytest.fixture(scope="session")
def dialogues() -> list[str]:
    """The built-in dialogues, half of them Chinese."""
    from chatfine.data.sources import read_rows

    return ["\n".join(map(str, row.values.values())) for row in read_rows("dialogs")]


@pytest.fixture(scope="session")
def llama2_base(shared: Path) -> Growable:
    folder = shared / "tokenizers" / "llama2_hf"
    if not folder.is_dir():
        pytest.skip("the Llama-2 tokenizer is not here")
    return Growable.load(folder)


@pytest.fixture(scope="session")
def tiny_base(tiny: Path) -> Growable:
    return Growable.load(tiny)


BASES = pytest.mark.parametrize("base", ["llama2_base", "tiny_base"])


@BASES
def test_grows_by_exactly_what_was_asked(
    base: str, dialogues: list[str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    before: Growable = request.getfixturevalue(base)
    rest, apart = dialogues[20:], dialogues[:20]
    learned = Learned(before, rest, SIZE)
    growth = fill(before, learned, SIZE)
    assert len(growth.pieces) == SIZE
    assert unreachable(before, growth) == []
    # what the corpus is not written with is there for a longer piece
    assert set(unused(before, growth, rest)) <= learned.needed(growth) | halves(before, growth)
    write_grown(before, growth, tmp_path, "grown")
    check_folder(before, tmp_path, 600, seed=5)
    assert len(new_pieces(tmp_path)) == SIZE
    after = Growable.load(tmp_path)
    saved = 1 - after.count_tokens(apart) / before.count_tokens(apart)
    assert saved > 0.1


def halves(base: Growable, growth: object) -> set[str]:
    after = grown(base, growth)  # type: ignore[arg-type]
    return {after.spellings[number] for number in after.byte_tokens if number >= base.first_new}


@BASES
def test_larger_is_shorter_and_holds_the_smaller(
    base: str, dialogues: list[str], request: pytest.FixtureRequest
) -> None:
    before: Growable = request.getfixturevalue(base)
    learned = Learned(before, dialogues, 400)
    counts = [before.count_tokens(dialogues)]
    kept: set[str] = set()
    for size in (50, 100, 200, 400):
        growth = learned.grow(size)
        names = {piece.spelling for piece in growth.pieces}
        assert kept <= names
        kept = names
        counts.append(grown(before, growth).count_tokens(dialogues))
    assert counts == sorted(set(counts), reverse=True)


def test_learning_is_repeatable(llama2_base: Growable, dialogues: list[str]) -> None:
    first, second = (Learned(llama2_base, dialogues, SIZE).grow(SIZE) for _ in range(2))
    assert first == second


def test_a_character_is_worth_the_bytes_it_saves(llama2_base: Growable) -> None:
    """习 saves two tokens each time, 中国 one: with one place the character wins."""
    texts = ["习，中国"] * 30 + ["中国"] * 15
    one = Learned(llama2_base, texts, 1).grow(1)
    assert [piece.spelling for piece in one.pieces] == ["习"]
    assert one.pieces[0].before == (231, 188, 163)


def test_rules_of_sentencepiece_pieces(llama2_base: Growable) -> None:
    """One script, perhaps after ▁ or one sign; digits alone; no Latin letters, no line breaks."""
    texts = [
        "学习Rust语言，共有１２３页。\n《学习》ガイド 한국어 学习",
        "学习：语言，共有１２页。\n",
    ] * 40
    growth = Learned(llama2_base, texts, 10_000).grow(10_000)
    names = {piece.spelling for piece in growth.pieces}
    assert {"学习", "▁学习", "，共有", "语言"} <= names
    letters = r"[\u3040-\u30ff\u4e00-\u9fff]"
    signs = r"[\u2000-\u303f\uff00-\uff0f\uff1a-\uff20]"
    allowed = re.compile(rf"[▁]?{signs}?{letters}+|▁?{signs}+|[\uff10-\uff19]|▁?[\uac00-\ud7a3]+")
    assert [name for name in names if not allowed.fullmatch(name)] == []


def test_rules_of_byte_level_pieces(tiny_base: Growable) -> None:
    """No piece crosses a word of the pre-tokenizer."""
    texts = ["学习 Rust 语言，共有页。学习，共有"] * 40
    after = grown(tiny_base, Learned(tiny_base, texts, 10_000).grow(10_000))
    new = [part.decode() for number, part in enumerate(after.bytes)
           if number >= tiny_base.first_new and number not in after.byte_tokens]  # fmt: skip
    assert "共有" in new
    split = tiny_base.files.spec["pre_tokenizer"]
    assert split["type"] == "ByteLevel"
    assert [text for text in new if re.search(r"\S\s|\w[^\w\s]|[^\w\s]\w", text)] == []


def test_missing_characters_at_text_edges(tiny_base: Growable) -> None:
    texts = ["龘", "龘龘", " 龘", "龘\n", "a龘a"] * 5
    after = grown(tiny_base, Learned(tiny_base, texts, 10).grow(10))
    assert len(after.tokens_of(after.spell("龘"))) == 1


@pytest.mark.parametrize("texts", [["only English here"] * 9, ["é ü Ж → “”"] * 9, ["\u200b\ufffd"]])
def test_nothing_rich_is_nothing_to_learn(llama2_base: Growable, texts: list[str]) -> None:
    with pytest.raises(TokenizerError) as refused:
        fill(llama2_base, Learned(llama2_base, texts, 10), 10)
    assert refused.value.code == "nothing-to-add"


def test_more_than_the_corpus_has(llama2_base: Growable, dialogues: list[str]) -> None:
    learned = Learned(llama2_base, dialogues[:5], 5000)
    with pytest.raises(TokenizerError) as refused:
        fill(llama2_base, learned, 5000)
    assert refused.value.code == "corpus-too-small"
    most = int(re.findall(r"\d+", refused.value.fix[0])[-1])
    assert len(fill(llama2_base, learned, most).pieces) == most


def test_control_tokens_in_a_corpus_stay_text(llama2_base: Growable) -> None:
    texts = ["</s>学习</s>", "学习"]
    assert [llama2_base.spelled_control(text) for text in texts] == ["</s>", ""]
    stretches = find_runs(llama2_base, texts).found
    assert sum(run.count for run in stretches.values()) == 2
    assert 2 not in next(iter(llama2_base.encode(texts))).ids


def test_growing_on(llama2_base: Growable, dialogues: list[str], tmp_path: Path) -> None:
    """A grown tokenizer is a tokenizer: it grows again, after its own pieces."""
    write_grown(llama2_base, Learned(llama2_base, dialogues, 50).grow(50), tmp_path / "a", "grown")
    once = Growable.load(tmp_path / "a")
    write_grown(once, Learned(once, dialogues, 50).grow(50), tmp_path / "b", "grown")
    check_folder(once, tmp_path / "b", 100, seed=6)
    assert new_pieces(tmp_path / "b")[0][0] == llama2_base.first_new + 50


# -- advice ----------------------------------------------------------------------------------------


def at(added: int, ratio: float, shown: float) -> Measure:
    return Measure(added, ratio, shown, 0.0)


NOW = at(0, 1.0, 0)
RARE, OFTEN = advice.MIN_SHOWN - 1, advice.MIN_SHOWN


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([at(1000, 1.2, OFTEN)], (0, "gains-little")),
        ([], (0, "gains-little")),
        ([at(1000, 1.3, RARE)], (0, "shown-too-rarely")),
        ([at(1000, 1.3, OFTEN)], (1000, "may-pay")),
        ([at(1000, 1.2, OFTEN), at(4000, 1.5, OFTEN)], (4000, "may-pay")),
        ([at(1000, 1.5, OFTEN), at(4000, 1.55, OFTEN)], (1000, "may-pay")),
        ([at(1000, 1.5, OFTEN), at(4000, 1.9, RARE)], (1000, "may-pay")),
    ],
)
def test_the_rule(sizes: list[Measure], expected: tuple[int, str]) -> None:
    """With less text than the limit the same size is named, but not advised."""
    size, cause = expected
    assert judge(NOW, sizes, advice.MIN_TEXT) == Verdict(size, cause, size)
    against = "too-little-text" if size else cause
    for characters in (advice.MEASURED_TEXT, advice.MIN_TEXT - 1):
        assert judge(NOW, sizes, characters) == Verdict(0, against, size)


def test_measures(llama2_base: Growable, dialogues: list[str]) -> None:
    rest, apart = advice.split(dialogues)
    assert len(dialogues) / 40 < len(apart) < len(dialogues) / 10
    assert sorted([*rest, *apart]) == sorted(dialogues)
    assert advice.split(dialogues[:10]) == (dialogues[:10], [])
    corpus = sum(map(len, dialogues))
    learned = Learned(llama2_base, rest, 200)
    now, then = advice.measure_sizes(llama2_base, learned, apart, corpus, (200, 10**6))
    assert now.ratio == pytest.approx(sum(map(len, apart)) / llama2_base.count_tokens(apart))
    assert (now.added, now.shown, then.added) == (0, 0, 200)
    assert then.ratio > now.ratio
    assert then.broken < now.broken
    assert 0 < then.shown < corpus / 200


def test_weights_of_new_rows() -> None:
    assert advice.added_weights(64, 100, tied=True) == 6400
    assert advice.added_weights(64, 100, tied=False) == 12800


def test_json_is_plain(tiny_base: Growable, dialogues: list[str], tmp_path: Path) -> None:
    """Half characters are readable in the list for people, and spelled in the list for programs."""
    write_grown(tiny_base, Learned(tiny_base, dialogues, 60).grow(60), tmp_path, "grown")
    shown = json.loads((tmp_path / "new_pieces.json").read_text(encoding="utf-8"))
    rows = new_pieces(tmp_path)
    assert list(shown.values()) == [number for number, _, _ in rows]
    vocab = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert all(vocab[piece] == number for number, piece, _ in rows)
