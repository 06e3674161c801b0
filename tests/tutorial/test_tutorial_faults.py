"""The tutorial's faults, not inherited: one test each.

Reading UTF-8 in the platform's encoding and reading a terminal where nothing was asked for are in
test_tutorial_doors.py: all its commands run in a locale of ASCII, at a terminal.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chatfine import tutorial
from chatfine.data.batches import Batches, in_order
from chatfine.data.examples import DataSettings, Splits, load_examples
from chatfine.errors import UsageError
from chatfine.evaluate.loss import evaluate_loss
from chatfine.model.load import load_model
from chatfine.tokenizer.encode import ChatTokenizer
from chatfine.types import IGNORE_INDEX, Message

QUESTION, ANSWER = "Who are you, number {}?", "I am model {}, at your service."


def write_rows(path: Path, count: int) -> Path:
    rows = [{"question": QUESTION.format(i), "answer": ANSWER.format(i) * (1 + i % 3)}
            for i in range(count)]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(llama: Path) -> ChatTokenizer:
    return ChatTokenizer.load(llama)


@pytest.fixture(scope="module")
def splits(tokenizer: ChatTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Splits:
    """16 rows as the trainer gets them, 5 of them for validation."""
    data = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 16)
    return load_examples([str(data)], tokenizer, DataSettings(validation="0.3", max_length=512))


@dataclass
class Trained:
    """A run of the door, and what was seen while it ran."""

    folder: Path
    passes: int
    """forward passes of the decoder while training"""


@pytest.fixture(scope="module")
def trained(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """finetuning.py in this process: 2 epochs of 8 rows, 2 at a time, 2 micro-batches a step."""
    from transformers.models.llama.modeling_llama import LlamaModel

    folder = tmp_path_factory.mktemp("trained")
    data = write_rows(folder / "rows.jsonl", 8)
    seen = []

    def count(module: Any, _inputs: Any) -> None:
        if type(module) is LlamaModel and module.training:
            seen.append(module)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    patch = pytest.MonkeyPatch()
    patch.setenv("CHATFINE_HOME", str(folder / "home"))
    words = [
        "--use_peft", "--model_name", str(llama), "--dataset", str(data), "--norun_validation",
        "--output_dir", str(folder / "PEFT_model"), "--num_epochs", "2",
        "--batch_size_training", "2", "--gradient_accumulation_steps", "2",
        "--fsdp_activation_checkpointing", "--device", "cpu", "--warmup", "2",
    ]  # fmt: skip
    try:
        assert tutorial.finetuning(words) == 0
    finally:
        hook.remove()
        patch.undo()
    return Trained(folder / "PEFT_model", len(seen))


def test_one_forward_pass_for_a_batch_not_one_for_each_of_its_keys(trained: Trained) -> None:
    assert trained.passes == 2 * 8 // 2  # epochs × rows / rows of a micro-batch


def test_gradients_reach_the_adapter_through_recomputation(trained: Trained) -> None:
    """In place of `loss.requires_grad_(True)`, under which nothing is learned."""
    from safetensors.torch import load_file

    weights = load_file(trained.folder / "adapter_model.safetensors")
    learned = {name: value.abs().max().item() for name, value in weights.items() if "_B" in name}
    assert len(learned) == 4
    assert min(learned.values()) > 0


def test_the_rate_warms_up_and_has_no_step_at_the_end_of_an_epoch(trained: Trained) -> None:
    lines = (trained.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [json.loads(line)["learning_rate"] for line in lines if "learning_rate" in line]
    assert len(rates) == 4  # 2 steps an epoch
    assert rates[0] < rates[1] == max(rates) == pytest.approx(1e-4)
    assert rates[1] >= rates[2] > rates[3]
    # halfway down a cosine; a decay once an epoch would have kept the rate within each epoch
    assert rates[3] == pytest.approx(0.5e-4)


def test_no_padding_id_lies_beyond_the_embedding(llama: Path, splits: Splits) -> None:
    rows = json.loads((llama / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    batches = Batches(splits.train, rows=4)
    ids = [batch.ids for step in range(batches.steps_per_epoch) for batch in batches.step(step)]
    assert max(int(one.max()) for one in ids) < rows


def test_the_question_is_not_trained_on(tokenizer: ChatTokenizer, splits: Splits) -> None:
    for example in splits.train[0]:
        learned = tokenizer.decode(
            int(i) for i, on in zip(example.ids, example.mask, strict=True) if on
        )
        assert learned.startswith("I am model")
        assert "Who are you" not in learned


def test_training_sees_exactly_the_text_that_chat_will_send(
    tokenizer: ChatTokenizer, splits: Splits
) -> None:
    texts = set()
    for example in splits.train[0]:
        start = int(np.argmax(np.asarray(example.mask)))
        whole = tokenizer.decode(int(i) for i in example.ids)
        number = whole.split("number ")[1].split("?")[0]
        asked = [Message("user", QUESTION.format(number))]
        prompt = list(tokenizer.encode_dialogue(asked, prompt=True).ids)
        assert [int(i) for i in example.ids[:start]] == prompt
        texts.add(whole)
    assert all("[INST]" in text for text in texts)


def test_packed_documents_do_not_see_each_other(llama: Path, splits: Splits) -> None:
    model = load_model(llama, torch.float32)
    packed = evaluate_loss(model, in_order(splits.train[0], 512))
    single = evaluate_loss(model, in_order(splits.train[0], int(splits.train[0].lengths.max())))
    assert len(list(in_order(splits.train[0], 512))) < len(splits.train[0])
    assert packed.tokens == single.tokens
    assert packed.loss == pytest.approx(single.loss, rel=1e-6)


def test_validation_drops_no_rest(llama: Path, splits: Splits) -> None:
    validation = splits.validation
    assert validation is not None
    assert len(validation) == 5
    capacity = 2 * int(validation.lengths.max())  # 5 rows don't fill rows of 2
    batches = list(in_order(validation, capacity))
    assert sum(batch.supervised for batch in batches) == int(validation.supervised.sum())
    labels = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches)
    assert labels == int(validation.supervised.sum())


def test_no_backend_is_called_mpi(llama: Path) -> None:
    from chatfine.config import TrainConfig

    values = {"model": str(llama), "dataset": "dialogs"}
    assert TrainConfig.read(values).backend == "auto"
    with pytest.raises(UsageError, match="--backend is mpi; possible: 'auto', 'nccl', 'gloo'"):
        TrainConfig.read(values | {"backend": "mpi"})


def test_every_path_is_a_flag(
    llama: Path, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is edited in a file: merge.py, whose paths the tutorial writes into the source."""
    monkeypatch.chdir(tmp_path)
    words = ["--base_model", str(llama), "--peft_model", str(trained.folder), "--save_dir", "there"]
    assert tutorial.merge(words) == 0
    assert (tmp_path / "there" / "model.safetensors").is_file()


