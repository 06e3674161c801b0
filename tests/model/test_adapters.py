"""What learns, and adapter folders that PEFT itself reads (contract C5)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from chatfine.data.batches import collate
from chatfine.errors import ModelError, UsageError
from chatfine.model import adapters, fast
from chatfine.model.load import load_model
from chatfine.types import Example

ROOT = Path(__file__).resolve().parents[2]
IDS = torch.tensor([[5, 9, 33, 70, 2, 91, 14]])
FACTS = {"base": "my-base", "template": "model", "canaries": {"a": [1, 2]}}


def adapted(path: Path, seed: int = 1, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    method = options.pop("method", "lora")
    model = adapters.attach(load_model(path, dtype), method, **options)
    torch.manual_seed(seed)
    for parameter in adapters.trained_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(IDS).logits
    return result


# -- what learns -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "wanted"),
    [
        # per layer: q 64→64, k and v 64→32, o 64→64, gate and up 64→160, down 160→64
        ("lora", {"rank": 4}, 2 * 4 * (128 + 96 + 96 + 128 + 224 + 224 + 224)),
        ("lora", {"rank": 4, "targets": "q_proj,v_proj"}, 2 * 4 * (128 + 96)),
        ("dora", {"rank": 4, "targets": "q_proj, v_proj"}, 2 * (4 * (128 + 96) + 64 + 32)),
        ("freeze", {"freeze_layers": 1}, 64 * 64 * 2 + 64 * 32 * 2 + 64 * 160 * 3 + 2 * 64),
    ],
)
def test_how_many_numbers_learn(
    tiny: Path, method: str, options: dict[str, Any], wanted: int
) -> None:
    base = load_model(tiny, torch.float32)
    everything = sum(p.numel() for p in base.parameters())
    trained, total = adapters.count_parameters(adapters.attach(base, method, **options))
    assert trained == wanted
    assert total == everything + (wanted if method != "freeze" else 0)


def test_full_trains_all(tiny: Path) -> None:
    trained, total = adapters.count_parameters(
        adapters.attach(load_model(tiny, torch.bfloat16), "full")
    )
    assert trained == total


def test_freeze_trains_the_last_layers_alone(tiny: Path) -> None:
    model = adapters.attach(load_model(tiny, torch.bfloat16), "freeze", freeze_layers=1)
    names = adapters.trained_parameters(model)
    assert names
    assert all(name.startswith("model.layers.1.") for name in names)


@pytest.mark.parametrize("method", ["lora", "dora", "full", "freeze"])
def test_what_learns_is_float32_and_the_rest_keeps_its_format(tiny: Path, method: str) -> None:
    model = adapters.attach(load_model(tiny, torch.bfloat16), method, freeze_layers=1)
    for parameter in model.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)


def test_a_new_adapter_changes_nothing(tiny: Path) -> None:
    base = logits(load_model(tiny, torch.float32))
    for method in ("lora", "dora"):
        model = adapters.attach(load_model(tiny, torch.float32), method)
        torch.testing.assert_close(logits(model), base, atol=1e-4, rtol=1e-4)


def test_an_unknown_target_is_refused_with_the_known_ones(tiny: Path) -> None:
    with pytest.raises(UsageError) as caught:
        adapters.attach(load_model(tiny, torch.float32), "lora", targets="q_proj,query")
    assert caught.value.code == "no-such-target"
    assert "query" in caught.value.what
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in caught.value.fix[0]


def test_more_layers_than_there_are_is_refused(tiny: Path) -> None:
    with pytest.raises(UsageError, match="--freeze-layers is 3; the model has 2 layers"):
        adapters.attach(load_model(tiny, torch.float32), "freeze", freeze_layers=3)


# -- adapter folders -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_peft_loads_it_with_equal_logits(tiny: Path, tmp_path: Path, method: str) -> None:
    from peft import PeftModel

    model = adapted(tiny, method=method, rank=4, alpha=12)
    adapters.save_adapter(model, tmp_path, FACTS)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    plain = logits(base)
    theirs = logits(PeftModel.from_pretrained(base, str(tmp_path)))
    torch.testing.assert_close(theirs, logits(model), atol=1e-5, rtol=1e-5)
    assert (theirs - plain).abs().max() > 0.1
    ours = adapters.load_adapter(load_model(tiny, torch.float32), tmp_path)
    torch.testing.assert_close(logits(ours), theirs, atol=1e-5, rtol=1e-5)


def test_its_files_say_what_it_is(tiny: Path, tmp_path: Path) -> None:
    adapters.save_adapter(adapted(tiny, rank=4), tmp_path, FACTS)
    assert json.loads((tmp_path / "chatfine.json").read_text(encoding="utf-8")) == FACTS
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "my-base"
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert (config["r"], config["lora_alpha"]) == (4, 16)
    assert config["inference_mode"] is True
    assert config["target_modules"] == sorted(config["target_modules"])
    assert {p.name for p in tmp_path.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "chatfine.json"
    }  # fmt: skip


SAVE = """
import sys, torch
from pathlib import Path
from chatfine.model import adapters
from chatfine.model.load import load_model
torch.manual_seed(0)
model = adapters.attach(load_model(Path(sys.argv[1]), torch.float32), "lora")
adapters.save_adapter(model, Path(sys.argv[2]), {"base": "x"})
"""


def test_two_processes_write_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    """Names in a set come in another order in every process: PYTHONHASHSEED."""
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    subprocess.run(
        [sys.executable, "-c", SAVE, str(tiny), str(tmp_path / "there")],
        cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}, check=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = adapters.attach(load_model(tiny, torch.float32), "lora")
    for name in ("here", "again"):
        adapters.save_adapter(model, tmp_path / name, {"base": "x"})
    names = sorted(p.name for p in (tmp_path / "there").iterdir())
    assert len(names) == 3
    for name in names:
        assert len({(tmp_path / n / name).read_bytes() for n in ("here", "again", "there")}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_going_on_starts_from_exactly_what_was_saved(
    tiny: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = adapted(tiny, dtype=dtype)
    adapters.save_adapter(model, tmp_path, FACTS)
    again = adapters.load_adapter(load_model(tiny, dtype), tmp_path, trainable=True)
    wanted, got = adapters.trained_parameters(model), adapters.trained_parameters(again)
    assert wanted.keys() == got.keys()
    for name in wanted:
        assert torch.equal(wanted[name], got[name]), name
    batch = collate([Example(list(range(9)), [True] * 9)])
    assert fast.loss_sum(model, batch).item() == fast.loss_sum(again, batch).item()


def test_loaded_for_use_nothing_learns(tiny: Path, tmp_path: Path) -> None:
    adapters.save_adapter(adapted(tiny), tmp_path, FACTS)
    model = adapters.load_adapter(load_model(tiny, torch.float32), tmp_path)
    assert adapters.trained_parameters(model) == {}
    assert not model.training


def damage_shape(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({n: x[:, :-1].contiguous() for n, x in tensors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip


def damage_missing(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(min(tensors))
    save_file(tensors, folder / "adapter_model.safetensors")


def damage_names(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({n.replace("layers.1", "layers.9"): x for n, x in tensors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip


def damage_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def damage_kind(folder: Path) -> None:
    """Learned input in the place of a LoRA: PEFT takes it, our loss would not see it."""
    from peft import PromptTuningConfig, get_peft_model

    base = transformers.LlamaForCausalLM(
        transformers.LlamaConfig.from_pretrained(folder.parent / "model")
    )
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (damage_shape, "size mismatch"),
        (damage_missing, "down_proj.lora_A.weight is not in both"),
        (damage_names, "layers.1.mlp.down_proj.lora_A.weight is not in both"),
        (damage_pickle, "no adapter_model.safetensors"),
        (damage_kind, "no LoRA"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    tiny: Path, tmp_path: Path, damage: Any, why: str
) -> None:
    (tmp_path / "model").symlink_to(tiny)
    folder = tmp_path / "adapter"
    adapters.save_adapter(adapted(tiny), folder, FACTS)
    damage(folder)
    with pytest.raises(ModelError) as caught:
        adapters.load_adapter(load_model(tiny, torch.float32), folder)
    assert caught.value.code == "adapter-unusable"
    assert str(folder) in caught.value.what
    assert why in str(caught.value.why) or damage is damage_shape


# -- whole models ----------------------------------------------------------------------------------


@pytest.fixture
def tied(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model with one matrix for input and output embedding."""
    config = transformers.LlamaConfig.from_pretrained(tiny, tie_word_embeddings=True)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


