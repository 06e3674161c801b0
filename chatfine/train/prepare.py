"""Everything that can refuse a run, done before torch is imported and before anything is
written."""

from __future__ import annotations

import datetime
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatfine import __version__
from chatfine.data import sources
from chatfine.data.examples import DataSettings, Splits, load_examples
from chatfine.errors import OutputError, UsageError
from chatfine.hub.catalog import find_model
from chatfine.hub.folder import ModelFolder, check_vocabulary, read_model_folder, resolve_source
from chatfine.hub.rounded import CALIBRATED
from chatfine.i18n import t
from chatfine.model import positions as scaling
from chatfine.runtime import home
from chatfine.tokenizer.encode import ChatTokenizer
from chatfine.train import plan as planning
from chatfine.train.methods import LLAMA_ADAPTER_LAYERS, check_method
from chatfine.train.rows import learning_rows

if TYPE_CHECKING:
    from chatfine.config import TrainConfig
    from chatfine.train.decisions import Decisions

CONFIG_FILE = "config.yaml"
RESULT_FILE = "result.json"
LOCK_FILE = ".lock"
DEFAULT_LENGTH = 2048
TEMPLATES = ("model", "plain")
CANARIES = ("Hello  world, it's 2024!\n", "你好，世界。😀", "a  1\t2")
"""Texts whose ids are kept beside an adapter: a tokenizer that encodes them otherwise is
noticed."""

WITHOUT_EFFECT = frozenset(
    {
        "output",
        "track",
        "keep",
        "overwrite",
        "save_every",
        "gpu_memory",
        "device",
        "author",
        "name",
        "sharding",
        "cpu_offload",
        "load",
        "backend",
    }
)
"""Settings that do not enter the maths of a run, so resuming allows them to change (the names in
identity questions enter through the data's fingerprint)."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that is ready to start: all inputs are read and good."""

    config: TrainConfig
    run: Path
    model: ModelFolder
    tokenizer: ChatTokenizer
    data: Splits
    max_length: int
    rows: Sequence[int] = ()
    """ids whose rows of embedding and head learn beside an adapter, or alone"""
    positions: scaling.Positions | None = None
    """how `model`, whose config is changed so, reads more tokens than its files say"""

    @property
    def row_parameters(self) -> int:
        """How many numbers these rows are."""
        return len(self.rows) * self.model.hidden_size * (1 if self.model.tied else 2)

    @property
    def method(self) -> str:
        """What learns, in words."""
        if not self.rows:
            return self.config.method
        return t("{method}, {n:,} new rows", method=self.config.method, n=len(self.rows))

    def fingerprint(
        self, quantize: str, learned_fp8: bool = False, calibrate: bool = False
    ) -> dict[str, Any]:
        """What must be equal for a checkpoint to fit: settings that matter, model, data, how the
        frozen weights are stored (`quantize`: what auto came to) and rounded, and whether weights
        that learn are multiplied as 8-bit floats."""
        values = self.config.model_dump(mode="json")
        maths = {key: value for key, value in values.items() if key not in WITHOUT_EFFECT}
        maths |= {"model_digest": self.model.digest(), "data": self.data.report.fingerprint}
        maths["quantize"] = quantize
        maths["fp8_products"] = "on" if learned_fp8 else "off"
        maths["calibrate"] = "on" if calibrate else "off"
        return maths | self._positions_fact

    def facts(self, decisions: Decisions) -> dict[str, Any]:
        """What an adapter folder should know about itself (contract C5)."""
        config = self.config
        return {
            "chatfine": __version__,
            "base": config.model,
            "base_digest": self.model.digest(),
            "method": config.method,
            "quantize": decisions.quantize,
            **({CALIBRATED: True} if decisions.calibrate else {}),
            "template": "model" if config.template == "model" else self.tokenizer.template,
            "tokenizer_digest": self.tokenizer.digest,
            "canaries": {text: self.tokenizer.encode_text(text) for text in CANARIES},
            "datasets": list(config.dataset),
            "data": self.data.report.fingerprint,
            "system": config.system,
        } | self._positions_fact

    @property
    def _positions_fact(self) -> dict[str, Any]:
        return {} if self.positions is None else {scaling.FACT: self.positions.facts()}


