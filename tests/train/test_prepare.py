"""What refuses a run does so at once: before torch is imported, and leaving nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from chatfine.config import TrainConfig
from chatfine.errors import UsageError
from chatfine.train.prepare import prepare, require_same, resolve_paths

Configure = Callable[..., TrainConfig]
ROOT = Path(__file__).resolve().parents[2]

TRY_ALL = """
import json, sys, time
from chatfine import cli
results = []
for words in json.loads(sys.argv[1]):
    begin = time.perf_counter()
    code = cli.main(["--json", *words])
    heavy = [name for name in ("torch", "transformers.modeling_utils") if name in sys.modules]
    results.append([code, time.perf_counter() - begin, heavy])
print("RESULTS", json.dumps(results))
"""


def test_bad_input_is_refused_before_torch_is_imported(
    tiny: Path, data: Path, tmp_path: Path
) -> None:
    """Unknown model, tokenizer beyond the embedding, bad data, all too long, no disk, and so on;
    the first one pays for Python's start, all are timed."""
    small = Path(shutil.copytree(tiny, tmp_path / "small"))
    settings = json.loads((small / "tokenizer.json").read_text(encoding="utf-8"))
    settings["added_tokens"] += [
        {"id": 400 + i, "content": f"<x{i}>", "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": True} for i in range(100)
    ]  # fmt: skip
    (small / "tokenizer.json").write_text(json.dumps(settings), encoding="utf-8")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "a", "answer": "b"}\n{"question": }\n', encoding="utf-8")
    base = {"-m": str(tiny), "-d": str(data), "-o": str(tmp_path / "run"), "--device": "cpu"}
    cases: list[tuple[dict[str, str], str]] = [
        ({"-m": "no-such-model"}, "no-model"),
        ({"-m": str(small)}, "expand-vocab"),
        ({"-d": str(bad)}, "bad.jsonl:2"),
        ({"-d": str(tmp_path / "none.jsonl")}, "none.jsonl"),
        ({"--max-length": "4"}, "--max-length"),
        ({"--max-length": "100000"}, "length-beyond-model"),
        ({"--template": str(tmp_path / "none.jinja")}, "none.jinja"),
        ({"-o": str(data)}, "output-is-file"),
        ({"-o": str(tmp_path)}, "output-not-empty"),
    ]
    before = sorted(p.name for p in tmp_path.iterdir())
    words = [["train", *(w for pair in (base | case).items() for w in pair)] for case, _ in cases]
    done = subprocess.run(
        [sys.executable, "-c", TRY_ALL, json.dumps(words)], cwd=ROOT, text=True,
        capture_output=True, check=True, env=os.environ | {"CHATFINE_LANG": "en"},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    errors = [json.loads(line) for line in lines if line.startswith("{")]
    results = json.loads(lines[-1].removeprefix("RESULTS "))
    assert len(errors) == len(results) == len(cases)
    for (case, named), error, (code, seconds, heavy) in zip(cases, errors, results, strict=True):
        assert code == 2, (case, error)
        assert named in json.dumps(error), (case, error)
        assert error["fix"] or error["where"], (case, error)
        assert heavy == [], case
        assert seconds < 2 * max(1.0, os.getloadavg()[0]), case
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "home") == before


def test_paths_become_absolute(configure: Configure, tmp_path: Path, data: Path,
                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    config = resolve_paths(configure(dataset=data.name, output="run", validation=data.name))
    assert config.dataset == (str(data),)
    assert config.validation == str(data)
    assert config.output == str(tmp_path / "run")
    assert resolve_paths(configure(output="")).output.startswith(str(tmp_path / "run-"))


def test_words_are_not_taken_for_folders_of_that_name(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A project folder often holds model/, test/ or dialogs/."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "plain", "test", "dialogs", "smollm2-135m-instruct", "0.1"):
        (tmp_path / name).mkdir()
    config = configure(model="smollm2-135m-instruct", dataset="dialogs", validation="test")
    resolved = resolve_paths(config)
    assert resolved.model == "smollm2-135m-instruct"
    assert resolved.dataset == ("dialogs",)
    assert (resolved.validation, resolved.template) == ("test", "model")
    assert resolve_paths(configure(validation=0.1, template="plain")).template == "plain"
    assert resolve_paths(configure(validation=0.1)).validation == "0.1"


def test_the_fingerprint_leaves_out_what_does_not_enter_the_maths(
    configure: Configure, tmp_path: Path
) -> None:
    one = prepare(configure()).fingerprint("none")
    same = prepare(
        configure(output=str(tmp_path / "x"), keep=5, save_every=7, overwrite=True,
                  track=["wandb"], gpu_memory=3)
    ).fingerprint("none")  # fmt: skip
    require_same(json.loads(json.dumps(one)), same)
    other = prepare(configure(learning_rate=0.5, clip=0.3)).fingerprint("none")
    with pytest.raises(UsageError) as caught:
        require_same(one, other)
    assert caught.value.what.splitlines()[1:] == ["learning_rate: 0.01 → 0.5", "clip: 1.0 → 0.3"]
    with pytest.raises(UsageError, match="fp8_products: off → on"):
        require_same(one, prepare(configure()).fingerprint("none", True))
    before = {name: value for name, value in one.items() if name != "fp8_products"}
    require_same(before, one)  # of a run that began before there was this setting


def test_another_model_in_the_same_place_is_noticed(
    configure: Configure, tiny: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny, tmp_path / "m"))
    one = prepare(configure(model=str(folder))).fingerprint("none")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1  # the digest reads headers and both ends of each file
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="model_digest"):
        require_same(one, prepare(configure(model=str(folder))).fingerprint("none"))
