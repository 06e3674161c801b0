"""One optimizer step is exactly right (contract C3), and a broken one touches nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chatfine.data.batches import Batches
from chatfine.data.examples import Examples
from chatfine.errors import Stopped
from chatfine.model import adapters, fast, recompute
from chatfine.model.load import load_model
from chatfine.train.distributed import Group
from chatfine.train.loop import Precision, Progress, Trainer
from chatfine.train.optim import Schedule, make_optimizer
from chatfine.types import StepReport

CPU = torch.device("cpu")
LENGTHS = (5, 17, 3, 30, 8, 8, 21, 2)


def examples(lengths: Sequence[int] = LENGTHS) -> Examples:
    """Random ids; how much of an example is trained on differs a lot, as in real data."""
    random = np.random.default_rng(0)
    ids = [random.integers(3, 300, n) for n in lengths]
    masks = [np.arange(n) >= (1 if i % 2 else n // 2 + n % 2) for i, n in enumerate(lengths)]
    offsets = np.cumsum([0, *lengths])
    return Examples(np.concatenate(ids).astype(np.int32), np.concatenate(masks), offsets)


def model_for(path: Path, method: str = "lora", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = adapters.attach(load_model(path, dtype), method, rank=4, freeze_layers=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


LOSS_SUM = fast.loss_sum


class Recorder(torch.optim.SGD):
    """Keeps the gradients it is given instead of using them."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def trainer_for(model: Any, batches: Any, **changes: Any) -> Trainer:
    parameters = adapters.trained_parameters(model)
    values: dict[str, Any] = {
        "model": fast.LossModel(model), "parameters": parameters, "batches": batches,
        "optimizer": make_optimizer(parameters, 0.0, CPU),
        "schedule": Schedule("constant", 1e-2, 0, 5),
        "precision": Precision(CPU, torch.float32, autocast=False), "progress": Progress(),
        "device": CPU, "group": Group(), "clip": 0.0,
        "evaluate": lambda: None, "save": lambda: None,
        "report": lambda report: None, "stop_requested": lambda: False, "eval_every": 1000,
        "save_every": 1000,
    }  # fmt: skip
    return Trainer(**(values | changes))


