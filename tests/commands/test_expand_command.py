"""`chatfine expand-vocab` as typed: what it writes, and what it refuses with nothing written."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from chatfine import console
from chatfine.cli import main
from chatfine.commands import advise
from chatfine.commands.expand import expand
from chatfine.config import ExpandConfig
from chatfine.errors import ModelError, UsageError
from chatfine.hub.folder import check_vocabulary, read_model_folder
from chatfine.hub.headers import read_tensors
from chatfine.tokenizer.encode import ChatTokenizer

CHINESE = ["感谢您的咨询，祝您身体健康。", "高血压患者可以使用这种药物吗？", "请问这个函数怎么用？"]


@pytest.fixture
def llama2(shared: Path, tmp_path: Path) -> Path:
    """The tokenizer's files alone, in a folder of the tutorial's name."""
    source = shared / "tokenizers" / "llama2_hf"
    if not source.is_dir():
        pytest.skip("the Llama-2 tokenizer is not here")
    folder = tmp_path / "chat_7b_hf"
    folder.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    rows = [{"id": number, "messages": [{"role": "user", "content": CHINESE[number % 3]}]}
            for number in range(90)]  # fmt: skip
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def run(capsys: pytest.CaptureFixture[str], *words: Any, code: int = 0) -> dict[str, Any]:
    """The command's JSON; its prose is under "prose"."""
    try:
        assert main(["expand-vocab", *map(str, words), "--json"]) == code
    finally:
        console.set_json_mode(False)
    out = capsys.readouterr()
    found: dict[str, Any] = json.loads(out.out.splitlines()[-1])
    return found | {"prose": out.err}


