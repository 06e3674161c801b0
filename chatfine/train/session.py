"""The objects of one run, built in order: device, plan, model, data order, optimizer, store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from chatfine import console
from chatfine.data.batches import Batches, in_order
from chatfine.errors import ModelError
from chatfine.evaluate.loss import LossResult, evaluate_loss
from chatfine.hub.folder import resolve_source
from chatfine.i18n import t
from chatfine.model import adapters, chunked, documents, fast, learned_rows, recompute
from chatfine.runtime import pick_device, set_seed
from chatfine.train import forecast, machine, steps
from chatfine.train import plan as planning
from chatfine.train.calibration import load_base
from chatfine.train.checkpoint import Checkpoint, CheckpointStore
from chatfine.train.decisions import EVALUATED, decide, work_of
from chatfine.train.distributed import Group, is_slice, own, own_rows, reshard, whole
from chatfine.train.loop import Precision, Progress, Trainer
from chatfine.train.methods import ADAPTERS
from chatfine.train.metrics import MetricsLog, ProgressBar
from chatfine.train.optim import (
    Schedule,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    warmup_steps,
)
from chatfine.train.prepare import Prepared, learning_layers, require_same, shapes_of
from chatfine.train.remedies import out_of_memory, remedies
from chatfine.train.rng import rng_tensors, set_rng_tensors
from chatfine.train.rows import first_steps
from chatfine.train.sharded import Sharing, load_sharded
from chatfine.train.stop import StopSignal
from chatfine.train.trackers import Trackers
from chatfine.types import StepReport


class Session:
    """One training run in this process. `train/run.py` drives it."""

    def __init__(self, prepared: Prepared, group: Group) -> None:
        self.prepared, self.group = prepared, group
        config = self.config = prepared.config
        set_seed(config.seed, config.deterministic)  # before a GPU library reads its settings
        self.device = pick_device(config.device)
        machine.cap_memory(self.device, config.gpu_memory)
        shapes = self.shapes = shapes_of(prepared.model)
        self.decisions = group.first(lambda: decide(prepared, shapes, self.device, group.size))
        decisions = self.decisions
        self.batches = Batches(
            prepared.data.train, config.mix, config.seed, decisions.rows, decisions.accumulate,
            decisions.packing, prepared.max_length, group.rank, group.size,
            share=not decisions.packing,
        )  # fmt: skip
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.total_steps = config.max_steps or max(1, round(config.epochs * self.steps_per_epoch))
        self.rows_first = first_steps(config.rows_first, self.prepared.rows, self.total_steps)
        self.progress = Progress()
        self.stop = StopSignal()
        self.store = CheckpointStore(prepared.run / "checkpoints", config.keep, group)
        self.output_name = "adapter" if config.method in ADAPTERS else "model"

    @property
    def sharded(self) -> bool:
        """Whether every process holds only its slices of the weights."""
        return self.decisions.sharding != "none"

    # -- plan ------------------------------------------------------------------------------------

    def show_plan(self) -> dict[str, Any]:
        """Print the plan, refuse a disk that is too small, and return the prediction."""
        return self.group.first(
            lambda: forecast.show(self.prepared, self.decisions, self.shapes, self.device,
                                  self.total_steps)
        )  # fmt: skip

    # -- objects ---------------------------------------------------------------------------------

    def restore(self) -> None:
        """Load the model, attach what learns, and continue from the newest valid checkpoint."""
        config, decisions = self.config, self.decisions
        set_seed(config.seed, config.deterministic)
        if self.group.rank == 0:
            self.store.clear_staging()
        self.model = self._load_sharded() if self.sharded else self._load()
        if decisions.recompute_layers:
            causal = fast.causal_model(self.model)
            recompute.install(causal, decisions.recompute_layers, decisions.offload)
            chunked.install(self.model, planning.piece_tokens(work_of(self.prepared, decisions)))
        self.parameters = adapters.trained_parameters(self.model)
        self.group.spread(self.parameters.values())
        self.optimizer = make_optimizer(
            self.parameters, config.weight_decay, self.device, config.optimizer, config.kahan,
            learned_rows.parameters(self.model).keys(), config.rows_factor, self.rows_first,
        )  # fmt: skip
        self.precision = Precision(
            self.device, decisions.torch_dtype, autocast=self._masters and not self.sharded
        )
        if self.group.rank:  # every process drops other numbers
            set_seed(config.seed + self.group.rank, config.deterministic)
        self._load_checkpoint()

    @property
    def _masters(self) -> bool:
        """Whether what learns is the model itself, in float32."""
        return self.output_name == "model" and not self.config.pure_bf16

    @property
    def _fingerprint(self) -> dict[str, Any]:
        now = self.decisions
        return self.prepared.fingerprint(now.quantize, now.learned_fp8, now.calibrate)

    def _load(self) -> Any:
        model = load_base(self.prepared, self.decisions, self.device)
        documents.check(model)
        model = self._attach(model)
        most = self.batches.most_documents
        self.measure = steps.loss_model(model, self.prepared, self.decisions, self.shapes, most)
        return model

    def _load_sharded(self) -> Any:
        config, dtype = self.config, self.decisions.torch_dtype
        whole_model = self.output_name == "model"
        sharing = Sharing(
            self.group, self.device, keep_gathered=self.decisions.sharding == "gradients",
            offload=config.cpu_offload, first_reads=config.load == "rank0",
            products=dtype if self._masters and dtype != torch.float32 else None,
        )  # fmt: skip
        self.measure = load_sharded(
            self.prepared.model.path, dtype, self.decisions.quantize,
            self._attach if whole_model else lambda model: model.requires_grad_(False), sharing,
            self.prepared.positions,
        )  # fmt: skip
        documents.check_loss(self.measure)
        reshard(self.measure)
        if not whole_model:  # it stays whole, and is only put on what is shared out
            self.measure.model = self._attach(self.measure.model)
        return self.measure.model

    def _attach(self, model: Any) -> Any:
        tuned = self._attach_method(model)
        if self.config.pure_bf16:
            for one in adapters.trained_parameters(tuned).values():
                one.data = one.data.to(torch.bfloat16)
        return tuned

    def _attach_method(self, model: Any) -> Any:
        config = self.config
        if config.adapter:
            source = resolve_source(config.adapter, str(self.prepared.model.path))
            if source.adapter is None:
                raise ModelError(
                    "no-adapter", t("there is no adapter in {path}", path=config.adapter)
                )
            tuned = adapters.load_adapter(model, source.adapter, trainable=True)
            adapters.require_method(tuned, config.method)
            if not self.prepared.rows:
                learned_rows.freeze(tuned)
            return tuned
        return adapters.attach(
            model, config.method, rank=config.rank, alpha=config.lora_alpha,
            dropout=config.dropout, targets=config.targets, rows=self.prepared.rows,
            adapter_layers=learning_layers(config, self.prepared.model),
            freeze_layers=config.freeze_layers, virtual_tokens=config.learned_tokens,
        )  # fmt: skip

    def _load_checkpoint(self) -> None:
        newest, skipped = self.group.first(self.store.newest)
        for name, fault in skipped:
            console.warn(t("checkpoint {name} is skipped: {fault}", name=name, fault=fault))
        length = 0
        if newest is not None:
            require_same(newest.state["fingerprint"], self._fingerprint)
            self._load_weights(newest)
            moments = newest.tensors("optimizer", self._rows_here)
            load_optimizer_tensors(self.optimizer, self.parameters, moments)
            self._load_rng(newest)
            self.precision.scaler.load_state_dict(newest.state["scaler"])
            self.progress = Progress(**newest.state["progress"])
            length = newest.state["log_bytes"]
            console.say(t("going on after step {step}", step=self.progress.step))
        log = self.prepared.run / "metrics.jsonl"
        self.log = MetricsLog(log if self.group.rank == 0 else None, length)

    def _rows_here(self, entry: str) -> tuple[int, int] | None:
        """Which rows of a checkpoint's tensor (`name` or `name|moment`) this process holds."""
        parameter = self.parameters[entry.partition("|")[0]]
        return own_rows(parameter, self.group) if is_slice(parameter) else None

    @torch.no_grad()
    def _load_weights(self, checkpoint: Checkpoint) -> None:
        tensors = checkpoint.tensors("weights", self._rows_here)
        for name, parameter in self.parameters.items():
            own(parameter).copy_(tensors[name])
        self.measure.stale = True

    def _load_rng(self, checkpoint: Checkpoint) -> None:
        """Go on with this process's random numbers, or begin new ones if it was not there."""
        rank = self.group.rank
        states = checkpoint.tensors(f"rng{rank}" if rank else "rng")
        if states:
            set_rng_tensors(states, self.device)
        else:
            set_seed(self.config.seed + checkpoint.step * self.group.size + rank,
                     self.config.deterministic)  # fmt: skip

    # -- the run ---------------------------------------------------------------------------------

    def train(self) -> str:
        """Run the loop; returns done, early or stopped."""
        config = self.config
        total = self.total_steps
        eval_every = config.eval_every or self.steps_per_epoch
        self._probe()
        console.heading(t("Training"))
        speaks = config.track if self.group.rank == 0 else ()
        trackers = Trackers(speaks, self.prepared.run, config.model_dump(mode="json"))
        bar = ProgressBar(total, self.progress.step, self.progress.seconds)

        def report(one: StepReport) -> None:
            if self.group.rank == 0:
                self.log.write(one)
                bar.show(one)
                trackers.show(one)

        trainer = Trainer(
            model=self.measure, parameters=self.parameters, batches=self.batches,
            optimizer=self.optimizer,
            schedule=Schedule(config.scheduler, config.peak_learning_rate,
                              warmup_steps(config.warmup, total), total),
            precision=self.precision, progress=self.progress, device=self.device, group=self.group,
            clip=config.clip,
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
        if self.device.type == "cpu" and not self.decisions.compile:
            return
        state = rng_tensors(self.device)
        try:
            batch = self.batches.longest().to(self.device)
            steps.try_out(self.measure, batch, self.precision.context)
        except torch.OutOfMemoryError as error:
            work = work_of(self.prepared, self.decisions)
            free = machine.free_memory_bytes(self.device, self.config.gpu_memory)
            raise out_of_memory(
                t("the longest batch ({n} tokens) does not fit into the device's memory",
                  n=self.batches.longest().tokens),
                remedies(self.shapes, work, free, self.decisions.rows, self.decisions.accumulate),
                why=str(error).splitlines()[0],
            ) from None  # fmt: skip
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            set_rng_tensors(state, self.device)

    def evaluate(self) -> float | None:
        """Loss on the validation examples; None if there are none."""
        validation = self.prepared.data.validation
        if validation is None:
            return None
        capacity = max(self.prepared.max_length, EVALUATED)
        with self.precision.context():
            part = evaluate_loss(
                self.measure,
                in_order(validation, capacity, self.group.rank, self.group.size, share=True),
                self.device,
            )
        nats, tokens = self.group.sums(part.nats, part.tokens)
        return LossResult(nats, int(tokens)).loss

    def save(self) -> None:
        """Write a checkpoint of all that determines the next step."""
        progress = self.progress
        state = {
            "step": progress.step,
            "best_step": progress.best_step,
            "progress": progress.as_dict(),
            "log_bytes": self.log.sync(),
            "scaler": self.precision.scaler.state_dict(),
            "fingerprint": self._fingerprint,
        }
        tensors: dict[str, Mapping[str, torch.Tensor]] = {
            "weights": dict(self.parameters),
            "optimizer": optimizer_tensors(self.optimizer, self.parameters),
        }
        for rank, states in enumerate(self.group.gather(rng_tensors(self.device))):
            tensors[f"rng{rank}" if rank else "rng"] = states
        self.store.save(state, tensors)

    # -- after -----------------------------------------------------------------------------------

    def use_best_weights(self) -> int:
        """Put the weights with the lowest validation loss into the model; returns their step."""
        best = self.progress.best_step
        if best is None or best == self.progress.step:
            return self.progress.step
        checkpoint = self.group.first(lambda: self.store.at(best))
        if checkpoint is None:
            console.warn(t("the best checkpoint (step {step}) is damaged; the last one is used",
                           step=best))  # fmt: skip
            return self.progress.step
        self._load_weights(checkpoint)
        return best

    def output_writer(self) -> Callable[[Path], None]:
        """What writes the adapter, or the whole model, into a folder.

        All processes ask for it, since the weights are gathered here; the first one calls it.
        """
        facts, positions = self.prepared.facts(self.decisions), self.prepared.positions
        if self.output_name == "adapter":
            return lambda folder: adapters.save_adapter(self.model, folder, facts)
        stored = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        dtype = stored.get(self.prepared.model.dtype, torch.float32)
        reshard(self.measure)
        state = adapters.model_state(self.model, dtype, whole)

        def write(folder: Path) -> None:
            from chatfine.tokenizer.files import copy_tokenizer

            adapters.save_model(self.model, folder, facts, state, positions)
            custom = self.config.template != "model"
            template = self.prepared.tokenizer.template if custom else None
            length = positions.length if positions else 0
            copy_tokenizer(self.prepared.model.path, folder, template, length)

        return write
