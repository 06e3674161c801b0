"""Fire's grammar, every field of the table, and what each of them becomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chatfine.config import ChatConfig, TrainConfig
from chatfine.errors import UsageError
from chatfine.flags import flags_of
from chatfine.tutorial.fields import TRAINING, Field
from chatfine.tutorial.generation import OPTIONS
from chatfine.tutorial.grammar import Values, parse
from chatfine.tutorial.show import DOORS
from chatfine.tutorial.talking import chat_settings
from chatfine.tutorial.training import training_settings

TALKING = DOORS["chat_completion.py"]


def training(*words: str) -> dict[str, Any]:
    """The settings of `chatfine train` for a command line of finetuning.py."""
    own = {name: flag for name, flag in flags_of(TrainConfig).items()
           if name not in {one.name for one in TRAINING}}  # fmt: skip
    return training_settings(parse(["--model_name", "m", *words], TRAINING, own))


def chatting(*words: str) -> dict[str, Any]:
    """The settings of `chatfine chat` for a command line of chat_completion.py."""
    own = {"device": flags_of(ChatConfig)["device"]}
    words = ("m", "--prompt_file", "chat.json", *words)
    return chat_settings(parse(words, TALKING, own, "chat.model_name"))


# -- grammar ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--use_peft"], "train_config.use_peft", True),
        (["--use-peft"], "train_config.use_peft", True),
        (["-use_peft"], "train_config.use_peft", True),
        (["--use_peft", "True"], "train_config.use_peft", True),
        (["--use_peft=true"], "train_config.use_peft", True),
        (["--use_peft", "1"], "train_config.use_peft", True),
        (["--use_peft", "0"], "train_config.use_peft", False),
        (["--use_peft=False"], "train_config.use_peft", False),
        (["--norun_validation"], "train_config.run_validation", False),
        (["--no-run-validation"], "train_config.run_validation", False),
        (["--notrain_config.run_validation"], "train_config.run_validation", False),
        (["--num_freeze_layers", "3"], "train_config.num_freeze_layers", 3),
        (["--lora_config.r", "16"], "lora_config.r", 16),
        (["--lora_config.r=16"], "lora_config.r", 16),
        (["--r", "16"], "lora_config.r", 16),
        (["--lr", "1e-3"], "train_config.lr", 1e-3),
        (["--lr=.5"], "train_config.lr", 0.5),
        (["--seed", "-1"], "train_config.seed", -1),
        (["--seed", "4.0"], "train_config.seed", 4),
        (["--target_modules", "q_proj,v_proj,o_proj"], "lora_config.target_modules",
         ("q_proj", "v_proj", "o_proj")),
        (["--target_modules", '["q_proj", "v_proj"]'], "lora_config.target_modules",
         ("q_proj", "v_proj")),
        (["--target_modules=[q_proj]"], "lora_config.target_modules", ("q_proj",)),
        (["--target_modules", "('k_proj','o_proj')"], "lora_config.target_modules",
         ("k_proj", "o_proj")),
        (["--output_dir", "'out put'"], "train_config.output_dir", "out put"),
        (["--output_dir", r"C:\models\out"], "train_config.output_dir", r"C:\models\out"),
        (["--output_dir="], "train_config.output_dir", ""),
        (["--sharding_strategy", "ShardingStrategy.SHARD_GRAD_OP"],
         "fsdp_config.sharding_strategy", "SHARD_GRAD_OP"),
        (["--peft_method", "llama-adapter"], "train_config.peft_method", "llama_adapter"),
        (["--optimizer", "adamw"], "fsdp_config.optimizer", "AdamW"),
        (["--num_epochs", "1", "--num-epochs=2"], "train_config.num_epochs", 2),
        (["--gamma", "0.5"], "train_config.gamma", "0.5"),
        (["--use_peft", "--lr", "1"], "train_config.use_peft", True),
    ],
)  # fmt: skip
def test_words_are_read_as_fire_does(words: list[str], key: str, value: Any) -> None:
    found = parse(words, TRAINING, {})
    assert found[key] == value
    assert type(found[key]) is type(value)


def test_a_bare_name_sets_every_group_that_has_it() -> None:
    both = parse(["--mixed_precision", "False", "--use_fp16"], TRAINING, {})
    for group in ("train_config", "fsdp_config"):
        assert both[f"{group}.mixed_precision"] is False
        assert both[f"{group}.use_fp16"] is True
    one = parse(["--fsdp_config.use_fp16"], TRAINING, {})
    assert one["fsdp_config.use_fp16"] is True
    assert one["train_config.use_fp16"] is False


def test_the_first_word_without_a_flag_is_the_model_of_a_chat_only() -> None:
    assert parse(["m", "--seed", "1"], TALKING, {}, "chat.model_name")["chat.model_name"] == "m"
    with pytest.raises(UsageError, match="unexpected argument 'm'"):
        parse(["m"], TRAINING, {})


@pytest.mark.parametrize(
    ("words", "code", "what", "fix"),
    [
        (["--use_perf"], "unknown-flag", "there is no flag --use_perf", "--use_peft?"),
        (["--quantisation"], "unknown-flag", "--quantisation", "--quantization?"),
        (["--lora_config.rr", "8"], "unknown-flag", "--lora_config.rr", "--lora_config.r?"),
        (["--lora_config.lr", "8"], "unknown-flag", "--lora_config.lr", "--lora_config.r?"),
        (["--max_lenght", "8"], "unknown-flag", "--max_lenght", "--max_length?"),
        (["--zzzzzz"], "unknown-flag", "--zzzzzz", "see --help"),
        (["--nolr"], "unknown-flag", "--nolr", ""),
        (["--lr"], "no-value", "--lr needs a value", "--lr=VALUE"),
        (["--lr", "--seed", "1"], "no-value", "--lr needs a value", "--lr=VALUE"),
        (["--use_peft", "lora"], "bad-setting", "--use_peft is 'lora'; possible: True, False", ""),
        (["--lr", "fast"], "bad-setting", "--lr is 'fast'; it must be a number", ""),
        (["--lr", "nan"], "bad-setting", "--lr is 'nan'", ""),
        (["--seed", "1.5"], "bad-setting", "--seed is '1.5'; it must be a whole number", ""),
        (["--peft_method", "ia3"], "bad-setting", "possible: lora, llama_adapter, prefix", ""),
        (["--bias", "all"], "bad-setting", "--bias is 'all'; possible: none", ""),
        (["--sharding_strategy", "HYBRID_SHARD"], "bad-setting",
         "possible: FULL_SHARD, SHARD_GRAD_OP, NO_SHARD", ""),
        (["stray"], "extra-word", "unexpected argument 'stray'", "quotes"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(words: list[str], code: str, what: str, fix: str) -> None:
    own = {"max_length": flags_of(TrainConfig)["max_length"]}
    with pytest.raises(UsageError) as caught:
        parse(words, TRAINING, own)
    assert caught.value.code == code
    assert what in caught.value.what
    assert fix in " ".join(caught.value.fix)


# -- fields ----------------------------------------------------------------------------------------

FIELDS = {
    "train_config": {
        "model_name": "", "enable_fsdp": False, "low_cpu_fsdp": False, "run_validation": True,
        "batch_size_training": 4, "gradient_accumulation_steps": 1, "num_epochs": 3,
        "num_workers_dataloader": 1, "lr": 1e-4, "weight_decay": 0.0, "gamma": 0.85, "seed": 42,
        "use_fp16": False, "mixed_precision": True, "val_batch_size": 1,
        "dataset": "samsum_dataset", "peft_method": "lora", "use_peft": False,
        "output_dir": "PEFT_model", "freeze_layers": False, "num_freeze_layers": 1,
        "quantization": False, "one_gpu": False, "save_model": True,
        "dist_checkpoint_root_folder": "PATH/to/save/FSDP/model",
        "dist_checkpoint_folder": "fine-tuned", "save_optimizer": False, "use_fast_kernels": False,
    },
    "fsdp_config": {
        "mixed_precision": True, "use_fp16": False, "sharding_strategy": "FULL_SHARD",
        "checkpoint_type": "SHARDED_STATE_DICT", "fsdp_activation_checkpointing": True,
        "fsdp_cpu_offload": False, "pure_bf16": False, "optimizer": "AdamW",
    },
    "lora_config": {
        "r": 8, "lora_alpha": 32, "target_modules": ("q_proj", "v_proj"), "bias": "none",
        "lora_dropout": 0.05, "task_type": "CAUSAL_LM", "inference_mode": False,
    },
    "llama_adapter_config": {"adapter_len": 10, "adapter_layers": 30, "task_type": "CAUSAL_LM"},
    "prefix_config": {"num_virtual_tokens": 30, "task_type": "CAUSAL_LM"},
    "samsum_dataset": {
        "dataset": "samsum_dataset", "train_split": "train", "test_split": "validation",
        "input_length": 2048,
    },
    "grammar_dataset": {
        "dataset": "grammar_dataset",
        "train_split": "datasets_processing/grammar_dataset/gtrain_10k.csv",
        "test_split": "datasets_processing/grammar_dataset/grammar_validation.csv",
        "input_length": 2048,
    },
    "alpaca_dataset": {
        "dataset": "alpaca_dataset", "train_split": "train", "test_split": "val",
        "data_path": "datasets_processing/alpaca_data.json",
    },
    "custom_dataset": {
        "dataset": "custom_dataset", "file": "datasets_processing/qa_huatuo.py",
        "train_split": "train", "test_split": "validation",
    },
    "chat": {
        "model_name": "", "peft_model": "", "quantization": False, "max_new_tokens": 256,
        "min_new_tokens": 0, "prompt_file": "", "seed": 42, "safety_score_threshold": 0.5,
        "do_sample": True, "use_cache": True, "top_p": 1.0, "temperature": 1.0, "top_k": 50,
        "repetition_penalty": 1.0, "length_penalty": 1.0, "use_fast_kernels": False,
        "enable_azure_content_safety": False, "enable_sensitive_topics": False,
        "enable_salesforce_content_safety": False, "enable_saleforce_content_safety": False,
    },
}  # fmt: skip
"""The tutorial's configs, field by field, with their defaults."""