def one_step(model: Any, batches: Batches) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of the first optimizer step."""
    reports: list[StepReport] = []
    recorder = Recorder(list(adapters.trained_parameters(model).values()), lr=0.0)
    model.train()
    assert trainer_for(model, batches, optimizer=recorder, report=reports.append).step()
    loss = reports[0].loss
    assert loss is not None
    return loss, recorder.seen


SHAPES: dict[str, dict[str, Any]] = {
    "1 × 8": {"rows": 1, "accumulate": 8},
    "2 × 4": {"rows": 2, "accumulate": 4},
    "3 × 3": {"rows": 3, "accumulate": 3},
    "8 × 1 with its common beginning once": {"rows": 8, "share": True},
    "packed 1 × 8": {"rows": 1, "accumulate": 8, "packing": True, "capacity": 40},
    "packed 4 × 1": {"rows": 4, "packing": True, "capacity": 32},
}


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_examples_give_the_same_step_however_they_are_cut(
    tiny: Path, shape: str, method: str
) -> None:
    model = model_for(tiny, method)
    wanted, slow = one_step(model, Batches([examples()], rows=8))
    loss, gradients = one_step(model, Batches([examples()], **SHAPES[shape]))
    assert loss == pytest.approx(wanted, rel=1e-6)
    for a, b in zip(gradients, slow, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_the_ranks_of_a_step_add_up_to_it(tiny: Path) -> None:
    model = model_for(tiny)
    wanted, slow = one_step(model, Batches([examples()], rows=8))
    ranks = [one_step(model, Batches([examples()], rows=4, rank=rank, world=2)) for rank in (0, 1)]
    assert sum(loss for loss, _ in ranks) == pytest.approx(wanted, rel=1e-6)
    for a, b, c in zip(ranks[0][1], ranks[1][1], slow, strict=True):
        torch.testing.assert_close(a + b, c, atol=1e-6, rtol=1e-4)


def test_the_loss_is_the_mean_over_trained_tokens_not_over_examples(tiny: Path) -> None:
    model, batches = model_for(tiny), Batches([examples()], rows=1, accumulate=8)
    loss, _ = one_step(model, batches)
    parts = [(fast.loss_sum(model, batch).item(), batch.supervised) for batch in batches.step(0)]
    assert loss == pytest.approx(sum(s for s, _ in parts) / sum(n for _, n in parts), rel=1e-6)
    assert abs(loss - sum(s / n for s, n in parts) / len(parts)) > 1e-3


# -- recomputation -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora", "full", "freeze"])
def test_recomputed_activations_give_the_same_gradients_and_none_is_zero(
    tiny: Path, method: str
) -> None:
    batches = Batches([examples()], rows=8)
    model = model_for(tiny, method)
    plain_loss, plain = one_step(model, batches)
    calls: list[int] = []
    recompute.install(fast.causal_model(model), 99)
    mlp = fast.causal_model(model).model.layers[1].mlp
    mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    loss, gradients = one_step(model, batches)
    assert len(calls) == 2  # once forward, once again backward
    assert loss == plain_loss
    for a, b in zip(gradients, plain, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


# -- number formats --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full", "freeze"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_step_in_16_bits_stays_close(tiny: Path, method: str, dtype: torch.dtype) -> None:
    batches = Batches([examples()], rows=4, accumulate=2)
    exact: list[StepReport] = []
    trainer_for(model_for(tiny, method), batches, report=exact.append).step()
    model = model_for(tiny, method, dtype)
    before = {n: p.detach().clone() for n, p in adapters.trained_parameters(model).items()}
    reports: list[StepReport] = []
    precision = Precision(CPU, dtype, autocast=method != "lora")
    if dtype is torch.float16:  # small enough not to overflow, so that the first step counts
        precision.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    model.train()
    trainer_for(model, batches, precision=precision, report=reports.append).step()
    assert reports[0].loss == pytest.approx(exact[0].loss, rel=2e-2)
    assert reports[0].grad_norm == pytest.approx(exact[0].grad_norm, rel=5e-2)
    after = adapters.trained_parameters(model)
    moved = [n for n in before if not torch.equal(before[n], after[n])]
    assert moved == list(before)
    assert all(p.dtype == torch.float32 for p in after.values())


def test_fp16_skips_steps_that_overflow_until_its_scale_fits(tiny: Path) -> None:
    model = model_for(tiny, dtype=torch.float16)
    reports: list[StepReport] = []
    precision = Precision(CPU, torch.float16, autocast=False)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    trainer = trainer_for(
        model, Batches([examples()], rows=8), precision=precision, report=reports.append
    )
    before = {n: p.detach().clone() for n, p in trainer.parameters.items()}
    trainer.step()
    assert not math.isfinite(reports[0].grad_norm or 0)
    assert all(torch.equal(before[n], p) for n, p in trainer.parameters.items())
    while len(reports) < 20 and not math.isfinite(reports[-1].grad_norm or math.nan):
        trainer.step()
    assert 1 < len(reports) < 20
    assert any(not torch.equal(before[n], p) for n, p in trainer.parameters.items())


# -- faults and requests ---------------------------------------------------------------------------


def frozen_state(trainer: Trainer) -> list[torch.Tensor]:
    return [value.detach().clone() for value in trainer.model.state_dict().values()]


def assert_not_finite(trainer: Trainer, what: str) -> Stopped:
    before, progress = frozen_state(trainer), trainer.progress.as_dict()
    with pytest.raises(Stopped) as caught:
        trainer.step()
    assert caught.value.code == "not-finite"
    assert caught.value.exit_code == 75
    assert what in caught.value.what
    for old, new in zip(before, trainer.model.state_dict().values(), strict=True):
        assert (
            torch.equal(
                old,
                new,
            )
            or (old.isnan() == new.isnan()).all()
        )
    assert trainer.progress.as_dict() == progress
    if trainer.progress.step == 0:
        assert not any(value.any() for state in trainer.optimizer.state.values()
                       for value in state.values())  # fmt: skip
    return caught.value


def test_an_infinite_weight_stops_before_the_update(tiny: Path) -> None:
    model = model_for(tiny)
    with torch.no_grad():
        model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight[0, 0] = math.inf
    trainer = trainer_for(model, Batches([examples()], rows=2, accumulate=4))
    error = assert_not_finite(trainer, "the loss of step 1 is nan")
    assert error.where == "examples " + ", ".join(
        str(i) for batch in trainer.batches.step(0) for i in batch.index
    )
    assert "0.01" in error.fix[0]


def test_a_loss_that_breaks_later_stops_that_step(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(model_for(tiny), Batches([examples()], rows=8))
    trainer.step()
    monkeypatch.setattr(fast, "loss_sum", lambda m, b: LOSS_SUM(m, b) * math.inf)
    assert_not_finite(trainer, "the loss of step 2 is inf")


def test_a_finite_loss_with_an_infinite_gradient_stops_too(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Break(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return grad * math.inf

    monkeypatch.setattr(fast, "loss_sum", lambda m, b: Break.apply(LOSS_SUM(m, b)))
    trainer = trainer_for(model_for(tiny), Batches([examples()], rows=8))
    assert_not_finite(trainer, "the gradient of step 1 is")


def test_fp16_does_not_skip_steps_for_ever(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_for(tiny, dtype=torch.float16)
    trainer = trainer_for(
        model, Batches([examples()], rows=8), precision=Precision(CPU, torch.float16, False)
    )
    hook = adapters.trained_parameters(model)
    for parameter in hook.values():
        parameter.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(Stopped, match="the gradient of step"):
        all(trainer.step() for _ in range(40))


def test_a_stop_in_the_middle_of_a_step_leaves_no_trace(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The micro-batches before it have drawn random numbers, as dropout does."""
    monkeypatch.setattr(fast, "loss_sum", lambda m, b: LOSS_SUM(m, b) + torch.rand(()))
    asked = iter([False, False, True])
    trainer = trainer_for(
        model_for(tiny), Batches([examples()], rows=2, accumulate=4),
        stop_requested=lambda: next(asked),
    )  # fmt: skip
    torch.manual_seed(9)
    generator, before = torch.get_rng_state(), frozen_state(trainer)
    assert trainer.step() is False
    assert torch.equal(torch.get_rng_state(), generator)
    assert trainer.progress == Progress()
    assert all(p.grad is None for p in trainer.parameters.values())
    for old, new in zip(before, trainer.model.state_dict().values(), strict=True):
        assert torch.equal(old, new)


