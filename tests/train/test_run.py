"""Whole runs in this process: what learns, what is written, when they end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from chatfine.config import TrainConfig
from chatfine.errors import OutputError, ResourceError, UsageError
from chatfine.model import adapters, fast
from chatfine.train.run import lock, train
from chatfine.train.session import Session

Configure = Callable[..., TrainConfig]
Metrics = Callable[[Path], list[dict[str, Any]]]


def losses(rows: list[dict[str, Any]], name: str = "loss") -> list[float]:
    return [row[name] for row in rows if name in row]


def test_a_run_leaves_what_the_design_says(configure: Configure, metrics: Metrics) -> None:
    config = configure(epochs=3, max_steps=0)
    result = train(config)
    run = Path(config.output)
    assert {p.name for p in run.iterdir()} >= {
        "config.yaml", "metrics.jsonl", "loss.png", "adapter", "checkpoints", "report.md"
    }  # fmt: skip
    assert not (run / "adapter" / ".staging").exists()
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    rows = metrics(run)
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == list(range(1, result["steps"] + 1))
    first, last = losses(rows)[0], losses(rows)[-1]
    assert last < first - 0.5
    assert len(losses(rows, "val_loss")) == 3
    assert result["val_loss"] == min(losses(rows, "val_loss"))
    assert result["tokens"] == rows[-2]["tokens"]
    assert {"run", "steps", "tokens", "tokens_per_second", "train_loss", "val_loss",
            "peak_memory_bytes", "seconds", "total_seconds"} <= result.keys()  # fmt: skip
    assert result["seconds"] < result["total_seconds"]
    report = (run / "report.md").read_text(encoding="utf-8")
    assert f"chatfine chat {run}" in report
    facts = json.loads((run / "adapter" / "chatfine.json").read_text(encoding="utf-8"))
    assert facts["base"] == config.model
    assert facts["data"]
    assert facts["canaries"]


def test_two_runs_are_the_same_run(configure: Configure, metrics: Metrics, tmp_path: Path) -> None:
    outputs = [tmp_path / name for name in ("a", "b")]
    for output in outputs:
        train(configure(output=str(output), dropout=0.2, max_steps=3))
    assert metrics(outputs[0]) == metrics(outputs[1])
    for file in (outputs[0] / "adapter").iterdir():
        assert file.read_bytes() == (outputs[1] / "adapter" / file.name).read_bytes(), file.name
    train(configure(output=str(tmp_path / "c"), dropout=0.2, max_steps=3, seed=7))
    assert metrics(tmp_path / "c") != metrics(outputs[0])


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_full_and_freeze_write_a_model_and_touch_only_what_learns(
    configure: Configure, tiny: Path, method: str
) -> None:
    config = configure(method=method, freeze_layers=1, max_steps=2)
    train(config)
    model = Path(config.output) / "model"
    before, after = (load_file(p / "model.safetensors") for p in (tiny, model))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if method == "full":
        assert changed == set(before)
    else:
        assert changed == {name for name in before if name.startswith("model.layers.1.")}
    assert (model / "tokenizer.json").is_file()
    assert (model / "config.json").is_file()


def test_an_adapter_run_never_touches_the_base(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions: list[Session] = []
    original = Session.train

    def spy(self: Session) -> str:
        sessions.append(self)
        base = {n: p for n, p in self.model.named_parameters() if not p.requires_grad}
        frozen = {name: value.detach().clone() for name, value in base.items()}
        result = original(self)
        assert base
        assert all(torch.equal(frozen[n], p) for n, p in base.items())
        return result

    monkeypatch.setattr(Session, "train", spy)
    train(configure(method="dora", max_steps=2))
    assert len(sessions) == 1


# -- how long, on what -----------------------------------------------------------------------------


def test_max_steps_goes_round_the_data(configure: Configure, metrics: Metrics) -> None:
    config = configure(max_steps=9)
    seen: list[set[int]] = []
    original = Session.train

    def spy(self: Session) -> str:
        assert self.steps_per_epoch < 9
        for epoch in (0, 1):
            steps = range(epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch)
            seen.append({i for s in steps if s < 9 for b in self.batches.step(s) for i in b.index})
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "train", spy)
        assert train(config)["steps"] == 9
    assert len(seen[0]) > len(seen[1]) > 0
    assert seen[1] < seen[0]
    assert len(losses(metrics(Path(config.output)))) == 9


def test_the_schedule_runs_over_the_whole_run(configure: Configure, metrics: Metrics) -> None:
    config = configure(max_steps=5, warmup=2, learning_rate=0.1)
    train(config)
    rates = losses(metrics(Path(config.output)), "learning_rate")
    wanted = [0.05, 0.1, 0.1, 0.05 * (1 + math.cos(math.pi / 3)), 0.05 * (1 - 0.5)]
    assert rates == pytest.approx(wanted)


def test_two_data_sets_are_mixed_by_weight(
    configure: Configure, data: Path, tmp_path: Path, more_rows: Callable[..., Path]
) -> None:
    other = more_rows(tmp_path / "other.jsonl", 24, "letter")
    counts: list[list[int]] = []
    original = Session.train

    def spy(self: Session) -> str:
        size = len(self.prepared.data.train[0])
        drawn = [i for s in range(self.steps_per_epoch) for b in self.batches.step(s)
                 for i in b.index]  # fmt: skip
        counts.append([sum(i < size for i in drawn), sum(i >= size for i in drawn)])
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "train", spy)
        train(configure(dataset=[str(data), str(other)], mix="3,1", max_steps=2))
    assert counts[0][0] / sum(counts[0]) == pytest.approx(0.75, abs=0.03)


def test_early_stopping_ends_after_evaluations_without_gain(
    configure: Configure, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([3.0, 2.0, 2.5, 2.2, 9.0, 9.0])
    monkeypatch.setattr(Session, "evaluate", lambda self: next(values))
    config = configure(max_steps=20, eval_every=2, early_stop=2)
    result = train(config)
    assert (result["ended"], result["steps"], result["best_step"]) == ("early", 8, 4)
    assert result["val_loss"] == 2.0
    assert losses(metrics(Path(config.output)), "val_loss") == [3.0, 2.0, 2.5, 2.2]


@pytest.mark.parametrize(
    ("values", "best"), [([3.0, 1.0, 2.0, 2.0], 2), ([3.0, 2.0, 1.5, 1.0], 4), ([None] * 4, 4)]
)
def test_the_adapter_is_the_best_else_the_last(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, values: list[float | None], best: int
) -> None:
    given = iter(values)
    monkeypatch.setattr(Session, "evaluate", lambda self: next(given))
    config = configure(max_steps=4, eval_every=1, keep=2)
    result = train(config)
    run = Path(config.output)
    stored = {p.name for p in (run / "checkpoints").iterdir()}
    assert {f"step-{best:08d}", "step-00000004", "step-00000003"} == stored
    weights = load_file(run / "checkpoints" / f"step-{best:08d}" / "weights.safetensors")
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    for name, value in weights.items():
        assert torch.equal(value, adapter[name.replace(".default", "")]), name
    assert result["best_step"] == best


def test_a_damaged_best_checkpoint_is_said_and_the_last_is_used(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(Session, "evaluate", lambda self: next(given))
    original = Session.use_best_weights

    def damage(self: Session) -> int:
        (self.store.folder / "step-00000001" / "weights.safetensors").write_bytes(b"")
        return original(self)

    monkeypatch.setattr(Session, "use_best_weights", damage)
    assert train(configure(max_steps=3, eval_every=1))["best_step"] == 3
    output = capsys.readouterr()
    assert "best checkpoint (step 1) is damaged" in " ".join((output.out + output.err).split())


def test_going_on_from_an_adapter(configure: Configure, metrics: Metrics, tmp_path: Path) -> None:
    first = configure(output=str(tmp_path / "first"), max_steps=12)
    train(first)
    second = configure(output=str(tmp_path / "second"), adapter=first.output, max_steps=2)
    train(second)
    start, end, again = (
        losses(metrics(Path(first.output)))[0],
        losses(metrics(Path(first.output)))[-1],
        losses(metrics(Path(second.output)))[0],
    )
    assert again < (start + end) / 2
    with pytest.raises(UsageError, match="--method full has none"):
        train(configure(output=str(tmp_path / "c"), adapter=first.output, method="full"))
    assert not (tmp_path / "c").exists()


def test_an_evaluation_does_not_change_the_training(
    configure: Configure, metrics: Metrics, tmp_path: Path
) -> None:
    runs = []
    for name, every in (("a", 1), ("b", 4)):
        config = configure(output=str(tmp_path / name), eval_every=every, dropout=0.3)
        train(config)
        runs.append(losses(metrics(Path(config.output))))
    assert runs[0] == runs[1]


def test_packing_and_recomputation_run_too(configure: Configure) -> None:
    result = train(configure(packing="on", max_length=128, checkpointing="full", batch_size=1))
    assert result["steps"] == 4


# -- a loss that is not finite ---------------------------------------------------------------------


def test_a_broken_loss_ends_the_run_with_75_and_the_last_weights(
    configure: Configure, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chatfine.errors import Stopped

    calls = 0
    original = fast.loss_sum

    def breaks(model: Any, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(model, batch) * (math.nan if calls == 3 else 1)

    monkeypatch.setattr(fast, "loss_sum", breaks)
    config = configure(max_steps=4, save_every=1)
    with pytest.raises(Stopped) as caught:
        train(config)
    run = Path(config.output)
    assert (caught.value.code, caught.value.exit_code) == ("not-finite", 75)
    assert [row["step"] for row in metrics(run)] == [1, 2]
    assert (run / "checkpoints" / "step-00000002").is_dir()
    assert not (run / "adapter").exists()


# -- the output folder -----------------------------------------------------------------------------


def test_an_output_that_is_a_file_is_refused(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x", encoding="utf-8")
    with pytest.raises(OutputError) as caught:
        train(configure(overwrite=True))
    assert caught.value.code == "output-is-file"
    assert (tmp_path / "run").read_text(encoding="utf-8") == "x"


def test_a_folder_with_something_else_is_never_touched(
    configure: Configure, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("x", encoding="utf-8")
    for overwrite in (False, True):
        with pytest.raises(OutputError) as caught:
            train(configure(overwrite=overwrite))
        assert caught.value.code == "output-not-empty"
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_run_is_named_with_both_ways_out_and_replaced_only_when_asked(
    configure: Configure,
) -> None:
    config = configure(max_steps=1)
    run = Path(config.output)
    train(config)
    (run / "checkpoints" / "old").write_text("x", encoding="utf-8")
    with pytest.raises(OutputError) as caught:
        train(config)
    assert caught.value.code == "output-is-run"
    assert f"chatfine resume {run}" in caught.value.fix[0]
    assert "--overwrite" in caught.value.fix[1]
    result = train(configure(max_steps=2, overwrite=True))
    assert result["steps"] == 2
    assert not (run / "checkpoints" / "old").exists()
    assert "overwrite: false" in (run / "config.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("left", [[], [".lock"], [".lock", ".config.yaml"]])
def test_an_empty_folder_or_a_run_that_died_before_its_first_file_is_fine(
    configure: Configure, tmp_path: Path, left: list[str]
) -> None:
    (tmp_path / "run").mkdir()
    for name in left:
        (tmp_path / "run" / name).write_text("", encoding="utf-8")
    assert train(configure(max_steps=1))["steps"] == 1


def test_overwrite_does_not_pull_a_run_from_under_another_process(configure: Configure) -> None:
    config = configure(max_steps=1)
    train(config)
    before = sorted(p.name for p in Path(config.output).iterdir())
    with lock(Path(config.output)), pytest.raises(OutputError) as caught:
        train(configure(max_steps=1, overwrite=True))
    assert caught.value.code == "run-in-use"
    assert sorted(p.name for p in Path(config.output).iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "error", "code"),
    [
        ({"targets": "query"}, UsageError, "no-such-target"),
        ({"method": "freeze", "freeze_layers": 9}, UsageError, "too-many-layers"),
        ({"gpu_memory": 0.1}, ResourceError, "out-of-memory"),
        ({"max_length": 4096}, UsageError, "length-beyond-model"),
    ],
)
def test_a_refused_run_leaves_nothing_behind(
    configure: Configure, tmp_path: Path, changes: dict[str, Any], error: type, code: str
) -> None:
    with pytest.raises(error) as caught:
        train(configure(**changes))
    assert caught.value.code == code
    assert caught.value.fix or code == "too-many-layers"
    assert not (tmp_path / "run").exists()


def test_too_little_disk_is_refused_with_both_sizes(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatfine.hub.place.free_disk_bytes", lambda path: 1000)
    with pytest.raises(ResourceError) as caught:
        train(configure(method="full"))
    assert caught.value.code == "disk-full"
    assert not (tmp_path / "run").exists()


def test_the_adapter_is_the_model_that_was_evaluated(configure: Configure, tiny: Path) -> None:
    from chatfine.data.batches import in_order
    from chatfine.evaluate.loss import evaluate_loss
    from chatfine.model.load import load_model
    from chatfine.train.prepare import prepare

    config = configure(max_steps=6, eval_every=3)
    result = train(config)
    model = adapters.load_adapter(load_model(tiny, torch.float32), Path(config.output) / "adapter")
    validation = prepare(config).data.validation
    assert validation is not None
    again = evaluate_loss(model, in_order(validation, 2048))
    assert again.loss == pytest.approx(result["val_loss"], rel=1e-5)