def test_the_table_has_every_field_with_its_default() -> None:
    table = [one for door in ("finetuning.py", "chat_completion.py") for one in DOORS[door]]
    found: dict[str, dict[str, Any]] = {}
    for one in table:
        if one.group != "generation":
            assert one.name not in found.setdefault(one.group, {}), one.key
            found[one.group][one.name] = one.default
    assert found == FIELDS


def test_every_option_of_generate_is_known() -> None:
    from transformers import GenerationConfig

    options = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert sorted(options - {one.name for one in TALKING}) == []


@pytest.mark.parametrize("one", [one for door in DOORS.values() for one in door],
                         ids=lambda one: one.key)  # fmt: skip
def test_every_field_says_what_it_becomes_or_why_not(one: Field) -> None:
    assert one.note()
    cls = {"merge": "MergeConfig", "expand_token": "ExpandConfig"}.get(
        one.group, "TrainConfig" if one in TRAINING else "ChatConfig"
    )
    from chatfine import config

    assert set(one.settings) <= set(getattr(config, cls).model_fields)


# what must be given beside a field for it to matter, and a value other than the default
BESIDE: dict[str, list[str]] = {
    "train_config.peft_method": ["--use_peft"],
    "train_config.num_freeze_layers": ["--freeze_layers"],
    "train_config.low_cpu_fsdp": ["--enable_fsdp"],
    "fsdp_config.sharding_strategy": ["--enable_fsdp"],
    "fsdp_config.fsdp_cpu_offload": ["--enable_fsdp"],
    "lora_config": ["--use_peft"],
    "llama_adapter_config": ["--use_peft", "--peft_method", "llama_adapter"],
    "prefix_config": ["--use_peft", "--peft_method", "prefix"],
    "grammar_dataset": ["--dataset", "grammar_dataset"],
    "alpaca_dataset": ["--dataset", "alpaca_dataset"],
    "custom_dataset": ["--dataset", "custom_dataset"],
}
OTHER: dict[str, str] = {
    "train_config.peft_method": "prefix", "train_config.num_freeze_layers": "2",
    "fsdp_config.optimizer": "anyprecision", "fsdp_config.sharding_strategy": "NO_SHARD",
    "lora_config.bias": "none", "custom_dataset.file": "mine.py",
}  # fmt: skip