class Mark:
    """Stands for the event that a GPU has come by."""

    def __init__(self, said: list[str]) -> None:
        self.said, self.at = said, time.perf_counter()

    def synchronize(self) -> None:
        self.said.append("read")

    def elapsed_time(self, other: Mark) -> float:
        return (other.at - self.at) * 1000


def work_ahead(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let a CPU be treated as a GPU is; returns what happens, in order."""
    said: list[str] = []

    def accumulate(trainer: Trainer, *args: Any) -> torch.Tensor:
        said.append("given")
        return original(trainer, *args)

    original = Trainer._accumulate
    monkeypatch.setattr(Trainer, "_works_ahead", Trainer._skips)
    monkeypatch.setattr(Trainer, "_mark", lambda self: Mark(said) if self._skips() else None)
    monkeypatch.setattr(Trainer, "_accumulate", accumulate)
    return said


def whole_run(tiny: Path) -> tuple[list[StepReport], list[Progress]]:
    """The lines of a run, and where it stood whenever it was saved."""
    lines: list[StepReport] = []
    saved: list[Progress] = []
    trainer = trainer_for(
        model_for(tiny), Batches([examples()], rows=4), report=lines.append, save_every=3,
        evaluate=lambda: 1.0,
    )  # fmt: skip
    trainer.save = lambda: saved.append(Progress(**trainer.progress.as_dict()))
    assert trainer.run() == "done"
    return lines, saved


def test_a_gpu_is_given_the_next_step_before_the_last_one_is_read(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, wanted_saved = whole_run(tiny)
    said = work_ahead(monkeypatch)
    lines, saved = whole_run(tiny)
    assert said == ["given", "given", "read", "given", "read", "read",
                    "given", "given", "read", "read"]  # fmt: skip
    assert [one.step for one in lines] == [1, 2, 3, 4, 5, 5]
    for one, other in zip(lines, wanted, strict=True):
        for name in ("step", "loss", "grad_norm", "tokens", "learning_rate", "val_loss"):
            assert getattr(one, name) == getattr(other, name)
    assert [one.step for one in saved] == [3, 5]
    assert [one.tokens for one in saved] == [one.tokens for one in wanted_saved]
    seconds = [one.seconds or 0.0 for one in lines[:5]]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


def test_one_micro_batch_is_enough_to_work_ahead(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = work_ahead(monkeypatch)
    trainer = trainer_for(model_for(tiny), Batches([examples()], rows=2, accumulate=2))
    trainer.step()
    trainer.step()
    assert said == ["given", "given", "given", "read", "given"]


def test_a_step_that_broke_is_found_before_the_next_one_changes_anything(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work_ahead(monkeypatch)
    trainer = trainer_for(model_for(tiny), Batches([examples()], rows=8))
    trainer.step()
    monkeypatch.setattr(fast, "loss_sum", lambda m, b: LOSS_SUM(m, b) * math.inf)
    before = frozen_state(trainer)
    trainer.step()
    with pytest.raises(Stopped, match="the loss of step 2 is inf"):
        trainer.step()
    assert trainer.progress.step == 1
    for old, new in zip(before, trainer.model.state_dict().values(), strict=True):
        assert torch.equal(old, new)


def test_a_stop_reports_the_step_before_it(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work_ahead(monkeypatch)
    reports: list[StepReport] = []
    asked = iter([False, True])
    trainer = trainer_for(
        model_for(tiny), Batches([examples()], rows=8), report=reports.append,
        stop_requested=lambda: next(asked),
    )  # fmt: skip
    assert trainer.run() == "stopped"
    assert [one.step for one in reports] == [1]
    assert trainer.progress.step == 1
    assert trainer.progress.tokens == sum(LENGTHS)


def test_clipping_bounds_the_step_and_reports_the_norm_before_it(tiny: Path) -> None:
    reports: list[StepReport] = []
    norms = []
    for clip in (0.0, 0.01):
        model = model_for(tiny)
        recorder = Recorder(list(adapters.trained_parameters(model).values()), lr=0.0)
        trainer_for(
            model, Batches([examples()], rows=8), optimizer=recorder, clip=clip,
            report=reports.append,
        ).step()  # fmt: skip
        norms.append(torch.stack([g.norm() for g in recorder.seen]).norm().item())
    assert norms[0] == pytest.approx(reports[0].grad_norm)
    assert reports[1].grad_norm == pytest.approx(reports[0].grad_norm)
    assert norms[1] == pytest.approx(0.01, rel=1e-3)


def test_a_validation_loss_that_is_not_a_number_is_never_the_best() -> None:
    progress = Progress(step=1)
    assert not progress.note_evaluation(math.nan)
    assert progress.best_loss is None
    progress.step = 2
    assert progress.note_evaluation(3.0)
    assert not progress.note_evaluation(math.inf)
    assert (progress.best_loss, progress.best_step) == (3.0, 2)
    assert progress.evaluations_without_gain == 1
