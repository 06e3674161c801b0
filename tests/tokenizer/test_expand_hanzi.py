"""The preset hanzi: the tutorial's ids, one encoding everywhere, nothing else changed."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from growing import check_folder, check_only_joined, new_pieces
from random_texts import random_texts

from chatfine.errors import TokenizerError
from chatfine.tokenizer.before import grown_vocabulary
from chatfine.tokenizer.encode import ChatTokenizer
from chatfine.tokenizer.grow_files import grown, write_grown
from chatfine.tokenizer.growable import FIRST_RICH, Growable, is_rich
from chatfine.tokenizer.hanzi import HANZI, hanzi

BEFORE = "｡＂＃＄％＆＇＊＋／＜＝＞＠［＼］＾＿｀｛｜｝｟｠｢｣､〃"
AFTER = "〔〕〖〗〘〙〚〛〝〞〟〰〾〿‛‟‧﹏"
SPARED = "‛‟‧"  # the tutorial's signs below U+2E80


@pytest.fixture(scope="session")
def llama2(shared: Path) -> Path:
    folder = shared / "tokenizers" / "llama2_hf"
    if not folder.is_dir():
        pytest.skip("the Llama-2 tokenizer is not here")
    return folder


@pytest.fixture(scope="session")
def grown_llama2(llama2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hanzi") / "grown"
    begin = time.perf_counter()
    base = Growable.load(llama2)
    write_grown(base, hanzi(base), folder, "grown")
    assert time.perf_counter() - begin < 10
    return folder


def check_table(ids: dict[str, int]) -> None:
    """The table of ids on Llama-2."""
    assert (ids["丂"], ids["习"], ids["\u9fff"]) == (32000, 32069, 52320)
    assert [ids[sign] for sign in BEFORE] == list(range(52291, 52320))
    assert [ids[sign] for sign in AFTER] == list(range(52321, 52339))
    characters = [letter for letter, number in ids.items() if number < 52291]
    assert characters == sorted(characters)
    assert "\n" not in ids
    assert len(ids) == 20339


def test_ids_of_the_tutorial(llama2: Path, grown_llama2: Path) -> None:
    rows = new_pieces(grown_llama2)
    check_table({piece: number for number, piece, _ in rows})
    tokenizer = ChatTokenizer.load(grown_llama2)
    assert tokenizer.size == 52339
    assert tokenizer.encode_text("习") == [29871, 32069]
    assert tokenizer.encode_text("a\n习") == [263, 13, 32069]
    assert json.loads((grown_llama2 / "new_pieces.json").read_text(encoding="utf-8"))["习"] == 32069
    assert not (grown_llama2 / "added_tokens.json").exists()
    old = ChatTokenizer.load(llama2)
    for number, piece, before in rows[::500]:
        assert tokenizer.token_bytes(number).decode() == piece
        assert b"".join(map(old.token_bytes, before)).decode() == piece


def test_every_library_agrees(llama2: Path, grown_llama2: Path) -> None:
    check_folder(Growable.load(llama2), grown_llama2, 2000, seed=1, spared=SPARED)


def test_it_is_still_a_llama2(llama2: Path, grown_llama2: Path) -> None:
    """A folder without a template keeps getting Llama 2's, and BOS."""
    from transformers import AutoTokenizer

    assert ChatTokenizer.load(grown_llama2).template == ChatTokenizer.load(llama2).template != ""
    assert AutoTokenizer.from_pretrained(grown_llama2).encode("习") == [1, 29871, 32069]


def test_from_tokenizer_model_alone(shared: Path, grown_llama2: Path, tmp_path: Path) -> None:
    base = Growable.load(shared / "tokenizers" / "llama2")
    write_grown(base, hanzi(base), tmp_path, "grown")
    same = (tmp_path / "tokenizer.model").read_bytes()
    assert same == (grown_llama2 / "tokenizer.model").read_bytes()
    assert ChatTokenizer.load(tmp_path).encode_text("习 a") == [29871, 32069, 263]


def test_added_tokens_form(llama2: Path, tmp_path: Path) -> None:
    """The tutorial's own form: same ids, tokenizer.model untouched, spaces lost."""
    from transformers import AutoTokenizer

    base = Growable.load(llama2)
    write_grown(base, hanzi(base), tmp_path, "added-tokens")
    added = json.loads((tmp_path / "added_tokens.json").read_text(encoding="utf-8"))
    check_table(added)
    same = (tmp_path / "tokenizer.model").read_bytes()
    assert same == (llama2 / "tokenizer.model").read_bytes()
    library = AutoTokenizer.from_pretrained(tmp_path)
    assert len(library) == 52339
    assert library.encode("习a", add_special_tokens=False) == [32069, 263]
    assert library.decode([32069, 263]) == "习 a"
    assert grown_vocabulary(tmp_path, 32000).pieces[69] == "习"
    with pytest.raises(TokenizerError) as refused:
        Growable.load(tmp_path)
    assert refused.value.code == "tokenizer-grown-beside"