def other_value(one: Field) -> str:
    """A value that is not the default, as typed."""
    if one.key in OTHER:
        return OTHER[one.key]
    if isinstance(one.default, bool):
        return str(not one.default)
    if isinstance(one.default, (int, float)):
        return str(one.default / 2 if isinstance(one.default, float) and one.default else 7
                   if isinstance(one.default, int) else 0.25)  # fmt: skip
    if one.name == "task_type":
        return "CAUSAL_LM"
    return "something"


@pytest.fixture
def three_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder named m of which only the config is read."""
    (tmp_path / "m").mkdir()
    config = '{"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 3}'
    (tmp_path / "m" / "config.json").write_text(config, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "m"


@pytest.mark.parametrize("one", TRAINING, ids=lambda one: one.key)
def test_a_field_of_training_changes_what_it_says_and_nothing_else(
    one: Field, three_layers: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    beside = BESIDE.get(one.key, BESIDE.get(one.group, []))
    before = training(*beside)
    capsys.readouterr()
    after = training(*beside, f"--{one.key}", other_value(one))
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    said = capsys.readouterr().out
    if one.effective:
        assert changed
        # another method brings its own fields along
        assert changed <= set(one.settings) or one.name in ("use_peft", "peft_method")
        assert "no effect" not in said
    else:
        assert changed == set()
        assert f"--{one.key} has no effect: " in said
    TrainConfig.read(after)


@pytest.mark.parametrize("one", TALKING, ids=lambda one: one.key)
def test_a_field_of_chatting_changes_what_it_says_and_nothing_else(one: Field, capsys: Any) -> None:
    before = chatting()
    after = chatting(f"--{one.name}", other_value(one))
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert changed == set(one.settings) or (one.name == "model_name" and changed == {"model"})
    assert ("has no effect" in capsys.readouterr().out) == (not one.effective)
    ChatConfig.read(after)


def test_the_defaults_are_the_tutorials() -> None:
    assert training("--use_peft") == {
        "model": "m", "dataset": "samsum", "output": "PEFT_model", "overwrite": True,
        "method": "lora", "rank": 8, "alpha": 32, "targets": "q_proj,v_proj", "dropout": 0.05,
        "batch_size": 4, "accumulate": 1, "epochs": 3, "learning_rate": 1e-4, "weight_decay": 0.0,
        "seed": 42, "optimizer": "adamw",
    }  # fmt: skip
    assert chatting() == {
        "model": "m", "prompt_file": "chat.json", "max_new_tokens": 256, "min_new_tokens": 0,
        "seed": 42, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0,
        "safety": (), "safety_threshold": 0.5, "min_p": 0.0, "typical_p": 1.0,
        "no_repeat_ngram_size": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--freeze_layers", "--num_freeze_layers", "1"], {"method": "freeze", "freeze_layers": 2}),
        (["--freeze_layers", "--num_freeze_layers", "0"], {"method": "full"}),
        (["--num_freeze_layers", "1"], {"method": "full"}),
        (["--use_peft", "--peft_method", "prefix"], {"method": "prefix", "virtual_tokens": 30}),
        (["--use_peft", "--peft_method", "llama_adapter"],
         {"method": "llama-adapter", "virtual_tokens": 10}),
        (["--quantization"], {"quantize": "int8"}),
        (["--pure_bf16"], {"dtype": "bf16", "pure_bf16": True}),
        (["--train_config.use_fp16"], {"dtype": "fp16"}),
        (["--fsdp_config.mixed_precision", "False"], {"dtype": "fp32"}),
        (["--norun_validation"], {"validation": "0"}),
        (["--fsdp_activation_checkpointing"], {"checkpointing": "full"}),
        (["--nofsdp_activation_checkpointing"], {"checkpointing": "none"}),
        (["--dataset", "samsum"], {"dataset": "samsum"}),
        (["--samsum_dataset.train_split", "test"],
         {"dataset": "samsum[test]", "validation": "samsum[validation]"}),
        (["--test_split", "test"], {"dataset": "samsum", "validation": "samsum[test]"}),
        (["--dataset", "grammar_dataset", "--train_split", "a.csv", "--test_split", "b.csv"],
         {"dataset": "grammar:a.csv", "validation": "grammar:b.csv"}),
        (["--dataset", "alpaca_dataset", "--alpaca_dataset.data_path", "X"],
         {"dataset": "alpaca:X"}),
        (["--dataset", "custom_dataset", "--file", "my.py:rows", "--test_split", "dev"],
         {"dataset": "my.py:rows", "validation": "my.py:rows[dev]"}),
        (["--dataset", "huatuo"], {"dataset": "huatuo"}),
        (["--dataset", "my.jsonl"], {"dataset": "my.jsonl"}),
        (["--input_length", "256"], {"max_length": 256}),
        (["--max_steps", "5", "--device=cpu", "--deterministic"],
         {"max_steps": "5", "device": "cpu", "deterministic": True}),
        (["--nodeterministic"], {"deterministic": False}),
    ],
)  # fmt: skip
def test_flags_that_need_thought(
    words: list[str], expected: dict[str, Any], three_layers: Path
) -> None:
    found = training(*words)
    assert {name: found.get(name) for name in expected} == expected
    TrainConfig.read(found)


def test_layers_that_stay_are_counted_by_the_model(three_layers: Path) -> None:
    with pytest.raises(UsageError, match="--num_freeze_layers is 3; the model has 3 layers"):
        training("--freeze_layers", "--num_freeze_layers", "3")


def test_flags_that_disagree_are_refused() -> None:
    with pytest.raises(UsageError, match="--pure_bf16, --use_fp16 can't be used together"):
        training("--pure_bf16", "--use_fp16")


@pytest.mark.parametrize(
    ("world", "words", "expected", "says"),
    [
        ("1", ["--enable_fsdp"], {}, "it trains alone"),
        ("1", [], {}, ""),
        ("4", [], {"sharding": "none"}, ""),
        ("4", ["--enable_fsdp"], {"sharding": "full"}, ""),
        ("4", ["--enable_fsdp", "--sharding_strategy", "SHARD_GRAD_OP", "--low_cpu_fsdp"],
         {"sharding": "gradients", "load": "rank0"}, ""),
        ("4", ["--enable_fsdp", "--fsdp_cpu_offload"],
         {"sharding": "full", "cpu_offload": True}, ""),
    ],
)  # fmt: skip
def test_processes_share_the_work_as_fsdp_says(
    world: str, words: list[str], expected: dict[str, Any], says: str,
    monkeypatch: pytest.MonkeyPatch, capsys: Any,
) -> None:  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", world)
    found = training(*words)
    shared = ("sharding", "cpu_offload", "load")
    assert {name: found[name] for name in shared if name in found} == expected
    said = capsys.readouterr().out
    assert says in said
    assert bool(said) == bool(says)


def test_a_flag_of_another_method_or_data_set_is_named(capsys: Any) -> None:
    training("--use_peft", "--num_virtual_tokens", "5", "--alpaca_dataset.data_path", "x")
    said = capsys.readouterr().out
    assert "--num_virtual_tokens has no effect: it belongs to prefix_config" in said
    assert "--alpaca_dataset.data_path has no effect: it belongs to alpaca_dataset" in said
    training("--peft_method", "lora")
    assert "--peft_method has no effect without --use_peft" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--nodo_sample"], {"temperature": 0.0}),
        (["--temperature", "0.7"], {"temperature": 0.7}),
        (["--peft_model", "PEFT_model"], {"model": "PEFT_model", "base": "m"}),
        (["--peft_model", "None"], {"model": "m"}),
        (["--quantization"], {"quantize": "int8"}),
        (["--enable_azure_content_safety", "--enable_saleforce_content_safety",
          "--enable_salesforce_content_safety"], {"safety": ("azure", "salesforce")}),
        (["--no_repeat_ngram_size", "3"], {"no_repeat_ngram_size": 3}),
        (["--device", "cpu"], {"device": "cpu"}),
    ],
)  # fmt: skip
def test_flags_of_a_chat(words: list[str], expected: dict[str, Any]) -> None:
    found = chatting(*words)
    assert {name: found.get(name) for name in expected} == expected


def test_an_option_of_generate_that_does_nothing_here_is_named(capsys: Any) -> None:
    before = chatting()
    assert chatting("--num_beams", "4", "--early_stopping", "--output_scores=True") == before
    said = capsys.readouterr().out
    for name in ("num_beams", "early_stopping", "output_scores"):
        assert f"--{name} has no effect: " in said
    assert {one.name for one in OPTIONS if one.effective} == {
        "min_p", "typical_p", "no_repeat_ngram_size"
    }  # fmt: skip
    with pytest.raises(UsageError) as caught:
        chatting("--num_beens", "4")
    assert caught.value.fix == ("did you mean --num_beams?",)


def test_values_fall_back_to_the_table() -> None:
    values = Values(TRAINING)
    assert values["train_config.num_epochs"] == 3
    assert not values.has("train_config.num_epochs")
    values.given["train_config.num_epochs"] = 1
    assert values["train_config.num_epochs"] == 1
