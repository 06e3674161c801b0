"""The tutorial's fields: one table from which parser, help and docs/*/tutorial-flags.md come.

Names and defaults are llama-recipes', as the tutorial has them. A field either becomes settings of
chatfine or is accepted without effect, and then its note says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from chatfine.i18n import t

Value = bool | int | float | str | tuple[str, ...]
Kind = Literal["switch", "whole", "number", "text", "list"]
Note = Callable[[], str]
"""A text in the language in force when it is shown."""


@dataclass(frozen=True)
class Field:
    """One flag of the tutorial."""

    group: str
    name: str
    default: Value
    settings: tuple[str, ...]
    """the settings of chatfine it decides; empty = without effect"""
    note: Note
    choices: Mapping[str, str] = field(default_factory=dict)
    """the words it takes → chatfine's; empty = anything of its kind"""
    direct: bool = False
    """the value itself (or its choice) is the one setting, with nothing else to consider"""

    @property
    def key(self) -> str:
        """`lora_config.r`, as it may be written."""
        return f"{self.group}.{self.name}"

    @property
    def kind(self) -> Kind:
        """What its value is."""
        kinds: dict[type, Kind] = {bool: "switch", int: "whole", float: "number", tuple: "list"}
        return kinds.get(type(self.default), "text")

    @property
    def effective(self) -> bool:
        """Whether it decides anything."""
        return bool(self.settings)


def same() -> str:
    """The note of a field that only has another name."""
    return t("the same")


def _to(group: str, name: str, default: Value, setting: str, note: Note = same) -> Field:
    """A field whose value is the setting."""
    return Field(group, name, default, (setting,), note, direct=True)


def _by(
    group: str, name: str, default: Value, settings: str, note: Note,
    choices: Mapping[str, str] | None = None,
) -> Field:  # fmt: skip
    """A field that decides `settings` (names with spaces between) together with others."""
    return Field(group, name, default, tuple(settings.split()), note, choices or {})


def _no(group: str, name: str, default: Value, note: Note) -> Field:
    """A field without effect."""
    return Field(group, name, default, (), note)


def _precision() -> str:
    return t("True: bf16 or fp16 where the device has it (--dtype auto); False: fp32")


def _fp16() -> str:
    return t("True: fp16 with loss scaling")


def _one_task() -> str:
    return t("chatfine trains causal language models only")


def _own_name() -> str:
    return t("its own name; --dataset chooses")


def _checkpoints() -> str:
    return t(
        "checkpoints lie in OUTPUT/checkpoints, whole or not at all, and resume on any number of "
        "processes"
    )


def _safety() -> str:
    return t("runs if its package is installed, else the command says what to install")


def _split_by_seed() -> str:
    return t("the one file is split by seed: nearly all of it trains, the rest validates")


def _trains() -> str:
    return t("the split that is trained on")


def _validates() -> str:
    return t("the split that validates")


def _length() -> str:
    return t("the same; not given: what the model can read, at most 2048")


def _merged() -> str:
    return t("the merged model; an earlier model in it is replaced")


def _fast() -> str:
    return t("the fast kernels are always on")


TRAIN = "train_config"
FSDP = "fsdp_config"
LORA = "lora_config"
ADAPTER = "llama_adapter_config"
PREFIX = "prefix_config"
SAMSUM, GRAMMAR, ALPACA, CUSTOM = (
    "samsum_dataset", "grammar_dataset", "alpaca_dataset", "custom_dataset",
)  # fmt: skip

METHODS = {"lora": "lora", "llama_adapter": "llama-adapter", "prefix": "prefix"}
SHARDING = {"FULL_SHARD": "full", "SHARD_GRAD_OP": "gradients", "NO_SHARD": "none"}
OPTIMIZERS = {"AdamW": "adamw", "anyprecision": "anyprecision"}
CUSTOM_FILE = "datasets_processing/qa_huatuo.py"

