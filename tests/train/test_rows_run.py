"""New rows in a whole run: beside LoRA or alone, staged, resumed, merged and talked with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from grown import CHARACTERS, grow_tokenizer, resave
from safetensors.torch import load_file

from chatfine import cli
from chatfine.config import ResumeConfig, TrainConfig
from chatfine.errors import ChatfineError, TokenizerError, UsageError
from chatfine.hub.folder import read_model_folder
from chatfine.model.rows import grow
from chatfine.tokenizer.encode import ChatTokenizer
from chatfine.train.checkpoint import CheckpointStore
from chatfine.train.loop import Trainer
from chatfine.train.prepare import prepare
from chatfine.train.rows import first_steps, learning_rows
from chatfine.train.run import resume, train

Configure = Callable[..., TrainConfig]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def both(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Grown models with a head of its own and with a tied one."""
    found = {}
    for name in ("untied", "tied"):
        folder = tmp_path_factory.mktemp(name)
        model = resave(tiny, folder / "model", torch.float32, tied=name == "tied")
        grow_tokenizer(model, folder / "tokenizer")
        grow(model, folder / "tokenizer", folder / "grown")
        found[name] = folder / "grown"
    return found


@pytest.fixture
def grown(both: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    return both[getattr(request, "param", "untied")]


@pytest.fixture
def chinese(tmp_path: Path) -> Path:
    """Questions and answers over the new characters."""
    rows = [
        {"question": f"{CHARACTERS[i : i + 3]}?", "answer": CHARACTERS[i : i + 9]}
        for i in range(0, 60, 3)
    ]
    path = tmp_path / "chinese.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def settings(configure: Configure, grown: Path, chinese: Path) -> Configure:
    def make(**changes: Any) -> TrainConfig:
        return configure(**{"model": str(grown), "dataset": str(chinese)} | changes)

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(str(folder / "model.safetensors"))


def stored(run: Path) -> dict[str, torch.Tensor]:
    return load_file(str(run / "adapter" / "adapter_model.safetensors"))


def ids_of(grown: Path) -> range:
    facts = json.loads((grown / "vocabulary.json").read_text(encoding="utf-8"))
    return range(facts["old_size"], facts["new_size"])


@pytest.mark.parametrize("grown", ["untied", "tied"], indirect=True)
@pytest.mark.parametrize("options", [
    {"method": "lora", "rows_first": 2}, {"method": "rows", "checkpointing": "full"},
])  # fmt: skip
def test_train_merge_and_ask(
    settings: Configure, grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
) -> None:  # fmt: skip
    config = settings(max_steps=12, output=str(tmp_path / "run"), **options)
    result = train(config)
    assert result["train_loss"] < 0.9 * json.loads(
        (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0]
    )["loss"]  # fmt: skip
    merged = tmp_path / "merged"
    assert cli.main(["merge", str(tmp_path / "run"), "-o", str(merged)]) == 0
    out = capsys.readouterr()
    assert "proved: logits" in out.out + out.err
    before, after, ids = weights(grown), weights(merged), ids_of(grown)
    assert before.keys() == after.keys()
    for name in {EMBEDDING, HEAD} & before.keys():
        old = [*range(ids[0]), *range(ids[-1] + 1, len(before[name]))]
        assert torch.equal(before[name][old], after[name][old])
        moved = (before[name][list(ids)] != after[name][list(ids)]).any(1)
        assert int(moved.sum()) > (len(ids) // 2 if name == EMBEDDING else len(ids) - 1)
    others = [name for name in before if name not in (EMBEDDING, HEAD) and before[name].ndim == 2]
    changed = {name for name in others if not torch.equal(before[name], after[name])}
    assert changed == (set() if options["method"] == "rows" else set(others))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        merged, output_loading_info=True
    )
    assert not any(info.values())
    assert model.config.tie_word_embeddings == read_model_folder(grown).tied
    for place in (merged, tmp_path / "run"):
        asked = ["chat", str(place), "--prompt", CHARACTERS[:3] + "?", "--max-new-tokens", "8"]
        assert cli.main([*asked, "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[0] == "{"]
    assert len(answers) == 2
    assert answers[0]["answer"] == answers[1]["answer"] != ""


@pytest.mark.parametrize("options", [
    {"method": "lora", "rows_first": 3, "dropout": 0.1},
    {"method": "rows", "dtype": "bf16", "weight_decay": 0.1},
    {"method": "dora", "accumulate": 2, "batch_size": 2, "rows_learning_rate": 1e-3},
])  # fmt: skip
def test_killed_and_resumed_is_the_same_run(
    settings: Configure, metrics: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    class Killed(BaseException):
        pass

    base = {"max_steps": 6, "eval_every": 3, "save_every": 2} | options
    train(settings(output=str(tmp_path / "whole"), **base))
    original = Trainer._update
    with pytest.MonkeyPatch.context() as patch:

        def update(self: Trainer, loss: Any, rate: float) -> float:
            if self.progress.step == 3:
                raise Killed
            return original(self, loss, rate)

        patch.setattr(Trainer, "_update", update)
        with pytest.raises(Killed):
            train(settings(output=str(tmp_path / "killed"), **base))
    resume(ResumeConfig(run=str(tmp_path / "killed")))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_first_only_the_rows_then_all(settings: Configure, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(settings(output=str(run), max_steps=5, save_every=1, keep=9, rows_first=2))
    store = CheckpointStore(run / "checkpoints")
    states = [store.at(step) for step in range(1, 6)]
    named = [state.tensors("weights") for state in states if state]
    moments = [state.tensors("optimizer") for state in states if state]
    assert len(named) == 5
    for name in named[0]:
        still = torch.equal(named[0][name], named[1][name])
        rows = "trainable_tokens" in name
        assert still != rows
        assert (f"{name}|exp_avg" in moments[1]) == rows
        assert not torch.equal(named[3][name], named[4][name])


def test_rows_have_a_learning_rate_of_their_own(settings: Configure, tmp_path: Path) -> None:
    """One AdamW step moves every number with a gradient by the learning rate."""

    def largest(rate: float) -> tuple[float, float]:
        run = tmp_path / f"run{rate}"
        train(settings(output=str(run), max_steps=1, warmup=0, learning_rate=1e-3,
                       rows_learning_rate=rate))  # fmt: skip
        base = weights(Path(settings().model))[EMBEDDING]
        rows = {name: value for name, value in stored(run).items() if "embed_tokens" in name}
        ids = ids_of(Path(settings().model))
        moved = next(iter(rows.values())) - base[list(ids)]
        b = max(float(v.abs().max()) for n, v in stored(run).items() if "lora_B" in n)
        return float(moved.abs().max()), b

    for given, wanted in ((0.0, 5e-3), (2e-4, 2e-4)):
        rows, others = largest(given)
        assert rows == pytest.approx(wanted, rel=1e-2)
        assert others == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("grown", ["untied", "tied"], indirect=True)
def test_what_learns_is_counted_before(settings: Configure, grown: Path, tmp_path: Path) -> None:
    ids, matrices = ids_of(grown), 1 if read_model_folder(grown).tied else 2
    for method, extra in (("rows", 0), ("lora", 2 * 2 * (128 + 96 + 96 + 128 + 224 * 3))):
        config = settings(method=method, output=str(tmp_path / method), max_steps=1)
        prepared = prepare(config)
        assert prepared.rows == ids
        assert prepared.row_parameters == len(ids) * 64 * matrices
        train(config)
        learned = stored(tmp_path / method)
        twice = [name for name in learned if "lm_head" in name] if matrices == 1 else []
        counted = sum(value.numel() for name, value in learned.items() if name not in twice)
        assert counted == prepared.row_parameters + extra


def test_going_on_from_an_adapter_with_rows(settings: Configure, tmp_path: Path) -> None:
    first = str(tmp_path / "first")
    train(settings(output=first, max_steps=2))
    for choice in ("auto", "none"):
        train(settings(output=str(tmp_path / choice), max_steps=2, adapter=first,
                       train_rows=choice))  # fmt: skip
    one, auto, none = (stored(tmp_path / name) for name in ("first", "auto", "none"))
    assert one.keys() == auto.keys() == none.keys()
    for name, value in one.items():
        assert not torch.equal(value, auto[name])
        assert torch.equal(value, none[name]) == ("trainable_tokens" in name)


def test_without_them_and_in_full_training(settings: Configure, tmp_path: Path) -> None:
    train(settings(output=str(tmp_path / "none"), train_rows="none", max_steps=1))
    assert not any("trainable_tokens" in name for name in stored(tmp_path / "none"))
    train(settings(output=str(tmp_path / "full"), method="full", train_rows="new", max_steps=2))
    assert (tmp_path / "full" / "model" / "vocabulary.json").is_file()
    ids = ids_of(Path(settings().model))
    old = weights(Path(settings().model))[EMBEDDING]
    new = weights(tmp_path / "full" / "model")[EMBEDDING]
    assert not torch.equal(old[: ids[0]], new[: ids[0]])
    assert not torch.equal(old[list(ids)], new[list(ids)])


def test_a_recipe_may_name_the_settings(settings: Configure, tmp_path: Path) -> None:
    values = settings(rows_first=0.5, rows_learning_rate=3e-3, max_steps=2).model_dump(mode="json")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    assert cli.main(["train", str(tmp_path / "recipe.yaml")]) == 0


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "code", "text"), [
    ({"method": "rows"}, "no-new-rows", "has no new rows"),
    ({"train_rows": "new"}, "no-new-rows", "there is no vocabulary.json"),
    ({"train_rows": "none", "method": "rows"}, "rows-and-method", "--method rows does not go"),
    ({"train_rows": "new", "method": "freeze"}, "rows-and-method", "with --method freeze"),
    ({"rows_first": 2}, "rows-first", "no new rows learn in this run"),
])  # fmt: skip
def test_a_model_without_new_rows(
    configure: Configure, tmp_path: Path, changes: dict[str, Any], code: str, text: str
) -> None:
    with pytest.raises(UsageError) as caught:
        train(configure(**changes))
    assert caught.value.code == code
    assert text in f"{caught.value.what} {caught.value.why}"
    assert caught.value.fix
    assert not (tmp_path / "run").exists()


def test_rows_first_must_leave_steps(settings: Configure, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--rows-first 4 does not work here") as caught:
        train(settings(rows_first=4, max_steps=4))
    assert "the run has 4 steps" in str(caught.value.why)
    assert not (tmp_path / "run").exists()
    assert first_steps(0.5, range(3), 9) == 5
    assert first_steps(0, (), 9) == 0


def test_adapters_of_another_kind(settings: Configure, tmp_path: Path) -> None:
    train(settings(output=str(tmp_path / "rows"), method="rows", max_steps=1))
    train(settings(output=str(tmp_path / "plain"), train_rows="none", max_steps=1))
    model = read_model_folder(settings().model)
    for adapter, method, choice, code in (
        ("rows", "lora", "auto", "adapter-and-method"),
        ("plain", "rows", "auto", "adapter-and-method"),
        ("plain", "lora", "new", "rows-not-in-adapter"),
    ):
        with pytest.raises(UsageError) as caught:
            learning_rows(model, method, choice, str(tmp_path / adapter))
        assert caught.value.code == code
        assert any("chatfine merge" in fix for fix in caught.value.fix)
    assert learning_rows(model, "lora", "auto", str(tmp_path / "plain")) == ()


def test_a_vocabulary_of_another_tokenizer(tiny: Path, settings: Configure, tmp_path: Path) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(settings().model, model)
    grow_tokenizer(tiny, tmp_path / "other", characters=30)
    shutil.copyfile(tmp_path / "other" / "vocabulary.json", model / "vocabulary.json")
    with pytest.raises(TokenizerError, match="is of another tokenizer"):
        train(settings(model=str(model)))
    shutil.copyfile(tiny / "tokenizer.json", model / "tokenizer.json")
    with pytest.raises(ChatfineError, match="is of another tokenizer"):
        train(settings(model=str(model)))
    assert ChatTokenizer.load(model).size == 400