def test_hanzi(llama2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new_token"
    begin = time.perf_counter()
    result = run(capsys, "-m", llama2, "--preset", "hanzi", "-o", output)
    assert time.perf_counter() - begin < 10
    assert (result["old_size"], result["new_size"]) == (32000, 52339)
    assert "32069" in result["prose"]
    assert {path.name for path in output.iterdir()} == {
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
        "vocabulary.json", "new_pieces.json",
    }  # fmt: skip
    refused = run(capsys, "-m", llama2, "--preset", "hanzi", "-o", output, code=2)
    assert (refused["error"], "--overwrite" in refused["fix"][0]) == ("output-not-empty", True)
    run(capsys, "-m", llama2, "--preset", "hanzi", "-o", output, "--overwrite")
    twice = run(capsys, "-m", output, "--preset", "hanzi", "-o", tmp_path / "x", code=2)
    assert twice["error"] == "nothing-to-add"
    assert not (tmp_path / "x").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_overwrite_keeps_what_is_no_tokenizer(
    llama2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mine"
    output.mkdir()
    (output / "tokenizer.json").write_text("{}", encoding="utf-8")
    (output / "letters.txt").write_text("dear", encoding="utf-8")
    refused = run(capsys, "-m", llama2, "--preset", "hanzi", "-o", output, "--overwrite", code=2)
    assert refused["error"] == "output-not-empty"
    assert (output / "letters.txt").read_text(encoding="utf-8") == "dear"


def test_added_tokens_form_warns(
    llama2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "beside"
    words = ("-m", llama2, "--preset", "hanzi", "--form", "added-tokens")
    result = run(capsys, *words, "-o", output)
    assert "loses spaces" in result["prose"]
    assert result["new_size"] == 52339
    again = run(capsys, "-m", output, "--preset", "hanzi", "-o", tmp_path / "x", code=2)
    assert again["error"] == "tokenizer-grown-beside"


def test_the_ids_that_are_shown_are_those_of_the_folder(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Added tokens of a byte-level vocabulary have no half characters between them."""
    for form, piece in (("grown", "ef b9"), ("added-tokens", "〿")):
        output = tmp_path / form
        result = run(capsys, "-m", tiny, "--preset", "hanzi", "--form", form, "-o", output)
        last = result["new_size"] - 1
        assert f"﹏ {last}\n" in result["prose"]
        assert f"{piece} {last - 1}  ﹏" in result["prose"]
        assert ChatTokenizer.load(output).token_bytes(last).decode() == "﹏"


def test_a_model_grows_with_its_tokenizer(
    tiny: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "grown"
    result = run(capsys, "-m", tiny, "--corpus", corpus, "--size", 20, "-o", output)
    tokenizer = ChatTokenizer.load(output)
    assert result["new_size"] == tokenizer.size == ChatTokenizer.load(tiny).size + 20
    assert result["rows"] % 64 == 0
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] == result["rows"] >= tokenizer.size
    shapes = {name: info.shape for name, info in read_tensors(output).items()}
    assert shapes["model.embed_tokens.weight"][0] == shapes["lm_head.weight"][0] == result["rows"]
    assert result["after"]["ratio"] > result["before"]["ratio"]
    assert "chatfine train -m" in result["prose"]
    assert (output / "new_pieces.json").is_file()


def test_copying_the_files_by_hand_works(
    tiny: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the tutorial says: grow a folder of tokenizer files, copy them into the model's folder."""
    alone, model, output = tmp_path / "alone", tmp_path / "model", tmp_path / "new"
    alone.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny / name, alone / name)
    run(capsys, "-m", alone, "--corpus", corpus, "--size", 60, "-o", output)
    shutil.copytree(tiny, model)
    for file in output.iterdir():
        shutil.copyfile(file, model / file.name)
    tokenizer = ChatTokenizer.load(model)
    assert tokenizer.size == ChatTokenizer.load(tiny).size + 60  # more than the padding of 448
    assert tokenizer.template == ChatTokenizer.load(tiny).template
    refused = run(capsys, "-m", model, "--preset", "hanzi", "-o", tmp_path / "x", code=2)
    assert refused["error"] == "model-small-embedding"


def test_advice(tiny: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "-m", tiny, "--corpus", corpus, "--size", 10, "--advise")
    assert [one["added"] for one in result["measures"]][:2] == [0, 10]
    for words in ("2401.01055", "2402.14714", "2506.03523", "hanzi", "weights more"):
        assert words in result["prose"]


def test_little_text_is_advised_against(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pieces would suit the text and are shown often; still it says no, why, and what for."""
    corpus, output = tmp_path / "corpus.txt", tmp_path / "x"
    corpus.write_text("\n\n".join(CHINESE * 400), encoding="utf-8")
    words = ("-m", tiny, "--corpus", corpus)
    result = run(capsys, *words, "--size", 20, "--advise")
    assert (result["advice"], result["fits"]) == (0, 20)
    for said in ("2.7 million", "30 million", "5 to 7 %", "--size 20"):
        assert said in " ".join(result["prose"].split())
    warned = run(capsys, *words, "--size", 20, "-o", output)
    assert "the advice is against it" in warned["prose"]
    assert (output / "new_pieces.json").is_file()


def test_the_advice_reads_enough_text_to_say_yes() -> None:
    assert advise.MOST_CHARACTERS > advise.MIN_TEXT


def test_advice_against_growing_ends_the_command(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "english.txt"
    path.write_text("\n\n".join(f"Line {n} of an English text." for n in range(90)), "utf-8")
    output = tmp_path / "x"
    for size in ((), ("--size", 0)):
        refused = run(capsys, "-m", tiny, "--corpus", path, *size, "-o", output, code=2)
        assert refused["error"] == "expanding-does-not-pay"
        assert not output.exists()


def test_control_tokens_in_the_corpus_are_refused_or_left_out(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = tmp_path / "corpus.jsonl", tmp_path / "x"
    texts = [*CHINESE * 20, "<|im_end|>龘龘", *CHINESE, "龘龘<|im_start|>"]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), "utf-8")
    words = ("-m", tiny, "--corpus", path, "--size", 5, "-o", output)
    for flags in ((), ("--advise",)):
        refused = run(capsys, *words, *flags, code=2)
        assert refused["error"] == "corpus-control-token"
        for said in (f"{path}:61: ", "<|im_end|>", f"{path}:65: ", "<|im_start|>"):
            assert said in refused["what"]
        assert "--on-bad-row skip" in refused["fix"][-1]
        assert not output.exists()
    result = run(capsys, *words, "--on-bad-row", "skip")
    assert "2 rows of the corpus are left out" in result["prose"]
    assert "龘" not in (output / "new_pieces.json").read_text(encoding="utf-8")


def test_growing_again_before_training_is_refused(
    tiny: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training would know the second growth only. A merged model may grow on."""
    alone, x = tmp_path / "alone", tmp_path / "x"
    alone.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny / name, alone / name)
    learn = ("--corpus", corpus, "--size", 5)
    for source in (tiny, alone):
        grown = tmp_path / f"{source.name}-grown"
        run(capsys, "-m", source, *learn, "-o", grown)
        for again in (learn, ("--preset", "hanzi")):
            refused = run(capsys, "-m", grown, *again, "-o", x, code=2)
            assert refused["error"] == "grown-twice"
            assert not x.exists()
        run(capsys, "-m", grown, *learn, "--advise")
    facts = tmp_path / f"{tiny.name}-grown" / "chatfine.json"
    values = json.loads(facts.read_text(encoding="utf-8")) | {"kind": "merged"}
    facts.write_text(json.dumps(values), encoding="utf-8")
    assert run(capsys, "-m", facts.parent, *learn, "-o", x)["new_size"] == 410


def add_token(folder: Path, number: int, content: str, special: bool = True) -> None:
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec["added_tokens"].append({"id": number, "content": content, **flags, "special": special})
    path.chmod(0o644)
    path.write_text(json.dumps(spec), encoding="utf-8")


def test_special_tokens_in_the_way(
    llama2: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table of ids can't be kept behind a `<pad>`; pieces of a corpus have no table."""
    add_token(llama2, 32000, "<pad>")
    output = tmp_path / "x"
    refused = run(capsys, "-m", llama2, "--preset", "hanzi", "-o", output, code=2)
    assert refused["error"] == "special-token-in-the-way"
    assert "<pad>" in refused["what"]
    assert "32070 and not 32069" in refused["why"]
    assert not output.exists()
    result = run(capsys, "-m", llama2, "--corpus", corpus, "--size", 5, "-o", output)
    assert "new pieces begin at 32001" in result["prose"]
    assert result["new_size"] == 32006


def test_a_special_token_that_is_chinese_text(
    tiny: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    add_token(model, 400, "习")
    for words in (("--preset", "hanzi"), ("--corpus", corpus, "--size", 5)):
        refused = run(capsys, "-m", model, *words, "-o", tmp_path / "x", code=2)
        assert refused["error"] == "special-token-in-the-way"
        assert "习" in refused["what"]
        assert not (tmp_path / "x").exists()


def test_the_tokenizer_of_another_model_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A grown tokenizer copied by hand into a model that it does not belong to."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    alone, grown, model, x = (tmp_path / name for name in ("alone", "grown", "model", "x"))
    alone.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny / name, alone / name)
    run(capsys, "-m", alone, "--preset", "hanzi", "-o", grown)
    for rows, why in (
        (399, "new pieces begin at the id 400, the model has 399 rows"),
        (2000, "new pieces begin at the id 400, the model has 2000 rows"),
    ):
        config = LlamaConfig.from_pretrained(tiny, vocab_size=rows)
        LlamaForCausalLM(config).to(torch.float32).save_pretrained(model)
        shutil.copytree(grown, model, dirs_exist_ok=True)
        refused = run(capsys, "-m", model, "-o", x, code=2)
        assert refused["error"] == "tokenizer-other-model"
        assert why in refused["why"]
        assert "tokenizer files back" in refused["fix"][0]
        assert not x.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "either --preset hanzi or --corpus"),
        (("--preset", "hanzi", "--corpus", "c.txt"), "either --preset hanzi or --corpus"),
        (("--preset", "hanzi", "--size", "5"), "--size goes with --corpus"),
        (("--preset", "hanzi", "--advise"), "--advise goes with --corpus"),
        (("--corpus", "c.txt", "--form", "added-tokens"), "added-tokens goes with --preset"),
        (("--corpus", "c.txt", "--size", "900000"), "--size is 900000; it must be ≤ 200000"),
        (("--corpus", "c.txt", "--size", "-1"), "--size is -1; it must be ≥ 0"),
    ],
)
def test_settings_that_do_not_go_together(
    tiny: Path, tmp_path: Path, words: tuple[str, ...], said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    refused = run(capsys, "-m", tiny, *words, "-o", tmp_path / "x", code=2)
    assert refused["error"] == "bad-setting"
    assert said in refused["what"]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("empty.txt", b"", "corpus-empty"),
        ("blank.txt", b"\n \n\n", "corpus-empty"),
        ("gbk.txt", "学习语言\n".encode("gbk") * 9, "data-encoding"),
        ("zip.txt", b"PK\x03\x04" + bytes(range(256)), "data-binary"),
        ("nul.txt", b"a line of some length\0 and more\n" * 3, "data-nul"),
        ("picture.png", b"\x89PNG", "data-unknown-kind"),
        ("torn.jsonl", b'{"text": "\xe5\xad', "data-"),
        ("missing.txt", None, "no-dataset"),
    ],
)
def test_corpora_that_cannot_be_read(
    tiny: Path, tmp_path: Path, name: str, content: bytes | None, code: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    refused = run(capsys, "-m", tiny, "--corpus", path, "--size", 5, "-o", tmp_path / "x", code=2)
    assert refused["error"].startswith(code)
    assert not (tmp_path / "x").exists()


def test_refusals_do_not_wait_for_torch(llama2: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from chatfine.cli import main; "
        f"code = main(['expand-vocab', '-m', {str(llama2)!r}, '--preset', 'hanzi', '-o', "
        f"{str(tmp_path / 'new')!r}]); "
        "assert code == 0; assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_tokenizer_copied_in_by_hand_gets_its_rows(tiny: Path, tmp_path: Path) -> None:
    """What the error of a model whose tokenizer has grown advises."""
    grown, model, output = (tmp_path / name for name in ("grown", "model", "output"))
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for file in tiny.glob("tokenizer*"):
        shutil.copyfile(file, tokenizer / file.name)
    expand(ExpandConfig(model=str(tokenizer), preset="hanzi", output=str(grown)))
    shutil.copytree(tiny, model)
    shutil.copytree(grown, model, dirs_exist_ok=True)
    size = ChatTokenizer.load(model).size
    with pytest.raises(ModelError, match="embedding only") as caught:
        check_vocabulary(read_model_folder(model), size)
    assert f"chatfine expand-vocab -m {model} -o NEW_FOLDER" in caught.value.fix[0]
    expand(ExpandConfig(model=str(model), output=str(output)))
    check_vocabulary(read_model_folder(output), ChatTokenizer.load(output).size)
    with pytest.raises(UsageError, match="either --preset"):
        expand(ExpandConfig(model=str(output), output=str(tmp_path / "again")))