@pytest.fixture
def with_pad(llama2: Path, tmp_path: Path) -> Path:
    """Llama-2 with `<pad>` 32000."""
    folder = tmp_path / "pad"
    shutil.copytree(llama2, folder)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec["added_tokens"].append({"id": 32000, "content": "<pad>", **flags, "special": True})
    path.write_text(json.dumps(spec), encoding="utf-8")
    return folder


def test_special_tokens_keep_their_ids(with_pad: Path, tmp_path: Path) -> None:
    base = Growable.load(with_pad)
    assert base.first_new == 32001
    write_grown(base, hanzi(base), tmp_path / "grown", "grown")
    check_folder(base, tmp_path / "grown", 300, seed=2, spared=SPARED)
    tokenizer = ChatTokenizer.load(tmp_path / "grown")
    assert tokenizer.encode_text("习") == [29871, 32070]
    assert tokenizer.piece(32000) == "<pad>"
    assert 32000 in tokenizer.control_ids
    assert grown_vocabulary(tmp_path / "grown", 32001).old_size == 32001


@pytest.mark.parametrize("style", ["tiny", pytest.param("smollm2", marks=pytest.mark.model)])
def test_byte_level(style: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    base = Growable.load(request.getfixturevalue(style))
    growth = hanzi(base)
    assert all(is_rich(spelled(base, piece.spelling)) for piece in growth.pieces)
    write_grown(base, growth, tmp_path, "grown")
    check_folder(base, tmp_path, 300, seed=3)
    after = Growable.load(tmp_path)
    split = [c for c in HANZI if ord(c) >= FIRST_RICH and len(after.tokens_of(after.spell(c))) > 1]
    assert split == []
    assert not hanzi(after).pieces


def spelled(base: Growable, spelling: str) -> bytes:
    from chatfine.tokenizer.stream import byte_level_alphabet

    return bytes(map(byte_level_alphabet().__getitem__, spelling))


def test_twice_is_nothing_new(grown_llama2: Path) -> None:
    assert hanzi(Growable.load(grown_llama2)).pieces == ()


def test_rich_bytes_are_exactly_those_of_rich_characters() -> None:
    """The rule on bytes and the rule on code points are one, for every character there is."""
    for code in range(0x110000):
        if not 0xD800 <= code < 0xE000:
            assert is_rich(chr(code).encode()) == (code >= FIRST_RICH), hex(code)


def test_old_pieces_out_of_new_ones(llama2: Path) -> None:
    """SentencePiece joins whatever makes a piece, so new cuts of old pieces become merges too."""
    from chatfine.tokenizer.growable import Growth, NewPiece

    base = Growable.load(llama2)
    whole = next(piece for piece in base.vocab
                 if len(piece) > 6 and piece.isalpha() and piece[1:] not in base.vocab)  # fmt: skip
    growth = Growth((NewPiece(whole[1:], base.tokens_of(whole[1:])),), ())
    merges = grown(base, growth).files.spec["model"]["merges"]
    pairs = [tuple(one.split(" ")) if isinstance(one, str) else tuple(one) for one in merges]
    own = [number for number, pair in enumerate(pairs) if "".join(pair) == whole[1:]]
    assert own
    assert pairs.index((whole[0], whole[1:])) < min(own)


@pytest.mark.parametrize("kind", ["WordPiece", "Unigram", "BPE"])
def test_other_kinds_are_refused(kind: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    model = {
        "WordPiece": models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"),
        "Unigram": models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, False),
        "BPE": models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]),
    }[kind]
    Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=kind) as refused:
        Growable.load(tmp_path)
    assert refused.value.code == "tokenizer-cannot-grow"


def test_files_of_two_tokenizers_are_refused(llama2: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(llama2, folder)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    path = folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    spec = json.loads(text)
    vocab = spec["model"]["vocab"]
    vocab["中"], vocab["国"] = vocab["国"], vocab["中"]
    path.write_text(json.dumps(spec), encoding="utf-8")
    base = Growable.load(folder)
    with pytest.raises(TokenizerError) as refused:
        write_grown(base, hanzi(base), tmp_path / "out", "grown")
    assert refused.value.code == "tokenizer-files-disagree"


def test_growth_in_memory_equals_the_folder(llama2: Path, grown_llama2: Path) -> None:
    base = Growable.load(llama2)
    texts = random_texts(200, seed=4)
    memory, folder = grown(base, hanzi(base)), Growable.load(grown_llama2)
    check_only_joined(base, memory, texts, SPARED)
    for one, other in zip(memory.encode(texts), folder.encode(texts), strict=True):
        assert one.ids == other.ids