def resolve_paths(config: TrainConfig) -> TrainConfig:
    """The same settings with local files as absolute paths, so a run can be resumed from
    anywhere."""

    def absolute(name: str) -> str:
        return os.path.abspath(name) if name and os.path.exists(name) else name

    def file(name: str) -> str:
        return os.path.abspath(name) if os.path.isfile(name) else name

    # a word that means something is not the folder of that name that happens to lie here
    model_here = os.path.isfile(os.path.join(config.model, "config.json"))

    output = config.output or datetime.datetime.now().strftime("run-%Y%m%d-%H%M%S")
    changes = {
        "model": os.path.abspath(config.model) if model_here else config.model,
        "dataset": tuple(map(sources.absolute, config.dataset)),
        "validation": _absolute_validation(config.validation),
        "adapter": absolute(config.adapter),
        "template": config.template if config.template in TEMPLATES else file(config.template),
        "output": os.path.abspath(output),
    }
    return config.model_copy(update=changes)


def _absolute_validation(name: str) -> str:
    """As `sources.absolute`, but a word that is also a folder here may be the name of a split."""
    return name if not name or os.path.isdir(name) else sources.absolute(name)


def prepare(config: TrainConfig) -> Prepared:
    """Read and check model, tokenizer and data of a run.

    Raises:
        Refused: whatever can't be used; nothing was written.
    """
    config = resolve_paths(config)
    model = read_model_folder(find_model(config.model))
    check_method(
        config.method, model, quantize=config.quantize, packing=config.packing,
        checkpointing=config.checkpointing, layers=config.adapter_layers, adapter=config.adapter,
        optimizer=config.optimizer, fp8_products=config.fp8_products,
    )  # fmt: skip
    tokenizer = ChatTokenizer.load(model.path, template=config.template)
    check_vocabulary(model, tokenizer.size)
    rows = learning_rows(model, config.method, config.train_rows, config.adapter)
    positions = positions_of(config, model)
    model = scaling.with_positions_of(model, positions)
    max_length = _max_length(config, model, positions.kind if positions else "yarn")
    settings = DataSettings(
        validation=config.validation, prompt=config.prompt, response=config.response,
        system=config.system, train_on=config.train_on, max_length=max_length,
        too_long=config.too_long, max_dropped=config.max_dropped, on_bad_row=config.on_bad_row,
        name=config.name, author=config.author, mix=config.mix, seed=config.seed,
    )  # fmt: skip
    data = load_examples(config.dataset, tokenizer, settings, home() / "data")
    run = Path(config.output)
    return Prepared(config, run, model, tokenizer, data, max_length, rows, positions)


def positions_of(config: TrainConfig, model: ModelFolder) -> scaling.Positions | None:
    """How the run makes `model` read more tokens than its files say; None for not at all.

    Raises:
        UsageError, ModelError: as `model.positions.of_run`.
    """
    begin = resolve_source(config.adapter, str(model.path)).adapter if config.adapter else None
    earlier = scaling.of_adapter(begin)
    tokens = config.max_length + _prefix_tokens(config)
    return scaling.of_run(model.text_config, config.rope_scaling, tokens, earlier)


def _prefix_tokens(config: TrainConfig) -> int:
    """Positions of every example that a learned prefix takes."""
    return config.learned_tokens if config.method == "prefix" else 0


def _max_length(config: TrainConfig, model: ModelFolder, kind: str) -> int:
    prefix = _prefix_tokens(config)
    limit = model.max_positions - prefix
    if config.max_length > limit:
        raise UsageError(
            "length-beyond-model",
            t("--max-length is {value}; the model was made for {limit} tokens",
              value=config.max_length, limit=model.max_positions),
            where="--max-length",
            why=t("the prefix takes {n} of them", n=prefix) if prefix else None,
            fix=(f"--max-length {limit}",
                 t("or let it read further: {flag}", flag=f"{scaling.FLAG} {kind}")),
        )  # fmt: skip
    return config.max_length or min(DEFAULT_LENGTH, limit)