TRAINING: tuple[Field, ...] = (
    _to(TRAIN, "model_name", "", "model"),
    _by(TRAIN, "enable_fsdp", False, "sharding",
        lambda: t("with torchrun: the model is shared out among the processes (FSDP2); without "
                  "torchrun one process trains")),
    _by(TRAIN, "low_cpu_fsdp", False, "load",
        lambda: t("True: only the first process reads the model from disk (--load rank0)")),
    _by(TRAIN, "run_validation", True, "validation",
        lambda: t("False: nothing is held out (--validation 0)")),
    _to(TRAIN, "batch_size_training", 4, "batch_size"),
    _to(TRAIN, "gradient_accumulation_steps", 1, "accumulate",
        lambda: t("the same; the loss is the mean over the tokens of all micro-batches")),
    _to(TRAIN, "num_epochs", 3, "epochs"),
    _no(TRAIN, "num_workers_dataloader", 1,
        lambda: t("data are tokenised once, before the first step, and then read from memory")),
    _to(TRAIN, "lr", 1e-4, "learning_rate", lambda: t("the peak, after a short warm-up")),
    _to(TRAIN, "weight_decay", 0.0, "weight_decay"),
    _no(TRAIN, "gamma", 0.85,
        lambda: t("the rate follows warm-up and cosine (--scheduler, --warmup) instead of falling "
                  "once an epoch")),
    _to(TRAIN, "seed", 42, "seed"),
    _by(TRAIN, "use_fp16", False, "dtype", _fp16),
    _by(TRAIN, "mixed_precision", True, "dtype", _precision),
    _no(TRAIN, "val_batch_size", 1,
        lambda: t("the validation loss counts every example once, whatever goes together")),
    _by(TRAIN, "dataset", "samsum_dataset", "dataset validation",
        lambda: t("a name (samsum_dataset, grammar_dataset, alpaca_dataset, custom_dataset, "
                  "huatuo) or anything that chatfine train -d takes")),
    _by(TRAIN, "peft_method", "lora", "method",
        lambda: t("with --use_peft: lora, llama_adapter or prefix"), METHODS),
    _by(TRAIN, "use_peft", False, "method",
        lambda: t("True: --peft_method decides; False: all weights learn (--method full)")),
    _to(TRAIN, "output_dir", "PEFT_model", "output",
        lambda: t("a run folder that is a PEFT folder too; an earlier run in it is replaced")),
    _by(TRAIN, "freeze_layers", False, "method freeze_layers",
        lambda: t("True, without --use_peft: the first --num_freeze_layers layers stay as they are "
                  "(--method freeze; there embedding and head stay too)")),
    _by(TRAIN, "num_freeze_layers", 1, "freeze_layers",
        lambda: t("how many of the first layers stay; chatfine counts those that learn")),
    _by(TRAIN, "quantization", False, "quantize",
        lambda: t("True: an 8-bit base (--quantize int8)")),
    _no(TRAIN, "one_gpu", False, lambda: t("one process uses one device; torchrun starts more")),
    _no(TRAIN, "save_model", True, lambda: t("what was learned is always kept")),
    _no(TRAIN, "dist_checkpoint_root_folder", "PATH/to/save/FSDP/model", _checkpoints),
    _no(TRAIN, "dist_checkpoint_folder", "fine-tuned", _checkpoints),
    _no(TRAIN, "save_optimizer", False,
        lambda: t("a checkpoint always holds the optimizer, so that the run can be resumed")),
    _no(TRAIN, "use_fast_kernels", False, _fast),
    _by(FSDP, "mixed_precision", True, "dtype", _precision),
    _by(FSDP, "use_fp16", False, "dtype", _fp16),
    _by(FSDP, "sharding_strategy", "FULL_SHARD", "sharding",
        lambda: t("with --enable_fsdp: FULL_SHARD, SHARD_GRAD_OP or NO_SHARD"), SHARDING),
    _no(FSDP, "checkpoint_type", "SHARDED_STATE_DICT", _checkpoints),
    _by(FSDP, "fsdp_activation_checkpointing", True, "checkpointing",
        lambda: t("True: --checkpointing full; not given: only where memory needs it (auto)")),
    _by(FSDP, "fsdp_cpu_offload", False, "cpu_offload",
        lambda: t("with --enable_fsdp: weights wait in the CPU's memory")),
    _by(FSDP, "pure_bf16", False, "pure_bf16 dtype",
        lambda: t("True: weights that learn are bf16 as well")),
    Field(FSDP, "optimizer", "AdamW", ("optimizer",), lambda: t("AdamW or anyprecision"),
          OPTIMIZERS, direct=True),
    _to(LORA, "r", 8, "rank"),
    _to(LORA, "lora_alpha", 32, "alpha"),
    _to(LORA, "target_modules", ("q_proj", "v_proj"), "targets",
        lambda: t("names with commas between, or all-linear")),
    _by(LORA, "bias", "none", "", lambda: t("only none: the linears of such models have no bias"),
        {"none": "none"}),
    _to(LORA, "lora_dropout", 0.05, "dropout"),
    _by(LORA, "task_type", "CAUSAL_LM", "", _one_task, {"CAUSAL_LM": ""}),
    _no(LORA, "inference_mode", False, lambda: t("training trains, chat answers")),
    _to(ADAPTER, "adapter_len", 10, "virtual_tokens"),
    _by(ADAPTER, "adapter_layers", 30, "adapter_layers",
        lambda: t("the same; not given: 30, or all layers where there are fewer")),
    _by(ADAPTER, "task_type", "CAUSAL_LM", "", _one_task, {"CAUSAL_LM": ""}),
    _to(PREFIX, "num_virtual_tokens", 30, "virtual_tokens"),
    _by(PREFIX, "task_type", "CAUSAL_LM", "", _one_task, {"CAUSAL_LM": ""}),
    _no(SAMSUM, "dataset", SAMSUM, _own_name),
    _by(SAMSUM, "train_split", "train", "dataset validation", _trains),
    _by(SAMSUM, "test_split", "validation", "validation", _validates),
    _by(SAMSUM, "input_length", 2048, "max_length", _length),
    _no(GRAMMAR, "dataset", GRAMMAR, _own_name),
    _by(GRAMMAR, "train_split", "datasets_processing/grammar_dataset/gtrain_10k.csv", "dataset",
        lambda: t("the file that is trained on")),
    _by(GRAMMAR, "test_split", "datasets_processing/grammar_dataset/grammar_validation.csv",
        "validation",
        lambda: t("the file that validates")),
    _by(GRAMMAR, "input_length", 2048, "max_length", _length),
    _no(ALPACA, "dataset", ALPACA, _own_name),
    _no(ALPACA, "train_split", "train", _split_by_seed),
    _no(ALPACA, "test_split", "val", _split_by_seed),
    _by(ALPACA, "data_path", "datasets_processing/alpaca_data.json", "dataset",
        lambda: t("the file with the instructions")),
    _no(CUSTOM, "dataset", CUSTOM, _own_name),
    _by(CUSTOM, "file", CUSTOM_FILE, "dataset",
        lambda: t("file.py or file.py:function, from any folder")),
    _by(CUSTOM, "train_split", "train", "dataset validation", _trains),
    _by(CUSTOM, "test_split", "validation", "validation", _validates),
)  # fmt: skip
"""Flags of finetuning.py."""

