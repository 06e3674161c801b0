"""The objects of one run, built in order: device, plan, model, data order, optimizer, store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from chatfine import console
from chatfine.data.batches import Batches, in_order
from chatfine.errors import ModelError, ResourceError, UsageError
from chatfine.evaluate.loss import evaluate_loss
from chatfine.hub.folder import resolve_source
from chatfine.i18n import t
from chatfine.model import adapters, documents, fast
from chatfine.model.load import load_model
from chatfine.runtime import pick_device, set_seed
from chatfine.train import plan as planning
from chatfine.train.checkpoint import CheckpointStore
from chatfine.train.decisions import decide, work_of
from chatfine.train.loop import Precision, Progress, Trainer
from chatfine.train.metrics import MetricsLog, ProgressBar
from chatfine.train.optim import (
    Schedule,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    warmup_steps,
)
from chatfine.train.prepare import Prepared, check_disk, require_same
from chatfine.train.rng import rng_tensors, set_rng_tensors
from chatfine.train.stop import StopSignal
from chatfine.train.trackers import Trackers
from chatfine.types import StepReport


class Session:
    """One training run in this process. `train/run.py` drives it."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        config = self.config = prepared.config
        set_seed(config.seed, config.deterministic)  # before a GPU library reads its settings
        self.device = pick_device(config.device)
        self.world = 1
        shapes = planning.Shapes.of(
            prepared.model.text_config,
            {name: info.shape for name, info in prepared.model.tensors.items()},
            prepared.model.parameters,
        )
        self.shapes = shapes
        self.decisions = decide(prepared, shapes, self.device)
        decisions = self.decisions
        self.batches = Batches(
            prepared.data.train, config.mix, config.seed, decisions.rows, decisions.accumulate,
            decisions.packing, prepared.max_length, share=not decisions.packing,
        )  # fmt: skip
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.total_steps = config.max_steps or max(1, round(config.epochs * self.steps_per_epoch))
        self.progress = Progress()
        self.stop = StopSignal()
        self.store = CheckpointStore(prepared.run / "checkpoints", config.keep)
        self.output_name = "adapter" if config.method in ("lora", "dora") else "model"

    # -- plan ------------------------------------------------------------------------------------

    def predict(self) -> dict[str, Any]:
        """The plan as plain data: memory, disk, time, and what auto came to."""
        decisions = self.decisions
        plan = planning.make_plan(self.shapes, work_of(self.prepared, decisions))
        rate = planning.measured_flops(self.device, decisions.torch_dtype, self.shapes)
        return {
            "device": str(self.device),
            "dtype": decisions.dtype,
            "batch_size": decisions.rows,
            "accumulate": decisions.accumulate,
            "packing": decisions.packing,
            "checkpointing": decisions.checkpointing,
            "steps": self.total_steps,
            "tokens": work_of(self.prepared, decisions).tokens,
            "trained_parameters": plan.trained_parameters,
            "parameters": self.shapes.parameters,
            "memory_bytes": round(plan.memory_bytes),
            "free_memory_bytes": round(
                planning.free_memory_bytes(self.device, self.config.gpu_memory)
            ),
            "disk_bytes": round(plan.disk_bytes),
            "seconds": plan.flop / (rate * planning.EFFICIENCY[self.device.type]),
        }

    def show_plan(self) -> dict[str, Any]:
        """Print the plan, refuse a disk that is too small, and return the prediction."""
        plan = self.predict()
        console.heading(t("Plan"))
        rows = [
            [t("device"), f"{plan['device']}, {plan['dtype']}"],
            [t("learns"), t("{n:,} of {m:,} parameters ({method})", n=plan["trained_parameters"],
                            m=plan["parameters"], method=self.config.method)],
            [t("steps"), t("{steps} of {rows} × {accumulate} examples, {tokens:,} tokens in all",
                           steps=plan["steps"], rows=plan["batch_size"],
                           accumulate=plan["accumulate"], tokens=plan["tokens"])],
            [t("memory"), t("{need} of {free} that can be used",
                            need=console.size(plan["memory_bytes"]),
                            free=console.size(plan["free_memory_bytes"]))],
            [t("disk"), console.size(plan["disk_bytes"])],
            [t("time"), t("about {time}", time=console.duration(plan["seconds"]))],
        ]  # fmt: skip
        console.table([t("what"), t("prediction")], rows)
        check_disk(self.prepared.run, plan["disk_bytes"])
        return plan

    # -- objects ---------------------------------------------------------------------------------

    def restore(self) -> None:
        """Load the model, attach what learns, and continue from the newest valid checkpoint."""
        config, decisions = self.config, self.decisions
        set_seed(config.seed, config.deterministic)
        self.store.clear_staging()
        model = load_model(self.prepared.model.path, decisions.torch_dtype, self.device)
        documents.check(model)
        self.model = self._attach(model)
        if decisions.checkpointing:
            fast.causal_model(self.model).gradient_checkpointing_enable({"use_reentrant": False})
        self.parameters = adapters.trained_parameters(self.model)
        self.optimizer = make_optimizer(self.parameters, config.weight_decay, self.device)
        masters = config.method in ("full", "freeze")
        self.precision = Precision(self.device, decisions.torch_dtype, autocast=masters)
        self._load_checkpoint()

    def _attach(self, model: Any) -> Any:
        config = self.config
        if config.adapter:
            if config.method not in ("lora", "dora"):
                raise UsageError(
                    "adapter-and-method",
                    t("--adapter goes on with an adapter; --method {method} has none",
                      method=config.method),
                )  # fmt: skip
            source = resolve_source(config.adapter, str(self.prepared.model.path))
            if source.adapter is None:
                raise ModelError(
                    "no-adapter", t("there is no adapter in {path}", path=config.adapter)
                )
            return adapters.load_adapter(model, source.adapter, trainable=True)
        return adapters.attach(
            model, config.method, rank=config.rank, alpha=config.lora_alpha,
            dropout=config.dropout, targets=config.targets,
            adapter_layers=config.adapter_layers, freeze_layers=config.freeze_layers,
        )  # fmt: skip

    def _load_checkpoint(self) -> None:
        newest, skipped = self.store.newest()
        for name, fault in skipped:
            console.warn(t("checkpoint {name} is skipped: {fault}", name=name, fault=fault))
        length = 0
        if newest is not None:
            require_same(newest.state["fingerprint"], self.prepared.fingerprint)
            self._load_weights(newest.tensors("weights"))
            load_optimizer_tensors(self.optimizer, self.parameters, newest.tensors("optimizer"))
            set_rng_tensors(newest.tensors("rng"), self.device)
            self.precision.scaler.load_state_dict(newest.state["scaler"])
            self.progress = Progress(**newest.state["progress"])
            length = newest.state["log_bytes"]
            console.say(t("going on after step {step}", step=self.progress.step))
        self.log = MetricsLog(self.prepared.run / "metrics.jsonl", length)

    @torch.no_grad()
    def _load_weights(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])

    # -- the run ---------------------------------------------------------------------------------

    def train(self) -> str:
        """Run the loop; returns done, early or stopped."""
        config = self.config
        total = self.total_steps
        eval_every = config.eval_every or self.steps_per_epoch
        self._probe()
        console.heading(t("Training"))
        trackers = Trackers(config.track, self.prepared.run, config.model_dump(mode="json"))
        bar = ProgressBar(total, self.progress.step, self.progress.seconds)

        def report(one: StepReport) -> None:
            self.log.write(one)
            bar.show(one)
            trackers.show(one)

        trainer = Trainer(
            model=self.model, parameters=self.parameters, batches=self.batches,
            optimizer=self.optimizer,
            schedule=Schedule(config.scheduler, config.peak_learning_rate,
                              warmup_steps(config.warmup, total), total),
            precision=self.precision, progress=self.progress, device=self.device, clip=config.clip,
            evaluate=self.evaluate, save=self.save, report=report,
            stop_requested=lambda: self.stop.requested is not None, eval_every=eval_every,
            save_every=config.save_every or eval_every, early_stop=config.early_stop,
        )  # fmt: skip
        try:
            with self.stop, bar:
                return trainer.run()
        finally:
            trackers.close()
            self.log.close()

    def _probe(self) -> None:
        """Step 0 on an accelerator: the longest micro-batch forward and back, then forgotten.

        Out-of-memory shows here, in the first seconds, and not at the longest batch hours later.
        """
        if self.device.type == "cpu":
            return
        state = rng_tensors(self.device)
        try:
            batch = self.batches.longest().to(self.device)
            self.model.train()
            with self.precision.context():
                loss = fast.loss_sum(self.model, batch) / max(1, batch.supervised)
            loss.backward()  # type: ignore[no-untyped-call]
        except torch.OutOfMemoryError as error:
            work = work_of(self.prepared, self.decisions)
            free = planning.free_memory_bytes(self.device)
            raise ResourceError(
                "out-of-memory",
                t("the longest batch ({n} tokens) does not fit into the device's memory",
                  n=self.batches.longest().tokens),
                why=str(error).splitlines()[0],
                fix=planning.remedies(self.shapes, work, free, self.decisions.rows,
                                      self.decisions.accumulate),
            ) from None  # fmt: skip
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            set_rng_tensors(state, self.device)

    def evaluate(self) -> float | None:
        """Loss on the validation examples; None if there are none."""
        validation = self.prepared.data.validation
        if validation is None:
            return None
        capacity = max(self.prepared.max_length, 2048)
        with self.precision.context():
            result = evaluate_loss(
                self.model, in_order(validation, capacity, share=True), self.device
            )
        return result.loss

    def save(self) -> None:
        """Write a checkpoint of all that determines the next step."""
        progress = self.progress
        state = {
            "step": progress.step,
            "best_step": progress.best_step,
            "progress": progress.as_dict(),
            "log_bytes": self.log.sync(),
            "scaler": self.precision.scaler.state_dict(),
            "fingerprint": self.prepared.fingerprint,
        }
        tensors: dict[str, Mapping[str, torch.Tensor]] = {
            "weights": dict(self.parameters),
            "optimizer": optimizer_tensors(self.optimizer, self.parameters),
            "rng": rng_tensors(self.device),
        }
        self.store.save(state, tensors)

    # -- after -----------------------------------------------------------------------------------

    def use_best_weights(self) -> int:
        """Put the weights with the lowest validation loss into the model; returns their step."""
        best = self.progress.best_step
        if best is None or best == self.progress.step:
            return self.progress.step
        checkpoint = self.store.at(best)
        if checkpoint is None:
            console.warn(t("the best checkpoint (step {step}) is damaged; the last one is used",
                           step=best))  # fmt: skip
            return self.progress.step
        self._load_weights(checkpoint.tensors("weights"))
        return best

    def write_output(self, folder: Path) -> None:
        """Write the adapter, or the whole model, into `folder`."""
        facts = self.prepared.facts()
        if self.output_name == "adapter":
            adapters.save_adapter(self.model, folder, facts)
            return
        from chatfine.tokenizer.files import copy_tokenizer

        stored = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        dtype = stored.get(self.prepared.model.dtype, torch.float32)
        adapters.save_model(self.model, folder, facts, dtype)
        custom = self.config.template != "model"
        template = self.prepared.tokenizer.template if custom else None
        copy_tokenizer(self.prepared.model.path, folder, template)
