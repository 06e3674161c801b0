"""Merging against peft's own merge_and_unload, and that nothing is left when the proof fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_parts import PROMPTS, Make, load, logits
from safetensors.torch import load_file, save_file

from chatfine.errors import ModelError, OutputError, ProofError
from chatfine.export import merge_logits, merge_weights
from chatfine.export.merge import merge


def oracle(base: Path, adapter: Path, merged: bool = True) -> Any:
    """What peft makes of base and adapter, merged by it or still side by side."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load(base), adapter).eval()
    return model.merge_and_unload() if merged else model


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7},
        "alpha_pattern": {"v_proj": 32, "layers.0.self_attn.k_proj": 1},
    },
    "some layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    "head and embedding": {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
    "embedding alone": {"target_modules": ["embed_tokens"]},
    "saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "token rows": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 250]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ties", ["untied", "tied"])
def test_equals_pefts_own_merge(
    kind: str, ties: str, tiny: Path, tied: Path, make_adapter: Make, tmp_path: Path
) -> None:
    base = tied if ties == "tied" else tiny
    adapter = make_adapter(base, **KINDS[kind])
    before = logits(load(base))
    # peft's merge adds what it has for embedding and head to the one weight of a tied pair, so that
    # its merged model is another than the one that was trained
    wanted = logits(oracle(base, adapter, merged=ties == "untied"))
    assert (wanted - before).abs().max() > 0.1, "the adapter must matter"
    result = merge(base, adapter, tmp_path / "out", None, PROMPTS)
    assert (logits(load(tmp_path / "out")) - wanted).abs().max() < 1e-3
    assert result.gap < 1e-3
    assert result.rounding_gap == 0
    assert result.top1_agreement == 1
    assert result.dtype == "float32"
    rows = KINDS[kind].get("trainable_token_indices", [])  # read as a prompt of their own
    assert result.positions == sum(map(len, PROMPTS)) + len(rows)
    touches_ends = kind in ("head and embedding", "embedding alone", "saved whole")
    assert result.untied == (ties == "tied" and touches_ends)