def check_output(run: Path, overwrite: bool) -> None:
    """Refuse an output folder that holds something; with `overwrite` only a run is replaced.

    Raises:
        OutputError: naming `resume` where it is a run, and --overwrite.
    """
    if not run.exists():
        return
    if not run.is_dir():
        raise OutputError("output-is-file", t("{path} is a file", path=run), where="--output")
    unfinished = {LOCK_FILE, f".{CONFIG_FILE}"}  # of a run killed before it had its config.yaml
    if all(entry.name in unfinished for entry in run.iterdir()):
        return
    is_run = (run / CONFIG_FILE).is_file()
    if is_run and overwrite:
        return
    if is_run:
        raise OutputError(
            "output-is-run",
            t("there is already a run in {path}", path=run),
            where="--output",
            fix=(
                t("go on with it: {command}", command=f"chatfine resume {run}"),
                t("or replace it: add --overwrite"),
            ),
        )
    raise OutputError(
        "output-not-empty",
        t("the folder {path} is not empty", path=run),
        where="--output",
        why=t("it is not a run, so nothing in it is touched, not even with --overwrite"),
        fix=t("name a new folder"),
    )


def learning_layers(config: TrainConfig, model: ModelFolder) -> int:
    """How many of the last layers learn; 0 = all."""
    if config.method == "llama-adapter":
        return config.adapter_layers or min(LLAMA_ADAPTER_LAYERS, model.layers)
    return config.freeze_layers if config.method == "freeze" else config.adapter_layers


def shapes_of(model: ModelFolder) -> planning.Shapes:
    """The numbers of `model` that a plan needs."""
    tensors = {name: info.shape for name, info in model.tensors.items()}
    return planning.Shapes.of(model.text_config, tensors, model.parameters)


def needed_disk_bytes(prepared: Prepared) -> float:
    """What checkpoints and result will take, known from the shapes in the files alone."""
    model, config = prepared.model, prepared.config
    shapes = shapes_of(model)
    learning = planning.learning_parameters(
        shapes, config.method, config.rank, planning.targets_of(config.targets),
        learning_layers(config, model), config.learned_tokens,
    )  # fmt: skip
    return planning.disk_bytes(learning + prepared.row_parameters, config.keep)


def create_run(prepared: Prepared) -> None:
    """Empty the run folder and write config.yaml, before torch is imported; the lock is held.

    A run that is killed in its first second can then be resumed from step 0.
    """
    from chatfine.config import dump_yaml

    run = prepared.run
    clear_run(run)
    staged = run / f".{CONFIG_FILE}"
    dump_yaml(prepared.config.model_copy(update={"overwrite": False}), staged)
    os.replace(staged, run / CONFIG_FILE)


def clear_run(run: Path) -> None:
    """Remove what is in a run folder, except its lock; config.yaml, which makes it a run, last."""
    for entry in sorted(run.iterdir(), key=lambda path: path.name == CONFIG_FILE):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != LOCK_FILE:
            entry.unlink()


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a small JSON file whole or not at all."""
    staged = path.with_name(f".{path.name}")
    with staged.open("w", encoding="utf-8", newline="\n") as file:
        json.dump(values, file, ensure_ascii=False, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path)


def require_same(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with other settings, model or data than a checkpoint was made with.

    Raises:
        UsageError: with one line for each difference.
    """
    changed = [key for key in now if key in saved and saved[key] != now[key]]
    if changed:
        lines = [f"{key}: {saved[key]} → {now[key]}" for key in changed]
        raise UsageError(
            "config-changed",
            t("the run was started with other settings:\n{lines}", lines="\n".join(lines)),
            where=CONFIG_FILE,
            why=t("going on would mix two different computations"),
            fix=t("undo the change, or start a new run with another --output"),
        )
