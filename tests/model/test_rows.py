"""Growing embedding and head: old rows keep their bits, new ones start by the rule asked for."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from grown import TOKENIZER_FILES, grow_tokenizer, resave
from safetensors.torch import load_file
from tokenizers import Tokenizer

from chatfine.errors import ChatfineError, ModelError, OutputError, TokenizerError
from chatfine.hub.folder import read_model_folder
from chatfine.hub.vocabulary import read_vocabulary
from chatfine.model.generate import Sampling, generate
from chatfine.model.load import load_model
from chatfine.model.rows import GrowResult, grow, grown_folder
from chatfine.tokenizer.before import grown_vocabulary

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = torch.tensor([[5, 9, 33, 70, 2, 91, 14]])


@pytest.fixture
def tokenizer(tiny: Path, tmp_path: Path) -> Path:
    grow_tokenizer(tiny, tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(str(file))
    return found


@pytest.mark.parametrize(("dtype", "tied", "options"), [
    (torch.float32, False, {}),
    (torch.float32, True, {}),
    (torch.bfloat16, False, {"max_shard_size": "100KB"}),
    (torch.float16, True, {"max_shard_size": "100KB"}),
])  # fmt: skip
def test_old_rows_keep_their_bits_and_transformers_says_nothing(
    tiny: Path, tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    dtype: torch.dtype, tied: bool, options: dict[str, Any],
) -> None:  # fmt: skip
    base = resave(tiny, tmp_path / "base", dtype, tied, **options)
    result = grow(base, tokenizer, tmp_path / "grown")
    old, new = weights(base), weights(tmp_path / "grown")
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert new[name].dtype == dtype
        kept = 400 if name in (EMBEDDING, HEAD) else len(tensor)
        assert torch.equal(new[name][:kept], tensor[:kept])
    assert result.rows == len(new[EMBEDDING]) > 448
    assert result.rows % 64 == 0
    assert result.new_pieces == read_vocabulary(tokenizer).new_size - 400  # type: ignore[union-attr]
    assert result.added_parameters == (result.rows - 448) * 64 * (1 if tied else 2)

    transformers.utils.logging.set_verbosity_warning()
    transformers.utils.logging.enable_propagation()
    with warnings.catch_warnings(), caplog.at_level("INFO"):
        warnings.simplefilter("error")
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "grown", output_loading_info=True
        )
    assert not any(info.values())
    assert caplog.text == ""
    assert model.dtype == dtype
    assert model.config.vocab_size == result.rows
    before = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits[..., :400], before(IDS).logits[..., :400])


def test_the_folder_speaks_with_the_grown_tokenizer(
    tiny: Path, tokenizer: Path, tmp_path: Path
) -> None:
    grow(tiny, tokenizer, tmp_path / "grown")
    names = {path.name for path in (tmp_path / "grown").iterdir()}
    assert {*TOKENIZER_FILES, "vocabulary.json", "config.json", "generation_config.json"} <= names
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "grown")
    assert len(loaded("习")["input_ids"]) == 1
    assert loaded.decode(loaded("好习 惯").input_ids) == "好习 惯"
    assert read_vocabulary(tmp_path / "grown") == read_vocabulary(tokenizer)
    read_model_folder(tmp_path / "grown")
    assert not list(tmp_path.glob(".*"))


def rows_by(rule: str, old: torch.Tensor, before: tuple[int, ...]) -> torch.Tensor:
    if rule == "zero":
        return torch.zeros(old.shape[1])
    return old[before[0]] if rule == "first" else old[list(before)].mean(0)


@pytest.mark.parametrize(("init", "output"), [("mean", "first"), ("first", "zero"),
                                              ("zero", "mean")])  # fmt: skip
def test_where_new_rows_start(
    tiny: Path, tokenizer: Path, tmp_path: Path, init: str, output: str
) -> None:
    grow(tiny, tokenizer, tmp_path / "grown", init, output)
    old, new = weights(tiny), weights(tmp_path / "grown")
    vocabulary = read_vocabulary(tokenizer)
    assert vocabulary is not None
    for name, rule in ((EMBEDDING, init), (HEAD, output)):
        for number, before in zip(vocabulary.ids, vocabulary.before, strict=True):
            torch.testing.assert_close(new[name][number], rows_by(rule, old[name], before))
        padding = new[name][vocabulary.new_size :]
        assert len(padding) > 0
        mean = old[name][:400].mean(0)
        torch.testing.assert_close(padding, mean.expand_as(padding))


def test_random_rows_are_like_the_old_ones(tiny: Path, tokenizer: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        grow(tiny, tokenizer, tmp_path / name, "random", "random")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    old, end = weights(tiny)[EMBEDDING][:400], read_vocabulary(tokenizer).new_size  # type: ignore[union-attr]
    new = one[EMBEDDING][400:end]
    assert torch.equal(new, two[EMBEDDING][400:end])
    assert not torch.equal(new, one[HEAD][400:end])
    assert abs(float(new.mean() - old.mean())) < 0.01
    assert abs(float(new.std() / old.std()) - 1) < 0.05


def test_padding_is_never_the_likeliest(tiny: Path, tokenizer: Path, tmp_path: Path) -> None:
    result = grow(tiny, tokenizer, tmp_path / "grown", "zero", "zero")
    model = load_model(tmp_path / "grown", torch.float32)
    end = read_vocabulary(tokenizer).new_size  # type: ignore[union-attr]
    torch.manual_seed(0)
    with torch.no_grad():
        logits = model.lm_head(10 * torch.randn(2000, 64))
    assert int(logits.argmax(-1).max()) < end
    assert float(logits.softmax(-1)[:, end:].max()) <= 1 / 400
    assert result.rows > end


def test_few_pieces_take_the_place_of_padding(tiny: Path, tmp_path: Path) -> None:
    size = grow_tokenizer(tiny, tmp_path / "tokenizer", characters=10)
    result = grow(tiny, tmp_path / "tokenizer", tmp_path / "grown")
    assert (result.rows, result.old_rows, result.added_parameters) == (448, 448, 0)
    old, new = weights(tiny)[HEAD], weights(tmp_path / "grown")[HEAD]
    assert torch.equal(old[size:], new[size:])
    assert torch.equal(old[:400], new[:400])
    assert not torch.equal(old[400:size], new[400:size])


# -- without vocabulary.json, and config.json edited by hand ---------------------------------------


def test_the_old_tokenizer_is_found_inside_the_grown_one(
    tiny: Path, tokenizer: Path, tmp_path: Path
) -> None:
    stated = grown_vocabulary(tokenizer, 400)
    (tokenizer / "vocabulary.json").unlink()
    assert grown_vocabulary(tokenizer, 400) == stated
    old = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    assert list(stated.before[1]) == old.encode("习").ids


def test_added_tokens_are_spelled_as_before_too(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "added")
    size = Tokenizer.from_file(str(tiny / "tokenizer.json")).get_vocab_size()
    words = {"习惯": size, "word ": size + 1}
    (tmp_path / "added" / "added_tokens.json").write_text(json.dumps(words), encoding="utf-8")
    vocabulary = grown_vocabulary(tmp_path / "added", size)
    old = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    assert vocabulary.pieces == ("习惯", "word ")
    assert [list(ids) for ids in vocabulary.before] == [old.encode(w).ids for w in words]


def hand_made(tiny: Path, folder: Path, edited: bool = True) -> Path:
    """What the tutorial has its readers do: copy the tokenizer in, write its size into config."""
    shutil.copytree(tiny, folder)
    size = grow_tokenizer(folder, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["vocab_size"] = size if edited else config["vocab_size"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("edited", [True, False])
def test_a_folder_changed_by_hand_is_grown_once(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edited: bool
) -> None:
    monkeypatch.setenv("CHATFINE_HOME", str(tmp_path / "home"))
    folder = hand_made(tiny, tmp_path / "hand", edited)
    if edited:
        with pytest.raises(ModelError) as caught:
            read_model_folder(folder)
        assert caught.value.code == "model-wrong-shape"
        assert "chatfine expand-vocab" in caught.value.fix[0]
    grown = grown_folder(folder)
    assert grown.is_relative_to(tmp_path / "home")
    assert grown_folder(folder) == grown
    stamp = (grown / "model.safetensors").stat().st_mtime_ns
    model = read_model_folder(grown)
    assert model.vocab_size % 64 == 0
    assert model.vocab_size > 448
    assert (grown_folder(folder) / "model.safetensors").stat().st_mtime_ns == stamp
    assert grown_folder(tiny) == tiny
    assert grown_folder(grown) == grown
    grow_tokenizer(tiny, folder, characters=70)  # another tokenizer is another grown model
    assert grown_folder(folder) != grown


# -- bad input -------------------------------------------------------------------------------------


def change(**values: Any) -> Callable[[Path, Path], None]:
    def edit(tokenizer: Path, model: Path) -> None:
        path = tokenizer / "vocabulary.json"
        facts = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(facts | values), encoding="utf-8")

    return edit


def other_piece(tokenizer: Path, model: Path) -> None:
    path = tokenizer / "vocabulary.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    facts["pieces"][3][1] = "没有"
    path.write_text(json.dumps(facts), encoding="utf-8")


def fewer_pieces(tokenizer: Path, model: Path) -> None:
    path = tokenizer / "vocabulary.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    facts["pieces"].pop()
    facts["new_size"] -= 1
    path.write_text(json.dumps(facts), encoding="utf-8")


def from_new_ids(tokenizer: Path, model: Path) -> None:
    path = tokenizer / "vocabulary.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    facts["pieces"][3][2] = [401]
    path.write_text(json.dumps(facts), encoding="utf-8")


def other_model(tokenizer: Path, model: Path) -> None:
    path = model / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    vocab = spec["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(spec), encoding="utf-8")


def not_grown(tokenizer: Path, model: Path) -> None:
    shutil.copyfile(model / "tokenizer.json", tokenizer / "tokenizer.json")
    (tokenizer / "vocabulary.json").unlink()


def holes(tokenizer: Path, model: Path) -> None:
    path = tokenizer / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    spec["model"]["vocab"]["far"] = 1000
    path.write_text(json.dumps(spec), encoding="utf-8")
    (tokenizer / "vocabulary.json").unlink()


@pytest.mark.parametrize(("damage", "code", "text"), [
    (lambda tokenizer, _: (tokenizer / "vocabulary.json").write_text("{"), "vocabulary-damaged",
     "JSONDecodeError"),
    (change(pieces=[]), "vocabulary-damaged", "the ids 400 to"),
    (change(old_size=399), "vocabulary-damaged", "the ids 399 to"),
    (from_new_ids, "vocabulary-damaged", "the piece 403 comes from ids that are not old ones"),
    (other_piece, "vocabulary-mismatch", "gives '没有' the id 403, the tokenizer -"),
    (fewer_pieces, "vocabulary-mismatch", "ends at the id"),
    (other_model, "tokenizer-other-model", "in the model's own tokenizer and"),
    (not_grown, "vocabulary-not-grown", "has nothing new: 400 pieces for 448 rows"),
    (holes, "vocabulary-gaps", "leaves out ids after 448"),
])  # fmt: skip
def test_files_that_disagree_are_refused(
    tiny: Path, tokenizer: Path, tmp_path: Path,
    damage: Callable[[Path, Path], None], code: str, text: str,
) -> None:  # fmt: skip
    model = tmp_path / "base"
    shutil.copytree(tiny, model)
    damage(tokenizer, model)
    with pytest.raises(ChatfineError) as caught:
        grow(model, tokenizer, tmp_path / "grown")
    assert caught.value.code == code
    assert text in f"{caught.value.what} {caught.value.why}"
    assert caught.value.fix
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tokenizer"]


def test_a_model_of_another_size_is_refused(tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "base"
    shutil.copytree(tiny, model)
    for name in TOKENIZER_FILES:
        (model / name).unlink()
    facts = {"old_size": 500, "new_size": 501, "pieces": [[500, "x", [1]]]}
    shutil.copytree(tiny, tmp_path / "tokenizer")
    spec = json.loads((tiny / "tokenizer.json").read_text(encoding="utf-8"))
    spec["model"]["vocab"]["x"] = 500
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    (tmp_path / "tokenizer" / "vocabulary.json").write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(TokenizerError, match="did not grow out of this model's") as caught:
        grow(model, tmp_path / "tokenizer", tmp_path / "grown")
    assert "new pieces begin at the id 500, the model has 448 rows" in str(caught.value.why)


def test_growing_twice_or_over_the_input_is_refused(
    tiny: Path, tokenizer: Path, tmp_path: Path
) -> None:
    result = grow(tiny, tokenizer, tmp_path / "grown")
    assert isinstance(result, GrowResult)
    with pytest.raises(ModelError, match="has the rows of these pieces already"):
        grow(tmp_path / "grown", tokenizer, tmp_path / "again")
    with pytest.raises(OutputError, match="holds what is being read"):
        grow(tmp_path / "grown", tokenizer, tmp_path / "grown", overwrite=True)
    with pytest.raises(OutputError, match="is not empty"):
        grow(tiny, tokenizer, tmp_path / "grown")
    assert grow(tiny, tokenizer, tmp_path / "grown", "zero", overwrite=True).rows == result.rows


def test_no_answer_holds_an_id_without_a_piece(tiny: Path, tmp_path: Path) -> None:
    model = load_model(tiny, torch.float32)
    with torch.no_grad():
        model.lm_head.weight[400:] = 100 * model.lm_head.weight[:48]
    sampling = Sampling(max_new_tokens=12, temperature=1.0)
    prompts = [[5, 9, 33], [8, 7]]
    free = generate(model, prompts, [], sampling)
    kept = generate(model, prompts, [], sampling, vocabulary=400)
    assert any(token >= 400 for row in free for token in row)
    assert all(token < 400 for row in kept for token in row)
    greedy = Sampling(max_new_tokens=12, repetition_penalty=1.3)
    assert max(map(max, generate(model, prompts, [], greedy, vocabulary=400))) < 400