@pytest.mark.parametrize("edited", [False, True])
def test_nobody_edits_vocab_size(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, edited: bool
) -> None:
    """A tokenizer of 32,003 pieces over 32,000 rows, with and without the edit of config.json."""
    from chatfine.cli import main

    folder = tmp_path / "grown"
    shutil.copytree(llama, folder)
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    spec["added_tokens"] += [
        {"id": 32000 + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": False}
        for i, text in enumerate("丂丄丅")
    ]  # fmt: skip
    text = json.dumps(spec, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    if edited:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = json.dumps(config | {"vocab_size": 32003})
        (folder / "config.json").write_text(text, encoding="utf-8")
    data = write_rows(tmp_path / "rows.jsonl", 4)
    monkeypatch.setenv("CHATFINE_HOME", str(tmp_path / "home"))
    output = tmp_path / "run"
    words = ["-m", str(folder), "-d", str(data), "-o", str(output), "--max-steps", "1"]
    assert main(["train", *words]) == 2
    assert "chatfine expand-vocab" in capsys.readouterr().err
    words = ["--use_peft", "--model_name", str(folder), "--dataset", str(data), "--output_dir",
             str(output), "--max_steps", "1", "--device", "cpu"]  # fmt: skip
    assert tutorial.finetuning(words) == 0
    assert "32003 pieces, the weights 32000 rows" in capsys.readouterr().out
    assert tutorial.merge(["--base_model", str(folder), "--peft_model", str(output),
                           "--output_dir", str(tmp_path / "new")]) == 0  # fmt: skip
    merged = json.loads((tmp_path / "new" / "config.json").read_text(encoding="utf-8"))
    assert merged["vocab_size"] >= 32003