@pytest.mark.filterwarnings("ignore")
def test_bias_of_b_is_added_to_the_bias(tmp_path: Path, make_adapter: Make, tiny: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(2)
    config = Qwen2Config(
        vocab_size=448, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1,
    )  # fmt: skip
    base = tmp_path / "qwen"
    shutil.copytree(tiny, base)
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(base)
    adapter = make_adapter(base, target_modules=["q_proj", "v_proj"], lora_bias=True)
    merge(base, adapter, tmp_path / "out", None, PROMPTS)
    wanted = logits(oracle(base, adapter))
    assert (logits(load(tmp_path / "out")) - wanted).abs().max() < 1e-3


@pytest.mark.filterwarnings("ignore")
def test_weights_stored_transposed(tmp_path: Path, make_adapter: Make, tiny: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(2)
    config = GPT2Config(vocab_size=448, n_embd=64, n_layer=2, n_head=4, n_positions=128)
    base = tmp_path / "gpt2"
    base.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny / name, base / name)
    GPT2LMHeadModel(config).save_pretrained(base)
    values = json.loads((base / "config.json").read_text())
    names = {"hidden_size": 64, "num_hidden_layers": 2}
    (base / "config.json").write_text(json.dumps(values | names))
    adapter = make_adapter(base, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    merge(base, adapter, tmp_path / "out", None, PROMPTS)
    wanted = logits(oracle(base, adapter))
    assert (logits(load(tmp_path / "out")) - wanted).abs().max() < 1e-3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ties", ["untied", "tied"])
def test_token_rows_are_rounded_to_the_bases_own_format(
    ties: str, tiny: Path, tied: Path, make_adapter: Make, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    base = shutil.copytree(tied if ties == "tied" else tiny, tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    adapter = make_adapter(base, **KINDS["token rows"])
    result = merge(base, adapter, tmp_path / "out", None, PROMPTS)
    assert result.dtype == "bfloat16"
    assert result.gap < 1e-3 < result.rounding_gap
    old, new = (load(one).get_input_embeddings().weight for one in (base, tmp_path / "out"))
    assert (old != new).any(dim=1).nonzero().flatten().tolist() == [3, 250]


def test_rounding_to_bf16_is_reported_and_exact(
    tiny: Path, make_adapter: Make, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny)
    result = merge(tiny, adapter, tmp_path / "out", torch.bfloat16, PROMPTS)
    assert result.dtype == "bfloat16"
    assert result.gap < 1e-3 < result.rounding_gap
    assert 0.5 < result.top1_agreement <= 1
    stored = load_file(tmp_path / "out" / "model.safetensors")
    wanted = oracle(tiny, adapter).state_dict()
    assert stored.keys() == load_file(tiny / "model.safetensors").keys()
    for name, tensor in stored.items():
        assert tensor.dtype == torch.bfloat16
        assert (tensor.float() - wanted[name]).abs().max() <= wanted[name].abs().max() * 2**-8
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_sharded_base_becomes_shards_of_bounded_size(
    sharded: Path, make_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_weights, "SHARD_BYTES", 150_000)
    adapter = make_adapter(sharded)
    result = merge(sharded, adapter, tmp_path / "out", None, PROMPTS)
    assert result.dtype == "bfloat16"
    sizes = [file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 2
    assert max(sizes) < 155_000
    loaded = load(tmp_path / "out")
    wanted = oracle(sharded, adapter).to(torch.bfloat16).float()
    # the sum was rounded once; peft's merge here is in float32 too
    assert (logits(loaded) - logits(wanted)).abs().max() < 2e-2


def test_untouched_tensors_keep_their_own_format(
    tiny: Path, make_adapter: Make, tmp_path: Path
) -> None:
    base = tmp_path / "mixed"
    shutil.copytree(tiny, base)
    tensors = load_file(base / "model.safetensors")
    mixed = {n: v if "norm" in n else v.to(torch.bfloat16) for n, v in tensors.items()}
    save_file(mixed, base / "model.safetensors", {"format": "pt"})
    merge(base, make_adapter(base), tmp_path / "out", None, PROMPTS)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {n: v.dtype for n, v in stored.items()} == {n: v.dtype for n, v in mixed.items()}


def test_the_folder_is_complete_and_says_where_it_comes_from(
    tiny: Path, make_adapter: Make, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    from chatfine.hub.folder import read_model_folder
    from chatfine.tokenizer.encode import ChatTokenizer
    from chatfine.types import Message

    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    (base / "LICENSE").write_text("free")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["eos_token"] = "<|endoftext|>"  # but the template ends a turn with <|im_end|>
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    adapter = make_adapter(base)
    facts = {"base": str(base), "datasets": ["/data/mine.jsonl"], "system": "Be brief."}
    (adapter / "chatfine.json").write_text(json.dumps(facts))
    merge(base, adapter, tmp_path / "out", None, PROMPTS)

    out = tmp_path / "out"
    assert (out / "LICENSE").read_text() == "free"
    assert read_model_folder(out).tensors.keys() == read_model_folder(base).tensors.keys()
    theirs = AutoTokenizer.from_pretrained(out)
    assert theirs.eos_token == "<|im_end|>"
    assert GenerationConfig.from_pretrained(out).eos_token_id[0] == theirs.eos_token_id == 2
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [2, 0]
    asked = [Message("user", "hi")]
    ours = list(ChatTokenizer.load(out).encode_dialogue(asked, prompt=True).ids)
    rendered = theirs.apply_chat_template(
        [message.as_dict() for message in asked], add_generation_prompt=True, return_dict=True
    )
    assert ours == rendered["input_ids"]
    said = (out / "chatfine.json").read_text()
    assert str(tmp_path) not in said
    assert "/data" not in said
    values = json.loads(said)
    assert (values["base"], values["datasets"]) == ("base", ["mine.jsonl"])
    assert values["system"] == "Be brief."
    assert values["proof"]["gap"] < 1e-3
    assert not list(tmp_path.glob(".out*"))


def test_the_template_of_the_run_goes_with_it(
    tiny: Path, make_adapter: Make, tmp_path: Path
) -> None:
    from chatfine.tokenizer.encode import ChatTokenizer

    template = "{% for m in messages %}[{{ m.content }}]<|im_end|>{% endfor %}"
    adapter = make_adapter(tiny)
    (adapter / "chatfine.json").write_text(json.dumps({"base": "x", "template": template}))
    merge(tiny, adapter, tmp_path / "out", None, PROMPTS)
    assert ChatTokenizer.load(tmp_path / "out").template == template


# -- what must be refused ------------------------------------------------------------------------


def test_a_failed_proof_leaves_nothing(
    tiny: Path, make_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of 2 % in the scale, in writing and in memory alike, shows against peft."""
    original = merge_weights.changed

    def wrong(weight: Any, change: Any, tensors: Any) -> Any:
        return weight + 1.02 * (original(weight, change, tensors) - weight)

    monkeypatch.setattr(merge_weights, "changed", wrong)
    monkeypatch.setattr(merge_logits, "changed", wrong)
    adapter = make_adapter(tiny)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ProofError, match=r"logits differ by .*, allowed are 0\.001") as error:
        merge(tiny, adapter, tmp_path / "out", None, PROMPTS)
    assert error.value.code == "proof-gap"
    assert sorted(tmp_path.iterdir()) == before


def test_a_wrong_byte_in_the_written_files_is_found(
    tiny: Path, make_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_and_damage(self: Any, folder: Path) -> None:
        write(self, folder)
        file = folder / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)

    write = merge_weights.Merging.write_weights
    monkeypatch.setattr(merge_weights.Merging, "write_weights", write_and_damage)
    adapter = make_adapter(tiny)
    with pytest.raises(ProofError) as error:
        merge(tiny, adapter, tmp_path / "out", None, PROMPTS)
    assert error.value.code == "proof-files"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_merge_leaves_all_as_it_was(
    overwrite: bool, tiny: Path, make_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tiny)
    if overwrite:
        shutil.copytree(tiny, tmp_path / "out")
    before = sorted(path for path in tmp_path.rglob("*"))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_logits, "load_adapter", interrupt)
    with pytest.raises(KeyboardInterrupt):
        merge(tiny, adapter, tmp_path / "out", None, PROMPTS, overwrite=overwrite)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_overwrite_replaces_a_model_and_nothing_else(
    tiny: Path, make_adapter: Make, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny)
    out = tmp_path / "out"
    shutil.copytree(tiny, out)
    (out / "stale.txt").write_text("old")
    with pytest.raises(OutputError, match="--overwrite") as error:
        merge(tiny, adapter, out, None, PROMPTS)
    assert error.value.code == "output-not-empty"
    merge(tiny, adapter, out, None, PROMPTS, overwrite=True)
    assert not (out / "stale.txt").exists()
    assert (out / "chatfine.json").is_file()
    home = tmp_path / "papers"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="never replaced"):
        merge(tiny, adapter, home, None, PROMPTS, overwrite=True)
    assert (home / "thesis.txt").read_text() == "years of work"


def damage_half(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]


def damage_nan(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def damage_shape(tensors: dict[str, torch.Tensor]) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    tensors[name] = tensors[name][:-1].contiguous()


def damage_name(tensors: dict[str, torch.Tensor]) -> None:
    for half in "AB":
        name = f"base_model.model.model.layers.0.self_attn.q_proj.lora_{half}.weight"
        tensors[name.replace("layers.0", "layers.7")] = tensors.pop(name)


@pytest.mark.parametrize(
    ("damage", "code", "why"),
    [
        (damage_half, "adapter-damaged", "q_proj.weight has only one half"),
        (damage_nan, "adapter-unusable", "not finite"),
        (damage_shape, "adapter-unusable", r"q_proj.weight of shape \[64, 64\]"),
        (damage_name, "adapter-unusable", "no parameter model.layers.7.self_attn.q_proj.weight"),
    ],
)
def test_a_corrupt_adapter_is_refused(
    damage: Any, code: str, why: str, tiny: Path, make_adapter: Make, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file)
    with pytest.raises(ModelError, match=why) as error:
        merge(tiny, adapter, tmp_path / "out", None, PROMPTS)
    assert error.value.code == code
    assert sorted(item.name for item in tmp_path.iterdir()) == ["adapter"]


def test_a_truncated_adapter_is_refused(tiny: Path, make_adapter: Make, tmp_path: Path) -> None:
    adapter = make_adapter(tiny)
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError) as error:
        merge(tiny, adapter, tmp_path / "out", None, PROMPTS)
    assert error.value.code == "model-truncated"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING"),
        ({"peft_type": "ADAPTION_PROMPT"}, "ADAPTION_PROMPT"),
        ({"peft_type": "LORA", "target_parameters": ["experts.w"]}, "target_parameters"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
    ],
)
def test_what_cannot_be_merged_names_chat(
    settings: dict[str, Any], named: str, tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=named) as error:
        merge(tiny, folder, tmp_path / "out", None, PROMPTS)
    assert error.value.code == "adapter-unmergeable"
    assert f"chatfine chat {folder}" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_pickled_adapter_is_never_opened(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ModelError, match="pickle") as error:
        merge(tiny, folder, tmp_path / "out", None, PROMPTS)
    assert error.value.code == "adapter-pickle"