CHATTING: tuple[Field, ...] = (
    _by("chat", "model_name", "", "model base", lambda: t("the model; with --peft_model its base")),
    _by("chat", "peft_model", "", "model base",
        lambda: t("a PEFT folder or a run, on top of --model_name")),
    _by("chat", "quantization", False, "quantize",
        lambda: t("True: 8-bit weights (--quantize int8)")),
    _to("chat", "max_new_tokens", 256, "max_new_tokens"),
    _to("chat", "min_new_tokens", 0, "min_new_tokens"),
    _to("chat", "prompt_file", "", "prompt_file",
        lambda: t("the same; without it a question is asked for, or read from a pipe")),
    _to("chat", "seed", 42, "seed"),
    _to("chat", "safety_score_threshold", 0.5, "safety_threshold"),
    _by("chat", "do_sample", True, "temperature", lambda: t("False: --temperature 0")),
    _no("chat", "use_cache", True, lambda: t("keys and values are always kept")),
    _to("chat", "top_p", 1.0, "top_p"),
    _by("chat", "temperature", 1.0, "temperature", lambda: t("the same, with --do_sample")),
    _to("chat", "top_k", 50, "top_k"),
    _to("chat", "repetition_penalty", 1.0, "repetition_penalty"),
    _no("chat", "length_penalty", 1.0,
        lambda: t("only beam search reads it; here one answer is drawn token by token")),
    _by("chat", "enable_azure_content_safety", False, "safety", _safety),
    _by("chat", "enable_sensitive_topics", False, "safety", _safety),
    _by("chat", "enable_salesforce_content_safety", False, "safety", _safety),
    _by("chat", "enable_saleforce_content_safety", False, "safety",
        lambda: t("the same flag as the tutorial spells it")),
    _no("chat", "use_fast_kernels", False, _fast),
)  # fmt: skip
"""Flags of chat_completion.py; tutorial/generation.py has the further options of generate."""

MERGING: tuple[Field, ...] = (
    _to("merge", "model_name", "chat_7b_hf", "model", lambda: t("the base model")),
    _to("merge", "base_model", "chat_7b_hf", "model", lambda: t("the base model")),
    _to("merge", "peft_model", "PEFT_model", "run", lambda: t("a run or a PEFT folder")),
    _to("merge", "output_dir", "new_model", "output", _merged),
    _to("merge", "save_dir", "new_model", "output", _merged),
)  # fmt: skip
"""Flags of merge.py; two names for one thing, since both are in use."""

EXPANDING: tuple[Field, ...] = (
    _to("expand_token", "model_name", "chat_7b_hf", "model", lambda: t("whose vocabulary grows")),
    _to("expand_token", "output_dir", "new_token", "output",
        lambda: t("the grown folder; an earlier one in it is replaced")),
)  # fmt: skip
"""Flags of expand_token.py."""