def test_a_whole_model_is_an_ordinary_folder_in_the_wanted_format(
    tiny: Path, tmp_path: Path
) -> None:
    model = adapted(tiny, method="full", dtype=torch.bfloat16)
    adapters.save_model(model, tmp_path, FACTS, adapters.model_state(model, torch.bfloat16))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert again.dtype == torch.bfloat16
    assert model.dtype == torch.float32
    for name, value in model.state_dict().items():
        assert torch.equal(value.bfloat16(), again.state_dict()[name]), name
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "bfloat16"
    assert "chatfine" not in json.dumps(config)  # our attention is not asked of others


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_embedding_is_stored_once(tied: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model = adapted(tied, method="full")
    adapters.save_model(model, tmp_path / "out", FACTS, adapters.model_state(model, dtype))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.embed_tokens.weight" in stored
    assert "lm_head.weight" not in stored
    again = load_model(tmp_path / "out", torch.float32)
    wanted = model.get_input_embeddings().weight.to(dtype).float()
    assert torch.equal(again.get_output_embeddings().weight, wanted)


def test_a_tied_embedding_learns_from_both_its_uses(tied: Path) -> None:
    rows = [[5, 6, 7, 8, 9], [10, 11, 12]]
    batch = collate([Example(row, [True] * len(row)) for row in rows])
    model = adapters.attach(load_model(tied, torch.float32), "full")
    fast.loss_sum(model, batch).backward()
    got = model.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    model.set_attn_implementation("eager")
    for row in rows:
        ids = torch.tensor([row])
        out = model(ids).logits[0, :-1]
        torch.nn.functional.cross_entropy(out, ids[0, 1:], reduction="sum").backward()
    wanted = model.get_input_embeddings().weight.grad
    assert ((got - wanted).norm() / wanted.norm()).item() < 1e-5
